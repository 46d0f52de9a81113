"""What to do after an attempt, and with which nodes: pure functions, values in, values out.

An attempt is one start of all ranks. It ends because the run is complete, because it was asked to stop, because its
configuration is refused, or because something died or fell silent; only in the last case is it started again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, NamedTuple, get_args

from evaclip.config import ClusterConfig
from evaclip.heartbeat import PHASES

Failure = Literal["a rank died", "a rank hangs", "a node is gone", "too few nodes", "no start"]
Cause = Literal["complete", "asked to stop", "refused"] | Failure
Action = Literal["done", "restart", "requeue", "stop"]

_FIRST_WAIT_SECONDS = 5.0
_LONGEST_WAIT_SECONDS = 300.0
_START_WAIT_SECONDS = 30.0
"""Before a third try of a start: storage or a node may have to come back."""


class Sign(NamedTuple):
    """What is known of a rank, from its node's last report."""

    rank: int
    node: str
    pid: int
    step: int
    phase: str
    age_seconds: float
    """Since the rank's last sign of life."""
    state: str
    """Of the process, a letter as in proc(5)."""

    def __str__(self) -> str:
        where = f"in {self.phase} of step {self.step + 1}" if self.phase != "start" else "in its start"
        stopped = ", stopped by a signal" if self.state in "Tt" else ""
        return f"rank {self.rank} on {self.node} ({where}, process {self.pid}{stopped})"


@dataclass(frozen=True)
class Attempt:
    """How one start of all ranks ended."""

    nodes: tuple[str, ...]
    cause: Cause
    detail: str
    """A sentence that names node, rank, step and phase, as far as they are known."""
    step: int | None
    """Updates that were done at its end; None where no rank came so far."""
    saved: int | None
    """Step of the newest checkpoint afterwards."""
    blamed: str | None = None
    """The node whose rank failed first."""


class Decision(NamedTuple):
    """What happens next."""

    action: Action
    reason: str
    wait_seconds: float = 0.0


def decide(attempts: Sequence[Attempt], config: ClusterConfig, *, may_requeue: bool) -> Decision:
    """What follows the last attempt.

    Args:
        attempts: Of this job, those before a requeue included.
        config: Limits.
        may_requeue: The scheduler takes the job back into its queue.
    """
    last = attempts[-1]
    back: Action = "requeue" if may_requeue else "stop"
    if last.cause == "complete":
        return Decision("done", last.detail)
    if last.cause == "refused":
        return Decision("stop", "the same command would fail again")
    if last.cause == "asked to stop":
        return _after_a_stop(attempts, config, back)
    failed = [attempt for attempt in attempts if attempt.cause in get_args(Failure)]
    stuck = list(takewhile(lambda a: a.saved == last.saved, reversed(failed)))
    if reason := _why_not_again(list(takewhile(lambda a: _same_place(a, last), reversed(attempts))), stuck, config):
        return Decision("stop", reason)
    if last.cause == "too few nodes":
        return Decision(back, last.detail)
    first = _FIRST_WAIT_SECONDS if last.step is not None else _START_WAIT_SECONDS
    wait = min(first * 2 ** (len(stuck) - 2), _LONGEST_WAIT_SECONDS) if len(stuck) > 1 else 0.0
    return Decision("restart", last.detail, wait)


def _after_a_stop(attempts: Sequence[Attempt], config: ClusterConfig, back: Action) -> Decision:
    """What follows being asked to stop: the same again, unless that leads nowhere."""
    idle = sum(1 for _ in takewhile(lambda a: a.saved == attempts[-1].saved, reversed(attempts)))
    if idle <= config.max_restarts:
        goes_on = "the job goes on by itself" if back == "requeue" else "a requeue or the same command continues it"
        return Decision(back, f"the run is saved, {goes_on}")
    return Decision(
        "stop",
        f"{idle} starts in a row ended without a new checkpoint: a start or a checkpoint takes longer than the job's "
        f"time allows; give it more (--time), or an earlier warning (--signal)",
    )


def _why_not_again(here: Sequence[Attempt], stuck: Sequence[Attempt], config: ClusterConfig) -> str:
    """Which limit is reached by failures at one place, or without a new checkpoint; newest first."""
    last = stuck[0]
    if len(here) >= config.max_same_step:
        where = f"step {last.step}" if last.step is not None else "the start"
        return f"the last {len(here)} attempts failed at {where}: {last.detail}"
    if len(stuck) > config.max_restarts:
        saved = "a checkpoint" if last.saved is None else f"a checkpoint after step {last.saved}"
        return f"{len(stuck)} attempts in a row did not come to {saved}"
    return ""


def _same_place(attempt: Attempt, last: Attempt) -> bool:
    """Whether two attempts failed in the same way: not for want of nodes, and at the same step."""
    alike = attempt.cause == last.cause and last.cause not in ("a node is gone", "too few nodes")
    return alike and (attempt.step, attempt.saved) == (last.step, last.saved)


def unfit_nodes(attempts: Sequence[Attempt]) -> set[str]:
    """Nodes to do without where that is possible: one that was to blame for the last two failures."""
    blamed = {attempt.blamed for attempt in attempts[-2:]}
    return {node for node in blamed if node} if len(attempts) > 1 and len(blamed) == 1 else set()


def choose_nodes(
    available: Sequence[str], ranks_per_node: int, *, slots: int, wanted: int, min_nodes: int | None
) -> tuple[str, ...]:
    """The most nodes whose ranks share the slots evenly, out of those that are there; none where these are too few.

    Args:
        available: Nodes that answer, in the job's order.
        ranks_per_node: Ranks that each would start.
        slots: Of the run's data order; every rank takes equally many.
        wanted: Nodes that the job has been given; more are not used, fewer need ``min_nodes``.
        min_nodes: Fewest nodes to run with; None: as many as wanted.
    """
    fewest = wanted if min_nodes is None else min(min_nodes, wanted)
    fitting = [n for n in range(fewest, min(wanted, len(available)) + 1) if slots % (n * ranks_per_node) == 0]
    return tuple(available[: max(fitting, default=0)])


def silent_ranks(signs: Sequence[Sign], config: ClusterConfig) -> list[Sign]:
    """Ranks to blame where some have been silent for too long, the first to blame first; none where all is well.

    Ranks wait for one another, so one that hangs silences all. To blame is who is stopped, or gone, or behind the
    others; where all are in the same place, a collective does not return, and all are.
    """
    starting = [sign for sign in signs if sign.phase == "start"]
    # Before the first step ranks that are done wait for those that still build indexes: one that is busy is enough.
    too_long = bool(starting) and min(sign.age_seconds for sign in starting) > config.start_timeout_seconds
    limits: Mapping[bool, float] = {True: config.start_timeout_seconds, False: config.step_timeout_seconds}
    others = [sign for sign in signs if sign.phase != "start"]
    if not too_long and all(sign.age_seconds <= limits[sign.phase == "end"] for sign in others):
        return []
    if stopped := [sign for sign in signs if sign.state in "TtZX"]:
        return stopped
    places = {sign.rank: (sign.step, PHASES.index(sign.phase)) for sign in signs}  # pyright: ignore[reportArgumentType]
    behind = min(places.values())
    return [sign for sign in signs if places[sign.rank] == behind]
