"""AdamW (arXiv:1711.05101) over the parameter table."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from evaclip.optim.base import Slice, TableOptimizer


class AdamW(TableOptimizer):
    """w <- w - lr (m / (sqrt(v) + eps) + decay w), with bias-corrected moments m and v."""

    def _apply(self, slices: Sequence[Slice], finite: Tensor) -> None:
        for s in slices:
            self._subtract(s, 1.0, finite)
