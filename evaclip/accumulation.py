"""One update from any number of micro-batches: the gradient is that of the whole batch, not an average of small losses.

A contrastive loss is not a sum over samples, so its gradient is taken in two passes (GradCache, arXiv:2101.06983): the
features of all micro-batches without graph, one loss on all of them, then a second forward of each micro-batch whose
features are multiplied with their part of the loss's gradient. Both passes see the same dropped patches and paths,
because these are drawn from the samples' seeds. It costs one more forward, 4/3 of the time, but none of a tower that is
frozen whole; memory does not grow with the number of micro-batches but for features and uint8 images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from evaclip.config import DeepSpeedEngineConfig

if TYPE_CHECKING:
    from evaclip.config import RunConfig, TrainConfig
    from evaclip.data.batch import Batch
    from evaclip.distributed import Ranks
    from evaclip.engine.protocol import Engine
    from evaclip.loss import ContrastiveLoss, LossOutput


def num_micro_batches(config: TrainConfig, world_size: int) -> int:
    """Pieces in which a rank takes its share; with ``auto``, which a trial decides, one."""
    share = max(1, config.global_batch // world_size)
    return -(-share // (config.micro_batch if isinstance(config.micro_batch, int) else share))


def adds_up_in_16_bits(config: RunConfig, pieces: int) -> bool:
    """Whether so many micro-batches would give another gradient: ZeRO-1 adds up those of 16-bit weights in 16 bits."""
    zero1 = isinstance(config.engine, DeepSpeedEngineConfig) and config.engine.zero_stage == 1
    return pieces > 1 and zero1 and config.train.precision == "bf16_weights"


def forward_backward(engine: Engine, loss: ContrastiveLoss, micro_batches: Sequence[Batch], ranks: Ranks) -> LossOutput:
    """Leave the gradient of the loss over the global batch in the engine.

    Args:
        engine: What holds the towers.
        loss: Taken once, over the samples of all ranks and micro-batches.
        micro_batches: This rank's samples; every rank has equally many, in equally many pieces.
        ranks: The peers.
    """
    if len(micro_batches) == 1:
        features = engine.forward(micro_batches[0], last=True)
        output = loss(features.image, features.text, ranks)
        engine.backward(output.surrogate(features.image, features.text))
        return output
    with torch.no_grad():
        cached = [engine.forward(batch, last=False) for batch in micro_batches]
    output = loss(torch.cat([f.image for f in cached]), torch.cat([f.text for f in cached]), ranks)
    start = 0
    for number, (batch, known) in enumerate(zip(micro_batches, cached, strict=True), 1):
        features = engine.forward(batch, last=number == len(micro_batches), known=known)
        rows = slice(start, start + len(batch.images))
        engine.backward(output.surrogate(features.image, features.text, rows))
        start = rows.stop
    return output
