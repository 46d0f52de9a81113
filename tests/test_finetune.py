"""``evaclip finetune``: what is learnt, what it depends on, what an interruption leaves, and who can use the result."""

import io
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from distributed.spawn import run_on_ranks
from models.peers import shake
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits
from tiny import COLOURS, SYNTHETIC, jpeg, merged, save_model, tiny_config, tiny_tree

import evaclip
from evaclip import cli
from evaclip import finetune as command
from evaclip.classifier import with_head
from evaclip.config import FinetuneConfig, ModelConfig, ZeroShotDataset
from evaclip.data.shards import write_shards
from evaclip.distributed import Ranks
from evaclip.errors import CheckpointError, ConfigError, DataError, EvaclipError, TrainingStoppedError, WeightsError
from evaclip.evaluation.command import Request, evaluate_model
from evaclip.finetune import finetune_on
from evaclip.labelled import Samples, epoch_ends, open_sets
from evaclip.models.clip import create_model
from evaclip.train import train

MODEL = tiny_tree("unused", SYNTHETIC)["model"]
TIMM = merged(MODEL, image={"kind": "timm", "model": "test_vit", "image_size": 48})
NAMES = sorted(COLOURS)
QUICK = {"epochs": 3, "batch": 8, "lr": 3e-3, "workers": 0}


def save(folder, tree=MODEL, seed=1, std=0.0):
    """A checkpoint with random weights, with ``std`` in every parameter."""
    model = create_model(ModelConfig.model_validate(tree), seed=seed)
    shake(model, std=std)
    return save_model(folder, tree, dict(model.named_parameters()) | {"logit_scale": torch.tensor([3.0])})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


def records(split):
    """(class, JPEG) in the order of classes."""
    count, first = {"train": (5, 0), "test": (9, 1000)}[split]
    return [(label, jpeg(COLOURS[NAMES[label]], seed=first + n)) for label in range(4) for n in range(count)]


def write_lists(root):
    (root / "classnames.txt").write_text("".join(f"{name}\n" for name in NAMES))
    (root / "zeroshot_classification_templates.txt").write_text("a {c} square\n{c}\n")


@pytest.fixture
def folders(tmp_path):
    """A folder per class, in two splits."""
    for split in ("train", "test"):
        for number, (label, image) in enumerate(records(split)):
            path = tmp_path / "set" / split / NAMES[label] / f"{number:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
    return tmp_path / "set"


@pytest.fixture
def shards(tmp_path):
    """The same images in CLIP_benchmark's layout."""
    for split in ("train", "test"):
        members = [(f"s{n:07d}", {"jpg": i, "cls": str(c).encode()}) for n, (c, i) in enumerate(records(split))]
        for number, path in enumerate(write_shards(tmp_path / "tars" / split, members, 8)):
            path.rename(path.with_name(f"{number}.tar"))
        (tmp_path / "tars" / split / "nshards.txt").write_text(f"{number + 1}")
    write_lists(tmp_path / "tars")
    return tmp_path / "tars"


def tune(model, data, out, ranks=Ranks(), **options):  # noqa: B008  an immutable value
    finetune_on(ranks, Path(model), str(data), Path(out), FinetuneConfig.model_validate({**QUICK, **options}))
    return json.loads((Path(out) / "result.json").read_text())


def tensors(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping


def assert_same(one, other):
    """Bit for bit the same result and the same checkpoint."""
    assert json.loads((one / "result.json").read_text()) == json.loads((other / "result.json").read_text())
    for name in ("checkpoint.safetensors", "model/model.safetensors"):
        mine, theirs = tensors(one / name), tensors(other / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name


# ------------------------------------------------------------------------------------------------------------ learning


def test_classes_are_learnt_and_the_result_says_from_what(tmp_path, model, folders, capsys):
    out = tmp_path / "out"
    options = ["epochs=8", "batch=10", "lr=3e-3", "workers=2", "augment.flip=0.25"]
    cli.main(["finetune", str(model), str(folders), str(out), *options])
    found = json.loads((out / "result.json").read_text())
    assert found["metrics"]["top1"] >= 0.9
    assert found["num_records"] == 36
    assert found["class_names"] == NAMES
    assert [(row["step"], row["epochs"]) for row in found["epochs"]] == [(2 * n, n) for n in range(1, 9)]
    assert found["epochs"][-1] == {"step": 16, "epochs": 8, "loss": found["epochs"][-1]["loss"], **found["metrics"]}
    made = found["made_from"]
    assert (made["epochs"], made["augment.flip"], made["augment.crop_scale"]) == (8, 0.25, [0.35, 1.0])
    assert made["train"].startswith("20 records, digest ")
    assert made["precision"] == "fp32"
    assert json.loads((out / "evaluation.json").read_text())["test"]["metrics"] == found["metrics"]
    said = capsys.readouterr().out
    assert "update 2, 1.00 of 8 epochs: loss 1." in said
    assert f'timm.create_model("local-dir:{out}/model", pretrained=True)' in said


def test_handwriting_is_learnt_by_the_whole_tower_as_a_head_alone_cannot(tmp_path, model):
    """From random weights; with a layer decay of 1e-6 all but the head and the norm before it stands still."""
    bunch = load_digits()
    for number, (image, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        path = tmp_path / "set" / ("train" if number % 5 else "test") / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).resize((16, 16)).save(path)
    options = {"epochs": 6, "batch": 32, "lr": 5e-3, "augment": {"flip": 0, "crop_scale": [0.6, 1]}, "drop_path": 0}
    whole = tune(model, tmp_path / "set", tmp_path / "whole", layer_decay=0.9, **options)
    alone = tune(model, tmp_path / "set", tmp_path / "alone", layer_decay=1e-6, **options)
    assert whole["metrics"]["top1"] >= 0.65  # 0.75 seen
    assert alone["metrics"]["top1"] <= 0.3  # 0.16 seen


def test_both_layouts_give_the_same(tmp_path, model, folders, shards):
    one, other = tune(model, folders, tmp_path / "one"), tune(model, shards, tmp_path / "other", workers=2)
    assert {**one, "made_from": 0} == {**other, "made_from": 0}


def test_the_first_loss_of_a_head_of_zeros_is_that_of_guessing(tmp_path, model, folders):
    (row,) = tune(model, folders, tmp_path / "out", epochs=1, batch=20)["epochs"]
    assert row["loss"] == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-6)  # rounding of fp32


def test_updates_are_those_of_a_plain_loop(tmp_path, model, folders):
    options = {**QUICK, "epochs": 1, "batch": 5, "layer_decay": 1.0, "weight_decay": 0.0, "warmup": 0.0}
    config = FinetuneConfig.model_validate(options)
    clip, sets = evaclip.load(model).model, open_sets(str(folders), config, Ranks())
    tower = with_head(clip, "model", 4, config.drop_path, Ranks()).image
    samples, optimizer = Samples(sets, tower.config, config), torch.optim.AdamW(tower.parameters(), weight_decay=0.0)
    for step, lr in enumerate((3e-3, 2.25e-3, 0.75e-3, 0.0)):  # half a cosine
        images, labels, seeds = zip(*[samples[n] for n in range(5 * step, 5 * step + 5)], strict=True)
        logits = tower(torch.stack(images), torch.tensor(seeds))
        loss = F.cross_entropy(logits, torch.tensor(labels), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    tune(model, folders, tmp_path / "out", **options)
    found = tensors(tmp_path / "out/checkpoint.safetensors")
    before = dict(clip.image.named_parameters())
    for name, expected in tower.named_parameters():
        got = found[f"weight/image.{name}"].view(expected.shape)
        start = torch.zeros_like(expected) if name.startswith("head.") else before[name]
        # of the way from the start; rounding of fp32, and Adam divides small gradients by themselves
        assert (got - expected).norm() <= 1e-3 * (expected - start).norm(), name


def test_every_pass_takes_every_record_once_in_an_order_of_its_own(folders):
    config = FinetuneConfig.model_validate(QUICK)
    samples = Samples(open_sets(str(folders), config, Ranks()), ModelConfig.model_validate(MODEL).image, config)
    passes = [[samples.place(20 * epoch + n) for n in range(20)] for epoch in range(3)]
    orders = [[record for record, _ in places] for places in passes]
    assert [sorted(order) for order in orders] == [list(range(20))] * 3
    assert orders[0] != orders[1] != orders[2]
    assert len({seed for places in passes for _, seed in places}) == 60
    labels = [[samples[20 * epoch + n][1] for n in range(20)] for epoch in range(2)]
    assert labels == [[record // 5 for record in order] for order in orders[:2]]


@pytest.mark.parametrize(
    ("records", "batch", "epochs", "ends"),
    [(20, 10, 3, [2, 4, 6]), (20, 8, 3, [3, 5, 8]), (5, 16, 4, [1, 2]), (7, 7, 1, [1])],
)
def test_passes_end_with_the_update_that_takes_their_last_record(records, batch, epochs, ends):
    assert epoch_ends(records, batch, epochs) == ends


def test_rates_fall_towards_the_input_and_the_head_has_the_whole(model):
    config = FinetuneConfig.model_validate({**QUICK, "lr": 1.0, "layer_decay": 0.5})
    tuned = with_head(evaclip.load(model).model, "model", 4, 0.0, Ranks())
    rows = {
        row.name: row
        for row in command._engine(tuned, config.model_copy(update={"precision": "fp32"}), Ranks()).optimizer.rows
    }
    assert not [name for name in rows if not name.startswith("image.")]
    rates = [rows[f"image.{name}"].lr for name in ("head.weight", "norm.bias", "blocks.1.mlp.w3.bias", "class_token")]
    assert rates == [1.0, 1.0, 0.5, 0.125]
    assert (rows["image.head.weight"].weight_decay, rows["image.head.bias"].weight_decay) == (0.05, 0.0)


# --------------------------------------------------------------------------------------------------------- what counts


def on_ranks(ranks, folder, *, model, data):
    """A case: the result, on every rank."""
    return tune(model, data, folder / "out", ranks, micro_batch=3)


def test_two_ranks_and_micro_batches_give_what_one_rank_gives(tmp_path, model, folders):
    alone = tune(model, folders, tmp_path / "alone")
    outcomes = run_on_ranks(2, {"two": partial(on_ranks, model=str(model), data=str(folders))}, tmp_path)["two"]
    for one, two in zip(alone["epochs"], outcomes[0]["epochs"], strict=True):
        assert two == pytest.approx(one, rel=1e-5)  # fp32 sums in another order
    whole, parts = (tensors(tmp_path / f"{name}/checkpoint.safetensors") for name in ("alone", "two/out"))
    apart = {name: (value - parts[name]).norm() for name, value in whole.items() if name.startswith("weight/")}
    start = {f"weight/image.{name}": p.detach() for name, p in evaclip.load(model).model.image.named_parameters()}
    moved = {name: (whole[name] - start[name].view(-1)).norm() for name in apart if "head." not in name}
    # rounding of fp32, and Adam divides gradients by their own size, also those that are rounding alone
    assert 0 < torch.stack([*apart.values()]).norm() < 1e-3 * torch.stack([*moved.values()]).norm()


@pytest.mark.parametrize(
    ("tree", "projection"), [(MODEL, None), (TIMM, "head"), (TIMM, "linear")], ids=["ours", "timm", "timm, linear"]
)
def test_a_head_of_prompts_begins_with_the_zero_shot_result(tmp_path, shards, tree, projection):
    tree = merged(tree, image__projection=projection) if projection else tree
    path = save(tmp_path / "model", tree, std=0.1)
    dataset = ZeroShotDataset.model_validate({"path": str(shards)})
    evaluate_model(path, Request({"set": dataset}, output=tmp_path))
    expected = json.loads((tmp_path / "evaluation.json").read_text())["set"]["metrics"]
    first, *later = tune(path, shards, tmp_path / "out", epochs=1, head="zero_shot", lr=1e-9)["epochs"]
    assert first == {"step": 0, "epochs": 0, **expected}
    assert [row["top1"] for row in later] == [expected["top1"]]
    predicted = [
        json.loads((tmp_path / p / "predictions" / f).read_text()) for p, f in ((".", "set.json"), ("out", "test.json"))
    ]
    assert predicted[0]["predictions"] == predicted[1]["predictions"], "a rate of 1e-9 moves nothing"
    assert len(set(predicted[0]["predictions"])) > 1


def test_a_projection_that_is_not_linear_gives_no_head_of_prompts(tmp_path, shards):
    path = save(tmp_path / "model", merged(TIMM, image__projection="mlp"))
    with pytest.raises(
        WeightsError, match=r"for head=zero_shot the projection of .* has to be one linear layer to bec"
    ):
        tune(path, shards, tmp_path / "out", head="zero_shot")
    tune(path, shards, tmp_path / "out2", epochs=1)


# --------------------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("tree", [MODEL, {"name": "tiny-ViT"}, TIMM], ids=["EVA02", "ViT", "timm"])
def test_timm_computes_the_same_scores_from_what_is_written(tmp_path, folders, tree):
    path = save(tmp_path / "model", tree, std=0.02)
    tune(path, folders, tmp_path / "out", epochs=1)
    clip = evaclip.load(path)
    tower = with_head(clip.model, "model", 4, 0.0, Ranks()).image
    for name, parameter in tower.named_parameters():
        parameter.data.copy_(
            tensors(tmp_path / "out/checkpoint.safetensors")[f"weight/image.{name}"].view_as(parameter)
        )
    peer = timm.create_model(f"local-dir:{tmp_path}/out/model", pretrained=True).eval()
    images = torch.stack([clip.preprocess(Image.open(io.BytesIO(image))) for _, image in records("test")])
    with torch.no_grad():
        scores, expected = peer(images), tower(images)
    assert (scores - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    written = json.loads((tmp_path / "out/predictions/test.json").read_text())
    assert scores.argmax(1).tolist() == written["predictions"]
    assert peer.pretrained_cfg["label_names"] == NAMES == written["class_names"]


@pytest.mark.parametrize("kind", ["EVA02", "18B"])
def test_a_run_starts_from_the_tuned_tower_and_leaves_its_head(tmp_path, folders, kind):
    """timm has no 18B, which is written under our names."""
    tree = {"name": f"tiny-{kind}"}
    tune(save(tmp_path / "model", tree), folders, tmp_path / "out", epochs=1)
    train(
        tiny_config(
            tmp_path / "run", model=tree, init__image=str(tmp_path / "out/model"), train__steps=1, optim__lr=1e-12
        )
    )
    log = (tmp_path / "run/log.txt").read_text()
    assert "image: newly initialised: head.weight" in log
    weights = evaclip.load(tmp_path / "run").model.image.state_dict()
    found = tensors(tmp_path / "out/checkpoint.safetensors")
    name = "blocks.1.attn.proj.weight"
    torch.testing.assert_close(weights[name].view(-1), found[f"weight/image.{name}"], rtol=0, atol=1e-9)
    with pytest.raises(WeightsError, match=r"holds an image tower alone; start from it with init\.image="):
        evaclip.load(tmp_path / "out/model")


# -------------------------------------------------------------------------------------------------------- going on


def test_after_a_request_to_stop_the_same_command_gives_the_same(tmp_path, model, folders, monkeypatch):
    options = {"head": "zero_shot"}
    write_lists(folders)
    tune(model, folders, tmp_path / "straight", **options)
    update, calls = command._update, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return update(*arguments)

    monkeypatch.setattr(command, "_update", counted)
    with pytest.raises(
        TrainingStoppedError, match=r"stopped by SIGTERM after update 4 of 8, which is saved; the same co"
    ):
        tune(model, folders, tmp_path / "out", **options)
    tune(model, folders, tmp_path / "out", micro_batch=8, **options)
    assert len(calls) == 8
    assert_same(tmp_path / "straight", tmp_path / "out")
    tune(model, folders, tmp_path / "out", **options)
    assert len(calls) == 8, "it was complete"
    assert_same(tmp_path / "straight", tmp_path / "out")


def test_after_a_kill_the_same_command_gives_the_same(tmp_path, model, folders):
    tune(model, folders, tmp_path / "straight", epochs=60)
    out, total = tmp_path / "out", epoch_ends(20, 8, 60)[-1]
    options = [f"{key}={value}" for key, value in {**QUICK, "epochs": 60}.items()]
    command = [sys.executable, "-m", "evaclip", "finetune", str(model), str(folders), str(out), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    with safe_open(out / "checkpoint.safetensors", "pt") as file:
        assert 0 < json.loads(file.metadata()["state"])["step"] < total
    tune(model, folders, out, epochs=60)
    assert_same(tmp_path / "straight", out)


def test_a_result_that_was_interrupted_while_it_was_written_is_written_again(tmp_path, model, folders):
    expected = tune(model, folders, tmp_path / "out")
    (tmp_path / "out/result.json").unlink()
    assert tune(model, folders, tmp_path / "out") == expected


def test_another_fine_tuning_is_refused_in_the_same_folder(tmp_path, model, folders, shards):
    out = tmp_path / "out"
    expected = tune(model, folders, out)
    message = (
        r"out holds a fine-tuning that differs from this one; choose another OUT\n  augment\.flip: 0\.5 -> 0\.0\n  l"
    )
    with pytest.raises(DataError, match=message + r"r: 0\.003 -> 0\.1$"):
        tune(model, folders, out, lr=0.1, augment={"flip": 0})
    with pytest.raises(DataError, match=r"  model: \w+ -> \w+$"):
        tune(save(tmp_path / "other", seed=2), folders, out)
    with pytest.raises(DataError, match=r"  test: 36 records, digest \w+ -> 36 records, digest \w+\n  train: 20 rec"):
        tune(model, shards, out)
    (folders / "train/red/new.jpg").write_bytes(jpeg(COLOURS["red"], seed=77))
    with pytest.raises(DataError, match=r"  train: 20 records, digest \w+ -> 21 records, digest \w+$"):
        tune(model, folders, out)
    assert json.loads((out / "result.json").read_text()) == expected


def test_a_folder_that_holds_something_else_is_refused(tmp_path, model, folders):
    with pytest.raises(DataError, match="set holds something else than a fine-tuning; choose another OUT"):
        tune(model, folders, folders)


def cut(content):
    return content[:-10]


def flip(content):
    return content[:-10] + bytes([content[-10] ^ 1]) + content[-9:]


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_checkpoint_is_named(tmp_path, model, folders, damage):
    tune(model, folders, tmp_path / "out")
    path = tmp_path / "out/checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        CheckpointError, match=r"checkpoint\.safetensors cannot be read \(.*\); remove it, and all begin"
    ):
        tune(model, folders, tmp_path / "out")


def test_a_loss_that_is_not_finite_stops_it(tmp_path, model, folders):
    message = (
        r"of the first 3 updates [12] had a loss or a gradient .* lower lr \(now 1e\+30\) or precision=fp32, and an"
    )
    with pytest.raises(TrainingStoppedError, match=message):
        tune(model, folders, tmp_path / "out", lr=1e30, warmup=0)
    assert not (tmp_path / "out/checkpoint.safetensors").exists()


# ------------------------------------------------------------------------------------------------------------- refusing


def without(*paths):
    def change(root):
        for path in paths:
            (root / path).rename(root.parent / "gone")

    return change


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (without("test"), {}, r"/set/test is not a folder; .* name two of train"),
        (without("train"), {}, r"/set/train is not a folder; .* name two of test"),
        (without("train"), {"train_split": "test"}, None),
        (without("test/red"), {}, r"have not the same class folders: red is in one of them alone"),
        (
            lambda root: None,
            {"head": "zero_shot"},
            r"/classnames\.txt does not exist; classification needs it, or anoth",
        ),
        (
            lambda root: (root / "classnames.txt").write_text("a\nb\n"),
            {},
            r"train has 4 class folders \(blue, green, red \.\.\.\), but 2 class names are given",
        ),
        (
            lambda root: (root / "train/red/cut.jpg").write_bytes(jpeg(COLOURS["red"])[:300]),
            {},
            r"train/red/cut\.jpg: the image is unusable \(undecodable: .*repair or remove it, nothing is skipped here",
        ),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_that_cannot_be_used_is_named(tmp_path, model, folders, change, options, message, workers):
    change(folders)
    if message is None:
        tune(model, folders, tmp_path / "out", **options)
        return
    with pytest.raises(DataError, match=message):
        tune(model, folders, tmp_path / "out", workers=workers, **options)


def test_what_is_no_folder_is_refused(tmp_path, model, shards):
    with pytest.raises(DataError, match=r"0\.tar/train is not a folder; .* give a path that has them"):
        tune(model, shards / "train/0.tar", tmp_path / "out")


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path, model, folders, monkeypatch):
    config = FinetuneConfig.model_validate({**QUICK, "batch": 10})
    with pytest.raises(ConfigError, match="batch 10 is not a multiple of the 4 ranks; give one, such as 12"):
        command._require_equal_shares(config, Ranks(0, 4))


def test_options_that_there_are_not_are_named(capsys, model, folders, tmp_path):
    with pytest.raises(SystemExit) as ended:
        cli.main(["finetune", str(model), str(folders), str(tmp_path / "out"), "epoch=3", "augment.flip=2"])
    assert ended.value.code == 78
    said = capsys.readouterr().err
    assert "error: finetune: 2 problems" in said
    assert "epoch: unknown key; did you mean epochs?" in said
    assert "augment.flip: Input should be less than or equal to 1 (got 2)" in said
    with pytest.raises(EvaclipError, match=r"/nowhere does not exist; give a run directory"):
        tune("/nowhere", folders, tmp_path / "out")
