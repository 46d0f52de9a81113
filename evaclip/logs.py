"""Where log lines go: rank 0's to the console and to ``run_dir/log.txt``, the other ranks' warnings to the console.

Modules log through ``logging.getLogger(__name__)`` and know nothing of this. Other packages are heard from WARNING on.
Lines on the console are written around a progress bar, not through it.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm import tqdm


class _ConsoleHandler(logging.Handler):
    """Writes to stderr, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; a console that is gone does not end the run, and log.txt goes on."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except (OSError, ValueError):  # a broken pipe, a closed file
            self.handleError(record)


class _ConsoleFormatter(logging.Formatter):
    """Time and message; the level only where it is a warning or worse."""

    def __init__(self, rank: int) -> None:
        origin = f"rank {rank} " if rank else ""
        super().__init__(f"%(asctime)s {origin}%(message)s", "%H:%M:%S")
        self._loud = logging.Formatter(f"%(asctime)s {origin}%(levelname)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return self._loud.format(record) if record.levelno >= logging.WARNING else super().format(record)


class _RunFileHandler(logging.FileHandler):
    """Appends to the run's ``log.txt``."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """A disk that is full costs lines of the file; the console has them."""


def log_setup(run_dir: Path | None, rank: int = 0) -> None:
    """Send this process's log where it belongs; a second call replaces what the first one set up.

    Args:
        run_dir: Existing folder of the run, where rank 0 appends to ``log.txt``; None: console only.
        rank: This process among its peers; ranks other than 0 print warnings only, with their number.
    """
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, _ConsoleHandler | _RunFileHandler):
            root.removeHandler(handler)
            handler.close()
    logging.getLogger("evaclip").setLevel(logging.INFO)

    console = _ConsoleHandler(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(_ConsoleFormatter(rank))
    root.addHandler(console)
    if run_dir is not None and rank == 0:
        file = _RunFileHandler(run_dir / "log.txt", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
        root.addHandler(file)


def log_error(message: str) -> None:
    """Add the error that ends a run to its ``log.txt``; the console has it already."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _RunFileHandler):
            handler.handle(
                logging.makeLogRecord(
                    {"name": "evaclip", "levelno": logging.ERROR, "levelname": "ERROR", "msg": message}
                )
            )
