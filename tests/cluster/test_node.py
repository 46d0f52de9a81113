"""A node whose supervisor fell silent while SLURM ends it: it gives the job back, unless that supervisor lives."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster.launched import environment, wait_for

SCONTROL = """#!/bin/sh
if [ "$1" = requeue ]; then echo "$2" >> {folder}/requeued; fi
echo "JobId=7 JobState={state} Requeue=1 BatchFlag=1 NodeList=n2"
"""
RANK = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.stdin.read(); signal.pause()"


class SilentlySupervised:
    """A node with one rank, started by a supervisor that says nothing further."""

    def __init__(self, folder: Path, job_state: str = "RUNNING") -> None:
        (folder / "logs").mkdir(parents=True)
        (folder / "scontrol").write_text(SCONTROL.format(folder=folder, state=job_state))
        (folder / "scontrol").chmod(0o755)
        self.folder = folder
        self.write("first")
        variables = {**environment(), "SLURM_JOB_ID": "7"}
        variables["PATH"] = f"{folder}:{variables['PATH']}"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "evaclip.cluster.node", "n2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=variables,
        )
        order = {
            "order": "start", "attempt": 1, "name": "7-1", "may_give_back": True, "patience_seconds": 1000,
            "nodes": ["n1", "n2"], "ranks_per_node": 1, "address": "127.0.0.1", "port": 12345,
            "command": [sys.executable, "-c", RANK], "arguments": [], "logs": str(folder / "logs"),
        }  # fmt: skip
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def write(self, content: str) -> None:
        """What a supervisor says to everybody; not whole, as one that was killed may leave it."""
        (self.folder / "cluster.json").write_text(f'{{"state": "{content}')

    @property
    def requeued(self) -> bool:
        return (self.folder / "requeued").exists()


@pytest.fixture
def nodes(tmp_path):
    """That of a dead supervisor, that of a living one, and that of a job which its user has cancelled."""
    made = [SilentlySupervised(tmp_path / "dead"), SilentlySupervised(tmp_path / "alive")]
    made.append(SilentlySupervised(tmp_path / "cancelled", "CANCELLED"))
    yield made
    for node in made:
        node.process.kill()
        node.process.wait()
        assert node.process.stdin
        node.process.stdin.close()


def test_a_node_that_slurm_ends_gives_the_job_back_before_it_is_killed(nodes):
    dead, alive, cancelled = nodes
    time.sleep(7)  # their silence alone is no reason yet
    assert [node.process.poll() for node in nodes] == [None] * 3
    for node in nodes:
        node.process.send_signal(signal.SIGTERM)
    numbers = iter(range(1000))

    def ended() -> bool:
        alive.write(str(next(numbers)))
        return dead.process.poll() is not None and cancelled.process.poll() is not None

    wait_for(ended, seconds=30)  # SLURM's KillWait
    assert dead.requeued
    assert not cancelled.requeued
    time.sleep(3)
    assert not alive.requeued
    assert alive.process.poll() is None
