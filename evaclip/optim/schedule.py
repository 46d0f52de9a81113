"""The learning rate over a run, as a pure function of the step. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from evaclip.config import OptimConfig, RunConfig

Shape = Literal["cosine", "constant", "inverse_sqrt"]


class Schedule(NamedTuple):
    """Linear warm-up, a shape, and at the end, if asked, a linear cooldown."""

    steps: int
    warmup_steps: int
    cooldown_steps: int
    shape: Shape
    final_fraction: float

    @classmethod
    def of(cls, config: RunConfig) -> Schedule:
        """That of a run."""
        schedule, batch = config.schedule, config.train.global_batch
        lengths = schedule.warmup(batch), schedule.cooldown(batch)
        return cls(config.train.steps, *lengths, schedule.shape, schedule.final_fraction)

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at ``step`` (from 0); behind the end that of the last step.

        The first step of a warm-up takes 1 / warmup_steps. The last step of the run takes ``final_fraction`` where the
        rate falls to it: after a cosine, and after a cooldown, which starts where the shape has come to.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        step, begin = min(step, self.steps - 1), self.steps - self.cooldown_steps
        if step < begin:
            return self._shaped(step)
        start = self._shaped(begin - 1)
        done = (step + 1 - begin) / self.cooldown_steps
        return start + (self.final_fraction - start) * done

    def _shaped(self, step: int) -> float:
        if self.shape == "constant":
            return 1.0
        if self.shape == "inverse_sqrt":  # arXiv:1706.03762, section 5.3
            return math.sqrt(self.warmup_steps / max(step + 1, self.warmup_steps))
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rates(optim: OptimConfig, factor: float) -> dict[str, float]:
    """Learning rates as they are published, at a share of their peaks; a tower that is frozen whole has none."""
    towers = {"lr/image": optim.image, "lr/text": optim.text}
    rates = {name: factor * (tower.lr or optim.lr) for name, tower in towers.items() if tower.freeze != "all"}
    return {**rates, "lr/logit_scale": factor * optim.lr}
