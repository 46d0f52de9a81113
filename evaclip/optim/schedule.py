"""The learning rate over a run, as a pure function of the step. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaclip.config import OptimConfig


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Share of the peak learning rate at ``step`` (from 0): linear warm-up, then half a cosine down to the floor.

    The first step of a warm-up takes 1 / warmup_steps; the last step of the run takes ``final_fraction``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def learning_rates(optim: OptimConfig, factor: float) -> dict[str, float]:
    """Learning rates as they are published, at a share of their peaks; a tower that is frozen whole has none."""
    towers = {"lr/image": optim.image, "lr/text": optim.text}
    rates = {name: factor * (tower.lr or optim.lr) for name, tower in towers.items() if tower.freeze != "all"}
    return {**rates, "lr/logit_scale": factor * optim.lr}
