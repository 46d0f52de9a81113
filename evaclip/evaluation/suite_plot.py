"""The table of a suite as a picture: a dot for each measured value, a diamond for each published one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from evaclip.evaluation.suite import Row
from evaclip.picture import COLOURS
from evaclip.plot import INSTALL, save


def plot_suite(rows: Sequence[Row], title: str, output: Path) -> None:
    """Draw one line per value into a PNG; without matplotlib, say what it needs and draw nothing."""
    try:
        import matplotlib as mpl  # noqa: PLC0415  an optional dependency, and slow
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ModuleNotFoundError:
        print(INSTALL, file=sys.stderr)  # noqa: T201  the numbers are there, so no error
        return

    names = [f"{row.name}, {row.metric}" for row in rows]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.5, 0.23 * len(rows) + 1.3), layout="constrained")
        axes = figure.add_subplot()
        values = [(place, 100 * row.value) for place, row in enumerate(rows) if row.value is not None]
        published = [(place, 100 * value) for place, row in enumerate(rows) for value, _ in row.published]
        none = [place for place, row in enumerate(rows) if row.value is None]
        look = {"linestyle": "", "clip_on": False, "zorder": 3}
        if published:
            places, numbers = zip(*published, strict=True)
            axes.plot(
                numbers, places, marker="D", markersize=7, mfc="none", color=COLOURS[1], label="published", **look
            )
        if values:
            places, numbers = zip(*values, strict=True)
            axes.plot(numbers, places, marker="o", markersize=5, color=COLOURS[0], label="measured", **look)
            for place, number in values:
                axes.annotate(f"{number:.1f}", (number, place), (7, 0), textcoords="offset points", va="center", size=7)
        for place in none:
            axes.text(1, place, "no value", va="center", color="0.5", size=8)
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(-100, 101, 20))
        axes.set_xlim(min([0, *(number for _, number in values)]), 106)  # room for the last number
        axes.set_xlabel("percent")
        axes.grid(visible=True, axis="both", color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(title, loc="left", fontsize=10, parse_math=False)
        figure.legend(loc="outside lower right", ncols=2, frameon=False)
        save(figure, output)
