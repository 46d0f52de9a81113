"""What the long suites measured, as Markdown tables and pictures of a page in docs/.

Tests call ``record`` and ``draw``; at the end of the session ``conftest`` calls ``write``, if ``EVACLIP_WRITE_TABLES``
is set in the environment. A page's suite is the marker that selects it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[1] / "docs"
PACKAGES = ("torch", "deepspeed", "timm", "open_clip_torch")


class Page(NamedTuple):
    """Where a suite's tables stand, behind a line that says who writes them."""

    name: str
    command: str

    @property
    def mark(self) -> str:
        """What parts prose from tables."""
        return f"<!-- what follows is written by {self.command} -->\n"


PAGES = {
    "matrix": Page("comparison.md", "make exactness"),
    "faults": Page("reliability.md", "make test-faults"),
}
"""By marker."""


class Figure(NamedTuple):
    """One cell."""

    table: str
    row: str
    column: str
    value: float | str


FIGURES: list[Figure] = []
"""Of this pytest session."""

PICTURES: dict[str, str] = {}
"""Of this pytest session: file name in docs/images -> SVG."""


def record(table: str, row: str, column: str, value: float | str) -> None:
    """Keep a figure for the tables; what is recorded twice is overwritten."""
    FIGURES.append(Figure(table, row, column, value))


def draw(name: str, svg: str) -> None:
    """Keep a picture, which a page shows from docs/images."""
    PICTURES[name] = svg


def write(page: Page) -> None:
    """Replace the page's tables, and its pictures, by those of this session."""
    path = DOCS / page.name
    prose = path.read_text(encoding="utf-8").partition(page.mark)[0]
    text = markdown(FIGURES, versions(), datetime.now(UTC).date())
    path.write_text(f"{prose}{page.mark}\n{text}", encoding="utf-8")
    for name, svg in PICTURES.items():
        (DOCS / "images").mkdir(exist_ok=True)
        (DOCS / "images" / name).write_text(svg, encoding="utf-8")


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
