"""How an update is computed: one protocol, two implementations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evaclip.config import DeepSpeedEngineConfig, LambConfig, RunConfig
from evaclip.engine.prepare import prepare
from evaclip.optim.adamw import AdamW
from evaclip.optim.base import Span
from evaclip.optim.lamb import Lamb
from evaclip.optim.table import parameter_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from evaclip.distributed import Ranks
    from evaclip.engine.prepare import PreparedTowers
    from evaclip.engine.protocol import Engine
    from evaclip.loss import ContrastiveLoss
    from evaclip.models.clip import CLIP
    from evaclip.optim.base import TableOptimizer


def create_engine(config: RunConfig, clip: CLIP, loss: ContrastiveLoss, ranks: Ranks) -> Engine:
    """Bring towers, loss and optimizer together.

    The towers' weights are taken as they are: where the forward works on 16-bit copies, the masters keep every bit.
    """
    parameters = {name: p for name, p in clip.named_parameters() if p.requires_grad}
    scalars = {name: p for name, p in loss.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in (parameters | scalars).items()}
    rows = parameter_table(shapes, config.optim, config.model, config.loss)
    kind = Lamb if isinstance(config.optim, LambConfig) else AdamW
    optimizer = kind(list(parameters.values()), rows, config.optim, ranks)
    optimizer.bind_whole([(p, [Span(row, 0, 1)]) for row, p in enumerate(scalars.values(), len(parameters))])
    rounded = config.train.precision == "bf16_weights"
    initial = {name: p.detach().view(-1) for name, p in parameters.items()} if rounded else {}
    engine = _engine(config, prepare(clip, config.train, ranks.device), list(parameters.values()), optimizer, ranks)
    for piece in optimizer.local_pieces():
        if piece.row.name in initial:
            piece.weight.copy_(initial[piece.row.name][piece.start : piece.start + len(piece.weight)])
    return engine


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
