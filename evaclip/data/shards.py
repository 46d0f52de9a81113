"""WebDataset tars: which exist, what is in them, and reading one record by its offset.

Every shard has an index: keys, members, offsets, sizes and checksums. It is built once by a scan that accounts for
every byte up to the end marker, because tar readers stop at the first damaged header without a word. The index's
digest is the identity of the data: storage can move, content cannot change unseen.

This is the one module that imports webdataset. It does not know what images and captions are.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import webdataset.utils
import xxhash
from numpy.typing import NDArray
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from evaclip.errors import DataError

INDEX_VERSION = 1
_OPEN_SHARDS = 64  # file descriptors a process keeps

webdataset.utils.enforce_security = True  # type: ignore[attr-defined]


class Record(NamedTuple):
    """The members of one key."""

    key: str
    members: dict[str, bytes]
    """Extension (behind the name's first dot, lower case) -> content."""


class CorruptRecordError(DataError):
    """A member's bytes differ from the checksum in the index."""


@dataclass(frozen=True)
class ShardIndex:
    """What a tar holds. Records are runs of members with one key; arrays are aligned with the members."""

    tar_size: int
    keys: tuple[str, ...]
    extensions: tuple[str, ...]
    starts: NDArray[np.int64]
    """First member of each record, and the number of members at the end."""
    kinds: NDArray[np.int32]
    """Which of ``extensions`` each member has."""
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    checksums: NDArray[np.uint64]
    """xxh3 of each member's bytes."""

    @property
    def num_records(self) -> int:
        """Records in the shard."""
        return len(self.keys)

    @property
    def digest(self) -> str:
        """Identity of the content: keys, extensions and checksums in order, wherever the bytes lie."""
        state = xxhash.xxh3_128()
        state.update("\0".join((*self.keys, "", *self.extensions)).encode())
        for array in (self.starts, self.kinds, self.sizes, self.checksums):
            state.update(array.tobytes())
        return state.hexdigest()


# ------------------------------------------------------------------------------------------------------------ finding


def expand(pattern: str | Sequence[str]) -> list[Path]:
    """The shards that a pattern names, brace ranges expanded, in order.

    Raises:
        DataError: A path is not local, is missing or is not a file, or there is none at all.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    for text in patterns:
        if text.startswith("pipe:") or "://" in text:
            raise DataError(f"{text}: only local paths are read; copy or mount the shards first")
    try:
        paths = [Path(url) for text in patterns for url in expand_urls(text)]
    except ValueError as error:
        raise DataError(f"{patterns}: the braces do not match: {error}") from None
    if not paths:
        raise DataError(f"{patterns}: the list of shards is empty; name at least one tar")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        what = "is a folder, not a shard" if missing[0].is_dir() else "does not exist"
        origin = "" if missing[0].is_absolute() else f", which counts from {Path.cwd()}"
        raise DataError(
            f"{missing[0]} {what} ({len(missing)} of {len(paths)} shards cannot be used); check the pattern{origin}"
        )
    return paths


# ----------------------------------------------------------------------------------------------------------- indexing


def build_index(path: Path) -> ShardIndex:
    """Scan a tar from end to end.

    Raises:
        DataError: The file is not a tar, is damaged or cut off, or holds no records.
    """
    keys: list[str] = []
    starts: list[int] = []
    kinds: list[int] = []
    extensions: dict[str, int] = {}
    spans: list[tuple[int, int, int]] = []
    seen: set[str] = set()
    with path.open("rb") as file:
        for name, offset, size in _members(path, file):
            key, extension = _split(name)
            if not keys or key != keys[-1] or extension in seen:
                keys.append(key)
                starts.append(len(spans))
                seen = set()
            seen.add(extension)
            kinds.append(extensions.setdefault(extension, len(extensions)))
            checksum = xxhash.xxh3_64_intdigest(os.pread(file.fileno(), size, offset))
            spans.append((offset, size, checksum))
        tar_size = os.fstat(file.fileno()).st_size
    if not keys:
        raise DataError(f"{path} holds no records; remove it from the list of shards")
    offsets, sizes, checksums = zip(*spans, strict=True)
    return ShardIndex(
        tar_size=tar_size,
        keys=tuple(keys),
        extensions=tuple(extensions),
        starts=np.array([*starts, len(spans)], np.int64),
        kinds=np.array(kinds, np.int32),
        offsets=np.array(offsets, np.int64),
        sizes=np.array(sizes, np.int64),
        checksums=np.array(checksums, np.uint64),
    )


def _members(path: Path, file: Any) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each file in a tar, and the certainty that nothing follows the last."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.isreg() and _split(info.name)[0]:
                    yield info.name, info.offset_data, info.size
                tar.members = []  # type: ignore[attr-defined]  tarfile keeps every header it saw
            end = cast("int", tar.offset)  # type: ignore[attr-defined]
    except tarfile.ReadError as error:
        raise DataError(f"{path} is not a readable tar ({error}); repair it or remove it from the shards") from None
    file.seek(end)
    tail = file.read(tarfile.BLOCKSIZE)
    if tail.count(0) != tarfile.BLOCKSIZE or any(map(any, iter(lambda: file.read(1 << 20), b""))):
        what = "is cut off" if len(tail) < tarfile.BLOCKSIZE else "is damaged"
        raise DataError(f"{path} {what} at byte {end}, before its end marker; restore it or remove it from the shards")


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member; an empty key for what is no part of a record."""
    key, extension = base_plus_ext(name)
    base = os.path.basename(name)  # noqa: PTH119  a member's name, not a path of this machine
    if key is None or extension is None or (base.startswith("__") and base.endswith("__")):
        return "", ""
    return key, extension.lower()


def index_path(shard: Path, index_dir: str | None) -> Path:
    """Where a shard's index lies: beside it, or in ``index_dir`` under the shard's whole path."""
    name = f"{shard.name}.index.npz"
    if index_dir is None:
        return shard.with_name(name)
    return Path(index_dir) / f"{xxhash.xxh3_64_hexdigest(os.fsencode(shard.resolve()))}-{name}"


def save_index(index: ShardIndex, path: Path) -> None:
    """Write an index so that half a file never looks like a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(
                file,
                version=np.int64(INDEX_VERSION),
                tar_size=np.int64(index.tar_size),
                keys=np.frombuffer("\0".join(index.keys).encode(), np.uint8),
                extensions=np.frombuffer("\0".join(index.extensions).encode(), np.uint8),
                starts=index.starts,
                kinds=index.kinds,
                offsets=index.offsets,
                sizes=index.sizes,
                checksums=index.checksums,
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_index(path: Path, tar_size: int) -> ShardIndex | None:
    """A saved index, or None where there is none that fits a tar of this size."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            if int(saved["version"]) != INDEX_VERSION or int(saved["tar_size"]) != tar_size:
                return None
            names = {name: tuple(saved[name].tobytes().decode().split("\0")) for name in ("keys", "extensions")}
            arrays = {name: saved[name] for name in ("starts", "kinds", "offsets", "sizes", "checksums")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent, torn or of another kind: it is built again
    return ShardIndex(tar_size, names["keys"], names["extensions"], **arrays)


def ensure_index(shard: Path, index_dir: str | None = None) -> ShardIndex:
    """A shard's index, built and saved if it is absent or of another size of tar.

    Raises:
        DataError: The shard cannot be indexed, or the index cannot be saved.
    """
    path = index_path(shard, index_dir)
    try:
        saved = read_index(path, shard.stat().st_size)
        if saved is not None:
            return saved
        index = build_index(shard)
    except OSError as error:
        raise DataError(f"{shard} cannot be read ({error.strerror}); check the storage and its permissions") from error
    try:
        save_index(index, path)
    except OSError as error:
        raise DataError(
            f"the index {path} cannot be written ({error.strerror}); set data.index_dir to a folder that can"
        ) from error
    return index


# ------------------------------------------------------------------------------------------------------------ reading


class Shard:
    """One tar, opened through its index."""

    def __init__(self, path: Path, index: ShardIndex) -> None:
        self.path = path
        self.index = index
        self._descriptor = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, self._descriptor)

    @property
    def num_records(self) -> int:
        """Records in the shard."""
        return self.index.num_records

    def key(self, record: int) -> str:
        """Key of a record."""
        return self.index.keys[record]

    def read(self, record: int) -> Record:
        """Read a record with one request.

        Raises:
            CorruptRecordError: A member's bytes do not match their checksum.
            DataError: The tar is shorter than its index says.
        """
        index = self.index
        first, last = int(index.starts[record]), int(index.starts[record + 1]) - 1
        start = int(index.offsets[first])
        length = int(index.offsets[last] + index.sizes[last]) - start
        data = os.pread(self._descriptor, length, start)
        if len(data) != length:
            raise DataError(f"{self.path} ends before record {self.key(record)!r}: it changed since it was indexed")
        members: dict[str, bytes] = {}
        for member in range(first, last + 1):
            offset, size = int(index.offsets[member]) - start, int(index.sizes[member])
            content = data[offset : offset + size]
            if xxhash.xxh3_64_intdigest(content) != int(index.checksums[member]):
                raise CorruptRecordError(f"{self.path}: record {self.key(record)!r} differs from its checksum")
            members[index.extensions[index.kinds[member]]] = content
        return Record(self.key(record), members)


def open_index(path: Path, index_dir: str | None = None) -> Shard:
    """A shard ready to read; see ``ensure_index``."""
    return Shard(path, ensure_index(path, index_dir))


class ShardSet:
    """The shards of a source, a bounded number of them open; ``digests`` holds what their indexes must say."""

    def __init__(self, paths: Sequence[Path], index_dir: str | None, digests: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self.index_dir = index_dir
        self.digests = tuple(digests)
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def read(self, shard: int, record: int) -> Record:
        """Read a record.

        Raises:
            CorruptRecordError: A member's bytes do not match their checksum.
            DataError: The shard is not the one that was counted.
        """
        return self._shard(shard).read(record)

    def key(self, shard: int, record: int) -> str:
        """Key of a record; raises ``DataError`` as ``read`` does."""
        return self._shard(shard).key(record)

    def _shard(self, shard: int) -> Shard:
        opened = self._open.get(shard)
        if opened is None:
            path = self.paths[shard]
            opened = open_index(path, self.index_dir)
            if opened.index.digest != self.digests[shard]:
                raise DataError(f"{path} was replaced while the run read it; restore it, or use a new run_dir")
            self._open[shard] = opened
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


# ------------------------------------------------------------------------------------------------------------ writing


def write_shards(
    folder: Path, records: Iterable[tuple[str, Mapping[str, bytes]]], records_per_shard: int
) -> list[Path]:
    """Write records as ``00000.tar``, ``00001.tar`` ..., each with its index; returns the tars.

    Members carry fixed times and owners: equal records make equal bytes.

    Raises:
        DataError: There are no records.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    iterator = iter(records)
    for first in iterator:
        path = folder / f"{len(paths):05d}.tar"
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file, contextlib.closing(TarWriter(file, mtime=0.0)) as tar:
            for count, (key, members) in enumerate(chain([first], iterator), 1):
                tar.write({"__key__": key, **members})  # type: ignore[no-untyped-call]
                if count == records_per_shard:
                    break
        temporary.replace(path)
        save_index(build_index(path), index_path(path, None))
        paths.append(path)
    if not paths:
        raise DataError(f"nothing to write into {folder}: there are no records")
    return paths
