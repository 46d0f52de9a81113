"""Reading records of shards by their offsets, and writing shards.

A process keeps open what it needs again soon: descriptors of some shards, and of their indexes only the neighbourhood
of the records it reads. It does not know what images and captions are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from evaclip.data.index import ShardIndex, build_index, checksum, ensure_index, index_path, read_index, save_index
from evaclip.data.storage import Cache, File, is_remote, open_file
from evaclip.data.tar import expand_names, write_tar
from evaclip.errors import DataError

_OPEN_FILES = 256
"""Descriptors a process keeps."""
_PAGE = 64
"""Records whose part of the index is kept together: a block of the data order, at its default size."""
_PAGES = 4096
"""Pages a process keeps: 20 KB each, enough for the windows of 256 slots."""
_INDEXES = 8
"""Whole indexes a process keeps: all of them where there are few shards."""
_MOST_BYTES = 256 << 20
"""A longer record is bad: nothing that is called an image and its caption takes so much memory."""

V = TypeVar("V")


class Record(NamedTuple):
    """The members of one key."""

    key: str
    members: dict[str, bytes]
    """Extension (behind the name's first dot, lower case) -> content."""


class CorruptRecordError(DataError):
    """A record's bytes are not those of the index.

    Attributes:
        reason: The kind of damage, under which it is counted.
    """

    def __init__(self, message: str, reason: str = "checksum") -> None:
        super().__init__(message)
        self.reason = reason


def expand(pattern: str | Sequence[str]) -> list[str]:
    """The shards that a pattern names, brace ranges expanded, in order.

    Raises:
        DataError: A local path is missing or is not a file, a URL is of an unknown kind, or there is no shard at all.
    """
    names = expand_names(pattern)
    require_files(names, missing_files(names))
    return names


def missing_files(names: Sequence[str]) -> list[str]:
    """Those of some shards that are neither URLs nor files."""
    return [name for name in names if not is_remote(name) and not Path(name).is_file()]


def require_files(names: Sequence[str], missing: Sequence[str]) -> None:
    """Raises ``DataError``, which names the first, where any of a pattern's shards are missing."""
    if missing:
        first = Path(missing[0])
        what = "is a folder, not a shard" if first.is_dir() else "does not exist"
        origin = "" if first.is_absolute() else f", which counts from {Path.cwd()}"
        raise DataError(
            f"{first} {what} ({len(missing)} of {len(names)} shards cannot be used); check the pattern{origin}"
        )


# ------------------------------------------------------------------------------------------------------------ reading


def read_record(file: File, index: ShardIndex, record: int, only: str | None = None) -> Record:
    """Read a record with one request, or two where the first answer is wrong.

    Args:
        file: The tar.
        index: The tar's, or a page of it.
        record: Number in ``index``.
        only: Read nothing but the member of this extension.

    Raises:
        CorruptRecordError: A member's bytes do not match their checksum, or are not there.
        DataError: The storage failed.
    """
    first, last = int(index.starts[record]), int(index.starts[record + 1]) - 1
    if only is not None:
        wanted = [m for m in range(first, last + 1) if index.extensions[int(index.kinds[m])] == only]
        if not wanted:
            return Record(index.keys[record], {})
        first = last = wanted[0]
    start = int(index.offsets[first])
    length = int(index.offsets[last] + index.sizes[last]) - start
    where = f"{file.location}: record {index.keys[record]!r}"
    if length > _MOST_BYTES:
        raise CorruptRecordError(f"{where} has {length:,} bytes, more than {_MOST_BYTES:,}", "too_many_bytes")
    data = b""
    for fresh in (False, True):
        data = file.read(start, length, fresh=fresh)
        if len(data) != length:
            continue
        spans = ((int(index.offsets[m]) - start, int(index.sizes[m])) for m in range(first, last + 1))
        contents = [data[offset : offset + size] for offset, size in spans]
        expected = index.checksums[first : last + 1].tolist()
        if [checksum(content) for content in contents] == expected:
            extensions = [index.extensions[int(index.kinds[member])] for member in range(first, last + 1)]
            return Record(index.keys[record], dict(zip(extensions, contents, strict=True)))
    if len(data) != length:
        raise CorruptRecordError(f"{where} lies behind the end of the file, which was cut off", "cut_off")
    raise CorruptRecordError(f"{where} differs from its checksum")


class Recent(Generic[V]):
    """What was used last of things that are costly to make."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Any, V] = OrderedDict()

    def get(self, key: Any, make: Callable[[], V]) -> V:
        """The value of a key, made if it is not kept."""
        value = self._kept.get(key)
        if value is None:
            value = self._kept[key] = make()
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return value


class ShardSet:
    """The shards of a source; ``digests`` holds what their indexes must say."""

    def __init__(
        self, locations: Sequence[str | Path], index_dir: str | None, digests: Sequence[str], cache: Cache | None = None
    ) -> None:
        self.locations = tuple(str(location) for location in locations)
        self.index_dir = index_dir
        self.digests = tuple(digests)
        self.cache = cache
        self._forget()

    def read(self, shard: int, record: int, only: str | None = None) -> Record:
        """Read a record, or ``only`` its member of one extension, if it has that.

        Raises:
            CorruptRecordError: Its bytes are not those of the index.
            DataError: The storage failed, or the index is not the one that was counted.
        """
        file = self._files.get(shard, lambda: open_file(self.locations[shard], self.cache))
        return read_record(file, self._page(shard, record), record % _PAGE, only)

    def key(self, shard: int, record: int) -> str:
        """Key of a record; raises ``DataError`` as ``read`` does."""
        return self._page(shard, record).keys[record % _PAGE]

    def _page(self, shard: int, record: int) -> ShardIndex:
        page = record // _PAGE
        return self._pages.get((shard, page), lambda: self._index_of(shard).records(page * _PAGE, _PAGE))

    def _index_of(self, shard: int) -> ShardIndex:
        return self._indexes.get(shard, lambda: self._verified_index(shard))

    def _verified_index(self, shard: int) -> ShardIndex:
        location = self.locations[shard]
        index = read_index(index_path(location, self.index_dir))
        if index is None or index.digest != self.digests[shard]:
            what = "is gone" if index is None else "was replaced"
            raise DataError(f"the index of {location} {what} while the run read it; restore it, or use a new run_dir")
        return index

    def _forget(self) -> None:
        self._files: Recent[File] = Recent(_OPEN_FILES)
        self._pages: Recent[ShardIndex] = Recent(_PAGES)
        self._indexes: Recent[ShardIndex] = Recent(_INDEXES)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in {"_files", "_pages", "_indexes"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class Shard:
    """One tar, opened through its index, which is built and saved where it is missing (see ``ensure_index``)."""

    def __init__(self, location: str | Path, index_dir: str | None = None) -> None:
        self.index = ensure_index(location, index_dir)
        self._file = open_file(str(location))

    @property
    def num_records(self) -> int:
        """Records in the shard."""
        return self.index.num_records

    def key(self, record: int) -> str:
        """Key of a record."""
        return self.index.keys[record]

    def read(self, record: int) -> Record:
        """Read a record; raises as ``read_record``."""
        return read_record(self._file, self.index, record)


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
        write_tar(path, chain([first], islice(iterator, records_per_shard - 1)))
        save_index(build_index(path), index_path(path, None))
        paths.append(path)
    if not paths:
        raise DataError(f"nothing to write into {folder}: there are no records")
    return paths
