"""The picture of a killed run beside an undisturbed one."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from evaclip.history import load_history
from faults.killing import EVERYTHING, Life

PALE, DARK, KILL = "#9ecae1", "#08306b", "#d62728"
LOOK = {"svg.hashsalt": "evaclip", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def killed_run(lives: Sequence[Life], killed: Path, undisturbed: Path) -> str:
    """Both losses over the steps, and below them what each start did until it was killed, as SVG.

    Args:
        lives: Of one run, in their order.
        killed: Its folder, after it came to its end.
        undisturbed: Folder of the other run.
    """
    with mpl.rc_context(LOOK):  # the salt makes equal runs give equal files
        figure = Figure(figsize=(9, 7), layout="constrained", facecolor="white")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 3])
        _losses(above, lives, _curve(killed), _curve(undisturbed))
        last_start = re.findall(r"continuing .* at step (\d+)", (killed / "log.txt").read_text(encoding="utf-8"))[-1]
        _starts(below, lives, int(last_start), max(_curve(killed)))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]


def _curve(run_dir: Path) -> dict[float, float]:
    return {row["step"]: row["train/loss"] for row in load_history(run_dir / "metrics.jsonl") if "train/loss" in row}


def _losses(axes: Any, lives: Sequence[Life], killed: dict[float, float], undisturbed: dict[float, float]) -> None:
    furthest = max(abs(killed[step] - undisturbed[step]) for step in undisturbed)
    axes.plot(undisturbed.keys(), undisturbed.values(), color=PALE, linewidth=6, label="undisturbed")
    axes.plot(killed.keys(), killed.values(), color=DARK, linewidth=1.2, label=f"killed {len(lives)} times")
    deaths = [(row["step"], row["train/loss"]) for life in lives for row in life.rows[-1:] if "train/loss" in row]
    axes.plot(*zip(*deaths, strict=True), "x", color=KILL, label="last row before a kill")
    axes.set_title(f"A run on 2 ranks; largest difference between the two losses: {furthest:g}", loc="left")
    axes.set_ylabel("training loss, in nats")
    axes.legend(frameon=False)


def _starts(axes: Any, lives: Sequence[Life], last_start: int, steps: float) -> None:
    stands = 0  # at the step of the checkpoint that the last start went on from
    for number, life in enumerate(lives, 1):
        stands = stands if life.first_step is None else life.first_step
        reached = stands if life.first_step is None else max([stands, *(row["step"] or 0 for row in life.rows)])
        axes.plot([stands, reached], [number, number], color=DARK, linewidth=1.5)
        axes.plot(reached, number, "x", color=KILL, markersize=5)
        what = life.hit if life.victim == EVERYTHING else f"{life.hit}: {life.victim}"
        axes.annotate(f"  {what}", (reached, number), fontsize=6, va="center", color="#555555")
    axes.plot([last_start, steps], [len(lives) + 1] * 2, color=DARK, linewidth=1.5)
    axes.set_ylim(len(lives) + 2, 0)
    axes.set_ylabel("start")
    axes.set_xlabel("step")
