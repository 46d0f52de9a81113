"""Averaged weights: what they are, that nothing else depends on them, and that they are saved, loaded and measured."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from distributed.spawn import run_on_ranks
from tiny import SYNTHETIC, tiny_config

import evaclip
from evaclip import cli
from evaclip.checkpoint import CheckpointReader
from evaclip.distributed import Ranks
from evaclip.engine import create_engine
from evaclip.errors import CheckpointError
from evaclip.history import load_history
from evaclip.loss import ContrastiveLoss
from evaclip.models.clip import create_model
from evaclip.train import train, train_on

CPU = torch.device("cpu")
EMA = {"optim__ema_decay": 0.75, "checkpoint__every_steps": 1, "checkpoint__keep_last": 20, "train__steps": 8}


def saved(run_dir, step, *, ema):
    return CheckpointReader(run_dir / "checkpoints" / f"step_{step:08d}").weights(ema=ema)


def zero(ranks, folder, *, stage):
    """Train on two ranks."""
    train_on(ranks, tiny_config(folder, **EMA, engine__name="deepspeed", engine__zero_stage=stage))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Engine -> folder of a run."""
    folder = tmp_path_factory.mktemp("runs")
    train(tiny_config(folder / "torch", **EMA))
    done = run_on_ranks(2, {f"zero{stage}": partial(zero, stage=stage) for stage in (2, 3)}, folder)
    assert done == {"zero2": [None] * 2, "zero3": [None] * 2}
    return folder


@pytest.mark.parametrize("engine", ["torch", "zero2", "zero3"])
def test_each_update_moves_the_average_by_its_share(runs, engine):
    run = runs / engine
    average = {name: value.double() for name, value in saved(run, 1, ema=True).items()}
    for step in range(2, 9):
        kept = min(0.75, (1 + step) / (10 + step))
        weights = saved(run, step, ema=False)
        average = {name: kept * value + (1 - kept) * weights[name].double() for name, value in average.items()}
    found = saved(run, 8, ema=True)
    assert found.keys() == average.keys()
    assert "logit_scale" in found
    for name, value in found.items():
        torch.testing.assert_close(value.double(), average[name], rtol=2e-6, atol=1e-8)  # seven roundings of fp32
    assert any(not torch.equal(value, saved(run, 8, ema=False)[name]) for name, value in found.items())


def test_the_average_begins_as_the_fp32_masters(tmp_path):
    config = tiny_config(tmp_path, train__precision="bf16_weights", optim__ema_decay=0.99)
    engine = create_engine(config, create_model(config.model, seed=1), ContrastiveLoss(config.loss, CPU), Ranks())
    pieces = list(engine.optimizer.local_pieces())
    assert all(torch.equal(piece.tensors["ema"], piece.weight) for piece in pieces)
    assert any(not torch.equal(piece.weight, piece.weight.bfloat16().float()) for piece in pieces)


def test_a_bad_step_leaves_the_average_as_it_is(tmp_path, monkeypatch):
    forward, calls = ContrastiveLoss.forward, []

    def sometimes_bad(self, *arguments):
        output = forward(self, *arguments)
        calls.append(1)
        return output._replace(loss=output.loss * float("nan")) if len(calls) == 5 else output  # the first is the trial

    monkeypatch.setattr(ContrastiveLoss, "forward", sometimes_bad)
    train(tiny_config(tmp_path, **EMA))
    changed = [
        any(not torch.equal(value, saved(tmp_path, step + 1, ema=True)[name]) for name, value in average.items())
        for step in range(1, 8)
        for average in [saved(tmp_path, step, ema=True)]
    ]
    assert changed == [True, True, False, True, True, True, True]


def test_weights_do_not_depend_on_it_and_evaluation_leaves_both_as_they_are(tmp_path, colour_shards):
    datasets = {"pairs": {"task": "retrieval", "path": str(colour_shards / "00000.tar")}}
    options = {**EMA, "eval__datasets": datasets, "eval__every_steps": 1, "eval__batch": 10}
    train(tiny_config(tmp_path / "averaged", **options))
    train(tiny_config(tmp_path / "unmeasured", **EMA))
    train(tiny_config(tmp_path / "plain", **{**EMA, "optim__ema_decay": None}))
    averaged, unmeasured, plain = (tmp_path / name for name in ("averaged", "unmeasured", "plain"))
    for name, value in saved(plain, 8, ema=False).items():
        assert torch.equal(value, saved(averaged, 8, ema=False)[name])
        assert torch.equal(saved(unmeasured, 8, ema=True)[name], saved(averaged, 8, ema=True)[name])
    first, *_, last = load_history(averaged / "metrics.jsonl")
    assert {name.split("/")[1] for name in first if name.startswith("eval/")} == {"pairs"}, "both are the same there"
    assert {"eval/pairs/image_to_text_recall@1", "eval/pairs.ema/image_to_text_recall@1"} <= last.keys()


def test_a_continued_run_has_the_same_average_and_an_average_may_begin_late(tmp_path):
    constant = {"schedule__shape": "constant"}
    train(tiny_config(tmp_path / "one", **EMA, **constant))
    train(tiny_config(tmp_path / "two", **{**EMA, "train__steps": 5}, **constant))
    train(tiny_config(tmp_path / "two", **EMA, **constant))
    for name, value in saved(tmp_path / "one", 8, ema=True).items():
        assert torch.equal(value, saved(tmp_path / "two", 8, ema=True)[name])
    train(tiny_config(tmp_path / "late", **{**EMA, "train__steps": 5, "optim__ema_decay": None}, **constant))
    train(tiny_config(tmp_path / "late", **{**EMA, "train__steps": 6}, **constant))
    before, after = (saved(tmp_path / "late", step, ema=False) for step in (5, 6))
    for name, value in saved(tmp_path / "late", 6, ema=True).items():
        torch.testing.assert_close(value, torch.lerp(before[name], after[name], 9 / 16), rtol=1e-6, atol=1e-8)


def test_it_is_loaded_measured_and_exported_where_there_is_one(tmp_path, colour_shards, capsys):
    train(tiny_config(tmp_path / "run", **EMA))
    train(tiny_config(tmp_path / "plain", SYNTHETIC, train__steps=1))
    average = saved(tmp_path / "run", 8, ema=True)
    clip = evaclip.load(tmp_path / "run", ema=True)
    assert all(torch.equal(value, average[name]) for name, value in clip.model.named_parameters())
    cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "safetensors", "--ema"])
    exported = evaclip.load(tmp_path / "out").model.state_dict()
    assert all(torch.equal(value, average[name]) for name, value in exported.items() if name in average)
    capsys.readouterr()
    measure = ["--dataset", str(colour_shards / "00000.tar"), "--task", "retrieval"]
    cli.main(["evaluate", str(tmp_path / "run"), "--ema", *measure])
    told = capsys.readouterr().out.splitlines()[1:]
    cli.main(["evaluate", str(tmp_path / "out"), *measure])
    assert told == capsys.readouterr().out.splitlines()[1:]
    with pytest.raises(CheckpointError, match=r"has no averaged weights; its run had no optim\.ema_decay"):
        evaclip.load(tmp_path / "plain", ema=True)
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tmp_path / "out"), "--ema", *measure])
    assert "is an export, which has one set of weights; take its run" in capsys.readouterr().err
