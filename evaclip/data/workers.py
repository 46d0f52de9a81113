"""Processes that read and decode: they outlive a signal to the whole group, and never their parent."""

from __future__ import annotations

import functools
import multiprocessing
import signal
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import DataLoader, Dataset


def loader(dataset: Dataset[Any], *, workers: int, **options: Any) -> DataLoader[Any]:
    """A ``DataLoader`` whose workers leave Ctrl-C and SIGTERM to their parent.

    Both signals often reach every process of a job, and the parent needs its workers until it has saved. It ends them
    itself: when the loader is done with, or at exit with a signal that cannot be ignored.
    """
    _kill_workers_at_exit()
    return DataLoader(dataset, num_workers=workers, worker_init_fn=_leave_signals_to_the_parent, **options)


def _leave_signals_to_the_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@functools.cache
def _kill_workers_at_exit() -> None:
    """Before multiprocessing asks its daemons to end with SIGTERM and waits for them."""
    Finalize(None, _kill_workers, exitpriority=10)


def _kill_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
