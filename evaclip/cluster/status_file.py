"""``cluster.json``: what every rank does, written once a second as long as the supervisor lives, whatever it waits for.

Nodes that nobody asks for any more look at it, to tell a supervisor that is lost from one that has given up them alone.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from evaclip.cluster.policy import Sign

_SECONDS = 1.0
_LEAVING_SECONDS = 5.0


class StatusFile:
    """A thread that writes what it was told last, with the time.

    Args:
        path: Of the file. It is written in place (a new one each second would keep a network's file system busy), and
            never becomes shorter, so whoever reads meanwhile finds the old or the new content, not an empty file.
        job: The scheduler's number.
    """

    def __init__(self, path: Path, job: str) -> None:
        self._path = path
        self._job = job
        self._told: tuple[int, str, Sequence[Sign], float] | None = None
        self._length = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="status", daemon=True)
        self._thread.start()

    def tell(self, attempt: int, state: str, signs: Sequence[Sign] = ()) -> None:
        """Have this written from now on."""
        self._told = attempt, state, signs, time.monotonic()

    def close(self) -> None:
        """Write it a last time; not for ever, where storage stands still."""
        self._over.set()
        self._thread.join(_LEAVING_SECONDS)

    def _work(self) -> None:
        while not self._over.wait(_SECONDS):
            self._write()
        self._write()

    def _write(self) -> None:
        if self._told is None:
            return
        attempt, state, signs, told = self._told
        since = time.monotonic() - told
        nodes: dict[str, list[dict[str, Any]]] = {}
        for sign in signs:
            row = {"rank": sign.rank, "pid": sign.pid, "step": sign.step, "phase": sign.phase}
            nodes.setdefault(sign.node, []).append({**row, "age_seconds": round(sign.age_seconds + since, 2)})
        status = {"time": time.time(), "job": self._job, "attempt": attempt, "state": state, "nodes": nodes}
        text = json.dumps(status)
        self._length = max(self._length, len(text) + 1)
        content = f"{text:<{self._length - 1}}\n".encode()
        with suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, content, 0)
                os.ftruncate(descriptor, len(content))
            finally:
                os.close(descriptor)
