"""A run's ``checkpoints`` folder as it looks without torch: names, for whoever writes, reads or only looks at it."""

from __future__ import annotations

import json
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


def newest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint that has got its name."""
    found = complete(folder)
    return step_of(found[-1]) if found else None


def saved_slots(checkpoint: Path) -> int | None:
    """Slots of the data order that a checkpoint continues; None where it does not tell."""
    try:
        return int(json.loads((checkpoint / "meta.json").read_bytes())["slots"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def place_aside(checkpoint: Path) -> Path:
    """Where a checkpoint goes that was proven to be damaged."""
    return checkpoint.with_name(f".{checkpoint.name}.damaged")


def damaged_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that were set aside, ascending."""
    names = [path.name.removeprefix(".").removesuffix(".damaged") for path in folder.glob(".step_*.damaged")]
    return sorted(step for name in names if (step := step_of(folder / name)) is not None)
