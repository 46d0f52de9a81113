"""A SLURM job as SLURM's commands describe it: a few calls, no decisions."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import datetime

from evaclip.errors import ConfigError

_log = logging.getLogger(__name__)

_UNUSABLE = re.compile(r"down|fail|power|unk|inval|\*", re.IGNORECASE)
"""In a node's state: nothing starts there; ``*`` stands for one that does not answer. One that drains is still ours."""
_TRIES = 6
"""Of a question to SLURM: its controller may be starting anew."""
_REQUEUE_SECONDS = 900.0
_UNREACHABLE = re.compile(r"contact|connect|timed out|socket", re.IGNORECASE)
_OPTIONS = re.compile(
    r"SRUN_\w+|SLURM_(?!JOB_|JOBID|ARRAY_|CLUSTER|CONF$|RESTART_|SUBMIT_|GPUS_ON_NODE|JWT|WORKING_|NNODES|NODELIST)\w+"
)
"""Variables that srun would take for options of ours, from how the job was submitted or from a user's shell; all of
SLURM's, but what says which job this is."""
_ENDING = ("CANCELLED", "COMPLETING", "TIMEOUT", "PREEMPTED", "COMPLETED", "FAILED")


class SlurmJob:
    """The job that this process runs in.

    Raises:
        ConfigError: There is none, or its number of ranks is none.
    """

    in_a_queue = True

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        if "SLURM_JOB_ID" not in environment:
            raise ConfigError(
                "this is no SLURM job; submit it (sbatch --nodes=N launch/slurm.sh CONFIG.yaml) or start it inside "
                "of salloc; without SLURM use launch/local.sh"
            )
        self.job = environment["SLURM_JOB_ID"]
        # A task of an array: the number of the last one stands for all of them.
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        self._name = f"{array}_{task}" if array else self.job
        self.num_nodes = self.num_left = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
        # One rank per GPU; on CPUs what --ntasks-per-node says.
        counts = ("EVACLIP_RANKS_PER_NODE", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_NTASKS_PER_NODE")
        ranks = next((environment[name] for name in counts if environment.get(name)), "1")
        ranks = ranks.rpartition(":")[2]  # of h100:8
        if not ranks.isdecimal() or int(ranks) < 1:
            raise ConfigError(f"{ranks} is no number of ranks per node; set EVACLIP_RANKS_PER_NODE to one above 0")
        self.ranks_per_node = int(ranks)
        on_node = environment.get("SLURM_GPUS_ON_NODE", "")
        self._gpus = [f"--gres=gpu:{on_node}"] if on_node.isdecimal() and int(on_node) else []
        self._srun_arguments = shlex.split(environment.get("EVACLIP_SRUN_ARGUMENTS", ""))
        self.was_requeued = environment.get("SLURM_RESTART_COUNT", "0") != "0"
        self._may_requeue = True

    @property
    def may_requeue(self) -> bool:
        """It is a batch job of the kind that SLURM takes back, and nobody has ended it."""
        if described := self._describe():
            # BatchFlag counts how often SLURM itself has started the job anew.
            self._may_requeue = bool(re.search(r" BatchFlag=[1-9]", described)) and "Requeue=1" in described
        return self._may_requeue

    @property
    def seconds_left(self) -> float:
        """Until the job's time is over."""
        if self.is_ending():  # its end is now, and KillWait what is left
            return math.inf
        found = re.search(r" EndTime=([\d-]+T[\d:]+)", self._describe())
        return datetime.fromisoformat(found[1]).timestamp() - time.time() if found else math.inf

    def nodes(self) -> list[str] | None:
        """Those that SLURM says the job has and can use now, in its order; without those that it lost.

        None where SLURM does not answer.
        """
        if not (described := self._describe()):
            return None
        listed = re.search(r" NodeList=(\S+)", described)
        if not listed or listed[1] == "(null)":
            return []
        states = _ask("sinfo", "--all", "--noheader", "--Node", "--nodes", listed[1], "--format", "%N %T")
        names = _ask("scontrol", "show", "hostnames", listed[1]).split()
        if not states or not names:
            return None
        self.num_left = len(names)
        usable = {name for name, state in (line.split() for line in states.splitlines()) if not _UNUSABLE.search(state)}
        return [name for name in names if name in usable]

    def address(self, node: str) -> str:
        """Where SLURM itself reaches a node, or what ``EVACLIP_ADDRESS`` makes of its name: ``{node}-ib0``."""
        if pattern := os.environ.get("EVACLIP_ADDRESS"):
            return pattern.replace("{node}", node)
        found = re.search(r" NodeAddr=(\S+)", _ask("scontrol", "show", "node", node, "--oneliner"))
        return found[1] if found else node

    def start_command(self, nodes: Sequence[str], command: Sequence[str]) -> list[str]:
        """The srun for one process per node, each with all of the job's cores, memory and GPUs there."""
        return [
            *_without(_OPTIONS),
            *("srun", f"--jobid={self.job}", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}"),
            *("--ntasks-per-node=1", f"--nodelist={','.join(nodes)}"),
            "--overlap",  # with what is still ending of the step before
            "--no-kill",  # a node that is lost does not end the step on the others: we do
            "--wait=0",  # nor does one whose ranks have ended
            "--kill-on-bad-exit=0",  # a cluster may have that by default
            "--mem=0",  # all that the job has
            *self._gpus,  # of each node, in whatever form the job asked for them
            "--cpu-bind=none",  # data workers need the other cores
            "--mpi=none",  # whatever the cluster has by default
            "--export=ALL",  # whatever sbatch was told about its environment
            *self._srun_arguments,
            *command,
        ]

    def answers(self, node: str) -> bool:
        """Whether a node starts a process, outside of any container."""
        try:
            srun = ["srun", f"--jobid={self.job}", "--overlap", "-N1", "-n1", "--gres=none", f"-w{node}", "true"]
            command = [*_without(_OPTIONS), *srun]
            subprocess.run(command, check=True, capture_output=True, timeout=10, stdin=subprocess.DEVNULL)  # noqa: S603
        except (OSError, subprocess.SubprocessError):
            return False
        return True

    def is_ending(self) -> bool:
        """Whether it was cancelled, or is being ended by SLURM, which then decides what becomes of it."""
        found = re.search(r" JobState=(\S+)", self._describe())
        return bool(found) and found[1] in _ENDING

    def requeue(self) -> None:
        """Put the job back into the queue; SLURM ends this process for it.

        Raises:
            ConfigError: SLURM refuses.
        """
        command = ["scontrol", "requeue", self._name]
        deadline = time.monotonic() + _REQUEUE_SECONDS
        while True:
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
            if done.returncode == 0:
                return
            if time.monotonic() < deadline and _UNREACHABLE.search(done.stderr):
                time.sleep(10)
                continue
            raise ConfigError(f"SLURM does not requeue job {self.job}: {done.stderr.strip()}; submit it again")

    def _describe(self) -> str:
        return _ask("scontrol", "show", "job", self._name, "--oneliner")


def _without(options: re.Pattern[str]) -> list[str]:
    """``env`` without variables of some names."""
    return ["env", *(f"--unset={name}" for name in sorted(os.environ) if options.fullmatch(name))]


def _ask(*command: str) -> str:
    """Output of one of SLURM's commands; empty, and a warning, where it fails for half a minute."""
    environment = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    why = ""
    for number in range(_TRIES):
        if number:
            time.sleep(number)
        try:
            done = subprocess.run(  # noqa: S603
                command, capture_output=True, text=True, check=False, timeout=10, env=environment
            )
        except subprocess.TimeoutExpired:
            why = "no answer"
            continue
        if done.returncode == 0:
            return done.stdout
        why = done.stderr.strip()
    _log.warning("%s: %s", " ".join(command), why)
    return ""
