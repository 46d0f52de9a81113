"""Files that are whole or not there: written under another name, put on the disk, then given their own.

A file that was there before stays until then. Folders and weight files do the same where they are written.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing(path: Path, *, flushed: bool = True) -> Generator[BinaryIO]:
    """A file that gets its name when the block ends well; several writers do not meet, and the last one counts.

    Args:
        path: Of the file, in a folder that is there.
        flushed: Not before its bytes are on the disk, so that a power loss leaves the old or the new ones. Shared
            storage takes its time for that.
    """
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if flushed:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, flushed: bool = True) -> None:
    """Write a text; as ``replacing``."""
    with replacing(path, flushed=flushed) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any, *, indent: int | None = None, flushed: bool = True) -> None:
    """Write a value without infinities; as ``replacing``.

    Raises:
        ValueError: A number is not finite.
    """
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n", flushed=flushed)


def flush(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
