"""Writing files without waiting for them: storage that stands still must not silence whoever keeps others informed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress

_MOST = 10_000
"""Writes that may wait; further ones are dropped, as on a full disk."""
_LEAVING_SECONDS = 5.0


class Behind:
    """A thread that does what it is given, in that order; what the disk refuses is left out."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[Callable[[], object] | None] = queue.Queue(_MOST)
        self._thread = threading.Thread(target=self._work, name="files", daemon=True)
        self._thread.start()

    def do(self, write: Callable[[], object]) -> None:
        """Have something written soon."""
        with suppress(queue.Full):
            self._waiting.put_nowait(write)

    def close(self) -> None:
        """Wait a few seconds for what was given."""
        with suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(_LEAVING_SECONDS)

    def _work(self) -> None:
        while write := self._waiting.get():
            with suppress(OSError):
                write()
