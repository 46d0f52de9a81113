"""What a rank is doing, for whoever watches it: a few bytes in a mapped file, written without a system call.

A launcher (``cluster.node``) names the folder in ``EVACLIP_HEARTBEATS``; without one nothing is written. The file stays
when the rank dies or hangs, and then tells where. Decides nothing and knows nobody who reads it.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path
from typing import Literal, NamedTuple

FOLDER = "EVACLIP_HEARTBEATS"

Phase = Literal["start", "data", "forward", "update", "metrics", "evaluation", "checkpoint", "end"]
PHASES: tuple[Phase, ...] = ("start", "data", "forward", "update", "metrics", "evaluation", "checkpoint", "end")
"""In the order of a step; ``start`` is all before the first update is done, ``end`` all after the last is saved."""

_LAYOUT = struct.Struct("<qqqd")  # process, step, phase, seconds of the machine's monotonic clock


class Beat(NamedTuple):
    """A rank's last sign of life."""

    rank: int
    pid: int
    step: int
    phase: Phase
    seconds: float
    """Of ``time.monotonic()``, which all processes of a machine share."""


class _Heart:
    """This process's file; ``beat`` makes it at the first call."""

    pages: mmap.mmap | None = None
    asked = False
    step = -1
    trained = False
    """An update is done: until then every part of a step may take minutes, and counts as the start."""


def beat(phase: Phase, step: int | None = None) -> None:
    """Tell what this rank does now; without a step, still at the last one."""
    if not _Heart.asked:
        _Heart.asked = True
        _Heart.pages = _open()
    if _Heart.pages is not None:
        _Heart.step = _Heart.step if step is None else step
        _Heart.trained |= phase == "metrics"
        if phase in ("data", "forward", "update") and not _Heart.trained:
            phase = "start"
        _LAYOUT.pack_into(_Heart.pages, 0, os.getpid(), _Heart.step, PHASES.index(phase), time.monotonic())


def read_beats(folder: Path) -> list[Beat]:
    """Last signs of life of a machine's ranks, by rank."""
    beats: list[Beat] = []
    for path in folder.glob("rank_*"):
        content = path.read_bytes()
        pid, step, phase, seconds = _LAYOUT.unpack_from(content) if len(content) == _LAYOUT.size else (0, 0, 0, 0.0)
        if pid:  # there was one
            beats.append(Beat(int(path.name.removeprefix("rank_")), pid, step, PHASES[phase], seconds))
    return sorted(beats)


def _open() -> mmap.mmap | None:
    if FOLDER not in os.environ:
        return None
    path = Path(os.environ[FOLDER]) / f"rank_{os.environ.get('RANK', '0')}"
    try:
        with path.open("w+b") as file:
            file.write(bytes(_LAYOUT.size))
            file.flush()
            return mmap.mmap(file.fileno(), _LAYOUT.size)
    except OSError:  # a full disk, say: nobody watches then, and the launcher's time-out counts from the start
        return None
