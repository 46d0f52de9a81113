import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from tiny import SYNTHETIC, colour_records, jpeg, tiny_config

import evaclip
from evaclip.checkpoint import CheckpointReader, find_checkpoint, meta_checksum
from evaclip.config import ModelConfig
from evaclip.data.pipeline import Stream, make_plan
from evaclip.data.shards import Shard, write_shards
from evaclip.distributed import Ranks
from evaclip.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EvaclipError,
    InterruptedEvaluationError,
    OutOfMemoryError,
    TrainingStoppedError,
)
from evaclip.evaluation.datasets import Records
from evaclip.history import load_history
from evaclip.loss import ContrastiveLoss
from evaclip.metrics import OF_THE_MACHINE
from evaclip.run import open_run
from evaclip.sources import open_sources
from evaclip.train import _loop, _reporting, train, train_on

prepare = importlib.import_module("evaclip.engine.prepare")  # the package has a function of that name


def rows(run_dir):
    """The history without what depends on the machine's speed."""
    history = load_history(run_dir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(OF_THE_MACHINE)} for row in history]


def weights(run_dir):
    return CheckpointReader(find_checkpoint(run_dir)).weights()


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("optim", ["adamw", "lamb"])
def test_10_and_10_steps_equal_20_bitwise(tmp_path, colour_shards, optim):
    source = {"shards": str(colour_shards / "{00000..00002}.tar")}
    options = {"optim__name": optim, "data__workers": 2, "checkpoint__every_steps": 10, "train__steps": 20}
    options["log__every_steps"] = 3  # step 10 lies between two rows
    train(tiny_config(tmp_path / "straight", source, **options))
    with pytest.raises(TrainingStoppedError):
        _train_until(tmp_path / "broken", 13, source, **options)
    shutil.rmtree(tmp_path / "broken/checkpoints/step_00000013")  # as if killed after step 13: step 10 is the newest
    train(tiny_config(tmp_path / "broken", source, **options))
    assert "continuing" in (tmp_path / "broken/log.txt").read_text()
    assert "at step 10" in (tmp_path / "broken/log.txt").read_text()
    assert_same_weights(weights(tmp_path / "straight"), weights(tmp_path / "broken"))
    assert rows(tmp_path / "straight") == rows(tmp_path / "broken")


def _train_until(run_dir, step, source, **options):
    """Train, and be asked to stop after a step, as by SIGTERM."""

    class Stop:
        calls = 0

        def agreed(self):
            self.calls += 1
            return 15 if self.calls == step else 0

        def give_way(self):
            if self.calls >= step:
                raise InterruptedEvaluationError

    run = open_run(tiny_config(run_dir, source, **options), Ranks())
    with _reporting(run) as report:
        _loop(run, report, Stop())


def test_loss_falls_on_learnable_data(tmp_path, colour_shards):
    source = {"shards": str(colour_shards / "{00000..00002}.tar")}
    train(tiny_config(tmp_path, source, train__steps=60, checkpoint__every_steps=60, optim__lr=3e-3))
    losses = [row["train/loss"] for row in rows(tmp_path)]
    # four captions in a batch of 16: a perfect model cannot tell duplicates apart and stays near log 4
    assert losses[0] > 2.5
    assert losses[-1] < 1.8


def test_one_batch_again_and_again_is_learnt_by_heart_and_resumes_bitwise(tmp_path):
    """On shards with bad records, with workers, in micro-batches; step 1 is that of a normal run."""
    colours = [(n * 37 % 256, n * 91 % 256, n * 151 % 256) for n in range(70)]
    pairs = [{"jpg": jpeg(colour), "txt": str(number).encode()} for number, colour in enumerate(colours)]
    records = ((f"{n:03d}", pair if n % 7 else {"txt": b"no image"}) for n, pair in enumerate(pairs))
    write_shards(tmp_path / "shards", records, 30)
    source = {"shards": str(tmp_path / "shards/{00000..00002}.tar")}
    options = {"train__overfit_one_batch": True, "train__steps": 40, "optim__lr": 3e-3, "train__micro_batch": 8}
    options |= {"checkpoint__every_steps": 20, "data__workers": 2, "data__max_bad_fraction": 0.5}
    train(tiny_config(tmp_path / "run", source, **options))
    straight, history = weights(tmp_path / "run"), rows(tmp_path / "run")
    listed = (tmp_path / "run/bad_records.jsonl").read_text()
    assert history[0]["train/loss"] > 2.5
    assert history[-1]["train/loss"] < 0.05
    assert [history[-1][name] for name in ("data/delivered/tiny", "samples")] == [16, 40 * 16]
    assert history[-1]["data/skipped/tiny"] == listed.count("no_image") > 0
    assert "every step takes the 16 samples of step 1" in (tmp_path / "run/log.txt").read_text()

    shutil.rmtree(tmp_path / "run/checkpoints/step_00000040")
    train(tiny_config(tmp_path / "run", source, **options))
    assert_same_weights(straight, weights(tmp_path / "run"))
    assert rows(tmp_path / "run") == history
    assert (tmp_path / "run/bad_records.jsonl").read_text() == listed

    options |= {"train__steps": 1, "train__overfit_one_batch": False}
    train(tiny_config(tmp_path / "normal", source, **options))
    assert rows(tmp_path / "normal")[0]["train/loss"] == history[0]["train/loss"]


def test_one_batch_repeats_on_any_ranks_and_workers_as_the_first_of_a_normal_run(tmp_path, colour_shards):
    source = {"shards": str(colour_shards / "{00000..00002}.tar")}

    def places(repeats, world, workers, states=None):
        """Samples of three steps in their order, and the slots' states behind each."""
        config = tiny_config(tmp_path, source, train__overfit_one_batch=repeats, data__workers=workers)
        sources = open_sources(config, Ranks())
        plan, states = make_plan(config, sources, 16), states or {}
        ranks = (Ranks(rank, world) for rank in range(world))
        steps = zip(*(Stream(config, plan, sources, rank, steps=3, states=states) for rank in ranks), strict=True)
        found = []
        for parts in steps:
            seeds = torch.cat([batch.seeds for part in parts for batch in part.micro_batches])
            found.append((seeds.tolist(), {slot: state for part in parts for slot, state in part.states.items()}))
        return found

    normal = places(repeats=False, world=1, workers=0)
    assert normal[0][0] != normal[1][0]
    for world, workers in ((1, 0), (1, 2), (2, 2)):
        assert places(repeats=True, world=world, workers=workers) == [normal[0]] * 3
    assert places(repeats=True, world=2, workers=0, states=normal[0][1]) == [normal[0]] * 3  # continued


def test_run_directory_holds_config_metrics_log_and_checkpoints(tmp_path):
    train(tiny_config(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "ranks.json",
        "log.txt",
        "checkpoints",
    }
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"latest", "step_00000002", "step_00000004"}
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000004\n"
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_a_finished_run_does_nothing_more(tmp_path):
    train(tiny_config(tmp_path))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    train(tiny_config(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_more_steps_and_another_learning_rate_continue_a_run_and_are_recorded(tmp_path):
    train(tiny_config(tmp_path))
    train(tiny_config(tmp_path))
    assert not (tmp_path / "changes.jsonl").exists()
    train(tiny_config(tmp_path, train__steps=6, optim__lr=2e-3))
    log = (tmp_path / "log.txt").read_text()
    assert f"continuing {tmp_path} at step 4" in log
    assert "changed since then: optim.lr: 0.001 -> 0.002" in log
    assert "learning rates of the next step: lr/image 0 -> 0.000191, lr/logit_scale 0 -> 0.000191" in log
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert rows(tmp_path)[4]["lr/image"] == pytest.approx(0.000191, rel=1e-3)
    change = json.loads((tmp_path / "changes.jsonl").read_text())
    assert change["step"] == 4
    assert change["changed"] == {"optim.lr": [0.001, 0.002], "train.steps": [4, 6]}
    assert change["versions"] == {}


def test_another_version_of_the_code_is_recorded(tmp_path, monkeypatch):
    train(tiny_config(tmp_path))
    monkeypatch.setattr("evaclip.run._commit", lambda: "0.1.0+other")
    train(tiny_config(tmp_path))
    change = json.loads((tmp_path / "changes.jsonl").read_text())
    assert change["changed"] == {}
    assert change["versions"]["evaclip"][1] == "0.1.0+other"


def test_a_checkpoint_without_its_metadata_is_damage_and_not_a_fresh_start(tmp_path):
    train(tiny_config(tmp_path))
    history = (tmp_path / "metrics.jsonl").read_bytes()
    for path in (tmp_path / "checkpoints").glob("step_*/meta.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is intact: .*meta\.json cannot be read"):
        train(tiny_config(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_bytes() == history


def test_another_model_or_data_order_is_refused_with_the_difference(tmp_path):
    train(tiny_config(tmp_path))
    with pytest.raises(
        ConfigError, match=r"(?s)another model, data order or freezing.*model\.embed_dim: 16 -> 24.*seed: 0 -> 1"
    ):
        train(tiny_config(tmp_path, model__embed_dim=24, seed=1))


def test_another_order_of_sources_or_slots_is_refused(tmp_path):
    sources = {"a": SYNTHETIC, "b": SYNTHETIC}
    train(tiny_config(tmp_path, data__sources=sources))
    swapped = dict(reversed(sources.items()))
    with pytest.raises(ConfigError, match=r"data\.sources\. in order: \['a', 'b'\] -> \['b', 'a'\]"):
        train(tiny_config(tmp_path, data__sources=swapped, train__steps=6))
    with pytest.raises(ConfigError, match=r"data\.slots: 16 -> 8"):
        train(tiny_config(tmp_path, data__sources=sources, data__slots=8, train__steps=6))


def test_other_content_of_a_source_is_refused(tmp_path, colour_shards):
    shard = tmp_path / "colours.tar"
    shutil.copy(colour_shards / "00000.tar", shard)
    source = {"shards": str(shard)}
    train(tiny_config(tmp_path / "run", source))
    shutil.copy(colour_shards / "00001.tar", shard)
    (tmp_path / "colours.tar.index.safetensors").unlink()
    with pytest.raises(CheckpointError, match="source tiny holds other records"):
        train(tiny_config(tmp_path / "run", source, train__steps=6))


def test_checkpoint_of_another_model_is_refused_by_its_first_difference(tmp_path):
    train(tiny_config(tmp_path))
    path = tmp_path / "checkpoints/step_00000004/meta.json"
    meta = json.loads(path.read_text())
    meta["shapes"]["image.head.weight"] = [24, 32]
    meta.pop("xxh3")
    path.write_text(json.dumps({**meta, "xxh3": meta_checksum(meta)}))
    with pytest.raises(CheckpointError, match=r"(?s)another model.*image\.head\.weight: \[24, 32\] in the checkpoint"):
        train(tiny_config(tmp_path, train__steps=6))


def test_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    train(tiny_config(tmp_path))
    part = tmp_path / "checkpoints/step_00000004/part_00000.safetensors"
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(content)
    train(tiny_config(tmp_path))
    assert "differs from its checksum" in caplog.text
    assert f"continuing {tmp_path} at step 2" in caplog.text
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("micro_batch", [8, 5, 1])
def test_micro_batches_change_no_loss(tmp_path, micro_batch):
    train(tiny_config(tmp_path / "whole"))
    train(tiny_config(tmp_path / "parts", train__micro_batch=micro_batch))
    whole, parts = ([row["train/loss"] for row in rows(tmp_path / name)] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-5)  # fp32 sums in another order
    log = (tmp_path / "parts/log.txt").read_text()
    assert f"each rank takes its 16 samples of a step in {-(-16 // micro_batch)} micro-batches" in log


def test_adding_up_micro_batches_in_16_bits_is_refused(tmp_path):
    options = {"engine__name": "deepspeed", "train__precision": "bf16_weights", "train__micro_batch": 8}
    with pytest.raises(ConfigError, match=r"makes 2 micro-batches, whose gradients ZeRO-1 adds up in 16 bits"):
        open_run(tiny_config(tmp_path, **options), Ranks())


def test_fewer_records_than_a_batch_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"hold 10 records, fewer than train\.global_batch 16"):
        train(tiny_config(tmp_path, {"kind": "synthetic", "num_records": 10}))


def test_run_dir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaclipError, match=r"cannot be written: .*; choose a folder that can be written"):
        train(tiny_config(tmp_path / "file" / "run"))


def test_endless_skipping_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("evaclip.loss.LossOutput.surrogate", lambda self, image, text: image.sum() * math.nan)
    with pytest.raises(TrainingStoppedError, match=r"the last 3 updates were skipped"):
        train(tiny_config(tmp_path, train__max_consecutive_skipped_steps=3, train__steps=10))
    assert [row["train/skipped_steps"] for row in rows(tmp_path)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "place", "uses"),
    [
        ({"train__activation_checkpointing": True}, (prepare, "checkpoint"), (1 + 4) * 4),  # trial and steps x blocks
        ({"train__compile": True}, (torch.nn.Module, "compile"), 2),  # the image tower's blocks
    ],
)
def test_checkpointing_and_compilation_do_not_change_the_losses(tmp_path, monkeypatch, change, place, uses):
    train_on(Ranks(), tiny_config(tmp_path / "plain"))
    used = Mock(wraps=getattr(*place))
    monkeypatch.setattr(*place, lambda *arguments, **options: used(*arguments, **options))  # noqa: PLW0108  a method
    train_on(Ranks(), tiny_config(tmp_path / "other", **change))
    assert used.call_count == uses
    plain, other = ([row["train/loss"] for row in rows(tmp_path / name)] for name in ("plain", "other"))
    assert plain == pytest.approx(other, rel=1e-5)  # fused kernels round in another order


@pytest.mark.parametrize("precision", ["bf16", "bf16_weights"])
def test_16_bit_precisions_follow_fp32(tmp_path, precision):
    options = {"train__steps": 8, "optim__lr": 1e-4}  # slow enough that rounding errors do not grow
    train_on(Ranks(), tiny_config(tmp_path / "plain", **options))
    train_on(Ranks(), tiny_config(tmp_path / "other", **options, train__precision=precision))
    plain, other = ([row["train/loss"] for row in rows(tmp_path / name)] for name in ("plain", "other"))
    assert plain == pytest.approx(other, rel=0.02)  # bf16 has 8 bits: 0.4 % per rounding
    assert plain != other


def test_fp16_halves_its_loss_scale_at_each_overflow_until_steps_apply(tmp_path):
    train(tiny_config(tmp_path, train__steps=10, train__precision="fp16", checkpoint__every_steps=10))
    progress = CheckpointReader(find_checkpoint(tmp_path)).state
    skipped = sum(row["train/skipped_steps"] for row in rows(tmp_path))
    assert 0 < skipped < 10  # gradients of a few hundred overflow at the initial 2**16
    assert progress.updates == 10 - skipped
    assert progress.grad_scale == 2.0 ** (16 - skipped)


@pytest.mark.parametrize(("first", "second", "scale"), [("fp16", "fp32", 1.0), ("fp32", "fp16", 2.0**16)])
def test_a_loss_scale_is_not_carried_over_to_another_precision(tmp_path, first, second, scale):
    train(tiny_config(tmp_path, train__steps=2, train__precision=first))
    train(tiny_config(tmp_path, train__steps=3, train__precision=second))
    progress = CheckpointReader(find_checkpoint(tmp_path)).state
    assert progress.grad_scale == scale / 2**progress.consecutive_skips


def test_16_bit_weights_resume_from_their_fp32_master(tmp_path):
    train(tiny_config(tmp_path / "straight", train__precision="bf16_weights"))
    train(tiny_config(tmp_path / "broken", train__precision="bf16_weights"))
    shutil.rmtree(tmp_path / "broken/checkpoints/step_00000004")
    train(tiny_config(tmp_path / "broken", train__precision="bf16_weights"))
    assert_same_weights(weights(tmp_path / "straight"), weights(tmp_path / "broken"))


def test_fixed_temperature_is_saved_and_restored(tmp_path):
    train(tiny_config(tmp_path, loss__learn_logit_scale=False, loss__logit_scale=100.0))
    assert weights(tmp_path)["logit_scale"].item() == pytest.approx(math.log(100))
    (tmp_path / "log.txt").unlink()
    train(tiny_config(tmp_path, loss__learn_logit_scale=False, loss__logit_scale=100.0, train__steps=5))
    assert f"continuing {tmp_path} at step 4" in (tmp_path / "log.txt").read_text()
    assert rows(tmp_path)[-1]["train/logit_scale"] == pytest.approx(100)


def test_the_sigmoid_loss_is_trained_evaluated_continued_and_loaded_with_its_bias(tmp_path, colour_shards):
    shards = str(colour_shards / "00000.tar")
    options = {"loss": {"name": "sigmoid"}, "eval__datasets": {"held": {"task": "loss", "path": shards, "limit": 10}}}
    options |= {"eval__batch": 10}
    train(tiny_config(tmp_path, **options))
    train(tiny_config(tmp_path, **options, train__steps=6))
    clip = evaclip.load(tmp_path)
    assert clip.logit_bias == rows(tmp_path)[-1]["train/logit_bias"] != -10.0
    records = [Shard(Path(shards)).read(number).members for number in range(10)]
    with torch.no_grad():
        images = torch.stack([clip.preprocess(Image.open(io.BytesIO(record["jpg"]))) for record in records])
        texts = clip.tokenize([record["txt"].decode() for record in records])
        cosines = clip.encode_image(images, normalize=True) @ clip.encode_text(texts, normalize=True).T
    signs = 2 * torch.eye(10) - 1
    expected = -torch.nn.functional.logsigmoid(signs * (clip.logit_scale * cosines + clip.logit_bias)).sum() / 10
    assert rows(tmp_path)[-1]["eval/held/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_runs_at_the_start_at_its_steps_and_at_the_end(tmp_path, colour_shards):
    shards = str(colour_shards / "00000.tar")
    datasets = {"held": {"task": "loss", "path": shards}, "pairs": {"task": "retrieval", "path": shards, "limit": 8}}
    options = {"eval__datasets": datasets, "eval__every_steps": 2, "eval__batch": 10}
    train(tiny_config(tmp_path, **options, checkpoint__keep_best="eval/held/loss", checkpoint__best_is="min"))
    evaluated = [row["step"] for row in rows(tmp_path) if "eval/held/loss" in row]
    assert evaluated == [0, 2, 4]
    assert all("eval/pairs/image_to_text_recall@1" in row for row in rows(tmp_path) if row["step"] in evaluated)
    assert (tmp_path / "evaluation.json").is_file()
    saved = CheckpointReader(find_checkpoint(tmp_path)).state.metrics
    assert saved["eval/held/loss"] == rows(tmp_path)[-1]["eval/held/loss"]


def test_a_linear_probe_in_training_may_choose_the_best_checkpoint(tmp_path):
    for split in ("train", "test"):
        place = tmp_path / "set" / split
        labelled = ((key, {**members, "cls": str(int(key) % 4).encode()}) for key, members in colour_records(40))
        write_shards(place, labelled, 40)[0].rename(place / "0.tar")
        (place / "nshards.txt").write_text("1")
    datasets = {"colours": {"task": "linear_probe", "path": str(tmp_path / "set"), "shots": 2}}
    options = {"eval__datasets": datasets, "eval__every_steps": 2, "checkpoint__keep_best": "eval/colours/top1"}
    train(tiny_config(tmp_path / "run", **options))
    found = {row["step"]: row["eval/colours/top1"] for row in rows(tmp_path / "run") if "eval/colours/top1" in row}
    assert list(found) == [0, 2, 4]
    assert min(found.values()) > 0.9, "colours are told apart whatever the weights"
    saved = CheckpointReader(find_checkpoint(tmp_path / "run")).state.metrics
    assert saved["eval/colours/top1"] == found[4]
    assert "eval/colours/top1_std" in saved


def test_a_vanished_evaluation_set_costs_no_training(tmp_path, colour_shards):
    gone = tmp_path / "gone.tar"
    shutil.copy(colour_shards / "00000.tar", gone)
    datasets = {"held": {"task": "loss", "path": str(gone)}}
    options = {"eval__datasets": datasets, "eval__batch": 10, "eval__at_start": False, "checkpoint__every_steps": 100}
    gone.unlink()
    with pytest.raises(DataError, match=r"gone\.tar"):
        train(tiny_config(tmp_path / "run", **options))
    assert find_checkpoint(tmp_path / "run").name == "step_00000004"


@pytest.mark.parametrize(("step", "evaluated"), [(2, [4]), (4, [2, 4])])
def test_a_run_that_is_asked_to_stop_saves_without_evaluating_but_at_its_last_step(
    tmp_path, colour_shards, step, evaluated
):
    datasets = {"held": {"task": "loss", "path": str(colour_shards / "00000.tar")}}
    options = {"eval__datasets": datasets, "eval__batch": 10, "eval__every_steps": 2, "eval__at_start": False}
    with pytest.raises(TrainingStoppedError) if step < 4 else nullcontext():
        _train_until(tmp_path, step, SYNTHETIC, **options)
    assert find_checkpoint(tmp_path).name == f"step_{step:08d}"
    assert ("the evaluation at step 2 is left out" in (tmp_path / "log.txt").read_text()) == (step == 2)
    train(tiny_config(tmp_path, **options))
    assert [row["step"] for row in rows(tmp_path) if "eval/held/loss" in row] == evaluated


def test_a_signal_in_the_middle_of_an_evaluation_does_not_wait_for_its_end(tmp_path, colour_shards, monkeypatch):
    """The step after it is the one that is saved; a run on several ranks needs one more to agree."""
    read = Records.read
    numbers = []

    def read_and_signal(self, number):
        numbers.append(number)
        if len(numbers) == 15:
            os.kill(os.getpid(), signal.SIGUSR1)
        return read(self, number)

    monkeypatch.setattr(Records, "read", read_and_signal)
    datasets = {"held": {"task": "loss", "path": str(colour_shards / "00000.tar")}}
    options = {"eval__datasets": datasets, "eval__batch": 10, "eval__every_steps": 2, "eval__at_start": False}
    with pytest.raises(TrainingStoppedError, match="stopped by SIGUSR1 after step 3, which is saved"):
        train(tiny_config(tmp_path, **options))
    assert len(numbers) == 20  # the second of three batches was read when the first was encoded
    assert "the evaluation at step 2 is left out" in (tmp_path / "log.txt").read_text()
    monkeypatch.undo()
    train(tiny_config(tmp_path, **options))
    assert [row["step"] for row in rows(tmp_path) if "eval/held/loss" in row] == [4]


def test_a_run_that_too_many_bad_records_stop_is_saved_and_goes_on_with_a_higher_limit(tmp_path):
    records = [(key, {**m, "jpg": b"bad"} if int(key) % 3 == 0 else m) for key, m in colour_records(60)]
    write_shards(tmp_path, records, 60)
    source = {"shards": str(tmp_path / "00000.tar")}
    options = {"train__steps": 6, "checkpoint__every_steps": 100}
    with pytest.raises(TrainingStoppedError, match=r"more than data\.max_bad_fraction"):
        train(tiny_config(tmp_path / "run", source, **options))
    step = rows(tmp_path / "run")[-1]["step"]
    assert find_checkpoint(tmp_path / "run").name == f"step_{step:08d}"
    train(tiny_config(tmp_path / "run", source, **options, data__max_bad_fraction=0.9))
    train(tiny_config(tmp_path / "straight", source, **options, data__max_bad_fraction=0.9))
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "straight"))


def test_a_second_process_is_kept_out_of_a_run_directory_until_the_first_is_gone(tmp_path):
    holder = (
        "import os, pathlib, time, sys; from evaclip.lock import lock; lock(pathlib.Path(sys.argv[1]));"
        "child = os.fork(); child and print(child, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holder, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        try:
            with pytest.raises(ConfigError, match=rf"another process trains in run_dir .* \(process {process.pid} on "):
                train(tiny_config(tmp_path))
            process.kill()
            process.wait()
            train(tiny_config(tmp_path))  # though a data worker of the killed one lives on
        finally:
            os.kill(child, signal.SIGKILL)
    assert find_checkpoint(tmp_path).name == "step_00000004"


def test_auto_takes_what_fits(tmp_path, monkeypatch):
    plain, auto = tiny_config(tmp_path / "plain"), tiny_config(tmp_path / "auto", train__micro_batch="auto")
    train(plain)
    train(auto)
    assert "samples of a step in 1 micro-batches" in (tmp_path / "auto" / "log.txt").read_text()
    assert_same_weights(weights(tmp_path / "plain"), weights(tmp_path / "auto"))
    monkeypatch.setattr("evaclip.trial.trial_step", lambda engine, loss, model, samples, ranks: 1e9 * samples)
    monkeypatch.setattr("evaclip.trial.available_bytes", lambda device, processes: 6.5e9)
    train(tiny_config(tmp_path / "little", train__micro_batch="auto"))
    assert "samples of a step in 3 micro-batches" in (tmp_path / "little" / "log.txt").read_text()


def test_running_out_of_memory_names_what_to_change(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    config = config.model_copy(update={"model": ModelConfig.model_validate({"name": "EVA02-CLIP-B-16"})})
    monkeypatch.setattr("evaclip.train.open_run", lambda *arguments: torch.empty(1 << 60))
    with pytest.raises(OutOfMemoryError, match=r"rank 0 ran out of memory \(.*allocate") as caught:
        train(config)
    lines = str(caught.value).splitlines()
    assert len(lines) >= 4
    assert lines[-1] == "  eval.batch, if this was an evaluation"
    assert any(re.match(r"  train\.micro_batch=8 \(now 16\) saves about \d+\.\d GiB$", line) for line in lines)


def test_checkpoints_within_a_streak_of_bad_steps_push_out_no_older_one(tmp_path, monkeypatch):
    original = ContrastiveLoss.forward

    def forward(self, image, text, ranks):
        output = original(self, image, text, ranks)
        return output._replace(loss=output.loss * math.nan) if next(calls) >= 1 + 4 else output  # after the trial

    calls = iter(range(100))
    monkeypatch.setattr(ContrastiveLoss, "forward", forward)
    options = {"train__max_consecutive_skipped_steps": 8, "checkpoint__every_steps": 2, "checkpoint__keep_last": 1}
    with pytest.raises(TrainingStoppedError, match=r"remove the newest checkpoints of .*, and the run goes on from"):
        train(tiny_config(tmp_path, train__steps=20, **options))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == [f"step_{step:08d}" for step in (4, 6, 8, 10)]
    assert CheckpointReader(tmp_path / "checkpoints" / "step_00000010").state.consecutive_skips == 6
