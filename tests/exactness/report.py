"""What the exactness tests measured, as Markdown tables.

Tests call ``record``; at the end of the session ``conftest`` writes what ``markdown`` makes of it, if
``EVACLIP_WRITE_TABLES`` is set in the environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from typing import NamedTuple

PACKAGES = ("torch", "deepspeed", "timm", "open_clip_torch")


class Figure(NamedTuple):
    """One cell."""

    table: str
    row: str
    column: str
    value: float | str


FIGURES: list[Figure] = []
"""Of this pytest session."""


def record(table: str, row: str, column: str, value: float | str) -> None:
    """Keep a figure for the tables; what is recorded twice is overwritten."""
    FIGURES.append(Figure(table, row, column, value))


def versions() -> dict[str, str]:
    """Of the packages that the figures depend on."""
    return {package: version(package) for package in PACKAGES}


def markdown(figures: Sequence[Figure], installed: Mapping[str, str], day: date) -> str:
    """Tables, rows and columns in the order of their first figures; a cell without a figure is empty."""
    tables: dict[str, dict[tuple[str, str], float | str]] = {}
    for table, row, column, value in figures:
        tables.setdefault(table, {})[row, column] = value
    packages = ", ".join(f"{package} {number}" for package, number in installed.items())
    lines = [f"Measured on {day.isoformat()} with {packages}."]
    for table, cells in tables.items():
        rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
        lines += ["", f"### {table}", "", _line(["", *columns]), _line(["---", *("---:" for _ in columns)])]
        lines += [_line([row, *(_text(cells.get((row, column), "")) for column in columns)]) for row in rows]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(value: float | str) -> str:
    """Whole numbers as they are, others with three significant digits."""
    if isinstance(value, str):
        return value
    return f"{value:,d}" if isinstance(value, int) else f"{value:.3g}"
