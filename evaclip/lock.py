"""One process per run directory: a lock that the system lets go of when its holder ends, however it ends.

A record lock (``lockf``) on ``.lock``, because data workers would inherit one of ``flock`` and hold it after a killed
parent. It reaches as far as the file system's locks do: over all nodes on NFS (with its lock service), Lustre (mounted
with ``flock``) and GPFS; a file system without locks is told in the log, and the run starts unprotected. The file names
the holder. A lock of a node that crashed lives on until its lease is over (90 s on NFSv4), so a holder on another node
is waited for; one on this node is alive.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import struct
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from evaclip.errors import RunLockedError

log = logging.getLogger(__name__)

_LEASE_SECONDS = 100.0

_held: dict[Path, int] = {}  # descriptors that stay open as long as the process: to close any would let go of the lock


def lock(directory: Path) -> None:
    """Keep other processes out of a run directory as long as this one lives.

    Raises:
        RunLockedError: Another one is in there; the message names it.
        OSError: The directory cannot be written.
    """
    if directory.resolve() in _held:
        return
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    job = f" SLURM job {os.environ['SLURM_JOB_ID']}," if "SLURM_JOB_ID" in os.environ else ""
    try:
        _acquire(descriptor, directory)
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()},{job} since {since}".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    _held[directory.resolve()] = descriptor


class Holder(NamedTuple):
    """Who trains in a run directory, or did last."""

    name: str
    """As the process named itself."""
    alive: bool | None
    """Whether it still does; None where that cannot be told from here."""


def holder(directory: Path) -> Holder | None:
    """Ask who holds the lock, and take nothing; None where nobody ever did.

    Raises:
        OSError: The file cannot be read.
    """
    own = _held.get(directory.resolve())
    if own is not None:  # to open the file once more, and close it, would let go of the lock
        return Holder(os.pread(own, 200, 0).decode(errors="replace"), alive=True)
    try:
        with (directory / ".lock").open("rb", buffering=0) as file:
            name = file.read(200).decode(errors="replace")
            question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # Linux's struct flock
            try:
                answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
            except OSError:  # a file system without locks
                return Holder(name, alive=None)
    except FileNotFoundError:
        return None
    if struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK:
        return Holder(name, alive=True)
    # where locks reach no further than a node, those of other nodes do not show
    return Holder(name, alive=False if _is_here(name) else None)


def require_free(directory: Path) -> None:
    """Refuse a folder in which another process trains, before anything of it is touched; takes nothing.

    Raises:
        RunLockedError: The message names it.
    """
    deadline = time.monotonic() + _LEASE_SECONDS
    with suppress(OSError):
        while (found := holder(directory)) and found.alive:
            if _is_here(found.name) or time.monotonic() > deadline:
                raise _locked(directory, found.name)
            time.sleep(1.0)


def _is_here(holder: str) -> bool:
    return f" on {platform.node()}," in holder


def _locked(directory: Path, holder: str) -> RunLockedError:
    return RunLockedError(
        f"another process trains in run_dir {directory} ({holder}); wait for it or end it, or choose another run_dir"
    )


def _acquire(descriptor: int, directory: Path) -> None:
    deadline, told = time.monotonic() + _LEASE_SECONDS, False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace")
        except OSError as error:  # for instance a cluster's file system that is mounted without locks
            log.warning(
                "the file system of run_dir %s has no locks (%s): nothing keeps a second process out; start none there",
                directory,
                error.strerror,
            )
            return
        else:
            return
        if _is_here(holder) or time.monotonic() > deadline:
            raise _locked(directory, holder)
        if not told:
            log.warning("run_dir %s is locked (%s); waiting for it to be free", directory, holder)
            told = True
        time.sleep(1.0)
