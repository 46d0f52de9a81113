"""One job's supervisor: starts an attempt on the job's nodes, watches it, and does what ``policy`` decides.

It runs in the job's batch script (launch/slurm.sh), imports no torch, and holds nothing that its successor after a
requeue would need: that finds the run directory. It writes there ``restarts.jsonl`` (one row per attempt),
``cluster.json`` (see ``status_file``), ``jobs/JOB`` (see ``snapshot``) and ``logs/``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import evaclip
from evaclip import config_file
from evaclip.checkpoint_names import complete, newest_step, saved_slots
from evaclip.cluster.machines import Machines
from evaclip.cluster.policy import Attempt, Decision, choose_nodes, decide, unfit_nodes
from evaclip.cluster.snapshot import Snapshot, take
from evaclip.cluster.status_file import StatusFile
from evaclip.cluster.watch import Ending, Launchers, StopSignals, Watch
from evaclip.config import RunConfig
from evaclip.data.order import choose_slots
from evaclip.errors import ConfigError
from evaclip.history import whole_rows
from evaclip.lock import require_free

_log = logging.getLogger(__name__)

_PORTS = range(10_000, 30_000)  # below those that the system gives to anybody
_PATIENCE = 5  # node_timeout_seconds in which a node hears nothing of its supervisor: SLURM's commands may take a while
_NODES_BACK_SECONDS = 30.0  # for nodes that the job still has to answer again, before fewer are taken or are too few


class Supervisor:
    """A job from its start to its end or requeue."""

    def __init__(
        self, config: RunConfig, machines: Machines, snapshot: Snapshot, request: StopSignals, *, only_check: bool
    ) -> None:
        self.config, self.machines, self.snapshot, self.request = config, machines, snapshot, request
        self._only_check = only_check
        self.run_dir = Path(config.run_dir)
        self._status = StatusFile(self.run_dir / "cluster.json", machines.job)
        self.attempts: list[Attempt] = []
        self._number = 0
        self._launchers: Launchers | None = None
        self._suspects: set[str] = set()
        """Nodes that gave no sign of life, until they start a process again."""
        self._why_too_few = ""

    def run(self) -> Decision:
        """Attempt after attempt, until one of them is the last; the training begins when the check is done."""
        decision = Decision("done", "nothing to do")
        for what in ("preflight",) if self._only_check else ("preflight", "train"):
            self.attempts = (
                earlier_attempts(self.run_dir, self.machines.job, what) if self.machines.was_requeued else []
            )
            decision = Decision("restart", "")
            while decision.action == "restart":
                if decision.wait_seconds:
                    _log.info("starting again in %.0f s", decision.wait_seconds)
                    self._status.tell(self._number, "waiting")
                    self._sleep(decision.wait_seconds)
                decision = self._attempt([what, str(self.snapshot.config)])
            if decision.action != "done":
                break
        self._close()
        self._status.tell(self._number, "ended")
        self._status.close()
        return decision

    def _attempt(self, arguments: list[str]) -> Decision:
        """One start of all ranks, recorded."""
        nodes = self._nodes()
        self._number += 1
        if not nodes:
            return self._too_few(arguments[0])
        if self._launchers is None or self._launchers.nodes != nodes or self._launchers.process.poll() is not None:
            self._close()
            self._launchers = Launchers(nodes, self.machines.start_command(nodes, _python("node")))
        ranks, began = len(nodes) * self.machines.ranks_per_node, time.time()
        _log.info("attempt %d: %s on %s, %d ranks", self._number, arguments[0], _short(nodes), ranks)
        state = "preflight" if arguments[0] == "preflight" else "running"
        watch = Watch(
            self._launchers,
            self.config.cluster,
            self.request,
            partial(self._status.tell, self._number, state),
            lambda: self.machines.seconds_left,
        )
        ending = watch.run(
            {
                "attempt": self._number,
                "name": f"{self.machines.job}-{self._number}-{began:.3f}",
                "may_give_back": self.machines.in_a_queue and not self._only_check,
                "patience_seconds": _PATIENCE * self.config.cluster.node_timeout_seconds,
                "nodes": nodes,
                "ranks_per_node": self.machines.ranks_per_node,
                "address": self.machines.address(nodes[0]),
                "port": self._port(),
                "command": _python("rank"),
                "arguments": arguments,
                "logs": str(self.run_dir / "logs"),
            }
        )
        return self._judge(arguments[0], ending, nodes, began)

    def _judge(self, what: str, ending: Ending, nodes: tuple[str, ...], began: float) -> Decision:
        """Decide what follows an attempt, and keep both for people, scripts and the next start of this job."""
        if what == "preflight":  # the node that found what is wrong is not the one that has it
            named = re.search(r"preflight found \d+ problems?: (\S+): ", ending.detail)
            ending = ending._replace(blamed=named[1] if named and named[1] in nodes else None)
        if ending.lost:
            self._suspects |= ending.lost
            self._close()
        saved = self._saved()
        self.attempts.append(Attempt(nodes, ending.cause, ending.detail, ending.step, saved, ending.blamed))
        may_requeue = self._may_requeue()
        decision = decide(self.attempts, self.config.cluster, may_requeue=may_requeue)
        if self.request.numbers and decision.action == "restart":  # it failed while it was asked to stop
            decision = Decision("requeue" if may_requeue else "stop", decision.reason)
        row = {
            "time": time.time(),
            "job": self.machines.job,
            "attempt": self._number,
            "what": what,
            "nodes": nodes,
            "ranks": len(nodes) * self.machines.ranks_per_node,
            "seconds": round(time.time() - began, 1),
            "step": ending.step,
            "saved": saved,
            "cause": ending.cause,
            "detail": ending.detail,
            "blamed": ending.blamed,
            "action": decision.action,
        }
        try:
            with (self.run_dir / "restarts.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # a full disk, perhaps what the ranks died of
            _log.warning("restarts.jsonl cannot be written: %s", error)
        log = _log.info if ending.cause in ("complete", "asked to stop") else _log.warning
        log("attempt %d: %s (%s); %s", self._number, ending.cause, ending.detail, decision.action)
        return decision

    def _saved(self) -> int | None:
        """Step of the newest checkpoint; the one known before where storage fails, perhaps what the ranks died of."""
        try:
            return newest_step(self.run_dir / "checkpoints")
        except OSError as error:
            _log.warning("%s cannot be read: %s", self.run_dir, error)
            return self.attempts[-1].saved if self.attempts else None

    def _may_requeue(self) -> bool:
        """Whether the job goes back into the queue by itself: not where its user ends it, or SLURM does that anyway."""
        asked = self.request.numbers
        if self._only_check or len(asked) > 1 or signal.SIGINT in asked:
            return False
        return self.machines.may_requeue and not (asked and self.machines.is_ending())

    def _nodes(self) -> tuple[str, ...]:
        """Nodes for the next attempt; waits a while for enough of them."""
        machines, config = self.machines, self.config
        slots = self._slots()
        deadline = time.monotonic() + _NODES_BACK_SECONDS
        while not self.request.numbers:
            there = machines.nodes()
            if there is None:  # as long as SLURM is silent, what runs is what there is
                running = self._launchers is not None and self._launchers.process.poll() is None
                there = list(self._launchers.nodes) if self._launchers and running else []
            self._suspects -= self._answering(self._suspects & {*there})
            available = [node for node in there if node not in self._suspects]
            choose = partial(
                choose_nodes,
                ranks_per_node=machines.ranks_per_node,
                slots=slots,
                wanted=machines.num_nodes,
                min_nodes=config.cluster.min_nodes,
            )
            unfit = unfit_nodes(self.attempts)
            chosen = choose([node for node in available if node not in unfit]) or choose(available)
            awaited, over = min(machines.num_left, machines.num_nodes) - len(available), time.monotonic() > deadline
            if chosen and (over or awaited <= 0):
                spare = [node for node in available if node not in chosen]
                if spare:
                    _log.info("%s spare: %d slots are shared by %d nodes", _short(spare), slots, len(chosen))
                return chosen
            if len(available) == machines.num_nodes:
                # All are there, and do not divide the work: say so as a single machine would.
                choose_slots(config.train.global_batch, machines.num_nodes * machines.ranks_per_node, slots)
            if over or machines.num_left < (config.cluster.min_nodes or machines.num_nodes):
                self._why_too_few = self._reason(len(available), slots)
                break  # what SLURM has taken away from the job does not come back
            self._sleep(1.0)
        return ()

    def _slots(self) -> int:
        """Of the run's data order: those of its newest checkpoint, else what the configuration says."""
        own = None
        while not self.request.numbers:
            try:
                saved = complete(self.run_dir / "checkpoints")
                own = saved_slots(saved[-1]) if saved else None
                break
            except OSError as error:
                _log.warning("%s cannot be read, waiting for it: %s", self.run_dir, error)
                self._sleep(10.0)
        return own or choose_slots(self.config.train.global_batch, 1, self.config.data.slots)

    def _reason(self, available: int, slots: int) -> str:
        """Why nothing is started with so many nodes."""
        wanted = self.machines.num_nodes
        fewest = min(self.config.cluster.min_nodes or wanted, wanted)
        if available < fewest:
            return f"fewer than {fewest} of {wanted} nodes answer (cluster.min_nodes)"
        ranks = self.machines.ranks_per_node
        return (
            f"{available} of {wanted} nodes answer, and no number of them from {fewest} (cluster.min_nodes) up shares "
            f"{slots} slots evenly with {ranks} ranks on each"
        )

    def _port(self) -> int:
        """Another one for each job and attempt: jobs may share a node, and what was killed may still hold its own."""
        number = int(re.sub(r"\D", "", self.machines.job) or os.getpid())
        return _PORTS[(16 * number + self._number) % len(_PORTS)]

    def _answering(self, nodes: set[str]) -> set[str]:
        with ThreadPoolExecutor(32) as pool:
            answers = pool.map(self.machines.answers, nodes)
            return {node for node, here in zip(nodes, answers, strict=True) if here}

    def _too_few(self, what: str) -> Decision:
        if self.request.numbers:
            return self._judge(what, Ending("asked to stop", "asked between two attempts", None), (), time.time())
        return self._judge(what, Ending("too few nodes", self._why_too_few, None), (), time.time())

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.request.numbers:
            time.sleep(0.1)

    def _close(self) -> None:
        if self._launchers:
            self._launchers.close()
            self._launchers = None


def earlier_attempts(run_dir: Path, job: str, what: str) -> list[Attempt]:
    """What became of this job before it was requeued, from ``restarts.jsonl``."""
    try:
        rows = whole_rows(run_dir / "restarts.jsonl")
    except OSError:  # it only counts failures
        return []
    return [
        Attempt(tuple(row["nodes"]), row["cause"], row["detail"], row["step"], row["saved"], row["blamed"])
        for row in rows
        if (row.get("job"), row.get("what")) == (job, what)
    ]


def supervise(config: RunConfig, machines: Machines, *, renew: bool, only_check: bool) -> int:
    """Run a job; the exit code: 0 where the run is complete, 75 where it was asked to stop, 1 otherwise.

    Args:
        config: Of the run.
        machines: Where.
        renew: Take a new snapshot of the code after a requeue, too.
        only_check: Preflight, and nothing else.

    Raises:
        ConfigError: The run directory cannot be written, or the ranks cannot share the work.
        RunLockedError: Another job trains there.
    """
    logging.basicConfig(format="%(asctime)s launcher: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    request = StopSignals()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request.receive)
    run_dir = Path(config.run_dir).absolute()
    require_free(run_dir)
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        renew = renew or not machines.was_requeued
        snapshot = take(run_dir, machines.job, config_file.dump(config), renew=renew)
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be written: {error.strerror}; choose another folder") from error
    if machines.in_a_queue and not machines.was_requeued:  # where launch/slurm.sh finds it after a requeue
        with suppress(OSError):
            pointer = Path(evaclip.__file__).parents[1] / ".jobs" / machines.job
            pointer.parent.mkdir(exist_ok=True)
            pointer.unlink(missing_ok=True)
            pointer.symlink_to(snapshot.folder)
    paths = [str(snapshot.code), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Torch's threads get into the way of the workers; one per rank, unless told otherwise.
    os.environ.update(PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    supervisor = Supervisor(config_file.load(snapshot.config), machines, snapshot, request, only_check=only_check)
    decision = supervisor.run()
    if decision.action == "requeue" and machines.is_ending():  # since it was decided
        _log.info("not requeued: the job is being ended")
    elif decision.action == "requeue":
        _log.info("requeued: %s", decision.reason)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        machines.requeue()
        time.sleep(60)  # SLURM ends this process; an exit before that could count as the job's end
    if decision.action == "stop":
        _log.info("stopped: %s", decision.reason)
    last = supervisor.attempts[-1].cause if supervisor.attempts else "asked to stop"
    return 0 if decision.action == "done" else os.EX_TEMPFAIL if last == "asked to stop" else 1


def plan(config: RunConfig, machines: Machines | None) -> str:
    """What would be started: machines, commands and settings; without machines, as far as it is known."""
    ours = ("EVACLIP_", "NCCL_", "GLOO_", "TORCH_", "CUDA_", "OMP_")
    settings = [f"  {name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(ours)]
    run_dir = Path(config.run_dir)
    lines = [f"run_dir {run_dir.absolute()}, newest checkpoint: {newest_step(run_dir / 'checkpoints')}"]
    if machines:
        nodes = machines.nodes() or []
        command = shlex.join(machines.start_command(nodes, _python("node")))
        lines += [
            f"job {machines.job}: {len(nodes)} nodes ({_short(nodes)}), {machines.ranks_per_node} ranks on each",
            f"requeued by itself: {'yes' if machines.may_requeue else 'no'}",
            f"on every node: {command}",
        ]
    else:
        lines += ["no job yet: nodes and ranks follow from what sbatch or salloc is asked for"]
    lines += [f"every rank, first with preflight and then with train: {shlex.join(_python('rank'))}", "settings:"]
    return "\n".join([*lines, *(settings or ["  none"])])


def _python(module: str) -> list[str]:
    """A module of this package, in the Python of the nodes; in a container that may be another one."""
    return [os.environ.get("EVACLIP_NODE_PYTHON") or sys.executable, "-P", "-m", f"evaclip.cluster.{module}"]


def _short(nodes: Sequence[str]) -> str:
    return ", ".join(nodes[:8]) + (f" and {len(nodes) - 8} more" if len(nodes) > 8 else "")
