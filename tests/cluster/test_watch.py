"""What one attempt's watch makes of the nodes' reports, without processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from typing import Any

import pytest

from evaclip.cluster import behind, node, status_file
from evaclip.cluster import watch as module
from evaclip.cluster.watch import Ending, Launchers, StopSignals, Watch
from evaclip.config import ClusterConfig

NODES = ("n1", "n2")


class Reports:
    """In the place of ``Launchers``: reports that were prepared, one turn of the watch after the other."""

    nodes = NODES

    class process:  # noqa: N801  of which only this is asked
        returncode = None

        @staticmethod
        def poll() -> None:
            return None

    def __init__(self, turns: tuple[list[dict[str, Any]], ...], then: tuple[str, ...]) -> None:
        self.then = then
        """Nodes that go on to speak, until they are told to kill."""
        self.heard_of: set[str] = set()
        self.orders: list[str] = []
        self._turns = deque(turns)

    def order(self, order: str, **content: Any) -> None:
        self.orders.append(order)

    def reports(self, seconds: float) -> list[dict[str, Any]]:
        if self._turns:
            return self._turns.popleft()
        time.sleep(0.01)
        if "kill" in self.orders:
            return [left(node, rank, None) for rank, node in enumerate(NODES) if node in self.then]
        return [alive(node, rank) for rank, node in enumerate(NODES) if node in self.then]


def report(kind: str, node: str, **content: Any) -> dict[str, Any]:
    return {"report": kind, "node": node, "attempt": 1, **content}


def alive(node: str, rank: int, step: int = 7, phase: str = "forward", age: float = 0.1) -> dict[str, Any]:
    return report("alive", node, ranks=[[rank, 100 + rank, step, phase, age, "S"]])


def left(node: str, rank: int, code: int | None, words: str = "") -> dict[str, Any]:
    return report("left", node, codes=[[rank, code]], words={str(rank): words} if words else {})


def watched(
    *turns: list[dict[str, Any]],
    request: StopSignals | None = None,
    then: tuple[str, ...] = NODES,
    seconds_left: float = 1e9,
    **limits: float,
) -> tuple[Ending, Reports]:
    launchers = Reports(turns, then)
    config = ClusterConfig.model_validate({"start_timeout_seconds": 60, "step_timeout_seconds": 10, **limits})
    watch = Watch(launchers, config, request or StopSignals(), lambda signs: None, lambda: seconds_left)  # pyright: ignore[reportArgumentType]
    return watch.run({"attempt": 1, "ranks_per_node": 1}), launchers


BOTH = [alive("n1", 0), alive("n2", 1)]
RANK_1 = "rank 1 on n2 (in forward of step 8, process 101)"


@pytest.mark.parametrize(
    ("codes", "cause", "said", "blamed"),
    [
        ((0, 0), "complete", "complete", None),
        ((75, 75), "asked to stop", "saved and stopped", None),
        ((None, -9), "a rank died", f"{RANK_1} was ended by SIGKILL", "n2"),
        ((1, -9), "a rank died", "rank 1 on n2 (in forward of step 8, process 101) was ended by SIGKILL", "n2"),
        ((1, -6), "a rank died", "rank 0 on n1 (in forward of step 8, process 100) ended with code 1: ", "n1"),
        ((None, -6), "a rank died", f"{RANK_1} was ended by SIGABRT", "n2"),
        ((1, 78), "refused", "rank 1 on n2 (in forward of step 8, process 101) ended with code 78: [rank 1] no", "n2"),
        (
            (None, 1),
            "a rank died",
            "rank 1 on n2 (in forward of step 8, process 101) ended with code 1: [rank 1] no",
            "n2",
        ),
    ],
)
def test_exit_codes_say_how_it_ended_and_who_is_to_blame(codes, cause, said, blamed):
    words = [f"[rank {rank}] no" if code and code > 0 and rank else "" for rank, code in enumerate(codes)]
    ends = [left(node, rank, codes[rank], words[rank]) for rank, node in enumerate(NODES)]
    ending, _ = watched(BOTH, ends)
    assert (ending.cause, ending.detail, ending.step, ending.blamed) == (cause, said, 7, blamed)


@pytest.mark.parametrize(("second", "blamed"), [("error: a shard is missing", None), ("error: the GPU fell off", "n1")])
def test_what_all_nodes_say_is_no_nodes_fault(second, blamed):
    ends = [left("n1", 0, 1, "error: a shard is missing"), left("n2", 1, 1, f"[rank 1] {second}")]
    ending, _ = watched(BOTH, ends)
    assert (ending.detail.rpartition(": error: ")[2], ending.blamed) == ("a shard is missing", blamed)


def test_a_silent_rank_is_named_and_its_stack_is_asked_for():
    silent = [alive("n1", 0, phase="metrics", age=11.0), alive("n2", 1, age=11.5)]
    ending, launchers = watched(
        BOTH, silent, [report("stacks", node) for node in NODES], [left("n1", 0, None), left("n2", 1, None)]
    )
    assert (ending.cause, ending.blamed, ending.lost) == ("a rank hangs", "n2", frozenset())
    assert ending.detail.endswith("process 101): no sign of life for 11.5 s")
    assert launchers.orders == ["start", "stacks", "kill"]


def test_ranks_that_wait_at_one_place_are_a_collective_that_does_not_return():
    silent = [alive("n1", 0, age=11.0), alive("n2", 1, age=11.5)]
    stacks = [report("stacks", node) for node in NODES]
    ending, _ = watched(BOTH, silent, stacks, [left("n1", 0, None), left("n2", 1, None)])
    assert ending.detail.startswith(
        "all ranks wait, a collective does not return: rank 0 on n1 (in forward of step 8, "
    )
    assert ending.blamed is None


def test_a_rank_that_never_gave_a_sign_is_to_blame_not_those_that_wait_for_it():
    waiting = [alive("n1", 0, step=-1, phase="start", age=61.0), report("alive", "n2", ranks=[])]
    stacks = [report("stacks", node) for node in NODES]
    ending, _ = watched(waiting, stacks, [left("n1", 0, None), left("n2", 1, None)])
    assert (ending.cause, ending.blamed) == ("a rank hangs", "n2")
    assert ending.detail == "rank 1 on n2: no sign of life since the start"


def test_a_node_whose_launcher_does_not_start_is_to_blame():
    ending, _ = watched([alive("n1", 0)], then=("n1",), start_timeout_seconds=0.3, node_timeout_seconds=0.2)
    assert (ending.cause, ending.blamed, ending.lost) == ("no start", "n2", {"n2"})
    assert ending.detail == "n2: the launcher has not started there, see the job's output"


def test_what_others_say_of_a_lost_node_is_told(monkeypatch):
    monkeypatch.setattr(module, "_OTHERS_SECONDS", 0.1)
    monkeypatch.setattr(module, "_KILL_SECONDS", 0.1)
    said = "error: preflight found 1 problems: n2: no word in x"
    ending, _ = watched(BOTH, [left("n1", 0, 1, said)], then=())
    assert (ending.cause, ending.lost) == ("a node is gone", {"n2"})
    assert ending.detail == f"n2 gives no sign of life; n1: {said}"


def test_a_silent_node_is_lost_and_the_others_are_killed():
    ending, launchers = watched(BOTH, then=("n1",), node_timeout_seconds=0.2)
    assert (ending.cause, ending.detail) == ("a node is gone", "n2 gives no sign of life")
    assert "n2" in ending.lost
    assert launchers.orders[-1] == "kill"


def test_one_request_reaches_the_ranks_once_however_many_nodes_tell_of_it():
    request = StopSignals()
    signalled = [report("signalled", node, number=int(signal.SIGUSR1), again=False) for node in NODES]
    ends = [left(node, rank, os.EX_TEMPFAIL) for rank, node in enumerate(NODES)]
    ending, launchers = watched(BOTH, signalled[:1], BOTH, signalled[1:], BOTH, ends, request=request)
    assert (ending.cause, request.numbers) == ("asked to stop", [signal.SIGUSR1])
    assert launchers.orders.count("signal") == 1
    assert "kill" not in launchers.orders


def test_half_of_a_short_grace_is_left_to_the_ranks():
    signalled = [report("signalled", "n1", number=int(signal.SIGTERM), again=False)]
    ends = [left(node, rank, os.EX_TEMPFAIL) for rank, node in enumerate(NODES)]
    ending, _ = watched(BOTH, signalled, BOTH, ends, seconds_left=20)
    assert ending.detail == "saved and stopped"


def test_who_is_not_gone_before_the_jobs_end_is_killed():
    signalled = [report("signalled", "n1", number=int(signal.SIGTERM), again=False)]
    ending, launchers = watched(BOTH, signalled, seconds_left=0.2)
    assert ending.detail == "not saved before the job's time was over"
    assert launchers.orders[-1] == "kill"


LISTENING = """
import sys
for line in sys.stdin:
    if "alive" in line:
        print('{"report": "alive", "node": "n1"}', flush=True)
    if "leave" in line:
        break
"""


def test_nodes_hear_that_their_supervisor_lives_while_it_waits_for_something_else(monkeypatch):
    monkeypatch.setattr(module, "_ALIVE_SECONDS", 0.05)
    launchers = Launchers(["n1"], [sys.executable, "-c", LISTENING])
    heard = launchers.reports(20)
    time.sleep(0.5)  # in the place of a question to SLURM
    heard += launchers.reports(1)
    launchers.close()
    assert len(heard) > 2
    assert launchers.process.returncode == 0


def test_what_srun_and_rank_0_print_reaches_the_jobs_output(capfd):
    script = "import sys; sys.stderr.write('step 1\\n' * 5000); sys.stderr.flush(); sys.stdin.read()"
    Launchers(["n1"], [sys.executable, "-c", script]).close()
    assert capfd.readouterr().err == "step 1\n" * 5000


def test_a_second_request_at_the_same_node_ends_it_at_once(monkeypatch):
    monkeypatch.setattr(module, "ONE_REQUEST_SECONDS", 0.0)
    first, second = (report("signalled", "n1", number=int(signal.SIGTERM), again=again) for again in (False, True))
    ending, launchers = watched(BOTH, [first], BOTH, [second])
    assert ending.detail == "stopped at once by a second signal"
    assert launchers.orders[-2:] == ["signal", "kill"]


def test_reports_of_an_attempt_before_are_no_signs_of_this_one():
    old = {**alive("n1", 0, step=99, age=1e6), "attempt": 0}
    ending, _ = watched([old], BOTH, [left(node, rank, 0) for rank, node in enumerate(NODES)])
    assert (ending.cause, ending.step) == ("complete", 7)


def test_times_that_lean_on_one_another_fit():
    kill_wait = 30  # SLURM's default
    assert node._FAILED_SECONDS < module._OTHERS_SECONDS, "a node kills its own ranks before all are killed"
    assert node._DYING_SECONDS < module._KILL_SECONDS, "and says so before it is given up"
    leaving = module._KILL_SECONDS + module._LEAVE_SECONDS + 2 * behind._LEAVING_SECONDS
    assert leaving < module._LAST_SECONDS, "a run that is ended for its time is back in the queue before that is over"
    assert kill_wait / 2 > node._ORPHANED_SECONDS + node._FRESH_SECONDS
    assert kill_wait / 2 > node._ENDING_SECONDS + node._FRESH_SECONDS
    assert node._FRESH_SECONDS > 4 * status_file._SECONDS, "a living supervisor is seen, even by a slow file system"
