"""One node's launcher: starts this node's ranks, watches them, and tells the supervisor, which decides; no torch.

Why not torchrun: it ends what is left of a run with SIGTERM and then waits for up to 30 s (a rank that hangs in a
collective takes all of them), turns every exit code into 1, tells no stacks, leaves its ranks alive when it is killed
itself, and imports torch before it starts anything. The ranks get torchrun's environment and meet in the same way.

Orders come as lines of JSON on stdin, reports go as lines of JSON to stdout, none above 1000 bytes: srun carries longer
ones in pieces that it mixes with those of other nodes. Where the supervisor falls silent, its node is lost: the ranks
are ended, and the nodes that are left ask SLURM to put the job back into its queue; soon, where SLURM is ending this
process too. When this process ends, the system ends its ranks (prctl(2), PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from evaclip.cluster.behind import Behind
from evaclip.cluster.processes import RankProcess, most_telling, state, write_stacks
from evaclip.cluster.protocol import LEFT_WELL, ONE_REQUEST_SECONDS, REPORT_SECONDS, STALLED_SECONDS
from evaclip.cluster.slurm import SlurmJob
from evaclip.errors import EvaclipError
from evaclip.heartbeat import FOLDER, read_beats

_KILLED_SECONDS = 0.5  # for the others to end by themselves, and with their own words, after one was killed
_FAILED_SECONDS = 5.0  # the same after one ended with an error, which the others may know too
_SIGNS_IN_A_REPORT = 8
_MOST_DEAD_SPARES = 3
_DYING_SECONDS = 20.0
_FRESH_SECONDS = 8.0  # in which a supervisor that lives writes cluster.json several times
_ORPHANED_SECONDS = 2.0  # for SLURM to end this process, where it has ended the supervisor
_ENDING_SECONDS = 5.0  # of silence after a signal; with the above well below SLURM's KillWait, which is 30 s by default


class Node:
    """The ranks of this node, one attempt after the other."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._selector = selectors.DefaultSelector()
        self._ranks: list[RankProcess] = []
        self._spares: list[RankProcess] = []
        self._dead_spares = 0
        """In this attempt: where they die, others would, and take the ranks' memory and cores at it."""
        self._command: list[str] = []
        self._attempt = 0
        self._beats = Path(tempfile.mkdtemp(prefix="evaclip_"))
        self._logs = Path()
        self._orders = b""
        self._files = Behind()
        self._dismissed = False
        self._may_give_back = False
        self._signalled_at = 0.0
        """When the scheduler first asked this attempt to stop."""
        self._passed_on = False
        """The ranks were asked to stop; to ask them again would end them at once."""
        self._asked = time.monotonic()
        """When the supervisor was last heard of."""
        self._patience = float("inf")
        self._looking: float | None = None
        """Since when for a supervisor's signs in ``cluster.json``."""
        self._seen: set[bytes] = set()
        self._codes: dict[int, int | None] = {}
        """Of the ranks that have ended, in that order; None of those that were killed from here."""
        self._deadline: float | None = None
        """When the ranks that are left are killed."""
        self._dying = 0.0
        """Since when all ranks have ended or been killed."""

    def run(self) -> None:
        """Follow orders until there are no more."""
        self._selector.register(0, selectors.EVENT_READ, None)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._signalled)
        reported, looked = 0.0, time.monotonic()
        try:
            while not self._dismissed:
                if time.monotonic() - looked > STALLED_SECONDS:
                    self._asked += time.monotonic() - looked
                looked = time.monotonic()
                for key, _ in self._selector.select(0.05):
                    if key.data is None:
                        self._take_orders()
                    elif not key.data.pump():
                        self._selector.unregister(key.fileobj)
                self._end_together()
                if time.monotonic() - reported >= REPORT_SECONDS:
                    reported = time.monotonic()
                    self._tell_signs()
                    self._keep_spares()
                    if self._is_alone():
                        return
        finally:
            for rank in (*self._ranks, *self._spares):
                rank.kill()
            self._files.close()
            shutil.rmtree(self._beats, ignore_errors=True)

    def _take_orders(self) -> None:
        """Do what is asked."""
        content = os.read(0, 1 << 16)
        if content:
            self._asked = time.monotonic()
        else:  # nobody will ask again
            self._selector.unregister(0)
            self._patience = min(self._patience, _ORPHANED_SECONDS)
        *lines, self._orders = (self._orders + content).split(b"\n")
        for line in lines:
            order = json.loads(line)
            match order["order"]:
                case "start":
                    self._start(order)
                case "signal":
                    self._send(order["number"])
                case "stacks":
                    threading.Thread(target=self._stacks, daemon=True).start()
                case "kill":
                    self._kill()
                case "alive":
                    pass
                case "leave":
                    self._dismissed = True
                case other:
                    raise AssertionError(other)

    def _start(self, order: dict[str, Any]) -> None:
        """Start this node's ranks with the environment that torchrun would give them."""
        nodes, local_ranks = order["nodes"], order["ranks_per_node"]
        self._attempt, self._patience = order["attempt"], order["patience_seconds"]
        self._command, self._codes, self._deadline = order["command"], {}, None
        self._may_give_back, self._signalled_at, self._passed_on = order["may_give_back"], 0.0, False
        self._dead_spares = 0
        for path in self._beats.iterdir():
            path.unlink()
        self._logs = Path(order["logs"])
        first = nodes.index(self.name) * local_ranks
        for local in range(local_ranks):
            variables = {
                "RANK": first + local,
                "LOCAL_RANK": local,
                "WORLD_SIZE": len(nodes) * local_ranks,
                "LOCAL_WORLD_SIZE": local_ranks,
                "GROUP_RANK": nodes.index(self.name),
                "MASTER_ADDR": order["address"],
                "MASTER_PORT": order["port"],
                "EVACLIP_NODE": self.name,
                "EVACLIP_NODES": ",".join(nodes),
                "EVACLIP_START": order["name"],
                FOLDER: self._beats,
            }
            self._spares = [rank for rank in self._spares if rank.process.poll() is None]
            rank = self._spares.pop() if self._spares else self._new()
            environment = {name: str(value) for name, value in variables.items()}
            console = self._logs / f"console_{first + local:05d}.txt"
            rank.begin(first + local, environment, order["arguments"], console)
            self._ranks.append(rank)

    def _new(self) -> RankProcess:
        rank = RankProcess(self._command, self._files)
        self._selector.register(rank.output, selectors.EVENT_READ, rank)
        return rank

    def _keep_spares(self) -> None:
        """Have one spare per rank, once the ranks are through with what takes the machine's cores at the start."""
        beats = read_beats(self._beats)
        if self._ranks and len(beats) == len(self._ranks) and all(beat.phase != "start" for beat in beats):
            living = [rank for rank in self._spares if rank.process.poll() is None]
            self._dead_spares += len(self._spares) - len(living)
            self._spares = living
            if self._dead_spares < _MOST_DEAD_SPARES:
                self._spares += [self._new() for _ in range(len(self._ranks) - len(self._spares))]

    def _end_together(self) -> None:
        """When a rank has ended, give the others a while, then kill them; when all have, say so."""
        for rank in self._ranks:
            if rank.number not in self._codes and rank.process.poll() is not None:
                self._codes[rank.number] = rank.process.returncode
        if not self._codes:
            return
        codes = [code for code in self._codes.values() if code is not None] or [-signal.SIGKILL]
        # Those that leave well do so together, but the first one may upload for a while.
        if self._deadline is None and not all(code in LEFT_WELL for code in codes):
            self._deadline = time.monotonic() + (_KILLED_SECONDS if min(codes) < 0 else _FAILED_SECONDS)
        if len(self._codes) < len(self._ranks):
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._kill()
            return
        self._dying = self._dying or time.monotonic()
        if any(rank.process.poll() is None for rank in self._ranks) and time.monotonic() - self._dying < _DYING_SECONDS:
            return  # one that waits for a disk or a driver may take a while, or not die at all
        for rank in self._ranks:
            rank.kill()  # its data workers, if any are left
            rank.pump()
        self._tell_signs()
        failed = [number for number, code in self._codes.items() if code and code > 0]
        told = sorted(failed, key=lambda number: self._codes[number] != os.EX_CONFIG)[
            :1
        ]  # the first, or why it refused
        words = {str(rank.number): most_telling(rank.last) for rank in self._ranks if rank.number in told}
        self._tell("left", codes=list(self._codes.items()), words=words)
        self._ranks, self._codes, self._dying = [], {}, 0.0

    def _stacks(self) -> None:
        write_stacks({rank.number: rank.process.pid for rank in self._ranks}, self._logs)
        self._tell("stacks")

    def _is_alone(self) -> bool:
        """Whether nobody asks for this node any more; gives back the job where its supervisor is gone.

        One that lives writes ``cluster.json`` once a second (``status_file``): then it has given up this node alone, or
        will ask again.
        """
        now = time.monotonic()
        silent, given_up = now - self._asked, now - self._asked > self._patience
        if not given_up and not (self._signalled_at and silent > _ENDING_SECONDS):
            self._looking = None
            return False
        if not self._may_give_back:
            return given_up
        if self._looking is None:
            self._looking, self._seen = now, set()
        with suppress(OSError):
            self._seen.add((self._logs.parent / "cluster.json").read_bytes())
        if len(self._seen) > 1:
            self._looking = None
            return given_up
        if now - self._looking < _FRESH_SECONDS:
            return False
        if self._seen:
            _give_back_the_job()
        return True

    def _kill(self) -> None:
        for rank in self._ranks:
            if rank.process.poll() is None:
                self._codes.setdefault(rank.number, None)
            rank.kill()

    def _tell_signs(self) -> None:
        signs = self._signs()
        for start in range(0, max(1, len(signs)), _SIGNS_IN_A_REPORT):
            self._tell("alive", ranks=signs[start : start + _SIGNS_IN_A_REPORT])

    def _signs(self) -> list[list[Any]]:
        """Rank, process, step, phase, seconds since, state of the process (proc(5)) of each rank, once it has any.

        Those that have left well are not missed.
        """
        now, left = time.monotonic(), {number for number, code in self._codes.items() if code in LEFT_WELL}
        return [
            [beat.rank, beat.pid, beat.step, beat.phase, round(now - beat.seconds, 2), state(beat.pid)]
            for beat in read_beats(self._beats)
            if beat.rank not in left
        ]

    def _signalled(self, number: int, _frame: object) -> None:
        """The scheduler signals the processes of a step, perhaps only these; what a second time means is not for us."""
        now = time.monotonic()
        again = bool(self._signalled_at) and now - self._signalled_at > ONE_REQUEST_SECONDS
        self._signalled_at = self._signalled_at or now
        self._tell("signalled", number=number, again=again)
        self._send(number)

    def _send(self, number: int) -> None:
        """Ask the ranks to stop, once in an attempt."""
        if self._passed_on:
            return
        self._passed_on = True
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    def _tell(self, report: str, **content: Any) -> None:
        with suppress(OSError):  # nobody listens any more: stdin tells
            content = {"report": report, "node": self.name, "attempt": self._attempt, **content}
            line = json.dumps(content, ensure_ascii=False)
            os.write(1, f"{line}\n".encode())


def _give_back_the_job() -> None:
    """Have SLURM start the job anew, unless somebody ended it: this node's supervisor is gone."""
    print("the job's first node gives no sign of life", file=sys.stderr)  # noqa: T201  nobody listens to reports
    with suppress(EvaclipError, OSError):  # another node was faster; there is no such job; a container has no scontrol
        job = SlurmJob()
        if job.may_requeue and not job.is_ending():
            job.requeue()


if __name__ == "__main__":
    Node(sys.argv[1] if len(sys.argv) > 1 else os.environ["SLURMD_NODENAME"]).run()
