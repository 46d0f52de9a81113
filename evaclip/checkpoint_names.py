"""Names in a run's ``checkpoints`` folder, for whoever writes, reads or only looks at it; no torch."""

from __future__ import annotations

import re
from pathlib import Path


def step_name(step: int) -> str:
    """Name of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint's name says; None for other names."""
    return int(checkpoint.name[5:]) if re.fullmatch(r"step_\d{8,}", checkpoint.name, re.ASCII) else None


def complete(folder: Path) -> list[Path]:
    """Checkpoints that have got their name, oldest first."""
    steps = {path: step for path in folder.glob("step_*") if (step := step_of(path)) is not None}
    return sorted(steps, key=steps.__getitem__)


def place_aside(checkpoint: Path) -> Path:
    """Where a checkpoint goes that was proven to be damaged."""
    return checkpoint.with_name(f".{checkpoint.name}.damaged")


def damaged_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that were set aside, ascending."""
    names = [path.name.removeprefix(".").removesuffix(".damaged") for path in folder.glob(".step_*.damaged")]
    return sorted(step for name in names if (step := step_of(folder / name)) is not None)
