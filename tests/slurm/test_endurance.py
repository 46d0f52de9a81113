"""A fault every two minutes for twenty minutes: how much is lost, and that nothing else is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil
import pytest
import tables
import yaml
from cluster.launched import REPOSITORY, assert_equal, signs, training, wait_for
from slurm.virtual import VirtualCluster

from evaclip.history import load_history
from evaclip.plot import plot

pytestmark = [pytest.mark.faults, pytest.mark.slurm]

STEPS = int(
    os.environ.get("EVACLIP_ENDURANCE_STEPS", "2400")
)  # the demo's: a little less than twenty minutes of two cores
EVERY_SECONDS = 120
OPTIONS: dict[str, Any] = {
    "train": {"steps": STEPS},
    "eval": {"datasets": {}},
    "checkpoint": {"every_steps": 20},
    "log": {"every_steps": 20, "wandb": {"mode": "off"}},
    "cluster": {"step_timeout_seconds": 10, "node_timeout_seconds": 15},
}


def submit(cluster: VirtualCluster, folder: Path) -> str:
    tree = yaml.safe_load((REPOSITORY / "configs/demo.yaml").read_text())
    tree["train"] |= OPTIONS["train"]
    tree |= {key: value for key, value in OPTIONS.items() if key != "train"} | {"run_dir": str(folder / "run")}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    options = ("--nodes=2", "--ntasks-per-node=1", f"--output={folder}/out.txt")
    return cluster.submit(*options, REPOSITORY / "launch/slurm.sh", folder / "config.yaml")


def seconds_of(run: Path) -> float:
    """From the first training's start to the end of the last, queues and preflights of later starts included."""
    rows = [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]
    trainings = [row for row in rows if row["what"] == "train"]
    return trainings[-1]["time"] - (trainings[0]["time"] - trainings[0]["seconds"])


def time_in_steps(run: Path) -> float:
    """The share of a run's time that its steps would take at the pace that they have between faults.

    That pace is the machine's at the time, so that two runs can be compared which did not meet an equally busy one.
    """
    rows = [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]
    first = {(row["saved"] or 0) + OPTIONS["log"]["every_steps"] for row in rows}  # rows that begin with a cold start
    paces = [
        1 / row["speed/samples_per_second"]
        for row in load_history(run / "metrics.jsonl")
        if "speed/samples_per_second" in row and row["step"] not in first
    ]
    samples = load_history(run / "metrics.jsonl")[-1]["samples"]
    return mean(paces) * samples / seconds_of(run)


def kill_rank(cluster: VirtualCluster, job: str, run: Path) -> None:
    os.kill(signs(run)[1].pid, signal.SIGKILL)


def stop_rank(cluster: VirtualCluster, job: str, run: Path) -> None:
    os.kill(signs(run)[0].pid, signal.SIGSTOP)


def kill_a_nodes_launcher(cluster: VirtualCluster, job: str, run: Path) -> None:
    psutil.Process(psutil.Process(signs(run)[1].pid).ppid()).kill()


def kill_all_ranks(cluster: VirtualCluster, job: str, run: Path) -> None:
    for sign in signs(run):
        os.kill(sign.pid, signal.SIGKILL)


def warn(cluster: VirtualCluster, job: str, run: Path) -> None:
    before = int(cluster.field(job, "Restarts"))
    cluster.ask("scancel", "--signal=USR1", job)
    cluster.requeued(job, before + 1)


def lose_a_node(cluster: VirtualCluster, job: str, run: Path) -> None:
    before, node = int(cluster.field(job, "Restarts")), signs(run)[1].node
    cluster.lose(node)
    cluster.requeued(job, before + 1)  # all nodes are wanted, so the job asks for others
    cluster.bring_back(node)


FAULTS: Sequence[Callable[[VirtualCluster, str, Path], None]] = (
    kill_rank, stop_rank, kill_a_nodes_launcher, warn, kill_all_ranks,
    lose_a_node, kill_rank, stop_rank, kill_rank, kill_a_nodes_launcher,
)  # fmt: skip


def test_a_fault_every_two_minutes_costs_less_than_a_fifth(cluster: VirtualCluster, tmp_path: Path) -> None:
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
    plain, run = tmp_path / "undisturbed/run", tmp_path / "disturbed/run"
    job = submit(cluster, tmp_path / "undisturbed")
    wait_for(lambda: cluster.state(job) == "COMPLETED", seconds=3600, told=cluster.describe)
    job = submit(cluster, tmp_path / "disturbed")
    wait_for(lambda: training(run, 2), told=cluster.describe)
    begin = time.monotonic()
    seconds: dict[Callable[..., None], list[float]] = defaultdict(list)
    title = f"A fault every {EVERY_SECONDS} s in {STEPS} steps of the demo's model on two nodes"
    for number, fault in enumerate(FAULTS, 1):
        wait_for(lambda at=begin + number * EVERY_SECONDS: time.monotonic() > at, seconds=EVERY_SECONDS + 60)
        if cluster.state(job) == "COMPLETED" or max((sign.step for sign in signs(run)), default=0) > STEPS - 50:
            break  # a fast machine
        before = wait_for(lambda: training(run, 2), told=cluster.describe)
        struck = time.monotonic()
        fault(cluster, job, run)
        old = {sign.pid for sign in before}
        wait_for(lambda old=old: [s for s in training(run, 2) if s.pid not in old], told=cluster.describe)
        seconds[fault].append(time.monotonic() - struck)
        row = f"{number}. {fault.__name__.replace('_', ' ')}"
        tables.record(title, row, "seconds to the next step", seconds[fault][-1])
    wait_for(lambda: cluster.state(job) == "COMPLETED", seconds=1200, told=cluster.describe)
    share = time_in_steps(run) / time_in_steps(plain)
    tables.record(title, "steps in the same time, of those of an undisturbed run", "share", share)
    tables.record(
        title, "the same by the clock, however fast the machine was", "share", seconds_of(plain) / seconds_of(run)
    )
    keep = os.environ.get("EVACLIP_KEEP_RUNS")
    if keep:
        for folder in ("undisturbed", "disturbed"):
            shutil.copytree(tmp_path / folder, Path(keep) / folder, dirs_exist_ok=True)
    plot([plain, run], tmp_path / "plot.png", metrics=["train/loss", "speed/samples_per_second"], by="step")
    assert sum(map(len, seconds.values())) >= 5
    assert_equal(run, plain)
    assert share >= 0.8
    kills = [*seconds[kill_rank], *seconds[kill_all_ranks]]
    assert median(kills) <= 10, kills
