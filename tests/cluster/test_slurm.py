"""What a job makes of SLURM's answers and variables, without SLURM."""

from __future__ import annotations

import time

import pytest

from evaclip.cluster import slurm
from evaclip.cluster.slurm import SlurmJob
from evaclip.errors import ConfigError

JOB = "JobId=7 JobState=RUNNING Requeue=1 BatchFlag=1 EndTime={end} NodeList=n[1-4] ReqNodeList=(null)"


@pytest.fixture
def answers(monkeypatch):
    """Command and subcommand -> what SLURM says; nothing where it is silent."""
    known = {"scontrol hostnames": "n1\nn2\nn3\nn4\n"}

    def ask(*command: str) -> str:
        return known.get(f"{command[0]} {command[2]}" if command[0] == "scontrol" else command[0], "")

    monkeypatch.setattr(slurm, "_ask", ask)
    return known


def job(**variables: str) -> SlurmJob:
    return SlurmJob({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", **variables})


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, 1),
        ({"SLURM_NTASKS_PER_NODE": "2"}, 2),
        ({"SLURM_GPUS_PER_NODE": "h100:8", "SLURM_NTASKS_PER_NODE": "1"}, 8),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_NODE": "8"}, 4),
        ({"EVACLIP_RANKS_PER_NODE": "3", "SLURM_GPUS_ON_NODE": "4"}, 3),
    ],
)
def test_there_is_a_rank_per_gpu_or_what_the_user_says(variables, ranks):
    assert job(**variables).ranks_per_node == ranks


def test_a_number_of_ranks_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="0 is no number of ranks per node; set EVACLIP_RANKS_PER_NODE"):
        job(EVACLIP_RANKS_PER_NODE="0")


def test_outside_of_a_job_the_message_says_how_to_submit():
    with pytest.raises(ConfigError, match="this is no SLURM job; submit it"):
        SlurmJob({})


@pytest.mark.parametrize("state", ["down", "down*", "fail", "unknown", "powering_down", "alloc*", "mixed*"])
def test_nodes_that_start_nothing_are_left_out(answers, state):
    answers["scontrol job"] = JOB
    answers["sinfo"] = f"n1 allocated\nn2 {state}\nn3 draining\nn4 mixed\n"
    here = job()
    assert here.nodes() == ["n1", "n3", "n4"]
    assert here.num_left == 4


def test_a_node_that_slurm_took_away_is_not_waited_for(answers):
    answers |= {"scontrol job": JOB, "scontrol hostnames": "n1\nn2\nn3\n", "sinfo": "n1 mixed\nn2 mixed\nn3 mixed\n"}
    here = job()
    assert (here.num_left, here.nodes(), here.num_left) == (4, ["n1", "n2", "n3"], 3)


def test_a_silent_controller_is_no_loss_of_nodes(answers):
    assert job().nodes() is None
    answers["scontrol job"] = JOB
    here = job()
    assert here.nodes() is None
    assert here.num_left == 4


@pytest.mark.parametrize(("state", "finite"), [("RUNNING", True), ("COMPLETING", False)])
def test_the_time_left_is_that_to_the_jobs_end(answers, state, finite):
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 600))
    answers["scontrol job"] = JOB.format(end=end).replace("RUNNING", state)
    assert (590 < job().seconds_left <= 600) == finite


def test_only_batch_jobs_that_slurm_takes_back_are_requeued(answers):
    answers["scontrol job"] = JOB
    here = job()
    assert here.may_requeue
    answers["scontrol job"] = ""  # silent: as it was
    assert here.may_requeue
    answers["scontrol job"] = JOB.replace("BatchFlag=1", "BatchFlag=3")  # SLURM has started it anew twice
    assert here.may_requeue
    answers["scontrol job"] = JOB.replace("BatchFlag=1", "BatchFlag=0")  # salloc
    assert not here.may_requeue
    answers["scontrol job"] = JOB.replace("Requeue=1", "Requeue=0")
    assert not here.may_requeue


def test_the_step_gets_all_gpus_of_each_node_and_none_of_sruns_variables(monkeypatch):
    for name in (
        "SRUN_CPUS_PER_TASK",
        "SLURM_NTASKS",
        "SLURM_CPU_BIND",
        "SLURM_JOB_ID",
        "SLURM_CONF",
        "SLURM_NODELIST",
    ):
        monkeypatch.setenv(name, "x")
    command = job(SLURM_GPUS_ON_NODE="8", EVACLIP_SRUN_ARGUMENTS="--container-image='a b'").start_command(
        ["n1", "n3"], ["python"]
    )
    assert {"--mpi=none", "--nodelist=n1,n3", "--ntasks=2", "--gres=gpu:8", "--container-image=a b"} <= {*command}
    unset = {argument.removeprefix("--unset=") for argument in command if argument.startswith("--unset=")}
    assert {"SRUN_CPUS_PER_TASK", "SLURM_NTASKS", "SLURM_CPU_BIND"} <= unset
    assert not unset & {"SLURM_JOB_ID", "SLURM_CONF", "SLURM_NODELIST"}
