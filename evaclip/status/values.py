"""Taking values out of files that another program writes and a crash may have damaged: what is no number is none."""

from __future__ import annotations

from typing import Any, cast

_LARGEST = 1e100
_LONGEST = 1000
"""Characters of a text that are taken."""


def number(value: object) -> float | None:
    """A finite number of sane size, so that what is reckoned with three of them is finite too."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        return None
    return 0.0 if abs(value) < 1 / _LARGEST else float(value)


def integer(value: object) -> int | None:
    """A number without its fraction."""
    found = number(value)
    return None if found is None else int(found)


def text(value: object) -> str | None:
    """A text that any terminal can show: one line, nothing that would move the cursor, and not endless."""
    if not isinstance(value, str):
        return None
    return "".join(c if c.isprintable() else " " for c in value[:_LONGEST])


def mapping(value: object) -> dict[str, Any]:
    """An object of JSON; empty for anything else."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def mappings(value: object) -> list[dict[str, Any]]:
    """The objects of a list of JSON; what else stands there is left out."""
    return [mapping(item) for item in cast("list[object]", value) if item] if isinstance(value, list) else []
