"""One attempt, watched: orders to the nodes, reports from them, and what ended it.

What is noticed, and when: a rank that ends, at once; one that is silent, ``step_timeout_seconds`` after its last sign
of life; a node whose launcher is silent, after ``node_timeout_seconds``. Each within a second of that.
"""

from __future__ import annotations

import json
import logging
import os
import re
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, cast

from evaclip.cluster.behind import Behind
from evaclip.cluster.policy import Cause, Sign, silent_ranks
from evaclip.cluster.protocol import LEFT_WELL, ONE_REQUEST_SECONDS, REPORT_SECONDS, STACKS_SECONDS, STALLED_SECONDS
from evaclip.config import ClusterConfig

_log = logging.getLogger(__name__)

_STATUS_SECONDS = 1.0
_ALIVE_SECONDS = 1.0
_STACKS_SECONDS = STACKS_SECONDS + 4  # on all nodes
_OTHERS_SECONDS = 6.0  # after one node's ranks have ended with an error: longer than a node gives its own
_KILL_SECONDS = 30.0  # for nodes to kill their ranks, whose drivers may take a while
_SPEAKING_SECONDS = 6 * REPORT_SECONDS  # without a report of a node
_LEAVE_SECONDS = 3.0  # for the launchers themselves
_LAST_SECONDS = 45.0  # before the job's time is over: to put it back into the queue
_MOST_STRANGE = 3  # lines that are no reports, which are told


class Launchers:
    """The launchers of some nodes, as one child process of ours."""

    def __init__(self, nodes: Sequence[str], command: Sequence[str]) -> None:
        self.nodes = tuple(nodes)
        self._strange = 0
        self.heard_of: set[str] = set()
        """Nodes that have answered at all: until then they may be fetching a container."""
        self.process = subprocess.Popen(  # noqa: S603  our own command
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        assert self.process.stdin
        assert self.process.stdout
        # The job's output may be on storage that stands still, and srun then hands on no orders and no reports.
        self._output = Behind()
        self._passing_on = threading.Thread(target=self._pass_on, name="output", daemon=True)
        self._passing_on.start()
        self._orders, self._reports, self._torn = self.process.stdin, self.process.stdout, b""
        self._writing = threading.Lock()
        self._closed = threading.Event()
        # Beside what this process waits for: SLURM's commands may take minutes, and nodes whose supervisor is silent
        # take it for lost.
        threading.Thread(target=self._keep_alive, name="alive", daemon=True).start()
        os.set_blocking(self._reports.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._reports, selectors.EVENT_READ)

    def order(self, order: str, **content: Any) -> None:
        """Send an order to all nodes."""
        with self._writing, suppress(OSError, ValueError):  # it has ended: the watch sees that
            self._orders.write((json.dumps({"order": order, **content}) + "\n").encode())
            self._orders.flush()

    def _pass_on(self) -> None:
        """What rank 0 prints, and srun itself."""
        assert self.process.stderr
        with self.process.stderr as printed:
            while content := os.read(printed.fileno(), 1 << 16):
                self._output.do(partial(os.write, 2, content))

    def _keep_alive(self) -> None:
        while not self._closed.wait(_ALIVE_SECONDS):
            self.order("alive")

    def reports(self, seconds: float) -> list[dict[str, Any]]:
        """What the nodes have said, waiting for it at most so long."""
        if not self._selector.select(seconds):
            return []
        content = self._reports.read(1 << 20) or b""
        if not content:
            time.sleep(seconds)  # the end of it
        *lines, self._torn = (self._torn + content).split(b"\n")
        return [report for line in lines if (report := self._parsed(line))]

    def _parsed(self, line: bytes) -> dict[str, Any] | None:
        """A report; None for anything else that is printed, which is told a few times."""
        with suppress(ValueError):
            report = json.loads(line)
            if isinstance(report, dict) and "report" in report:
                return cast("dict[str, Any]", report)
        if line.strip() and self._strange < _MOST_STRANGE:
            self._strange += 1
            _log.warning("a node's launcher prints what is no report: %s", line[:200].decode(errors="replace"))
        return None

    def close(self) -> None:
        """End the launchers, and what they started."""
        self._closed.set()
        self.order("leave")
        with self._writing, suppress(OSError):
            self._orders.close()
        try:
            self.process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:  # srun waits for a node that is lost
            self.process.kill()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_LEAVE_SECONDS)
        self._passing_on.join(_LEAVE_SECONDS)
        self._output.close()
        self._selector.close()
        self._reports.close()


class StopSignals:
    """Signals that asked this supervisor, or a node's launcher, to end the run."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._last = 0.0

    def receive(self, number: int, _frame: object = None) -> None:
        """Take a signal; one that reaches several processes is one."""
        if not self.numbers or time.monotonic() - self._last > ONE_REQUEST_SECONDS:
            self.numbers.append(number)
            self._last = time.monotonic()


class Ending(NamedTuple):
    """How an attempt ended."""

    cause: Cause
    detail: str
    step: int | None
    """Updates that were done."""
    lost: frozenset[str] = frozenset()
    """Nodes that do not answer; where there are any, the next attempt needs other launchers."""
    blamed: str | None = None
    """The node whose rank failed first."""


class Watch:
    """Starts the ranks on some nodes and waits for their end.

    Args:
        launchers: Of the nodes.
        config: Time-outs.
        request: Signals received; passed on to the ranks.
        tell: Called once a second with what is known of the ranks.
        seconds_left: Until the job's time is over.
    """

    def __init__(
        self,
        launchers: Launchers,
        config: ClusterConfig,
        request: StopSignals,
        tell: Callable[[list[Sign]], None],
        seconds_left: Callable[[], float],
    ) -> None:
        self.launchers, self.config, self.request, self.tell = launchers, config, request, tell
        self._seconds_left = seconds_left
        self._began = time.monotonic()
        self._heard = dict.fromkeys(launchers.nodes, self._began)
        self._signs: dict[int, Sign] = {}
        self._places: dict[int, str] = {}
        """Node of each rank."""
        self._left: dict[str, dict[str, Any]] = {}
        self._deadline: float | None = None
        """When the ranks of the other nodes are killed, after those of one have failed."""
        self._last_moment: float | None = None
        """When a run that was asked to stop has to be gone."""
        self._passed_on = 0
        self._attempt = 0

    def run(self, order: dict[str, Any]) -> Ending:
        """Watch one attempt from its start order to its end."""
        self._attempt = order["attempt"]
        per_node = order["ranks_per_node"]
        self._places = {
            rank: node
            for n, node in enumerate(self.launchers.nodes)
            for rank in range(n * per_node, (n + 1) * per_node)
        }
        self.launchers.order("start", **order)
        told = looked = time.monotonic()
        while True:
            for report in self.launchers.reports(0.1):
                self._take(report)
            now = time.monotonic()
            if now - looked > STALLED_SECONDS:
                self._heard = {node: heard + now - looked for node, heard in self._heard.items()}
            looked = now
            if ending := self._stopped() or self._ending():
                return ending
            if now - told >= _STATUS_SECONDS:
                told = now
                self.tell(self.signs)

    @property
    def signs(self) -> list[Sign]:
        """Of all ranks, as last reported."""
        return [self._signs[rank] for rank in sorted(self._signs)]

    def _take(self, report: dict[str, Any]) -> None:
        node = report["node"]
        self._heard[node] = time.monotonic()
        self.launchers.heard_of.add(node)
        if report["report"] == "signalled" and (report["again"] or not self.request.numbers):
            self.request.receive(report["number"])  # one request, however many nodes it reaches
        if report["attempt"] != self._attempt:  # it has not read its orders yet
            return
        for row in report.get("ranks", ()):
            self._signs[row[0]] = Sign(row[0], node, *row[1:])
        if report["report"] == "left":
            self._left[node] = report

    def _stopped(self) -> Ending | None:
        """Hand new requests to the ranks; an ending where they cannot be waited for."""
        if len(self.request.numbers) > self._passed_on:
            self._passed_on = len(self.request.numbers)
            if self._passed_on > 1:
                return self._finish("asked to stop", "stopped at once by a second signal")
            _log.info("%s: asking all ranks to save and stop", signal.Signals(self.request.numbers[-1]).name)
            if all(sign.phase == "start" for sign in self.signs):
                return self._finish("asked to stop", "stopped in its start, where there is nothing to save")
            self.launchers.order("signal", number=int(signal.SIGTERM))
            left = self._seconds_left()
            self._last_moment = time.monotonic() + left - min(_LAST_SECONDS, left / 2)
        if self._last_moment is not None and time.monotonic() > self._last_moment:
            return self._finish("asked to stop", "not saved before the job's time was over")
        return None

    def _ending(self) -> Ending | None:
        now = time.monotonic()
        if not self._missing():
            return self._judge()
        failed = [report for report in self._left.values() if not _left_well(report)]
        if failed and self._deadline is None:
            self._deadline = now + _OTHERS_SECONDS
            if any(code is not None and code < 0 for report in failed for _, code in report["codes"]):
                self.launchers.order("kill")
        if self._deadline and now > self._deadline:
            self._kill()
            return self._judge()
        if self.launchers.process.poll() is not None and not self.launchers.heard_of:
            code = self.launchers.process.returncode
            return Ending("no start", f"no node was started: srun ended with code {code}, see the output", None)
        silent = self._silent_nodes(now)
        if silent or self.launchers.process.poll() is not None:
            return self._gone(silent)
        hanging = silent_ranks([sign for sign in self.signs if sign.node not in self._left], self.config)
        if hanging or (not self._signs and now - self._began > self.config.start_timeout_seconds):
            return self._hang(hanging)
        return None

    def _gone(self, silent: list[str]) -> Ending:
        gone = silent or self._missing()
        if never := [node for node in silent if node not in self.launchers.heard_of]:
            detail = f"{', '.join(never)}: the launcher has not started there, see the job's output"
            ending = self._finish("no start", detail, lost=gone)
            return ending._replace(blamed=never[0] if len(never) == 1 else None)
        return self._finish("a node is gone", f"{', '.join(gone)} gives no sign of life", lost=gone)

    def _missing(self) -> list[str]:
        """Nodes whose ranks have not all ended."""
        return [node for node in self.launchers.nodes if node not in self._left]

    def _silent_nodes(self, now: float) -> list[str]:
        """Nodes that are lost; all at once rather wait for their network or disk, and get three times as long."""
        limit = self.config.node_timeout_seconds
        if all(now - heard > limit for heard in self._heard.values()):
            limit *= 3
        limits = {True: limit, False: max(limit, self.config.start_timeout_seconds)}
        known = self.launchers.heard_of
        return [node for node in self._missing() if now - self._heard[node] > limits[node in known]]

    def _hang(self, hanging: list[Sign]) -> Ending:
        shown = "; ".join(map(str, hanging[:4])) + (f" and {len(hanging) - 4} more" if len(hanging) > 4 else "")
        unseen = {
            rank: node for rank, node in self._places.items() if rank not in self._signs and node not in self._left
        }
        if unseen:  # the others wait for them
            named = ", ".join(f"rank {rank} on {node}" for rank, node in list(unseen.items())[:4])
            more = f" and {len(unseen) - 4} more" if len(unseen) > 4 else ""
            detail = f"{named}{more}: no sign of life since the start"
        elif len(hanging) == len(self._signs) > 1:
            detail = f"all ranks wait, a collective does not return: {shown}"
        else:
            detail = f"{shown}: no sign of life for {max(s.age_seconds for s in hanging):.1f} s"
        _log.warning("%s", detail)
        step, answered = self._step(), set[str]()
        self.launchers.order("stacks")
        deadline = time.monotonic() + _STACKS_SECONDS
        while len(answered) < len(self.launchers.nodes) and time.monotonic() < deadline:
            for report in self.launchers.reports(0.1):
                self._take(report)
                answered |= {report["node"]} if report["report"] == "stacks" else set()
        blamed = {*unseen.values()} or {sign.node for sign in hanging}
        ending = self._finish("a rank hangs", detail)
        return ending._replace(step=step, blamed=blamed.pop() if len(blamed) == 1 else None)

    def _finish(self, cause: Cause, detail: str, lost: Sequence[str] = ()) -> Ending:
        """Kill what is left."""
        step = self._step()
        self._kill(lost)
        return Ending(cause, detail, step, frozenset(self._missing()))

    def _kill(self, lost: Sequence[str] = ()) -> None:
        """Have all ranks killed, and wait until they are; not for nodes that are lost, or say nothing now."""
        self.launchers.order("kill")
        deadline = time.monotonic() + _KILL_SECONDS
        while (now := time.monotonic()) < deadline and self.launchers.process.poll() is None:
            waited = {*self._missing()} - {*lost}
            if not any(now - self._heard[node] < _SPEAKING_SECONDS for node in waited):
                return
            for report in self.launchers.reports(0.05):
                self._take(report)

    def _step(self) -> int | None:
        step = max((sign.step for sign in self.signs), default=-1)
        return step if step >= 0 else None

    def _judge(self) -> Ending:
        """What the ranks' exit codes mean, when all that answer have left."""
        lost = frozenset(self._missing())
        if lost:  # the others died of it, most likely
            said = [f"{node}: {words}" for node, report in self._left.items() for words in report["words"].values()]
            why = f"; {said[0]}" if said else ""
            return Ending("a node is gone", f"{', '.join(sorted(lost))} gives no sign of life{why}", self._step(), lost)
        codes: list[tuple[int, int | None]] = [
            (rank, code) for report in self._left.values() for rank, code in report["codes"]
        ]
        ended = {code for _, code in codes}
        if ended == {0}:
            return Ending("complete", "complete", self._step())
        if ended == {os.EX_TEMPFAIL}:
            return Ending("asked to stop", "saved and stopped", self._step())
        # To blame is who was killed, else who refused, else the first of a node to fail; others died of it. NCCL aborts
        # whoever waits for a rank that has failed, so an abort blames last.
        known = [(rank, code) for rank, code in codes if code]
        order = [
            lambda code: code < 0 and code != -signal.SIGABRT,
            lambda code: code == os.EX_CONFIG,
            lambda code: code > 0 and code not in LEFT_WELL,
            lambda code: code < 0,
        ]
        rank, code = next(((rank, code) for fits in order for rank, code in known if fits(code)), (-1, 0))
        sign = self._signs.get(rank)
        who = str(sign) if sign else f"rank {rank}"
        if code < 0:
            detail = f"{who} was ended by {signal.Signals(-code).name}"
        else:
            said = [words[str(rank)] for report in self._left.values() if str(rank) in (words := report["words"])]
            detail = f"{who} ended with code {code}: {''.join(said)}"
        cause: Cause = "refused" if code == os.EX_CONFIG else "a rank died"
        return Ending(cause, detail, self._step(), blamed=sign.node if sign and not self._agree() else None)

    def _agree(self) -> bool:
        """Whether several nodes say the same of their failure, so that it is none's alone."""
        said = [" ".join(report["words"].values()) for report in self._left.values() if report["words"]]
        return len(said) > 1 and len({re.sub(r"^\[rank \d+\] ", "", words) for words in said}) == 1


def _left_well(report: dict[str, Any]) -> bool:
    return all(code in LEFT_WELL for _, code in report["codes"])
