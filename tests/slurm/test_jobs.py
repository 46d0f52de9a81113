"""Jobs on a real SLURM with virtual nodes: submitted, warned, requeued, out of time, without a node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cluster.launched import (
    REPOSITORY,
    assert_equal,
    assert_no_secrets,
    config_file,
    outcome,
    restarts,
    training,
    wait_for,
)
from slurm.virtual import VirtualCluster

pytestmark = pytest.mark.slurm

SCRIPT = REPOSITORY / "launch/slurm.sh"
LONG = {"train__steps": 150, "checkpoint__every_steps": 20}


def submit(cluster: VirtualCluster, folder: Path, *options: str, **changes: Any) -> str:
    """A tiny run on two nodes; its output goes to ``out.txt``."""
    config = config_file(folder, **{**LONG, **changes})
    return cluster.submit("--nodes=2", "--ntasks-per-node=1", f"--output={folder}/out.txt", *options, SCRIPT, config)


def wait_until(cluster: VirtualCluster, job: str, state: str, folder: Path) -> None:
    def told() -> str:
        return f"{cluster.describe()}\n{(folder / 'out.txt').read_text()[-3000:]}"

    wait_for(lambda: cluster.state(job) == state, told=told)


@pytest.fixture(scope="module")
def undisturbed(cluster: VirtualCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two nodes to compare with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = submit(cluster, folder)
    wait_until(cluster, job, "COMPLETED", folder)
    return folder / "run"


def test_warned_killed_and_requeued_job_ends_with_the_same_bits(
    cluster: VirtualCluster, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, tmp_path)
    after = cluster.submit(f"--dependency=afterok:{job}", f"--output={tmp_path}/after.txt", "--wrap=echo trained")
    first = wait_for(lambda: training(run, 2, beyond=5))
    cluster.ask("scancel", "--signal=USR1", job)  # to the steps; SLURM's own warning goes to the batch script
    cluster.requeued(job, 1)
    second = wait_for(lambda: training(run, 2, beyond=first[0].step + 10))
    os.kill(second[1].pid, signal.SIGKILL)
    third = wait_for(lambda: [s for s in training(run, 2) if s.pid not in {s.pid for s in second}])
    cluster.ask("scontrol", "requeue", job)
    cluster.requeued(job, 2)
    assert cluster.state(after) == "PENDING"
    wait_until(cluster, job, "COMPLETED", tmp_path)
    assert_equal(run, undisturbed)
    asked, died, *requeued, complete = restarts(run)
    assert (asked["cause"], asked["action"]) == ("asked to stop", "requeue")
    assert (died["cause"], died["action"]) == ("a rank died", "restart")
    assert f"rank 1 on {second[1].node} (in " in died["detail"]
    assert [row["cause"] for row in requeued] == ["asked to stop"], "requeued by hand, it saved in its grace period"
    assert complete["cause"] == "complete"
    assert {row["job"] for row in (asked, died, complete)} == {job}
    assert third
    wait_until(cluster, after, "COMPLETED", tmp_path)
    assert (tmp_path / "after.txt").read_text() == "trained\n"
    assert_no_secrets(tmp_path)


def test_job_requeues_itself_before_its_time_is_over_and_not_when_it_is_cancelled(
    cluster: VirtualCluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = {"train__steps": 10**6, "checkpoint__every_steps": 1000}
    # SLURM counts in minutes, and warns up to one of them too early.
    job = submit(cluster, tmp_path, "--time=2", "--signal=B:USR1@40", **options)
    cluster.requeued(job, 1)
    (row,) = restarts(run)
    assert (row["cause"], row["action"]) == ("asked to stop", "requeue")
    assert (run / "checkpoints" / f"step_{row['step']:08d}").exists()
    wait_for(lambda: training(run, 2, beyond=row["step"] + 5))
    cluster.ask("scancel", job)
    wait_until(cluster, job, "CANCELLED", tmp_path)
    wait_for(lambda: len(restarts(run)) == 2)
    assert (restarts(run)[1]["cause"], restarts(run)[1]["action"]) == ("asked to stop", "stop")
    assert cluster.field(job, "Restarts") == "1"


def test_run_goes_on_without_a_lost_node_and_takes_it_back_after_a_requeue(
    cluster: VirtualCluster, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    limits = {"cluster__min_nodes": 1, "cluster__node_timeout_seconds": 10}
    job = submit(cluster, tmp_path, **limits)
    lost = wait_for(lambda: training(run, 2, beyond=5))[1].node
    cluster.lose(lost)
    (alone,) = wait_for(lambda: training(run, 1, beyond=10), told=cluster.describe)
    (row,) = restarts(run)
    assert row["action"] == "restart"
    assert lost in row["detail"]
    cluster.bring_back(lost)
    cluster.ask("scancel", "--signal=USR1", job)
    cluster.requeued(job, 1)
    wait_for(lambda: training(run, 2, beyond=alone.step), told=cluster.describe)
    wait_until(cluster, job, "COMPLETED", tmp_path)
    # SLURM tries for a minute to kill what ran on the lost node, and may meet the requeued job there: one more restart.
    together, apart, *again = restarts(run)
    assert [row["ranks"] for row in (together, apart)] == [2, 1]
    assert again
    assert {row["ranks"] for row in again} == {2}
    assert {row["cause"] for row in again[:-1]} <= {"a node is gone", "a rank died"}
    weights, history = outcome(run)
    others, other_history = outcome(undisturbed)
    assert [row["step"] for row in history] == [row["step"] for row in other_history]
    # One rank adds up in another order than two: roundings, which a run of this length lets grow.
    for row, other in zip(history[:50], other_history[:50], strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)
    assert weights.keys() == others.keys()


def test_loss_of_the_first_node_requeues_the_job(cluster: VirtualCluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, train__steps=10**6, cluster__node_timeout_seconds=10)
    before = wait_for(lambda: training(run, 2, beyond=25))
    first = cluster.field(job, "BatchHost")
    cluster.lose(first)
    cluster.requeued(job, 1)
    assert cluster.state(job) in ("PENDING", "RUNNING")
    after = wait_for(lambda: [s for s in training(run, 2, beyond=25) if s.pid not in {b.pid for b in before}])
    assert {sign.node for sign in after} == {"n1", "n2", "n3"} - {first}
    cluster.bring_back(first)
    cluster.ask("scancel", job)
    wait_until(cluster, job, "CANCELLED", tmp_path)


def test_tasks_of_an_array_train_side_by_side(cluster: VirtualCluster, tmp_path: Path) -> None:
    config = config_file(tmp_path, train__steps=5)
    command = ["--nodes=2", "--ntasks-per-node=1", "--array=0-1", f"--output={tmp_path}/%a.txt", SCRIPT, config]
    job = cluster.submit(*command, f"run_dir={tmp_path}/run_${{SLURM_ARRAY_TASK_ID}}")
    rows = [f"{tmp_path}/run_{task}" for task in range(2)]
    wait_for(lambda: all(restarts(Path(row)) for row in rows), told=cluster.describe)
    assert [restarts(Path(row))[0]["cause"] for row in rows] == ["complete", "complete"]
    wait_for(lambda: not cluster.ask("squeue", "-h", "-j", job).strip())


def test_in_an_allocation_it_runs_at_once(cluster: VirtualCluster, tmp_path: Path) -> None:
    config = config_file(tmp_path, train__steps=5)
    command = ["salloc", "--nodes=2", "--ntasks-per-node=2", str(SCRIPT)]
    dry = subprocess.run(
        [*command, "--dry-run", str(config)], env=cluster.environment, capture_output=True, text=True, check=True
    )
    assert "2 nodes (n1, n2), 2 ranks on each" in dry.stdout
    assert "srun --jobid=" in dry.stdout
    assert not (tmp_path / "run").exists()
    done = subprocess.run([*command, str(config)], env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert restarts(tmp_path / "run")[0]["ranks"] == 4


FOREIGN = """
import importlib.metadata, os
original = importlib.metadata.version
if os.environ.get("SLURMD_NODENAME") == "n2":
    importlib.metadata.version = lambda name: "0.1" if name == "numpy" else original(name)
"""


def test_preflight_names_the_node_that_is_not_as_the_others(cluster: VirtualCluster, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FOREIGN)
    (tmp_path / "site.sh").write_text(f"export PYTHONPATH={tmp_path}\n")
    job = submit(cluster, tmp_path, "--nodelist=n1,n2,n3", "--nodes=3", f"--export=ALL,EVACLIP_SITE={tmp_path}/site.sh",
                 train__global_batch=18, cluster__max_same_step=2)  # fmt: skip
    wait_until(cluster, job, "FAILED", tmp_path)
    output = (tmp_path / "out.txt").read_text()
    assert output.count("n2: numpy 0.1, elsewhere ") >= 2
    assert "all-reduce" not in output, "which might not end where nodes differ"
    assert not restarts(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/restarts.jsonl").read_text().splitlines()]
    assert [(row["what"], row["action"]) for row in rows] == [("preflight", "restart"), ("preflight", "stop")]
    assert all("preflight found 1 problems: n2: numpy 0.1, elsewhere " in row["detail"] for row in rows)
    assert [row["blamed"] for row in rows] == ["n2", "n2"], "not the node that found it"
