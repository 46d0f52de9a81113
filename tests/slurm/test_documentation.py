"""The commands of docs/cluster.md, one after the other, on the virtual cluster."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cluster.launched import REPOSITORY, restarts, training, wait_for
from slurm.virtual import VirtualCluster

pytestmark = pytest.mark.slurm

PAGE = (REPOSITORY / "docs/cluster.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"(?:<!-- (when [a-z ]+) -->\n)?```bash\n(.*?)```", PAGE, flags=re.DOTALL)
"""(What to wait for, commands)."""
ENDED = ("COMPLETED", "CANCELLED", "FAILED")
REPLACED = {
    "python3 -m venv .venv && . .venv/bin/activate\npip install -e .\n": "",  # make has done that
    "--nodes=16 --gpus-per-node=8 --exclusive": "--nodes=2 --ntasks-per-node=1",
}


def test_every_command_of_the_page_works(cluster: VirtualCluster, tmp_path: Path) -> None:
    clone = tmp_path / "evaclip"
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(clone)], check=True)
    shutil.copytree(REPOSITORY / "evaclip", clone / "evaclip", dirs_exist_ok=True)  # as it is here
    offline = {**cluster.environment, "WANDB_MODE": "offline"}  # there is no server
    run, job, seen, times = clone / "runs/first", "", set[int](), 0
    assert len(BLOCKS) == PAGE.count("```bash") > 8
    for condition, written in BLOCKS:
        text = written
        for old, new in REPLACED.items():
            text = text.replace(old, new)
        if condition == "when it trains again":
            times += 1
            cluster.requeued(job, times)
        if condition.startswith("when it trains"):
            wait_for(lambda seen=frozenset(seen): {s.pid for s in training(run, 2)} - seen, told=cluster.describe)
            seen |= {sign.pid for sign in training(run, 2)}
        if condition == "when it has ended":
            wait_for(lambda job=job: cluster.state(job) in ENDED, seconds=400, told=cluster.describe)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"job={job}\n{text}\necho job=$job"],
            cwd=clone, env=offline, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        job = done.stdout.strip().rpartition("job=")[2]
        if "preflight.txt" in text:
            assert re.search(r"all-reduce over 2 ranks: \d", done.stdout)
        if "evaclip plot" in text:
            assert (clone / "runs/first.png").stat().st_size > 10_000
    assert [row["cause"] for row in restarts(run)] == ["asked to stop"] * 3 + ["complete"]
    assert (clone / "exports/first/model.safetensors").exists()
