"""fp16's loss scale: gradients are multiplied so that small ones do not vanish, and divided by the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from evaclip.optim.base import TableOptimizer

_INITIAL = 2.0**16
_LARGEST = 2.0**24
_WINDOW = 2000  # applied updates before the scale is doubled


class LossScale:
    """Lives in ``optimizer.grad_scale``, on the device, and is 1 for every precision but fp16."""

    def __init__(self, optimizer: TableOptimizer, autocast_dtype: torch.dtype | None) -> None:
        self._optimizer = optimizer
        self._active = autocast_dtype == torch.float16
        if self._active:
            optimizer.grad_scale.fill_(_INITIAL)

    def scaled(self, surrogate: Tensor) -> Tensor:
        """What backward is to start from."""
        return surrogate * self._optimizer.grad_scale if self._active else surrogate

    def adjust(self) -> None:
        """Halve the scale after a skipped step, double it after a while without one; waits for nothing."""
        if not self._active:
            return
        skipped = self._optimizer.consecutive_skips > 0
        grow = ~skipped & (self._optimizer.updates % _WINDOW == 0)
        factor = torch.where(skipped, 0.5, torch.where(grow, 2.0, 1.0))
        self._optimizer.grad_scale.mul_(factor).clamp_(min=1.0, max=_LARGEST)
