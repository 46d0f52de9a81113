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
    from evaclip.distributed import Ranks
    from evaclip.engine.protocol import Engine
    from evaclip.loss import ContrastiveLoss
    from evaclip.models.clip import CLIP


def create_engine(config: RunConfig, clip: CLIP, loss: ContrastiveLoss, ranks: Ranks) -> Engine:
    """Bring towers, loss and optimizer together; the towers' weights are taken as they are."""
    parameters = {name: p for name, p in clip.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if loss.logit_scale.requires_grad:
        shapes["logit_scale"] = (1,)
    rows = parameter_table(shapes, config.optim, config.model, config.loss)
    kind = Lamb if isinstance(config.optim, LambConfig) else AdamW
    optimizer = kind(list(parameters.values()), rows, config.optim, ranks)
    if loss.logit_scale.requires_grad:
        optimizer.bind_whole([(loss.logit_scale, [Span(len(rows) - 1, 0, 1)])])
    towers = prepare(clip, config.train, ranks.device)
    if isinstance(config.engine, DeepSpeedEngineConfig):
        from evaclip.engine.deepspeed_engine import DeepSpeedEngine  # noqa: PLC0415  seconds, and not always needed

        return DeepSpeedEngine(
            towers,
            list(parameters.values()),
            optimizer,
            ranks,
            zero_stage=config.engine.zero_stage,
            sixteen_bit=config.train.precision == "bf16_weights",
            micro_batch=config.train.global_batch // ranks.world_size,
        )
    from evaclip.engine.torch_engine import TorchEngine  # noqa: PLC0415  beside the other

    return TorchEngine(towers, list(parameters.values()), optimizer, ranks)
