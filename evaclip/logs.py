"""Where log lines go: to the console, and to a file per rank.

Rank 0's go to the console and to ``run_dir/log.txt``; the other ranks' to ``run_dir/logs/rank_00003.txt``, and their
warnings to the console too. Files are written line by line, and rotated, so that no run fills a disk with them.

Modules log through ``logging.getLogger(__name__)`` and know nothing of this. Other packages are heard from WARNING on.
Lines on the console are written around a progress bar, not through it.
"""

from __future__ import annotations

import logging
import re
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

from tqdm import tqdm

LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?P<level>[A-Z]+) (?P<name>[\w.]+): (?P<message>.*)")
"""A line of ``log.txt`` that begins a record; other lines belong to the one before."""
END = "evaclip"
"""Name under which the error that ends a run is logged."""
log = logging.getLogger(__name__)

_MAIN_FILE = 50 * 2**20, 3  # bytes, old ones that are kept
_RANK_FILE = 10 * 2**20, 2


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


class _RunFileHandler(RotatingFileHandler):
    """Appends to a file of the run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """A disk that is full costs lines of the file; the console has them."""


def log_setup(run_dir: Path | None, rank: int = 0) -> None:
    """Send this process's log where it belongs; a second call replaces what the first one set up.

    Args:
        run_dir: Existing folder of the run: rank 0 appends to ``log.txt``, others to their file in the existing folder
            ``logs``, or to the console alone where that cannot be opened. None: console only.
        rank: This process among its peers; ranks other than 0 print warnings only, with their number.

    Raises:
        OSError: ``log.txt`` cannot be opened.
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
    if run_dir is None:
        return
    try:
        path = run_dir / ("log.txt" if rank == 0 else f"logs/rank_{rank:05d}.txt")
        size, num_old = _MAIN_FILE if rank == 0 else _RANK_FILE
        file = _RunFileHandler(path, maxBytes=size, backupCount=num_old, encoding="utf-8")
    except OSError as error:
        if rank == 0:
            raise
        log.warning("no log of this rank is written: %s", error)
        return
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
    root.addHandler(file)


def log_error(message: str) -> None:
    """Add the error that ends a run to this process's file; the console has it already."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _RunFileHandler):
            handler.handle(
                logging.makeLogRecord({"name": END, "levelno": logging.ERROR, "levelname": "ERROR", "msg": message})
            )
