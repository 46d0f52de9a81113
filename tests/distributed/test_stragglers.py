"""A rank that is slow by itself is told by name; ranks that are alike are not, and no number changes."""

import json
import platform
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config

from distributed.spawn import run_on_ranks
from evaclip.distributed import Ranks
from evaclip.history import Row, load_history
from evaclip.preemption import StopRequest
from evaclip.run import open_run
from evaclip.train import _loop, _reporting

USUAL, SLOW = 0.05, 0.3  # seconds before each forward: far more than three tiny ranks on two cores differ by themselves


def trained(ranks: Ranks, folder: Path, *, slow: int | None) -> tuple[str, dict[str, Any], list[Row]]:
    platform.node = lambda: (
        f"n{ranks.rank // 2}"
    )  # in this rank's process alone: two on the first node, one on the other
    options = {"model__text__width": 16, "train__steps": 8, "train__global_batch": 24, "log__every_steps": 2}
    run = open_run(tiny_config(folder, **options, checkpoint__every_steps=8), ranks)
    seconds = SLOW if ranks.rank == slow else USUAL
    run.engine.towers.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    with _reporting(run) as report:
        _loop(run, report, StopRequest(ranks))
    rows = load_history(folder / "metrics.jsonl")
    return (folder / "log.txt").read_text(), json.loads((folder / "ranks.json").read_text()), rows


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cases = {"slow": partial(trained, slow=2), "alike": partial(trained, slow=None)}
    found = run_on_ranks(3, cases, tmp_path_factory.mktemp("ranks"))
    return {name: answers[0] for name, answers in found.items()}


def test_a_rank_that_sleeps_before_its_forward_is_named_once(results):
    log, ranks, _ = results["slow"]
    (factor,) = re.findall(r"WARNING .*rank 2 on n1 takes (\S+) times as long as usual", log)
    assert 2 < float(factor) < 8
    assert log.count("times as long as usual") == 1
    assert [row["rank"] for row in ranks["ranks"]] == [0, 1, 2]
    own = [row["own_seconds"] for row in ranks["ranks"]]
    steps = [row["step_seconds"] for row in ranks["ranks"]]
    assert own[2] > SLOW
    assert max(own[:2]) < own[2] / 1.5
    assert max(steps) == pytest.approx(min(steps), rel=0.3), "they end a step together"


def test_ranks_that_are_alike_are_not_named(results):
    log, ranks, _ = results["alike"]
    assert "times as long as usual" not in log
    assert len(ranks["ranks"]) == 3


def test_times_change_no_number(results):
    slow, alike = ([row["train/loss"] for row in results[name][2]] for name in ("slow", "alike"))
    assert slow == alike
    assert len(slow) == 4


def test_each_node_is_measured_once(results):
    for row in results["alike"][2]:
        found = [name.split("/")[1] for name in row if name.startswith("system/") and name.endswith("/memory_fraction")]
        assert found == ["n0", "n1"]
