"""The index of a shard: which records it holds, where their members lie, and what their bytes must be.

It is built once by a scan that accounts for every byte. Its digest is the identity of the data: storage can move,
content cannot change unseen. Damage is remembered with it, so that nothing is lost unseen either.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from evaclip.data.storage import NotThereError, as_stream, is_remote, open_file
from evaclip.data.tar import Gap, scan, split_name
from evaclip.errors import DataError
from evaclip.files import replacing

log = logging.getLogger(__name__)

INDEX_VERSION = 3
_PIECE = 8 << 20
_ARRAYS = ("key_ends", "starts", "kinds", "offsets", "sizes", "checksums")

checksum = xxhash.xxh64_intdigest
"""Of a member's bytes. xxh3 is faster, but by instructions that slow a processor's clock down: on a Xeon the JPEG
decoder that runs next took 5 % longer (NOTES)."""


@dataclass(frozen=True)
class ShardIndex:
    """What a tar holds. Records are runs of members with one key; arrays are aligned with the members."""

    tar_size: int
    key_bytes: bytes
    """Keys, one behind the other: most of them are never looked at."""
    key_ends: NDArray[np.int64]
    """Where each key ends."""
    extensions: tuple[str, ...]
    starts: NDArray[np.int64]
    """First member of each record, and the number of members at the end."""
    kinds: NDArray[np.int32]
    """Which of ``extensions`` each member has."""
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    checksums: NDArray[np.uint64]
    """xxh64 of each member's bytes."""
    gaps: tuple[Gap, ...] = ()
    """Bytes that belong to no member."""

    @property
    def num_records(self) -> int:
        """Records in the shard."""
        return len(self.key_ends)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Key of each record."""
        ends = self.key_ends.tolist()
        spans = zip([0, *ends], ends, strict=False)
        return tuple(self.key_bytes[start:end].decode(errors="surrogateescape") for start, end in spans)

    @cached_property
    def digest(self) -> str:
        """Identity of the content: keys, extensions and checksums in order, wherever the bytes lie."""
        state = xxhash.xxh3_128()
        state.update("\0".join(self.extensions).encode(errors="surrogateescape"))
        state.update(self.key_bytes)
        for array in (self.key_ends, self.starts, self.kinds, self.sizes, self.checksums):
            state.update(array.tobytes())
        return state.hexdigest()

    @property
    def damage(self) -> str:
        """What is wrong with the shard, in words; empty if nothing is."""
        if self.gaps:
            return f"{self.gaps[0].what} at byte {self.gaps[0].start:,}"
        return "" if self.num_records else "it holds no records"

    @property
    def lost_records(self) -> int:
        """How many records the gaps have cost, about: at least one each, by their bytes."""
        size = max(1.0, self.tar_size / max(1, self.num_records))
        return sum(max(1, round((gap.stop - gap.start) / size)) for gap in self.gaps)

    def records(self, first: int, count: int) -> ShardIndex:
        """The index of some consecutive records, without what they do not need."""
        count = min(count, self.num_records - first)
        low, high = int(self.starts[first]), int(self.starts[first + count])
        ends = self.key_ends[first : first + count]
        before = int(self.key_ends[first - 1]) if first else 0
        return ShardIndex(
            self.tar_size,
            self.key_bytes[before : int(ends[-1])],
            ends - before,
            self.extensions,
            self.starts[first : first + count + 1] - low,
            self.kinds[low:high].copy(),
            self.offsets[low:high].copy(),
            self.sizes[low:high].copy(),
            self.checksums[low:high].copy(),
        )


# ----------------------------------------------------------------------------------------------------------- building


def build_index(location: str | Path) -> ShardIndex:
    """Scan a tar from end to end.

    Raises:
        DataError: It cannot be read.
    """
    keys: list[str] = []
    starts: list[int] = []
    kinds: list[int] = []
    extensions: dict[str, int] = {}
    spans: list[tuple[int, int, int]] = []
    gaps: list[Gap] = []
    seen: set[str] = set()
    file = open_file(str(location))
    with as_stream(file) as stream:
        for found in scan(stream, file.size):
            if isinstance(found, Gap):
                gaps.append(found)
                continue
            key, extension = split_name(found.name)
            if not key:
                continue
            if not keys or key != keys[-1] or extension in seen:
                keys.append(key)
                starts.append(len(spans))
                seen = set()
            seen.add(extension)
            kinds.append(extensions.setdefault(extension, len(extensions)))
            spans.append((found.offset, found.size, _checksum(stream, found.offset, found.size)))
    file.close()
    offsets, sizes, checksums = zip(*spans, strict=True) if spans else ((), (), ())
    names = [key.encode(errors="surrogateescape") for key in keys]
    return ShardIndex(
        tar_size=file.size,
        key_bytes=b"".join(names),
        key_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        extensions=tuple(extensions),
        starts=np.array([*starts, len(spans)], np.int64),
        kinds=np.array(kinds, np.int32),
        offsets=np.array(offsets, np.int64),
        sizes=np.array(sizes, np.int64),
        checksums=np.array(checksums, np.uint64),
        gaps=tuple(gaps),
    )


def _checksum(stream: io.BufferedReader, offset: int, size: int) -> int:
    stream.seek(offset)
    state = xxhash.xxh64()
    for start in range(0, size, _PIECE):
        state.update(stream.read(min(_PIECE, size - start)))
    return state.intdigest()


# ------------------------------------------------------------------------------------------------------------- saving


def index_path(location: str | Path, index_dir: str | None) -> str:
    """Where a shard's index lies: beside it, or in ``index_dir`` under the shard's whole path."""
    location = str(location)
    if index_dir is None:
        return f"{location}.index.safetensors"
    whole = location if is_remote(location) else str(Path(location).resolve())
    name = location.rpartition("/")[2]
    return str(Path(index_dir) / f"{xxhash.xxh3_64_hexdigest(os.fsencode(whole))}-{name}.index.safetensors")


def save_index(index: ShardIndex, path: str | Path) -> None:
    """Write an index; several processes may."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(_to_bytes(index))


def _to_bytes(index: ShardIndex) -> bytes:
    """The file's content: arrays, the rest as JSON, and a checksum of both."""
    facts = {
        "version": INDEX_VERSION,
        "tar_size": index.tar_size,
        "extensions": index.extensions,
        "gaps": [(gap.start, gap.stop, gap.what) for gap in index.gaps],
    }
    arrays: dict[str, NDArray[Any]] = {name: getattr(index, name) for name in _ARRAYS}
    arrays["keys"] = np.frombuffer(index.key_bytes, np.uint8)
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    arrays["xxh3"] = np.array([_own_checksum(arrays)], np.uint64)
    return save(arrays)


def _own_checksum(arrays: Mapping[str, NDArray[Any]]) -> int:
    state = xxhash.xxh3_64()
    for name in (*_ARRAYS, "keys", "facts"):
        state.update(arrays[name].tobytes())
    return state.intdigest()


def read_index(path: str | Path) -> ShardIndex | None:
    """A saved index, or None where there is none, or half of one.

    Raises:
        DataError: The storage failed.
    """
    try:
        file = open_file(str(path))
        arrays = load(file.read(0, file.size))
        if _own_checksum(arrays) != int(arrays["xxh3"][0]):
            return None
        facts = json.loads(arrays["facts"].tobytes())
        if facts["version"] != INDEX_VERSION:
            return None
        return ShardIndex(
            facts["tar_size"],
            arrays["keys"].tobytes(),
            arrays["key_ends"],
            tuple(facts["extensions"]),
            **{name: arrays[name] for name in _ARRAYS[1:]},
            gaps=tuple(Gap(*gap) for gap in facts["gaps"]),
        )
    except (NotThereError, ValueError, KeyError, IndexError, SafetensorError):
        return None  # absent, torn or of another kind: it is built again


def ensure_index(location: str | Path, index_dir: str | None = None) -> ShardIndex:
    """A shard's index, built and saved if it is absent or describes another tar.

    An index of a tar of another size is kept if the tar is damaged and holds nothing else: then it was cut off since,
    and what it lacks is to be missed when it is read.

    Raises:
        DataError: The shard cannot be read, or the index cannot be saved.
    """
    path = index_path(location, index_dir)
    file = open_file(str(location))
    file.close()
    saved = read_index(path)
    if saved is not None and saved.tar_size == file.size:
        return saved
    if saved is None and is_remote(path):
        raise DataError(f"{path} does not exist and cannot be written there; set data.index_dir to a local folder")
    index = build_index(location)
    if saved is not None and index.gaps and _lacks_some(index, saved):
        lost = len(saved.checksums) - len(index.checksums)
        log.warning("%s lacks %d of %d indexed members: restore it", location, lost, len(saved.checksums))
        return saved
    try:
        save_index(index, path)
    except OSError as error:
        raise DataError(
            f"the index {path} cannot be written ({error.strerror}); set data.index_dir to a folder that can"
        ) from error
    return index


def _lacks_some(found: ShardIndex, saved: ShardIndex) -> bool:
    """Whether a tar lost members that its saved index knows, and has no others."""
    return len(found.checksums) < len(saved.checksums) and {*found.checksums.tolist()} <= {*saved.checksums.tolist()}
