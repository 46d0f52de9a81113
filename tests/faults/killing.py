"""Runs that are killed: real processes, moments to strike at, and what a strike hit.

What a strike hit is read off the files and the log that the run left behind, not off what was aimed at.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import psutil

from evaclip.history import Row, load_history

REPOSITORY = Path(__file__).parents[2]
PATIENCE_SECONDS = 180  # for anything that has to happen

STARTING = "start-up: imports, meeting the other ranks"
INDEXING = "building the shards' indexes"
OPENING = "opening the run: checkpoint, model, engine"
STEP = "a step"
WRITING = "a checkpoint's write"
DELETING = "an old checkpoint's deletion"
EVALUATING = "an evaluation"
HIT = (STARTING, INDEXING, OPENING, STEP, WRITING, DELETING, EVALUATING)
"""What a run can be doing."""

EVERYTHING, RANK, WORKER = "all processes at once", "one rank", "one data worker"


@dataclass(frozen=True)
class Command:
    """``evaclip train CONFIG run_dir=...`` on some ranks; the same one starts a run and continues it."""

    config: Path
    run_dir: Path
    world: int
    num_shards: int
    eval_every: int

    @property
    def indexes(self) -> Path:
        """Where this run keeps the shards' indexes."""
        return self.run_dir / "indexes"

    def finish(self) -> float:
        """Run to the end; the seconds that took."""
        with self.start(launched=False) as start:
            start.end_well()
            return start.seconds

    @contextmanager
    def start(self, *, launched: bool) -> Iterator[Start]:
        """Start it, by ``launch/local.sh`` or each rank by itself, and leave no process behind."""
        options = [str(self.config), f"run_dir={self.run_dir}", f"data.index_dir={self.indexes}"]
        if launched:
            commands = [(["launch/local.sh", str(self.world), *options], {})]
        else:
            train, port = [sys.executable, "-m", "evaclip", "train", *options], _free_port()
            commands = [(train, _rank_environment(rank, self.world, port)) for rank in range(self.world)]
        self.run_dir.mkdir(parents=True, exist_ok=True)
        start = Start(self, commands, launched=launched)
        try:
            yield start
        finally:
            start.kill()


Commands = Sequence[tuple[list[str], dict[str, str]]]
"""Arguments and own environment of each process that is started."""


def _rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    if world == 1:
        return {}
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in group.items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Start:
    """One start of a run, and what it has done so far."""

    def __init__(self, command: Command, commands: Commands, *, launched: bool) -> None:
        self.command = command
        self._launched = launched
        self._log = command.run_dir / "log.txt"
        self._log_size = self._log.stat().st_size if self._log.exists() else 0
        self._errors = command.run_dir.with_suffix(".stderr")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
        environment |= {"OMP_NUM_THREADS": "1", "PATH": path}
        self._time = time.time()
        self.seconds_to_step: float | None = None
        """Until the first row of a step was there, as far as somebody watched."""
        with self._errors.open("w") as errors:
            self._processes = [
                subprocess.Popen(
                    arguments,
                    env=environment | own,
                    cwd=REPOSITORY,
                    stderr=errors,
                    stdout=errors,
                    start_new_session=True,
                )
                for arguments, own in commands
            ]

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.time() - self._time

    def said(self) -> str:
        """What this start has added to the run's log."""
        if not self._log.exists():
            return ""
        with self._log.open("rb") as file:
            file.seek(self._log_size)
            return file.read().decode()

    def steps(self) -> list[int]:
        """Steps of which this start has published a row."""
        return [int(step) for step in re.findall(r"step (\d+) of \d+: loss", self.said())]

    @property
    def ended(self) -> bool:
        """Whether all processes are gone by themselves."""
        return all(process.poll() is not None for process in self._processes)

    def wait_until(self, reached: Callable[[], bool]) -> bool:
        """Wait for a moment; False where the run came to its end before."""
        while not reached():
            if self.ended:
                self.end_well()
                return False
            if self.seconds_to_step is None and self.steps():
                self.seconds_to_step = self.seconds
            assert self.seconds < PATIENCE_SECONDS, f"a run hangs: {self.errors()}"
            time.sleep(0.001)
        return True

    def end_well(self) -> None:
        """Wait for the end, which has to be a good one."""
        codes = [process.wait(PATIENCE_SECONDS) for process in self._processes]
        assert not any(codes), f"exit codes {codes}: {self.errors()}"

    def errors(self) -> str:
        """The end of what all ranks wrote to the console."""
        return self._errors.read_text(errors="replace")[-3000:]

    def where(self) -> str:
        """What the run is doing, or was doing when it died."""
        said, command = self.said(), self.command
        checkpoints = command.run_dir / "checkpoints"
        indexes = len(list(command.indexes.glob("*.safetensors")))
        if not self._is_new(command.run_dir / ".lock"):
            return STARTING
        if not re.search(r"(starting|continuing) .* at step", said):
            return INDEXING if command.indexes.exists() and indexes < command.num_shards else OPENING
        if any(map(self._is_new, checkpoints.glob(".step_*.tmp"))):
            return WRITING
        if any(map(self._is_new, checkpoints.glob(".step_*.deleted"))):
            return DELETING
        step = max(self.steps(), default=0)
        fresh = step > 0 or "starting" in said
        due = fresh and step % command.eval_every == 0 and f"evaluation at step {step}\n" not in said
        return EVALUATING if due else STEP

    def _is_new(self, path: Path) -> bool:
        """Whether this start has made or changed a file."""
        with suppress(OSError):  # gone meanwhile
            return path.stat().st_mtime > self._time
        return False

    def hold(self, moment: str) -> bool:
        """Stop all processes; where they are no longer at the moment, let them go on, and return False."""
        family = self._family()
        _signal(family, signal.SIGSTOP)
        time.sleep(0.05)  # until all their threads stand still
        if self.where() == moment:
            return True
        _signal(family, signal.SIGCONT)
        return False

    def kill(self) -> bool:
        """Send SIGKILL to all processes at once; whether there was one to be killed."""
        self._strike(self._family())
        return -signal.SIGKILL in [process.wait(PATIENCE_SECONDS) for process in self._processes]

    def kill_one(self, victim: str, random: Random) -> None:
        """Send SIGKILL to a rank or a data worker, on which the others have to end by themselves, with an error."""
        family = self._family()
        ranks = [child for root in self._roots() for child in root.children()] if self._launched else self._roots()
        workers = [child for rank in ranks for child in rank.children() if child.cmdline() == rank.cmdline()]
        self._strike([random.choice(ranks if victim == RANK else workers)])
        codes = [process.wait(PATIENCE_SECONDS) for process in self._processes]
        assert all(codes), f"exit codes {codes} without {victim}: {self.errors()}"
        _wait_until_gone(family)

    def _strike(self, doomed: Sequence[psutil.Process]) -> None:
        _signal(doomed, signal.SIGKILL)
        _wait_until_gone(doomed)

    def _roots(self) -> list[psutil.Process]:
        return [psutil.Process(process.pid) for process in self._processes if process.poll() is None]

    def _family(self) -> list[psutil.Process]:
        """All living processes of this start."""
        roots = self._roots()
        return [*roots, *(child for root in roots for child in root.children(recursive=True))]


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _wait_until_gone(processes: Sequence[psutil.Process]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while alive := [process for process in processes if _is_alive(process)]:
        assert time.monotonic() < deadline, f"{alive} outlive their run"
        time.sleep(0.002)


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


# -------------------------------------------------------------------------------------------------------- many of them


class Life(NamedTuple):
    """What a start achieved before it was killed."""

    run: int
    """Which of the runs that came to their end."""
    hit: str
    victim: str
    first_step: int | None
    """From which it went on; None where it did not get so far."""
    rows: list[Row]
    """The run's whole history at its death."""
    seconds_to_step: float | None
    """From the start to the first new row, if there was one."""


Moment = Callable[[Start, Random, float], Callable[[], bool]]


def _after(delay: float, reached: Callable[[], bool]) -> Callable[[], bool]:
    """So many seconds after something is first seen."""
    since: list[float] = []

    def later() -> bool:
        if not since and reached():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= delay

    return later


def any_time(start: Start, random: Random, duration: float) -> Callable[[], bool]:
    """A random time within most of what a whole run takes; the last steps have their turn in a continued one."""
    moment = random.uniform(0.1, 0.7 * duration)
    return lambda: start.seconds > moment


def in_index(start: Start, random: Random, duration: float) -> Callable[[], bool]:
    """Some indexes are there, some are not."""
    shutil.rmtree(start.command.indexes, ignore_errors=True)
    return lambda: start.where() == INDEXING and start.command.indexes.exists()


def in_opening(start: Start, random: Random, duration: float) -> Callable[[], bool]:
    """Soon after the run directory was taken."""
    return _after(random.uniform(0, 0.3), lambda: start.where() == OPENING)


def in_step(start: Start, random: Random, duration: float) -> Callable[[], bool]:
    """After some new steps."""
    steps = random.randint(1, 15)
    return _after(random.uniform(0, 0.05), lambda: len(start.steps()) >= steps)


def in_write(start: Start, random: Random, duration: float) -> Callable[[], bool]:
    """While a temporary folder of a checkpoint is there; the processes are stopped, or it might go before the kill."""

    def reached() -> bool:
        if start.where() != WRITING:
            return False
        time.sleep(random.uniform(0, 0.01))
        return start.hold(WRITING)

    return reached


def in_evaluation(start: Start, random: Random, duration: float) -> Callable[[], bool]:
    """Between a step that is followed by an evaluation and its results."""
    return lambda: start.where() == EVALUATING


@dataclass
class Hunt:
    """A run that is killed again and again; whenever one gets to its end all the same, the next one begins."""

    command: Command
    random: Random
    duration: float
    """Seconds that the run takes undisturbed, start-up included."""
    check: Callable[[Path], None]
    """Called with every finished run's folder."""
    lives: list[Life] = field(default_factory=list)
    finished: list[Path] = field(default_factory=list)

    def kill(self, moment: Moment, victim: str = EVERYTHING) -> None:
        """Start the run and kill it at a moment."""
        for _ in range(5):
            with self.command.start(launched=self.command.world > 1 and victim != EVERYTHING) as start:
                if start.wait_until(moment(start, self.random, self.duration)):
                    hit = start.where()
                    if victim != EVERYTHING:
                        start.kill_one(victim, self.random)
                        return self._remember(start, hit, victim)
                    if start.kill():
                        return self._remember(start, start.where(), victim)
            self._next()
        raise AssertionError(f"five runs came to their end and never to {moment.__name__}")

    def finish(self) -> None:
        """Leave the run alone."""
        self.command.finish()
        self._next()

    def _remember(self, start: Start, hit: str, victim: str) -> None:
        history = start.command.run_dir / "metrics.jsonl"
        rows = load_history(history) if history.exists() else []
        opened = re.search(r"(?:starting|continuing) .* at step (\d+)", start.said())
        first_step = int(opened[1]) if opened else None
        self.lives.append(Life(len(self.finished), hit, victim, first_step, rows, start.seconds_to_step))

    def _next(self) -> None:
        self.check(self.command.run_dir)
        self.finished.append(self.command.run_dir)
        self.command = replace(self.command, run_dir=self.command.run_dir.with_suffix(f".{len(self.finished)}"))
