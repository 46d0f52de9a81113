"""Where bytes lie: files of this machine, and objects behind http(s), s3 and gs URLs, read by ranges.

A fault of the storage is retried with growing pauses and then stops the run: another run would not repeat it, so
nothing may be skipped because of it. What the bytes mean is decided elsewhere. fsspec reads what is remote; it is
imported here alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import logging
import os
import re
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import fsspec
import xxhash

from evaclip.errors import DataError

log = logging.getLogger(__name__)

T = TypeVar("T")

_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0)
"""Seconds before a failed read is tried again."""
_TIMEOUT = 60
"""Seconds without an answer after which a remote read has failed."""
_CHUNK = 8 << 20
"""Bytes that are cached together."""
_PIECE_NAME = re.compile(r"\.?[0-9a-f]{32}-\d+(\.tmp)?")
"""Of the cache's own files, also half-written ones; whatever else lies in its folder is not its to count or delete."""
_LEDGER_NAME = ".evaclip-cache"
"""The cache's lock and how many bytes it holds. Not ``.lock``: that is a run directory's, perhaps the same folder."""
_DIGITS = 20
"""Of the number in the ledger, which is written in place."""
_ROOM = 100
"""The share of the cache that is freed at once: one in so many pieces, or each new one would need all to be counted."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Answers that a second try does not change."""


class NotThereError(DataError):
    """There is no such file, or it may not be read."""


class File(Protocol):
    """Bytes that are read by ranges."""

    location: str
    size: int
    """Bytes, when it was opened."""

    def read(self, start: int, length: int, *, fresh: bool = False) -> bytes:
        """A range of the bytes, shorter only where the file ends; ``fresh``: not what is kept of it.

        Raises:
            DataError: The storage failed again and again.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


def is_remote(location: str) -> bool:
    """Whether a location is a URL."""
    return "://" in location


def open_file(location: str, cache: Cache | None = None) -> File:
    """Open a path or a URL; what is remote goes through ``cache``, if there is one.

    Raises:
        NotThereError: It does not exist or may not be read.
        DataError: The storage failed again and again.
    """
    if not is_remote(location):
        return _LocalFile(location)
    remote = _RemoteFile(location)
    return _CachedFile(remote, cache) if cache else remote


def _persistent(location: str, read: Callable[[], T], faults: type[Exception]) -> T:
    """The answer of ``read``, tried again while it raises ``faults``."""
    began = time.monotonic()
    for wait in (*_WAITS, None):
        try:
            return read()
        except DataError:
            raise
        except faults as error:
            cause = _cause(error)
            if isinstance(cause, _FINAL):
                unsaid = "permission denied" if isinstance(cause, PermissionError) else "it does not exist"
                what = cause.strerror or unsaid  # fsspec's libraries often give no reason
                raise NotThereError(
                    f"{location} cannot be read ({what}); check the path and its permissions"
                ) from error
            if wait is None:
                raise DataError(
                    f"{location} cannot be read ({_text(cause)}), tried {len(_WAITS) + 1} times in "
                    f"{time.monotonic() - began:.0f} s; mend the storage and start the run again"
                ) from error
            log.warning("%s cannot be read (%s), next try in %g s", location, _text(cause), wait)
            time.sleep(wait)
    raise AssertionError("the last try answers or raises")


def _cause(error: Exception) -> Exception:
    """What is behind an answer: fsspec calls an object missing whose server did not answer at all."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    refused = getattr(cause, "status", 0)
    return error if isinstance(cause, _FINAL) or refused in {403, 404, 410} else cause


def _text(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror or f"{type(error).__name__} {error}".strip()


class _LocalFile:
    """A file of this machine, or one that is mounted."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._descriptor: int | None = None
        self.size = _persistent(location, lambda: os.fstat(self._opened()).st_size, OSError)

    def read(self, start: int, length: int, *, fresh: bool = False) -> bytes:
        return _persistent(self.location, lambda: self._try(start, length), OSError)

    def close(self) -> None:
        if self._descriptor is not None:
            self._closing()
            self._descriptor = None

    def _try(self, start: int, length: int) -> bytes:
        pieces: list[bytes] = []
        try:
            while length > 0 and (piece := os.pread(self._opened(), length, start)):
                pieces.append(piece)
                start, length = start + len(piece), length - len(piece)
        except OSError:
            self.close()  # a stale handle of a network file system stays stale
            raise
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _opened(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.location, os.O_RDONLY)
            self._closing = weakref.finalize(self, os.close, self._descriptor)
        return self._descriptor


class _RemoteFile:
    """An object behind a URL; fsspec hands on whatever its libraries raise."""

    def __init__(self, location: str) -> None:
        self.location = location
        size = _persistent(location, lambda: _file_system(location).info(location)["size"], Exception)
        if not isinstance(size, int):
            raise DataError(f"{location}: the server does not tell the size; serve the shards with Content-Length")
        self.size = size

    def read(self, start: int, length: int, *, fresh: bool = False) -> bytes:
        stop = min(start + length, self.size)
        return _persistent(self.location, lambda: self._try(start, stop), Exception) if start < stop else b""

    def close(self) -> None:
        pass

    def _try(self, start: int, stop: int) -> bytes:
        data = _file_system(self.location).cat_file(self.location, start=start, end=stop)
        if len(data) > stop - start:
            raise DataError(f"{self.location}: the server ignores ranges; serve the shards by one that knows them")
        if len(data) < stop - start:
            raise OSError(f"{len(data)} bytes came instead of {stop - start}")
        return bytes(data)


@functools.cache
def _file_system_of(scheme: str, _process: int) -> Any:
    """Fsspec's file system; one that was made before a fork cannot be used behind it."""
    options: dict[str, Any] = {}
    if scheme in {"http", "https"}:
        import aiohttp  # noqa: PLC0415  comes with the extra that remote shards need

        options = {
            "client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, connect=_TIMEOUT, sock_read=_TIMEOUT)}
        }
    elif scheme == "s3":
        options = {"config_kwargs": {"connect_timeout": _TIMEOUT, "read_timeout": _TIMEOUT}}
    elif scheme == "gs":
        options = {"timeout": _TIMEOUT}
    return fsspec.filesystem(scheme, **options)


def _file_system(location: str) -> Any:
    scheme = location.partition("://")[0]
    try:
        return _file_system_of(scheme, os.getpid())
    except ModuleNotFoundError as error:
        raise DataError(f"{location}: {error}; pip install 'evaclip[remote]' brings what {scheme} URLs need") from error


# -------------------------------------------------------------------------------------------------------------- cache


class Cache(NamedTuple):
    """A folder that keeps pieces of remote files, the least recently used of which go first.

    Other files may lie in it, such as indexes or shards: they stay, and do not count.
    """

    folder: Path
    most_bytes: int

    def get(self, file: File, number: int, start: int, stop: int, *, fresh: bool) -> bytes:
        """A range of the ``number``-th piece of a file, out of the folder if it is there and need not be ``fresh``.

        A folder that cannot be written costs speed alone, and a warning.
        """
        path = self._path(file, number)
        length = min(_CHUNK, file.size - number * _CHUNK)
        if not fresh:
            with contextlib.suppress(OSError), path.open("rb", buffering=0) as kept:
                if os.fstat(kept.fileno()).st_size == length:  # a power loss may have cut it off
                    os.utime(kept.fileno())
                    return os.pread(kept.fileno(), stop - start, start)
        data = file.read(number * _CHUNK, length)
        try:
            self._keep(path, data)
        except OSError as error:
            _warn_once(f"{self.folder} cannot keep pieces of shards ({error.strerror}); check data.cache_dir")
        return data[start:stop]

    def _path(self, file: File, number: int) -> Path:
        return self.folder / f"{xxhash.xxh3_128_hexdigest(f'{file.size} {file.location}'.encode())}-{number}"

    def _keep(self, path: Path, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with self._locked() as ledger:
            if not self._take_room(ledger, len(data)):
                return
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def _take_room(self, ledger: int, wanted: int) -> bool:
        """Whether there is room for some bytes, which then are taken.

        The ledger holds the bytes of all processes' pieces, or more: what is replaced, fails or is deleted by others
        stays in it until they are counted, when it reaches the bound. (A power loss may cost it the last few.)
        """
        text = os.pread(ledger, _DIGITS, 0)
        total = int(text) if len(text) == _DIGITS and text.isdigit() else self.most_bytes
        if total + wanted > self.most_bytes:
            total = self._make_room(wanted)
        if total + wanted > self.most_bytes:
            return False
        os.pwrite(ledger, b"%0*d" % (_DIGITS, total + wanted), 0)
        return True

    def _make_room(self, wanted: int) -> int:
        """Count the pieces and delete the oldest ones where there is no room; returns the bytes of those that stay."""
        with os.scandir(self.folder) as entries:
            pieces = [(entry.stat(), entry.path) for entry in entries if _PIECE_NAME.fullmatch(entry.name)]
        total = sum(stat.st_size for stat, _ in pieces)
        if total + wanted > self.most_bytes:
            most = self.most_bytes - self.most_bytes // _ROOM - wanted
            for stat, old in sorted(pieces, key=lambda piece: piece[0].st_mtime):
                if total <= most:
                    break
                Path(old).unlink(missing_ok=True)
                total -= stat.st_size
        return total

    @contextmanager
    def _locked(self) -> Generator[int]:
        """Only one process of this machine adds at a time, so the bound holds; gives the ledger's descriptor."""
        descriptor = os.open(self.folder / _LEDGER_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


@functools.cache
def _warn_once(text: str) -> None:
    log.warning(text)


@dataclass
class _CachedFile:
    """A remote file, read in pieces that are kept."""

    file: File
    cache: Cache

    def __post_init__(self) -> None:
        self.location, self.size = self.file.location, self.file.size

    def read(self, start: int, length: int, *, fresh: bool = False) -> bytes:
        stop = min(start + length, self.size)
        if start >= stop:
            return b""
        numbers = range(start // _CHUNK, -(-stop // _CHUNK))
        spans = [(number, max(start - number * _CHUNK, 0), min(stop - number * _CHUNK, _CHUNK)) for number in numbers]
        return b"".join(self.cache.get(self.file, *span, fresh=fresh) for span in spans)

    def close(self) -> None:
        self.file.close()


# ---------------------------------------------------------------------------------------------------------- as stream


class _Stream(io.RawIOBase):
    """A file as what Python's readers take."""

    def __init__(self, file: File) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def as_stream(file: File, buffered: int = _CHUNK) -> io.BufferedReader:
    """The file from its start, read ahead in large pieces."""
    return io.BufferedReader(_Stream(file), buffered)
