"""WebDataset's tar format: which names a pattern means, what lies where in a tar, and writing one.

Tar readers stop at the first damaged header without a word. ``scan`` accounts for every byte of a file: members, and
gaps behind which it found its way again. This is the one module that imports webdataset; it knows no indexes.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import webdataset.utils
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext
from webdataset.writer import TarWriter

from evaclip.config.base import URL_SCHEMES
from evaclip.errors import DataError
from evaclip.files import replacing

webdataset.utils.enforce_security = True  # type: ignore[attr-defined]

_BLOCK = tarfile.BLOCKSIZE
_PIECE = 1 << 20
_LONGEST_NAME = 1 << 16  # bytes of the header of a long name; tarfile reads it whole
_EXTENDED = {b"x", b"g", b"X", b"L", b"K"}  # headers whose content says something about the next one
_END, _DAMAGED, _CUT_OFF = "an end marker", "a damaged header", "the file is cut off"


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    """Of its first byte."""
    size: int


class Gap(NamedTuple):
    """Bytes of a tar that belong to no member."""

    start: int
    stop: int
    what: str


# -------------------------------------------------------------------------------------------------------------- names


def expand_names(pattern: str | Sequence[str]) -> list[str]:
    """The paths and URLs that a pattern names, brace ranges expanded, in order.

    Raises:
        DataError: The braces do not match, a URL is of an unknown kind, or there is no name at all.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    for text in patterns:
        scheme, separator, _ = text.partition("://")
        if text.startswith("pipe:") or (separator and scheme not in URL_SCHEMES):
            raise DataError(f"{text}: only paths and {', '.join(URL_SCHEMES)} URLs are read; copy or mount the shards")
    try:
        names = [str(url) for text in patterns for url in expand_urls(text)]
    except ValueError as error:
        raise DataError(f"{patterns}: the braces do not match: {error}") from None
    if not names:
        raise DataError(f"{patterns}: the list of shards is empty; name at least one tar")
    return names


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member, a key for records only: empty where the member is no part of one."""
    key, extension = base_plus_ext(name)
    base = os.path.basename(name)  # noqa: PTH119  a member's name, not a path of this machine
    if key is None or extension is None or "\0" in name or (base.startswith("__") and base.endswith("__")):
        return "", ""
    return key, extension.lower()


# ------------------------------------------------------------------------------------------------------------ reading


def scan(file: IO[bytes], size: int) -> Iterator[Member | Gap]:
    """Regular members and gaps of a tar of ``size`` bytes, in order; the file's position is free between two of them.

    A gap begins where no header can be read and ends at the next header that can, or at the end. A member that is cut
    off is a gap. A file without its end marker ends with a gap, which may be empty.
    """
    position = 0
    while True:
        header = _header(file, position, size)
        if header == _END and _all_zero(file, position, size):
            return
        found = _member(file, position, size, header) if isinstance(header, tarfile.TarInfo) else header
        if not isinstance(found, str):
            member, position = found
            if member.size >= 0:
                yield member
            continue
        start, cut_off = position, found.startswith(_CUT_OFF)
        position = size if cut_off else _next_header(file, start + _BLOCK, size) or size
        yield Gap(start, position, f"{found} before the end" if found == _END else found)
        if position == size:
            return


def _header(file: IO[bytes], position: int, size: int) -> tarfile.TarInfo | str:
    """The header at ``position``, or why there is none."""
    file.seek(position)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        return _CUT_OFF if position < size else "the file ends without an end marker"
    if block.count(0) == _BLOCK:
        return _END
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return _DAMAGED
    long_name = info.type in _EXTENDED and info.size > _LONGEST_NAME
    return _DAMAGED if info.size < 0 or long_name else info


def _member(file: IO[bytes], position: int, size: int, header: tarfile.TarInfo) -> tuple[Member, int] | str:
    """What lies at ``position``, with a size of -1 if it is no regular file, and where the next header lies."""
    name, offset, length = header.name, position + _BLOCK, header.size
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):  # links, folders, long names: tarfile knows all of them
        file.seek(position)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                info = tar.next()
                follows = int(tar.offset)  # type: ignore[attr-defined]
        except (tarfile.TarError, ValueError, OverflowError):  # a long name that is damaged or not followed by a file
            return _DAMAGED
        if info is None or info.size < 0 or follows <= position:
            return _DAMAGED
        if not info.isreg() or info.issparse():
            return Member(info.name, position, -1), follows
        name, offset, length = info.name, info.offset_data, info.size
    if offset + length > size:
        return f"{_CUT_OFF} within {name}"
    return Member(name, offset, length), offset + -(-length // _BLOCK) * _BLOCK


def _next_header(file: IO[bytes], position: int, size: int) -> int | None:
    """The first place from ``position`` on, in whole blocks, where a POSIX header can be read."""
    while position < size:
        file.seek(position)
        piece = file.read(_PIECE)
        if not piece:
            return None
        for start in range(0, len(piece) - _BLOCK + 1, _BLOCK):
            if piece[start + 257 : start + 262] == b"ustar":
                with contextlib.suppress(tarfile.TarError, ValueError):
                    tarfile.TarInfo.frombuf(piece[start : start + _BLOCK], "utf-8", "surrogateescape")
                    return position + start
        position += len(piece)
    return None


def _all_zero(file: IO[bytes], position: int, size: int) -> bool:
    file.seek(position)
    while position < size:
        piece = file.read(_PIECE)
        if not piece or piece.count(0) != len(piece):
            return False
        position += len(piece)
    return True


# ------------------------------------------------------------------------------------------------------------ writing


def write_tar(path: Path, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write records as one tar; members carry fixed times and owners, so equal records make equal bytes."""
    with replacing(path) as file, contextlib.closing(TarWriter(file, mtime=0.0)) as tar:
        for key, members in records:
            tar.write({"__key__": key, **members})  # type: ignore[no-untyped-call]
