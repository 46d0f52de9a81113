"""AdamW (arXiv:1711.05101) over the parameter table."""

from __future__ import annotations

import torch
from torch import Tensor

from evaclip.optim.base import TableOptimizer


class AdamW(TableOptimizer):
    """w <- w - lr (m / (sqrt(v) + eps) + decay w), with bias-corrected moments m and v."""

    def _ratios(self, weight: Tensor, update: Tensor) -> Tensor:
        return torch.ones_like(update, dtype=torch.float32)
