"""Linear probe and k-shot: which images are fitted to, which penalty is chosen, and what is measured then."""

import io
import json
import re
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import pytest
import torch
from distributed.spawn import run_on_ranks
from PIL import Image
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from weights.stored import stored

from evaclip import cli
from evaclip.config import EvalConfig, LinearProbeDataset
from evaclip.data.images import eval_crop, load_eval
from evaclip.distributed import Ranks
from evaclip.errors import DataError, InterruptedEvaluationError
from evaclip.evaluation import evaluate, open_bench
from evaclip.evaluation import measure as measure_one
from evaclip.evaluation.linear_probe import FITTED, HELD_OUT, divide, search
from evaclip.loss import Similarity
from evaclip.models.clip import create_model

CLASSES = 8
TRAIN = [(5 * i + i // 7) % CLASSES for i in range(61)]
TEST = [(3 * i + i // 4) % CLASSES for i in range(47)]


def picture(label, seed):
    """Noise around a colour that says something of the class."""
    random = np.random.default_rng(seed)
    colour = np.random.default_rng(abs(label)).integers(0, 256, 3)
    noisy = 0.3 * colour + 0.7 * random.integers(0, 256, (16, 16, 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def records_of(labels, seed):
    return [
        (f"s{i:07d}", {"png": picture(label, seed + i), "cls": str(label).encode()}) for i, label in enumerate(labels)
    ]


SPLITS = {"train": records_of(TRAIN, 1000), "test": records_of(TEST, 5000)}


@pytest.fixture
def write(folder, tmp_path):
    """Writes both splits, with changes to their records, into a folder of their own."""

    def write(**splits):
        for name, records in {**SPLITS, **splits}.items():
            path = folder(records, split=name)
        place = path.rename(tmp_path / f"set{len(list(tmp_path.iterdir()))}")
        return {"task": "linear_probe", "path": str(place)}

    return write


def features_of(clip, records):
    images = [eval_crop(load_eval(members["png"], max_pixels=10_000), 16, "crop") for _, members in records]
    return clip.encode_image(torch.stack(images), normalize=True).detach().double().numpy()


def reference(clip, chosen, log10_l2):
    """The five classes that scikit-learn's regression on some of the training images gives most, by test image."""
    peer = LogisticRegression(C=10**-log10_l2, tol=1e-8, max_iter=50_000)
    peer.fit(features_of(clip, [SPLITS["train"][i] for i in chosen]), [TRAIN[i] for i in chosen])
    return peer.decision_function(features_of(clip, SPLITS["test"])).argsort(1)[:, :-6:-1]


# ---------------------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize("peak", [-48, -47, -33, -3, 0, 8, 21, 48])
def test_the_search_ends_at_the_peak_of_a_curve_that_has_one(peak):
    asked = []
    assert search(lambda place: asked.append(place) or -abs(place - peak)) == peak
    assert len(asked) == len(set(asked)) <= 15
    assert asked[:7] == [48, 32, 16, 0, -16, -32, -48]


def test_of_equally_good_penalties_the_largest_is_taken():
    assert search(lambda place: place <= 5) == 5
    assert search(lambda _: 0) == 48


def test_a_fifth_of_each_class_is_held_out_but_never_all_of_it():
    sizes = [1, 2, 4, 5, 6, 10, 100]
    targets = torch.tensor([label for label, size in enumerate(sizes) for _ in range(size)])[
        torch.arange(128) * 37 % 128
    ]
    part = divide(targets, None, 0)
    assert targets[part == HELD_OUT].bincount(minlength=7).tolist() == [0, 1, 1, 1, 2, 2, 20]
    assert int((part == FITTED).sum()) == 128 - 27


@pytest.mark.parametrize("shots", [1, 2, 4, 8])
def test_exactly_so_many_shots_are_drawn_and_at_most_four_of_the_others_held_out(shots):
    sizes = [8, 9, 10, 50]
    targets = torch.tensor([label for label, size in enumerate(sizes) for _ in range(size)])
    draws = [divide(targets, shots, seed) for seed in range(3)]
    for part in draws:
        assert targets[part == FITTED].bincount().tolist() == [shots] * 4
        held_out = [min(shots, 4, size - shots) for size in sizes]
        assert targets[part == HELD_OUT].bincount(minlength=4).tolist() == held_out
    assert len({tuple(part.tolist()) for part in draws}) == 3
    assert torch.equal(draws[0], divide(targets, shots, 0))


# --------------------------------------------------------------------------------------------------------- the result


def test_the_result_is_that_of_scikit_learn_with_the_chosen_penalty(clip, write, measure):
    result = measure(write())
    expected = reference(clip, range(len(TRAIN)), result.metrics["log10_l2"])
    hits = expected == np.array(TEST)[:, None]
    assert result.predictions.predicted == tuple(expected[:, 0])
    assert result.predictions.labels == tuple(TEST)
    assert result.predictions.class_names == tuple("01234567")
    assert result.num_records == len(TEST)
    assert list(result.metrics) == ["top1", "top5", "mean_per_class", "log10_l2"]
    assert result.metrics["top1"] == pytest.approx(hits[:, 0].mean())
    assert result.metrics["top5"] == pytest.approx(hits.any(1).mean())
    per_class = [hits[np.array(TEST) == label, 0].mean() for label in range(CLASSES)]
    assert result.metrics["mean_per_class"] == pytest.approx(fmean(per_class))
    assert 0.3 < result.metrics["top1"] < result.metrics["top5"] < 1, "better than chance, and no test on 1"
    assert -6 < result.metrics["log10_l2"] < 6


def test_shots_are_means_over_draws_and_only_what_is_drawn_is_encoded(clip, write, measure, counting):
    encoder = counting()
    result = measure({**write(), "shots": 2, "draws": 2}, encoder=lambda _: encoder)
    targets = torch.tensor(TRAIN)
    parts = [divide(targets, 2, seed) for seed in range(2)]
    encoded = sum(count for _, count in encoder.calls)
    assert encoded == int((parts[0] + parts[1] > 0).sum()) + len(TEST) < len(TRAIN) + len(TEST)
    assert result.predictions is None
    alone = measure({**write(), "shots": 2, "draws": 1})
    first = reference(clip, (parts[0] == FITTED).nonzero().flatten().tolist(), alone.metrics["log10_l2"])
    assert alone.metrics["top1"] == pytest.approx(fmean(first[:, 0] == np.array(TEST)))
    assert alone.metrics["top1_std"] == 0
    second = 2 * result.metrics["top1"] - alone.metrics["top1"]
    assert result.metrics["top1_std"] == pytest.approx(pstdev([alone.metrics["top1"], second]))
    assert result.metrics["top1_std"] > 0


def test_the_result_does_not_depend_on_the_number_of_ranks(write, measure):
    dataset = write()
    assert measure(dataset, world_size=3) == measure(dataset, batch=64)


def on_ranks(ranks, _folder, *, dataset, model):
    config = EvalConfig.model_validate({"batch": 4, "datasets": {"set": dataset}})
    options = {"workers": 1, "index_dir": None, "max_image_pixels": 10_000}
    return list(evaluate(create_model(model, seed=3), Similarity(10.0), config, model, ranks, **options))


def test_processes_find_together_what_one_does(write, measure, clip, tmp_path):
    dataset = {**write(), "shots": 2, "draws": 2}
    found = run_on_ranks(2, {"probe": partial(on_ranks, dataset=dataset, model=clip.config)}, tmp_path)["probe"]
    assert found == [[measure(dataset)]] * 2


def test_class_folders_measure_as_the_same_images_in_shards(write, measure, tmp_path):
    order = {
        name: sorted(range(len(records)), key=lambda i, r=records: (r[i][1]["cls"], i))
        for name, records in SPLITS.items()
    }
    for name, numbers in order.items():
        for place, i in enumerate(numbers):
            members = SPLITS[name][i][1]
            path = tmp_path / "folders" / name / f"class {members['cls'].decode()}" / f"{place:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(members["png"])
    shards = measure(write(**{name: [SPLITS[name][i] for i in numbers] for name, numbers in order.items()}))
    folders = measure({"task": "linear_probe", "path": str(tmp_path / "folders")}, world_size=2)
    assert folders.metrics == shards.metrics
    assert folders.predictions.predicted == shards.predictions.predicted
    assert folders.predictions.class_names == tuple(f"class {number}" for number in range(CLASSES))
    (tmp_path / "folders/test/class 8").mkdir()
    (tmp_path / "folders/test/class 8/0.png").write_bytes(picture(0, 0))
    with pytest.raises(DataError, match=r"not the same class folders: class 8 is in one of them alone \(1 such\)"):
        measure({"task": "linear_probe", "path": str(tmp_path / "folders")}, world_size=2)


def test_labels_may_leave_numbers_out(write, measure):
    apart = {
        name: [(key, {**members, "cls": str(7 * int(members["cls"])).encode()}) for key, members in records]
        for name, records in SPLITS.items()
    }
    dense, sparse = measure(write()), measure(write(**apart))
    assert sparse.metrics == dense.metrics
    assert sparse.predictions.class_names == ("0", "7", "14", "21", "28", "35", "42", "49")


def test_a_limit_is_of_both_splits(write, measure):
    result = measure({**write(), "limit": 30})
    assert result.num_records == 30
    assert result == measure(write(**{name: records[:30] for name, records in SPLITS.items()}))


def test_features_that_are_not_finite_predict_nothing(write, measure, clip):
    class Broken:
        def encode_image(self, images, *, normalize):
            features = clip.encode_image(images, normalize=normalize)
            return features.where(images.flatten(1).sum(1, keepdim=True) % 2 == 0, torch.nan)

    result = measure(write(), encoder=lambda _: Broken())
    assert result.metrics["top1"] == 0
    assert np.isnan(result.metrics["log10_l2"])
    assert set(result.predictions.predicted) == {-1}


def test_a_request_to_stop_is_heard_between_fits(write, clip):
    asked = []

    def between():
        asked.append(1)
        if len(asked) == 5:  # one batch of each split, then the third fit
            raise InterruptedEvaluationError("asked to stop")

    bench = open_bench(clip, clip.config, Ranks(), batch=100, workers=0, max_image_pixels=10_000, between=between)
    with pytest.raises(InterruptedEvaluationError):
        measure_one("set", LinearProbeDataset.model_validate(write()), bench, None, Similarity(10.0))


# ------------------------------------------------------------------------------------------------------------- errors


def labelled(*labels):
    return records_of(labels, 9000)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        (
            {},
            {"train_split": "fit"},
            r"fit is not a folder; .* from the split fit and measured on test, .* two of test, train$",
        ),
        (
            {"test": labelled(0, 8, 9)},
            {},
            r"record 's0000001': label 8 has no image in the split train, whose 8 labels are 0 to 7 "
            r"\(2 of 3 images of test have such labels\); number the classes of both splits alike, or take",
        ),
        ({"train": labelled(0, 1, 0, 1, 2)}, {"limit": 4}, r"label 3 has no image .*; or raise limit, which is 4$"),
        ({"train": labelled(3, 3, 3)}, {}, r"the split train has one class alone, 3; give it two or more$"),
        ({}, {"shots": 11}, r"the split train has \d+ images of class \d, fewer than shots 11; lower shots to \d+$"),
        (
            {"train": labelled(*range(8), *range(8))},
            {"shots": 2},
            r"has at most 2 images of a class, so none remain to choose the penalty on; give it more, or lower shots$",
        ),
        ({"train": labelled(*range(8))}, {}, r"has at most 1 images of a class, .*; give it more$"),
        (
            {"train": labelled(0, -1)},
            {},
            r"train/0\.tar: record 's0000001': label -1 is not in 0\.\.2147483647; labels",
        ),
        ({"test": [("a", {"png": picture(0, 0)})]}, {}, r"test/0\.tar: record 'a' has no label \(cls\), only png"),
    ],
)
def test_splits_that_allow_no_probe_are_refused(write, measure, splits, options, message, world_size):
    with pytest.raises(DataError, match=message):
        measure({**write(**splits), **options}, world_size=world_size)


def test_shards_without_splits_are_refused(write, measure):
    path = f"{write()['path']}/test/{{0..2}}.tar"
    with pytest.raises(DataError, match=r"tar/train is not a folder; .*; give a path that has them"):
        measure({"task": "linear_probe", "path": path})


def test_a_split_is_not_measured_on_itself():
    with pytest.raises(ValidationError, match="train_split and split are both train; a probe is measured on other im"):
        LinearProbeDataset(task="linear_probe", path="p", split="train")


# --------------------------------------------------------------------------------------------------------- the command


def test_the_pages_command_works(write, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^evaclip (evaluate .*linear_probe.*)$", page, re.MULTILINE)
    _, run, _, dataset, *_ = command.split()
    monkeypatch.chdir(tmp_path)
    for place in (run, dataset):
        Path(place).parent.mkdir(parents=True)
    stored(tmp_path, {"name": "tiny-ViT"}, std=0.3)
    (tmp_path / "run").rename(run)
    Path(write(train=labelled(*[0, 1] * 17), test=labelled(*[0, 1] * 5))["path"]).rename(dataset)
    cli.main([*command.split(), "--output", "out"])
    assert re.search(r"^pets +10 +top1 +[01]\.\d{4}$", capsys.readouterr().out, re.MULTILINE)
    (found,) = json.loads(Path("out/evaluation.json").read_text()).values()
    assert list(found["metrics"]) == ["top1", "top5", "mean_per_class", "log10_l2", "top1_std"]
