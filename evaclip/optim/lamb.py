"""LAMB (arXiv:1904.00962, algorithm 2) over the parameter table."""

# torch leaves parts of its interface untyped:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaclip.config import LambConfig
from evaclip.optim.base import TableOptimizer
from evaclip.optim.table import Row

if TYPE_CHECKING:
    from evaclip.config import OptimConfig
    from evaclip.distributed import Ranks


class Lamb(TableOptimizer):
    """w <- w - lr (|w| / |u|) u with u = m / (sqrt(v) + eps) + decay w.

    The trust ratio is that of a whole parameter and is 1 where either norm is zero. Rows that do not adapt take plain
    Adam steps. Spans of one row add up their squares, under ZeRO over ranks too: one all-reduce of two numbers per row.
    """

    def __init__(self, parameters: Sequence[Tensor], rows: Sequence[Row], config: OptimConfig, ranks: Ranks) -> None:
        super().__init__(parameters, rows, config, ranks)
        assert isinstance(config, LambConfig)
        self._bounds = config.trust_ratio_bounds
        self._bias_correction = config.bias_correction
        self._adapts = torch.tensor([row.adapts for row in rows], device=ranks.device)

    def _ratios(self, weight: Tensor, update: Tensor) -> Tensor:
        ratios = weight / update
        if self._bounds:
            ratios = ratios.clamp(*self._bounds)
        return torch.where(self._adapts & (weight > 0) & (update > 0), ratios, 1.0).float()
