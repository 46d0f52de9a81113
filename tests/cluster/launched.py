"""Runs that a launcher started: what its files say of them, and faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny import merged, tiny_tree

from evaclip.checkpoint import CheckpointReader, find_checkpoint
from evaclip.cluster.policy import Sign
from evaclip.history import load_history

REPOSITORY = Path(__file__).parents[2]
PATIENCE_SECONDS = 120

SECRETS = {
    "WANDB_API_KEY": "canary0000000000000000000000000000wandb0",
    "HF_TOKEN": "hf_canaryToken",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+secret",
    "MY_PASSWORD": "canary-password",
}
"""What must not be found in anything that a job writes."""


def config_file(folder: Path, **changes: Any) -> Path:
    """A tiny run in ``folder/run`` on made-up samples."""
    source = {"kind": "synthetic", "num_records": 200}
    tree = merged(tiny_tree(folder / "run", source), **{"cluster__node_timeout_seconds": 10, **changes})
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """As a user's shell, without W&B and with secrets in it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "SLURM"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, **SECRETS, "OMP_NUM_THREADS": "1", "PATH": path}


def wait_for(what: Callable[[], Any], *, seconds: float = PATIENCE_SECONDS, told: Callable[[], str] = str) -> Any:
    """The first value that is true."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, f"nothing in {seconds} s; {told()}"
        time.sleep(0.05)
    return value


def signs(run_dir: Path) -> list[Sign]:
    """What the ranks of a running training do, as last written."""
    try:
        status = json.loads((run_dir / "cluster.json").read_text())
    except (OSError, ValueError):
        return []
    if status["state"] != "running":
        return []
    rows = [(node, row) for node, rows in status["nodes"].items() for row in rows]
    keys = ("pid", "step", "phase", "age_seconds")
    return sorted(Sign(row["rank"], node, *(row[key] for key in keys), state="?") for node, row in rows)


def training(run_dir: Path, ranks: int, *, beyond: int = -1) -> list[Sign]:
    """The ranks, once all of them have trained beyond a step; none before."""
    found = signs(run_dir)
    trained = len(found) == ranks and all(s.phase not in ("start", "end") and s.step > beyond for s in found)
    return found if trained else []


def restarts(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of ``restarts.jsonl`` that tell of trainings, not of preflight."""
    path = run_dir / "restarts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["what"] == "train"]


def outcome(run_dir: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Final weights, and the history without what depends on the machine's speed."""
    timed = ("speed/", "memory/", "system/")
    rows = load_history(run_dir / "metrics.jsonl")
    history = [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]
    return CheckpointReader(find_checkpoint(run_dir)).weights(), history


def assert_equal(first: Path, second: Path) -> None:
    """Two runs ended with the same bits."""
    (weights, history), (others, other_history) = outcome(first), outcome(second)
    assert history == other_history
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def assert_no_secrets(*folders: Path) -> None:
    """No file below holds one of the secrets."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path


@contextmanager
def launched(config: Path, ranks: int, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """``evaclip launch --local``; its output goes to ``launcher.txt`` beside the configuration."""
    command = [sys.executable, "-m", "evaclip", "launch", "--local", str(ranks), str(config), *overrides]
    with (config.parent / "launcher.txt").open("a") as output:
        process = subprocess.Popen(
            command, env=environment(), cwd=REPOSITORY, stdout=output, stderr=output, text=True, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
