"""How fast each rank is by itself. All ranks end a step together, so one that is slow shows in what it does alone.

``own_seconds`` of a rank is its wait for data plus its forward pass up to the loss, with which the collectives of a
step begin. On a CPU both are taken by the host's clock. On a GPU the host runs ahead, so the forward pass lies between
two events on the device's own stream, which are read when metrics are published and the device has been waited for
anyway; until then nothing waits.

Under ZeRO-3 the forward pass itself gathers parameters, so ranks wait for each other within it: there ``own_seconds``
is the wait for data alone, and a slow processor or GPU cannot be told from the others.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median_low
from typing import NamedTuple

import torch
from torch import nn

from evaclip.distributed import Ranks
from evaclip.files import write_json

_SLOW = 1.5
"""Multiple of the median at which a rank is slow."""
_LEAST_SHARE = 0.05
"""Of the step that a slow rank costs: less is not worth a warning, and times of microseconds are noise."""
_ROWS = 2
"""Publications in a row after which it is told."""

_Mark = float | torch.cuda.Event


class RankPace(NamedTuple):
    """Means per step of one rank since the row before, in seconds."""

    rank: int
    node: str
    step_seconds: float
    data_seconds: float
    """Waiting for data."""
    own_seconds: float
    """What the rank did without waiting for others: see the module."""


class Pace:
    """Takes this rank's times; every rank has one.

    Communicates the nodes' names when it is made, and three numbers per rank at each publication.

    Args:
        loss: What every forward pass ends in.
        ranks: The peers.
        sharded: The forward pass has collectives (ZeRO-3).

    Attributes:
        nodes: Name of each rank's machine.
    """

    def __init__(self, loss: nn.Module, ranks: Ranks, *, sharded: bool) -> None:
        self.nodes = ranks.gather_objects(os.environ.get("EVACLIP_NODE") or platform.node())  # as its launcher says
        self._ranks = ranks
        self._begun: _Mark | None = None
        self._spans: list[tuple[_Mark, _Mark]] = []
        if not sharded:
            loss.register_forward_pre_hook(lambda *_: self._end())

    def begin(self) -> None:
        """A step's data are there."""
        self._begun = self._mark()

    def publish(self, values: Mapping[str, float], global_batch: int) -> list[RankPace]:
        """All ranks' means since the last call, on every rank; to be called when the device has been waited for.

        Args:
            values: This rank's metrics, with those of its clock.
            global_batch: Samples of a step.
        """
        step = global_batch / values["speed/samples_per_second"]
        data = step * values["speed/data_wait_fraction"]
        forward = sum(_seconds(*span) for span in self._spans) / max(1, len(self._spans))
        self._spans.clear()
        own = torch.tensor([[step, data, data + forward]], dtype=torch.float64, device=self._ranks.device)
        rows = self._ranks.gather_rows(own).tolist()
        return [RankPace(rank, node, *row) for rank, (node, row) in enumerate(zip(self.nodes, rows, strict=True))]

    def _end(self) -> None:
        if self._begun is not None:
            self._spans.append((self._begun, self._mark()))
            self._begun = None

    def _mark(self) -> _Mark:
        if self._ranks.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: _Mark, end: _Mark) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return start.elapsed_time(end) / 1000


class Stragglers:
    """Which ranks have been slow for several publications in a row."""

    def __init__(self) -> None:
        self._slow_rows: dict[int, int] = {}

    def judge(self, paces: Sequence[RankPace]) -> list[str]:
        """What to say of ranks that have just become stragglers; each is told again only after it has recovered."""
        usual = _usual(paces)
        told: list[str] = []
        for pace in paces:
            rows = self._slow_rows.get(pace.rank, 0) + 1 if _is_slow(pace, usual) else 0
            self._slow_rows[pace.rank] = rows
            if rows == _ROWS:
                told.append(
                    f"rank {pace.rank} on {pace.node} takes {pace.own_seconds / max(usual, 1e-6):.1f} times as long as "
                    f"usual for what it does alone ({pace.own_seconds:.3g} s per step against {usual:.3g} s, "
                    f"{pace.data_seconds:.3g} s of it waiting for data); all ranks wait for it"
                )
        return told


def _usual(paces: Sequence[RankPace]) -> float:
    """The median, the lower one of an even number: of two ranks that is the faster one."""
    return median_low(pace.own_seconds for pace in paces)


def _is_slow(pace: RankPace, usual: float) -> bool:
    costs = pace.own_seconds - usual
    return pace.own_seconds > _SLOW * usual and costs > _LEAST_SHARE * pace.step_seconds


def write_ranks(path: Path, step: int, paces: Sequence[RankPace]) -> None:
    """Replace ``ranks.json``; whoever reads it meets a whole file."""
    usual = _usual(paces)
    rows = [{**pace._asdict(), "slow": _is_slow(pace, usual)} for pace in paces]
    write_json(path, {"step": step, "time": time.time(), "ranks": rows}, flushed=False)
