"""What ``evaclip evaluate --follow`` found while a run trains, and where it stands in the run's W&B history.

``followed/results.jsonl`` has a row per checkpoint that was measured: ``step``, ``samples``, ``checkpoint`` (its
digest), ``written`` (when the run wrote it, in Unix seconds), ``measured`` (digest of what was asked for) and
``eval/NAME/METRIC``. One follower appends to it, and nothing else does. A run that goes back trains steps once more: a
row is void where a checkpoint of its step or a lower one was written later (``valid``).

Whoever has the run open at W&B sends the rows, so there is one writer. A result comes after later rows were sent, and
W&B's steps only ascend: it is a row of its own behind them, with W&B's next step, and its own ``step`` says what it is
about. Behind which rows it comes is noted in ``wandb/followed.jsonl`` before it is sent. So the order is a function of
two files, and the last step that the server has tells what it lacks (``sent``). Only ``tracking`` sends anything.
"""

from __future__ import annotations

import heapq
import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from evaclip.files import write_text
from evaclip.history import append_rows, cut_rows, whole_rows

FOLDER = "followed"
RESULTS = f"{FOLDER}/results.jsonl"
_VOID = -1
_KEYS = {"step", "samples", "checkpoint", "written", "measured"}

Row = dict[str, Any]

_log = logging.getLogger(__name__)


def read_results(run_dir: Path) -> list[Row]:
    """All rows of the results, in the order in which they were found; what is just being written is left out."""
    return [row for row in whole_rows(run_dir / RESULTS) if row.keys() >= _KEYS]


def valid(rows: Iterable[Row]) -> list[Row]:
    """The rows of the run as it is now, by ascending step."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: row["written"], reverse=True):
        if not kept or row["step"] < kept[-1]["step"]:
            kept.append(row)
    return kept[::-1]


def values_of(row: Row) -> Row:
    """What a row says about its step, without where that comes from."""
    return {name: value for name, value in row.items() if name in ("step", "samples") or name.startswith("eval/")}


# ----------------------------------------------------------------------------------------------------------------- W&B


class Sent(NamedTuple):
    """How far a W&B run is."""

    wandb_step: int = -1
    """Of its last row."""
    next_step: int = 0
    """It has the rows of ``metrics.jsonl`` below this step."""
    results: int = 0
    """It has so many results."""

    def row(self, step: int) -> Sent:
        """With a row of ``metrics.jsonl``: W&B's step is the row's, or the next one where that is taken."""
        return Sent(max(step, self.wandb_step + 1), step + 1, self.results)

    def result(self) -> Sent:
        """With one result more."""
        return Sent(self.wandb_step + 1, self.next_step, self.results + 1)


def sent(steps: Iterable[int], behind: Iterable[int], lacking: float = math.inf) -> Sent:
    """What a W&B run has that lacks everything from its step ``lacking`` on.

    Args:
        steps: Of the rows of ``metrics.jsonl``, ascending.
        behind: The step that each result comes behind; they never descend.
        lacking: First step of W&B that it does not have.
    """
    found = Sent()
    order = heapq.merge(((step, False) for step in steps), ((step, True) for step in behind))
    for step, is_result in order:
        more = found.result() if is_result else found.row(step)
        if more.wandb_step >= lacking:
            break
        found = more
    return found


class Places:
    """The results of a run that W&B was sent or is to be sent, each with the step that it comes behind.

    Args:
        run_dir: Run directory.
        restored: Step that the run goes on from. Results of later ones are void from now on.

    Attributes:
        rows: Results that have a place, in their order; ``behind`` is the step that each comes behind.

    Raises:
        OSError: A file cannot be read.
    """

    def __init__(self, run_dir: Path, restored: int) -> None:
        self._run_dir = run_dir
        self._restored = restored
        self._path = run_dir / "wandb" / "followed.jsonl"
        cut_rows(self._path, sys.maxsize)
        self._noted = whole_rows(self._path)
        self.rows = [row for row in self._noted if row["behind"] >= 0]

    def sent(self, steps: Iterable[int], lacking: float = math.inf) -> Sent:
        """What a W&B run has of the rows of ``metrics.jsonl`` and of these; as the function ``sent``."""
        return sent(steps, (row["behind"] for row in self.rows), lacking)

    @property
    def went_back(self) -> bool:
        """Whether a result comes behind rows that the run trains again."""
        return any(row["behind"] > self._restored for row in self.rows)

    def settle(self) -> None:
        """Note what a run's going back has changed: results of steps that are trained again never get a place."""
        noted = [
            {**row, "behind": min(row["behind"], self._restored) if row["step"] <= self._restored else _VOID}
            for row in self._noted
        ]
        noted += [{**row, "behind": _VOID} for row in self._fresh() if row["step"] > self._restored]
        if noted != self._noted:
            write_text(self._path, "".join(json.dumps(row) + "\n" for row in noted))
            self._noted, self.rows = noted, [row for row in noted if row["behind"] >= 0]

    def add(self, upto_step: int) -> None:
        """Give new results a place behind a step, up to which all rows are sent."""
        fresh = [{**row, "behind": upto_step} for row in self._fresh() if row["step"] <= upto_step]
        if fresh:
            append_rows(self._path, fresh)
            self._noted += fresh
            self.rows += fresh

    def _fresh(self) -> list[Row]:
        """Results that are valid and not noted."""
        known = {_identity(row) for row in self._noted}
        try:
            return [row for row in valid(read_results(self._run_dir)) if _identity(row) not in known]
        except (OSError, ValueError) as error:
            _log.warning("%s cannot be read, its results wait: %s", self._run_dir / RESULTS, error)
            return []


def _identity(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["checkpoint"], row["measured"]
