"""The metrics of a run as one file, ``metrics.jsonl``: one line of JSON per step that published something.

A row is ``{"step": int, "samples": int, NAME: number, ...}`` with names declared in ``metrics``. Steps ascend, and a
step has one row: what is published for it later (evaluation after training metrics) extends its line. JSON knows no
infinities, so a value that is not finite is ``null``; its name stays.

The file changes in two ways only: bytes are appended (or the last line is extended), and the end is cut off, which is
one system call. So whatever kills the process, the file is a whole history followed by at most one torn line, which is
cut when it is next opened. ``seal`` declares the rows up to a step final: it is called before the checkpoint of that
step is written, and whoever writes to such a step afterwards has the order wrong. Where a run restarts, and what W&B
is told, is decided elsewhere.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaclip.errors import EvaclipError
from evaclip.metrics import check_names

Row = dict[str, float | None]

_log = logging.getLogger(__name__)


class History:
    """The rows of ``metrics.jsonl``, open for writing; created if absent.

    Only steps and offsets are held in memory. One process writes (rank 0).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self._file = path.open("r+b", buffering=0)
        self._steps = array("q")
        self._offsets = array("q")
        self._end = 0
        for row, offset, end in _scan(path):
            self._steps.append(row["step"])
            self._offsets.append(offset)
            self._end = end
        self._sealed = self.last_step
        if torn := path.stat().st_size - self._end:
            kept = f" and what follows; {self._keep_old()}" if self._lines_behind_the_end() > 1 else ""
            _log.warning("%s: cut %d bytes that are no row%s, from offset %d", path, torn, kept, self._end)
            self._cut(len(self._steps), self._end)

    @property
    def last_step(self) -> int:
        """Step of the last row; -1 without rows."""
        return self._steps[-1] if self._steps else -1

    @property
    def steps(self) -> Sequence[int]:
        """Steps of all rows, ascending."""
        return self._steps

    @property
    def sealed(self) -> int:
        """Step up to which the rows are final: that of a checkpoint, which may lie behind the last row's."""
        return self._sealed

    def write(self, step: int, samples: int, metrics: Mapping[str, float]) -> Row:
        """Append a row, or extend the last one if it is of the same step; readers of the file see it at once.

        Args:
            step: Optimizer updates so far; at least the last row's.
            samples: Samples trained on so far.
            metrics: Declared name -> value; none of them already in the row.

        Returns:
            The step's row, as it now stands in the file.

        Raises:
            ValueError: A name is not declared.
            EvaclipError: The file cannot be written, for instance because the disk is full.
        """
        check_names(metrics)
        assert step > self._sealed, f"the rows up to step {self._sealed} are final, step {step} comes too late"
        assert step >= self.last_step, f"step {step} after step {self.last_step}"
        fields = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        if step > self.last_step:
            start, row = self._end, {"step": step, "samples": samples, **fields}
            self._put(start, row)
            self._steps.append(step)
            self._offsets.append(start)
        else:
            before = next(self.rows(step))
            twice = before.keys() & fields.keys()
            assert not twice, f"{', '.join(sorted(twice))} published twice for step {step}"
            row = {**before, **fields}
            self._put(self._offsets[-1], row)
        return row

    def seal(self, step: int) -> None:
        """Declare the rows up to ``step`` final and put them on the disk; before the checkpoint of that step."""
        self._sealed = max(self._sealed, step)
        os.fsync(self._file.fileno())

    def truncate(self, step: int) -> None:
        """Cut the rows after ``step``, the restored one; the rest is final. -1 cuts everything."""
        keep = bisect_right(self._steps, step)
        if keep < len(self._steps):
            # Perhaps the checkpoints are missing by mistake.
            kept = f"; {self._keep_old()}; no checkpoint is left, training starts anew" if keep == 0 else ""
            level = logging.WARNING if kept else logging.INFO
            _log.log(level, "%s: cut %d rows after step %d%s", self.path, len(self._steps) - keep, max(step, 0), kept)
            self._cut(keep, self._offsets[keep])
        self._sealed = step

    def rows(self, since: int = 0) -> Iterator[Row]:
        """Yield the rows from step ``since`` on, read from the file; None stands for a value that is not finite."""
        first = bisect_left(self._steps, since)
        if first == len(self._steps):
            return
        with self.path.open("rb") as file:
            file.seek(self._offsets[first])
            for line in file:
                yield json.loads(line)

    def close(self) -> None:
        """Close the file; every row is in it already."""
        self._file.close()

    def _put(self, start: int, row: Row) -> None:
        """Write a row at an offset: the end, or the start of the last row, which it then extends."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            self._file.seek(start)
            written = self._file.write(line)
            if written != len(line):  # what fits on a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise EvaclipError(
                f"cannot write to {self.path}: {error.strerror}; free some space, then continue"
            ) from error
        self._end = start + len(line)

    def _lines_behind_the_end(self) -> int:
        with self.path.open("rb") as file:
            file.seek(self._end)
            return sum(1 for _ in file)

    def _keep_old(self) -> str:
        """Copy the file as it is, once; what is said of it."""
        old = self.path.with_name(f"{self.path.name}.old")
        shutil.copyfile(self.path, old)
        return f"the file as it was is {old.name}"

    def _cut(self, num_rows: int, end: int) -> None:
        self._file.truncate(end)
        os.fsync(self._file.fileno())
        del self._steps[num_rows:]
        del self._offsets[num_rows:]
        self._end = end


def append_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Append rows to a list beside the history, such as ``skipped_steps.jsonl``; each row has a ``step``."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def cut_rows(path: Path, step: int) -> None:
    """Cut the rows after ``step``, and half a line, off such a list, whose steps never descend."""
    end = 0
    if not path.exists():
        return
    with path.open("r+b") as file:
        for line in file:
            row = _row_of(line)
            if row is None or row["step"] > step:
                break
            end += len(line)
        file.truncate(end)
        os.fsync(file.fileno())


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of such a list; none where there is no list."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a list that another process appends to; what it is just writing is left out."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith("\n") else None
        except ValueError:  # half a line of a launcher that was killed, and what was appended to it
            row = {}
        if isinstance(row, dict):
            rows.append(row)
    return rows


def load_history(path: Path) -> list[Row]:
    """Return the rows of a ``metrics.jsonl`` without changing it; a torn last line is left out."""
    return list(read_history(path))


def read_history(path: Path) -> Iterator[Row]:
    """Yield the same rows one by one, for files that are long."""
    return (row for row, _, _ in _scan(path))


def _scan(path: Path) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Yield (row, start, end) of each line; stop at one that is no row, or whose step does not ascend."""
    offset, last = 0, -1
    with path.open("rb") as file:
        for line in file:
            row = _row_of(line)
            if row is None or row["step"] <= last:
                return
            yield row, offset, offset + len(line)
            offset, last = offset + len(line), row["step"]


def _row_of(line: bytes) -> dict[str, Any] | None:
    """The row that a line of such a file holds; None for one that is torn or damaged."""
    if not line.endswith(b"}\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, or not even text
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def training_time(rows: Iterable[Mapping[str, float | None]]) -> list[tuple[float, float]]:
    """(samples, seconds of training that they took), from 0 on, a pair for each row that has a speed.

    Evaluations, checkpoints, and the time between a stop and the next start do not count.
    """
    found = [(0.0, 0.0)]
    for row in rows:
        samples, speed = row.get("samples"), row.get("speed/samples_per_second")
        if samples and speed:
            before, seconds = found[-1]
            found.append((samples, seconds + (samples - before) / speed))
    return found
