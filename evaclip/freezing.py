"""Freezing: what of the towers does not learn, and how its weights stay what they were, bit for bit.

A frozen parameter has no gradient, no optimizer state and, where nothing below it learns, no graph. Nothing changes its
weights, so a checkpoint holds those that the run began with, in fp32: every rank copies an equal share into the host's
memory, 4 bytes per frozen parameter over all ranks, before an engine rounds or shards them, and writes that. Under
``bf16_weights`` the forward uses rounded weights, as it does of what learns, and the checkpoint holds all 32 bits.
Nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from evaclip.errors import WeightsError
from evaclip.models.vision import ImageTower
from evaclip.optim.table import is_frozen, require_layers

if TYPE_CHECKING:
    from evaclip.config import OptimConfig
    from evaclip.distributed import Ranks
    from evaclip.models.clip import CLIP
    from evaclip.weights.load import Report


class FrozenPiece(NamedTuple):
    """A run of a frozen parameter's elements."""

    name: str
    start: int
    weight: Tensor
    """fp32, flat, in the host's memory."""


def freeze(clip: CLIP, optim: OptimConfig) -> None:
    """Take what does not learn out of autograd's sight; before an engine sees the towers.

    Raises:
        ConfigError: An image tower of timm has no such layers.
    """
    layers = None if isinstance(clip.image, ImageTower) else clip.image.layers()
    require_layers(optim, layers)
    for name, parameter in clip.named_parameters():
        if is_frozen(name, optim, clip.config, layers):
            parameter.requires_grad_(False)


def frozen_pieces(parameters: Iterable[tuple[str, nn.Parameter]], ranks: Ranks) -> list[FrozenPiece]:
    """This rank's share of those weights that do not learn, as they are now."""
    found: list[FrozenPiece] = []
    for name, parameter in parameters:
        start, stop = (parameter.numel() * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
        if not parameter.requires_grad and start < stop:
            part = parameter.detach().view(-1)[start:stop]
            found.append(FrozenPiece(name, start, part.to("cpu", torch.float32, copy=True)))
    return found


def require_filled(clip: CLIP, reports: Sequence[Report]) -> None:
    """Refuse to freeze what a checkpoint left at random values.

    Raises:
        WeightsError: With the first name.
    """
    frozen = {name for name, parameter in clip.named_parameters() if not parameter.requires_grad}
    for report in reports:
        names = [name for name in (f"{report.tower}.{own}" for own in report.initialised) if name in frozen]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise WeightsError(
                f"{report.source} does not hold {names[0]}{more}, which optim.{report.tower}.freeze would keep at "
                f"random values; give a checkpoint that does, or freeze less"
            )
