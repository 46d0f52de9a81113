"""Steps on made-up samples before the first real one: how large a micro-batch fits.

A trial goes through the engine as every step does, on all ranks alike, and ends in an update that is skipped: weights,
moments and counts stay as they were.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch

from evaclip.accumulation import forward_backward
from evaclip.data.batch import Batch, PackedText
from evaclip.memory import activation_bytes, advice, available_bytes, largest_micro_batch, peak_bytes, reset_peak

if TYPE_CHECKING:
    from evaclip.config import ModelConfig, RunConfig
    from evaclip.distributed import Ranks
    from evaclip.engine.protocol import Engine
    from evaclip.loss import ContrastiveLoss

log = logging.getLogger(__name__)


def largest_that_fits(engine: Engine, loss: ContrastiveLoss, config: RunConfig, ranks: Ranks) -> int:
    """The largest micro-batch for which every rank has memory, equal on all ranks.

    Raises:
        ConfigError: Not even one sample fits.
    """

    def over_ranks(number: float) -> float:
        return float(ranks.max(torch.tensor(number, dtype=torch.float64, device=ranks.device)))

    on_gpu = ranks.device.type == "cuda"
    budget = -over_ranks(-available_bytes(ranks.device, ranks.local_world_size))
    found = largest_micro_batch(
        config.train.global_batch // ranks.world_size,
        lambda samples: over_ranks(trial_step(engine, loss, config.model, samples, ranks)),
        budget,
        growth=2 * activation_bytes(config.model, config.train, on_gpu=on_gpu),  # it is within 20 % on what was seen
        remedies=lambda: advice(config, ranks.world_size, on_gpu=on_gpu),
    )
    log.info("train.micro_batch auto: %d, of %.1f GiB that may be used", found, budget / 2**30)
    return found


def trial_step(engine: Engine, loss: ContrastiveLoss, model: ModelConfig, samples: int, ranks: Ranks) -> float:
    """Peak bytes of a step of two micro-batches of so many samples, with captions as long as they can be."""
    reset_peak(ranks.device)
    side = model.image.image_size
    batch = Batch(
        images=torch.randint(0, 256, (samples, 3, side, side), dtype=torch.uint8),
        text=PackedText.pack([[0] * model.text.context_length] * samples),
        seeds=torch.arange(samples),
    ).to(ranks.device)
    optimizer = engine.optimizer
    grad_scale = optimizer.grad_scale.clone()
    output = forward_backward(engine, loss, [batch, batch], ranks)
    engine.step(0.0, torch.full_like(output.loss, math.nan))
    optimizer.consecutive_skips.zero_()
    optimizer.grad_scale.copy_(grad_scale)
    return peak_bytes(ranks.device)
