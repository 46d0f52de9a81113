"""LAMB (arXiv:1904.00962, algorithm 2) over the parameter table."""

# torch leaves parts of its interface untyped:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaclip.optim.base import Slice, TableOptimizer
from evaclip.optim.table import Row

if TYPE_CHECKING:
    from evaclip.config import OptimConfig
    from evaclip.distributed import Ranks


class Lamb(TableOptimizer):
    """w <- w - lr (|w| / |u|) u with u = m / (sqrt(v) + eps) + decay w.

    The trust ratio is that of a whole parameter, is 1 where either norm is zero, and is not clamped. Rows that do not
    adapt take plain Adam steps. Spans of one row add up their squares; under ZeRO they would be added up over ranks.
    """

    def __init__(self, parameters: Sequence[Tensor], rows: Sequence[Row], config: OptimConfig, ranks: Ranks) -> None:
        super().__init__(parameters, rows, config, ranks)
        adapting = [number for number, row in enumerate(rows) if row.adapts]
        self._adapting = torch.tensor(adapting, dtype=torch.int64, device=ranks.device)

    def _apply(self, slices: Sequence[Slice], finite: Tensor) -> None:
        squares = torch.zeros(2, len(self.rows), device=self.loss.device)
        for s in slices:
            if self.rows[s.row].adapts:
                squares[0, s.row] += torch.linalg.vector_norm(s.weight) ** 2
                squares[1, s.row] += torch.linalg.vector_norm(s.grad) ** 2
        if self._sharded:
            self.ranks.sum(squares)
        weight, update = squares.sqrt()
        ratios = torch.where((weight > 0) & (update > 0), weight / update, 1.0)
        for s in slices:
            self._subtract(s, ratios[s.row], finite)
        self.trust_ratios = ratios[self._adapting]
