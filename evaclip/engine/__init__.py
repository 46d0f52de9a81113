"""How an update is computed: one protocol, two implementations."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch

from evaclip.config import DeepSpeedEngineConfig, LambConfig, RunConfig
from evaclip.engine.placing import place
from evaclip.engine.prepare import prepare
from evaclip.models.vision import ImageTower
from evaclip.optim.adamw import AdamW
from evaclip.optim.base import Span
from evaclip.optim.lamb import Lamb
from evaclip.optim.table import parameter_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from evaclip.distributed import Ranks
    from evaclip.engine.placing import Fill
    from evaclip.engine.prepare import PreparedTowers
    from evaclip.engine.protocol import Engine
    from evaclip.loss import ContrastiveLoss
    from evaclip.models.clip import CLIP
    from evaclip.optim.base import TableOptimizer


def create_engine(
    config: RunConfig, clip: CLIP, loss: ContrastiveLoss, ranks: Ranks, fill: Fill | None = None
) -> Engine:
    """Bring towers, loss and optimizer together.

    Args:
        config: Engine, precision, optimizer.
        clip: The towers, frozen where they are to be; with weights, or on the meta device.
        loss: Its scalars stay outside the engine.
        ranks: That share the work.
        fill: Sets the weights of towers on the meta device, parameter by parameter. Where the forward works on 16-bit
            copies, the masters keep every bit.
    """
    learning = chain(clip.named_parameters(), loss.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in learning if p.requires_grad}
    masters = _place(config, clip, ranks, fill)  # after which the towers have other parameters
    parameters = [p for p in clip.parameters() if p.requires_grad]
    scalars = [p for p in loss.parameters() if p.requires_grad]
    layers = None if isinstance(clip.image, ImageTower) else clip.image.layers()
    rows = parameter_table(shapes, config.optim, config.model, config.loss, layers)
    kind = Lamb if isinstance(config.optim, LambConfig) else AdamW
    optimizer = kind(parameters, rows, config.optim, ranks)
    optimizer.bind_whole([(p, [Span(row, 0, 1)]) for row, p in enumerate(scalars, len(parameters))])
    engine = _engine(config, prepare(clip, config.train, ranks.device), parameters, optimizer, ranks)
    for piece in optimizer.local_pieces():
        if piece.row.name in masters:
            start, values = masters[piece.row.name]
            piece.weight.copy_(values[piece.start - start :][: len(piece.weight)])
            if "ema" in piece.tensors:
                piece.tensors["ema"].copy_(piece.weight)
    return engine


def _place(config: RunConfig, clip: CLIP, ranks: Ranks, fill: Fill | None) -> dict[str, tuple[int, Tensor]]:
    """Give the towers their weights in the run's dtype.

    Returns:
        Where that rounds, the fp32 values of what learns, in the host's memory: name -> first element, and this rank's
        share under ZeRO-3, all of them elsewhere.
    """
    rounded = config.train.precision == "bf16_weights"
    sharded = isinstance(config.engine, DeepSpeedEngineConfig) and config.engine.zero_stage == 3
    kept: dict[str, tuple[int, Tensor]] = {}

    def set_and_keep(name: str, parameter: nn.Parameter) -> None:
        if fill:
            fill(name, parameter)
        if rounded and parameter.requires_grad:
            share = -(-parameter.numel() // ranks.world_size) if sharded else parameter.numel()
            start = share * ranks.rank if sharded else 0
            kept[name] = start, parameter.detach().view(-1)[start : start + share].to("cpu", copy=True)

    shard = None
    if isinstance(config.engine, DeepSpeedEngineConfig) and sharded and fill:
        from evaclip.engine.deepspeed_engine import sharder  # noqa: PLC0415  seconds, and not always needed

        shard = sharder(
            config.engine, ranks, sixteen_bit=rounded, micro_batch=config.train.global_batch // ranks.world_size
        )
    place(clip, set_and_keep, ranks.device, torch.bfloat16 if rounded else torch.float32, shard)
    return kept


def _engine(
    config: RunConfig,
    towers: PreparedTowers,
    parameters: Sequence[nn.Parameter],
    optimizer: TableOptimizer,
    ranks: Ranks,
) -> Engine:
    if isinstance(config.engine, DeepSpeedEngineConfig):
        from evaclip.engine.deepspeed_engine import DeepSpeedEngine  # noqa: PLC0415  seconds, and not always needed

        return DeepSpeedEngine(
            towers,
            parameters,
            optimizer,
            ranks,
            config=config.engine,
            sixteen_bit=config.train.precision == "bf16_weights",
            micro_batch=config.train.global_batch // ranks.world_size,
        )
    from evaclip.engine.torch_engine import TorchEngine  # noqa: PLC0415  beside the other

    return TorchEngine(towers, parameters, optimizer, ranks)
