"""Options of the optimizer and of its schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from evaclip.config.base import Fraction, Probability, Section, tagged

Freeze = Literal["all"] | NonNegativeInt
"""How much of a tower does not learn: its embeddings and so many blocks, or all of it; 0 is nothing."""


class TowerOptimConfig(Section):
    """What one tower has for itself; null takes the value of ``optim``."""

    lr: PositiveFloat | None = None
    """Peak learning rate of the tower's last layer."""
    weight_decay: NonNegativeFloat | None = None
    """Decoupled weight decay of matrices; vectors and position embeddings have none."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate per layer towards the input."""
    freeze: Freeze = 0
    """What does not learn: 0: nothing; N: the embeddings and the first N blocks; all: the whole tower (LiT)."""


class OptimConfig(Section):
    """What LAMB and AdamW share."""

    lr: PositiveFloat = 5e-4
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """Decay of the first and the second moment."""
    eps: PositiveFloat = 1e-6
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled weight decay of matrices; vectors and position embeddings have none."""
    clip_norm: PositiveFloat | None = None
    """The gradient is scaled down to this global L2 norm; null does not clip."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights, which loses this share of itself at each update, at first
    less (min(ema_decay, (1 + t) / (10 + t)) is kept); evaluated as NAME.ema and saved beside the weights; null: none.
    """
    image: TowerOptimConfig = TowerOptimConfig()
    text: TowerOptimConfig = TowerOptimConfig()

    @property
    def frozen(self) -> tuple[Freeze, Freeze]:
        """How much of the image tower and of the text tower does not learn."""
        return self.image.freeze, self.text.freeze


class LambConfig(OptimConfig):
    """LAMB (arXiv:1904.00962)."""

    name: Literal["lamb"] = "lamb"
    """The optimizer: lamb or adamw."""
    trust_ratio: Literal["decayed", "all"] = "decayed"
    """Which tensors take a trust ratio: those with weight decay (as timm does), or all but gains and scalars."""
    trust_ratio_bounds: tuple[NonNegativeFloat, PositiveFloat] | None = None
    """Trust ratios are clamped to these, for instance [0.01, 10] as in DeepSpeed's FusedLamb; null does not clamp."""
    bias_correction: bool = True
    """Divide the moments by 1 - beta^t, t counting applied updates."""

    @field_validator("trust_ratio_bounds")
    @classmethod
    def _bounds_are_ordered(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds and bounds[0] > bounds[1]:
            raise ValueError(f"{bounds[0]} is above {bounds[1]}; give the lower bound first")
        return bounds


class AdamWConfig(OptimConfig):
    """AdamW (arXiv:1711.05101)."""

    name: Literal["adamw"]
    """The optimizer: lamb or adamw."""


Optim = Annotated[LambConfig | AdamWConfig, Field(discriminator="name"), tagged("name", "lamb")]


class ScheduleConfig(Section):
    """Linear warm-up, a shape, and at the end, if asked, a linear cooldown. Lengths are in steps or in samples."""

    shape: Literal["cosine", "constant", "inverse_sqrt"] = "cosine"
    """After the warm-up: half a cosine down to final_fraction; constant: the peak; inverse_sqrt: the peak times the
    root of warm-up / step. The latter two know no end, so that runs can go on and cool down from any of their steps."""
    warmup_steps: NonNegativeInt = 0
    """Steps until the peak learning rate."""
    warmup_samples: PositiveInt | None = None
    """The same in samples, instead of warmup_steps."""
    cooldown_steps: NonNegativeInt = 0
    """Last steps of the run, in which a constant or inverse_sqrt rate falls to final_fraction in a straight line."""
    cooldown_samples: PositiveInt | None = None
    """The same in samples, instead of cooldown_steps."""
    final_fraction: Probability = 0.0
    """Share of the peak learning rate that is left at the last step of a cosine or a cooldown."""

    @model_validator(mode="after")
    def _is_clear(self) -> ScheduleConfig:
        for name in ("warmup", "cooldown"):
            steps, samples = getattr(self, f"{name}_steps"), getattr(self, f"{name}_samples")
            if steps and samples:
                raise ValueError(f"{name}_steps {steps} and {name}_samples {samples} say the same; give one of them")
        cools = bool(self.cooldown_steps or self.cooldown_samples)
        if self.shape == "cosine" and cools:
            raise ValueError("a cosine falls to final_fraction by itself; set shape to constant or inverse_sqrt")
        if self.shape != "cosine" and self.final_fraction and not cools:
            raise ValueError(f"final_fraction is never reached by shape {self.shape}; give cooldown_steps")
        if self.shape == "inverse_sqrt" and not (self.warmup_steps or self.warmup_samples):
            raise ValueError("shape inverse_sqrt falls from the end of its warm-up on; give warmup_steps")
        return self

    def warmup(self, global_batch: int) -> int:
        """Steps of the warm-up."""
        return steps_of(self.warmup_steps, self.warmup_samples, global_batch)

    def cooldown(self, global_batch: int) -> int:
        """Steps of the cooldown."""
        return steps_of(self.cooldown_steps, self.cooldown_samples, global_batch)


def steps_of(steps: int, samples: int | None, global_batch: int) -> int:
    """A length in steps, of which the last may take some samples more than were asked for."""
    return steps if samples is None else -(-samples // global_batch)
