"""What a rank is doing, for whoever watches it: a few bytes in a mapped file, written without a system call.

A launcher (``cluster.node``) names the folder in ``EVACLIP_HEARTBEATS``; without one nothing is written. The file stays
when the rank dies or hangs, and then tells where. It has two places, written in turn and each with its checksum: who
reads in the middle of a write, or of one that death broke off, takes the other. Decides nothing and knows nobody who
reads it.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

FOLDER = "EVACLIP_HEARTBEATS"

Phase = Literal["start", "data", "forward", "update", "metrics", "evaluation", "checkpoint", "end"]
PHASES: tuple[Phase, ...] = ("start", "data", "forward", "update", "metrics", "evaluation", "checkpoint", "end")
"""In the order of a step; ``start`` is all before the first update is done, ``end`` all after the last is saved."""

_BEAT = struct.Struct("<qqqd")  # process, step, phase, seconds of the machine's monotonic clock
_CHECKSUM = struct.Struct("<q")
_PLACE = _BEAT.size + _CHECKSUM.size
_SIZE = 2 * _PLACE


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
    count = 0
    step = -1
    phase: Phase = "start"
    trained = False
    """An update is done: until then every part of a step may take minutes, and counts as the start."""


def beat(phase: Phase | None = None, step: int | None = None) -> None:
    """Tell what this rank does now; without a phase, still the same, and without a step, still at the last one."""
    if not _Heart.asked:
        _Heart.asked = True
        _Heart.pages = _open()
    if _Heart.pages is not None:
        _Heart.step = _Heart.step if step is None else step
        _Heart.phase = phase = phase or _Heart.phase
        _Heart.trained |= phase == "metrics"
        if phase != "end" and not _Heart.trained:
            phase = "start"
        content = _BEAT.pack(os.getpid(), _Heart.step, PHASES.index(phase), time.monotonic())
        begin = _Heart.count % 2 * _PLACE
        _Heart.pages[begin : begin + _PLACE] = content + _CHECKSUM.pack(zlib.crc32(content))
        _Heart.count += 1


def read_beats(folder: Path) -> list[Beat]:
    """Last signs of life of a machine's ranks, by rank."""
    beats: list[Beat] = []
    for path in folder.glob("rank_*"):
        content = path.read_bytes()
        whole = [beat for place in range(2) if (beat := _whole(content[place * _PLACE : (place + 1) * _PLACE]))]
        if whole:  # there was one
            pid, step, phase, seconds = max(whole, key=lambda beat: beat[-1])
            beats.append(Beat(int(path.name.removeprefix("rank_")), pid, step, PHASES[phase], seconds))
    return sorted(beats)


def _whole(place: bytes) -> tuple[int, int, int, float] | None:
    """What stands in a place, if it is not half of one beat and half of another."""
    if len(place) < _PLACE or _CHECKSUM.unpack_from(place, _BEAT.size)[0] != zlib.crc32(place[: _BEAT.size]):
        return None
    return _BEAT.unpack_from(place)


def _open() -> mmap.mmap | None:
    if FOLDER not in os.environ:
        return None
    path = Path(os.environ[FOLDER]) / f"rank_{os.environ.get('RANK', '0')}"
    try:
        with path.open("w+b") as file:
            file.write(bytes(_SIZE))
            file.flush()
            return mmap.mmap(file.fileno(), _SIZE)
    except OSError:  # a full disk, say: nobody watches then, and the launcher's time-out counts from the start
        return None
