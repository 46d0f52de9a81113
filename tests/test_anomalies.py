"""What the log says of steps that went wrong."""

import dataclasses
import json
import math

import pytest
import torch
from tiny import tiny_config

from evaclip import anomalies as module
from evaclip.data.pipeline import Stream
from evaclip.data.shards import Shard
from evaclip.errors import TrainingStoppedError
from evaclip.loss import ContrastiveLoss
from evaclip.train import train


def test_the_sample_with_a_bad_image_is_named_with_its_shard_and_key(tmp_path, colour_shards, monkeypatch):
    original = Stream._join

    def join(self, parts):
        delivery = original(self, parts)
        first, second = delivery.micro_batches
        if next(calls) == 2:
            image = (second.images.float() / 255).index_fill_(0, torch.tensor(3), math.nan)
            second = dataclasses.replace(second, images=image)
            broken.append(second.places[3])
        return delivery._replace(micro_batches=[first, second])

    calls, broken = iter(range(100)), []
    monkeypatch.setattr(Stream, "_join", join)
    source = {"shards": str(colour_shards / "{00000..00002}.tar")}
    train(tiny_config(tmp_path, source, train__steps=6, train__micro_batch=8, log__every_steps=6))
    shard = colour_shards / f"{broken[0].shard:05d}.tar"
    name = f"tiny {shard}:{Shard(shard).key(broken[0].record)}"
    log = (tmp_path / "log.txt").read_text()
    assert f"step 3 was skipped: loss nan, gradient norm nan; the feature of {name} is not finite" in log
    (row,) = [json.loads(line) for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert row == {"step": 3, "loss": "nan", "cause": "feature", "samples": 1, "records": [name]}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin")
    train(tiny_config(folder, train__steps=1))
    return str(folder)


@pytest.mark.parametrize("frozen", [(0, 0), (1, "all"), (2, 1)])
def test_a_bad_gradient_is_blamed_on_its_micro_batch(tmp_path, monkeypatch, origin, frozen):
    original = ContrastiveLoss.forward

    def forward(self, image, text, ranks):
        output = original(self, image, text, ranks)
        output.image_grad[9] = math.inf  # of the second micro-batch of 8
        return output

    monkeypatch.setattr(ContrastiveLoss, "forward", forward)
    parts = {"init__model": origin, "optim__image__freeze": frozen[0], "optim__text__freeze": frozen[1]}
    train(tiny_config(tmp_path, train__steps=1, train__micro_batch=8, **parts))
    (row,) = [json.loads(line) for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert row["cause"] == "gradient"
    assert row["samples"] == len(row["records"]) == 8
    assert "and 5 more is not finite" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("optim", ["lamb", "adamw"])
def test_a_loss_and_an_update_far_above_their_running_values_are_named(tmp_path, monkeypatch, optim):
    monkeypatch.setattr(module, "_MEMORY", 8)
    original = ContrastiveLoss.forward

    def forward(self, image, text, ranks):
        output = original(self, image, text, ranks)
        if next(calls) != 1 + 12:  # after the trial
            return output
        return output._replace(loss=2 * output.loss, text_grad=1000 * output.text_grad)

    calls = iter(range(100))
    monkeypatch.setattr(ContrastiveLoss, "forward", forward)
    train(tiny_config(tmp_path, train__steps=14, optim__name=optim, optim__betas=[0.0, 0.99]))
    log = (tmp_path / "log.txt").read_text()
    told = [line.split("the ", 1)[1].split(" was ")[0] for line in log.splitlines() if "its running value" in line]
    assert "loss" in told
    assert "update of text.projection" in told
    assert not any("image" in name for name in told)
    assert all("up to step 13 " in line for line in log.splitlines() if "the loss was" in line)


def test_overflows_of_fp16_are_told_as_such_and_blamed_on_nobody(tmp_path):
    train(tiny_config(tmp_path, train__steps=10, train__precision="fp16"))
    log = (tmp_path / "log.txt").read_text()
    assert "step 1 was skipped: its gradient overflowed in fp16, and the loss scale was halved" in log
    assert not (tmp_path / "skipped_steps.jsonl").exists()


def test_a_diverged_run_names_a_few_of_its_samples(tmp_path):
    options = {"train__global_batch": 64, "train__max_consecutive_skipped_steps": 2, "optim__lr": 1e30}
    with pytest.raises(TrainingStoppedError, match="the last 2 updates were skipped"):
        train(tiny_config(tmp_path, train__steps=8, **options))
    rows = [json.loads(line) for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert [(row["cause"], row["samples"], len(row["records"])) for row in rows] == [("feature", 64, 16)] * 2
