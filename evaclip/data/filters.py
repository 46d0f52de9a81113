"""Which of a source's records are used: by their keys, and by fields of their json members.

A filter is a function of a record's bytes and of the content of its lists, so every run leaves out the same records.
How they are counted and replaced is decided elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from evaclip.config import FieldFilter, FilterConfig
from evaclip.data.captions import json_field
from evaclip.errors import DataError


class KeyList:
    """The keys of a file, as sorted 64-bit hashes: 8 bytes for each, whatever its length.

    A key that is not in the file counts as listed with a probability of its number of keys / 2^64: with 50 million of
    them once in 4 x 10^11 records.
    """

    def __init__(self, path: str) -> None:
        try:
            with Path(path).open("rb") as file:
                listed = (xxhash.xxh3_64_intdigest(key) for line in file if (key := line.strip()))
                hashes: NDArray[np.uint64] = np.fromiter(listed, np.uint64)
        except OSError as error:
            raise DataError(f"the list of keys {path} cannot be read ({error.strerror}); check the path") from error
        if not len(hashes):
            raise DataError(f"the list of keys {path} is empty; it needs the key of a record in each line")
        hashes.sort()
        self._hashes = hashes[np.append(True, hashes[1:] != hashes[:-1])]  # np.unique takes ten times as long

    def __contains__(self, key: str) -> bool:
        wanted = np.uint64(xxhash.xxh3_64_intdigest(key.encode(errors="surrogateescape")))
        place = int(self._hashes.searchsorted(wanted))
        return place < len(self._hashes) and self._hashes[place] == wanted

    @property
    def digest(self) -> str:
        """Identity of the keys, in whatever order they stand in the file."""
        return xxhash.xxh3_64_hexdigest(self._hashes.tobytes())


class RecordFilter:
    """The conditions of a source's filter; each method names the first that a record fails, or gives None.

    Raises:
        DataError: A list of keys cannot be read or is empty.
    """

    def __init__(self, config: FilterConfig) -> None:
        self._keys = KeyList(config.keys) if config.keys else None
        self._dropped = KeyList(config.drop_keys) if config.drop_keys else None
        self._fields = [(name, name.split("."), field) for name, field in sorted(config.fields.items())]

    @property
    def digest(self) -> str:
        """Identity of what the lists hold; empty without any."""
        lists = {"keys": self._keys, "drop_keys": self._dropped}
        return "".join(f"-{name}-{keys.digest}" for name, keys in lists.items() if keys)

    @property
    def reads_json(self) -> bool:
        """Whether it asks for fields of the json member."""
        return bool(self._fields)

    def failed_by_key(self, key: str) -> str | None:
        """Judge a record by its key."""
        if self._keys is not None and key not in self._keys:
            return "keys"
        return "drop_keys" if self._dropped is not None and key in self._dropped else None

    def failed_by_json(self, content: bytes | None) -> str | None:
        """Judge a record by its json member, None where it has none; raises ValueError where that is no JSON."""
        try:
            values = None if content is None else json.loads(content.decode("utf-8-sig"))
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        for name, path, field in self._fields:
            try:
                value = json_field(values, path)
            except TypeError:  # something on the way is no object
                value = None
            if not _passes(value, field):
                return f"fields.{name}"
        return None


def _passes(value: Any, field: FieldFilter) -> bool:
    """Whether a value meets a condition; None and values of another kind do not."""
    if field.is_numeric:
        number = _number(value)
        if number is None:
            return False
        # A NaN fails both comparisons, and there is at least one.
        return (field.min is None or number >= field.min) and (field.max is None or number <= field.max)
    if not isinstance(value, str | bool):
        return False
    return (field.one_of is None or value in field.one_of) and value not in (field.none_of or ())


def _number(value: Any) -> float | None:
    """A number, also one that is spelt out, as in what came from a CSV."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return None
