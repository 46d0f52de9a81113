"""Plain PyTorch: everything on every rank, gradients added up in one fixed layout.

All gradients live in one fp32 buffer in the order of the parameter table; after backward it is all-reduced in pieces
of a fixed size, 4 bytes per parameter in all. DistributedDataParallel is not used: it rebuilds its buckets after the
first step, and a resumed run would add in another order. On one rank nothing is sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaclip.engine.loss_scale import LossScale
from evaclip.optim.base import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from evaclip.data.batch import Batch
    from evaclip.distributed import Ranks
    from evaclip.engine.prepare import PreparedTowers
    from evaclip.models.clip import Features
    from evaclip.optim.base import TableOptimizer

_REDUCE_NUMBERS = 1 << 24  # of one all-reduce: 64 MiB


class TorchEngine:
    """See ``protocol.Engine``."""

    def __init__(
        self, towers: PreparedTowers, parameters: Sequence[nn.Parameter], optimizer: TableOptimizer, ranks: Ranks
    ) -> None:
        self.towers = towers
        self.optimizer = optimizer
        self._ranks = ranks
        self._parameters = list(parameters)
        sizes = [parameter.numel() for parameter in parameters]
        self._buffer = torch.zeros(sum(sizes), device=ranks.device)
        self._grads = [g.view(p.shape) for g, p in zip(self._buffer.split(sizes), parameters, strict=True)]
        # fp32 parameters are their own master and accumulate straight into the buffer.
        self._masters = [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]
        for master, grad in zip(self._masters, self._grads, strict=True):
            master.grad = grad
        optimizer.bind(
            [(master, [Span(row, 0, master.numel())]) for row, master in enumerate(self._masters)], sharded=False
        )
        self._loss_scale = LossScale(optimizer, towers.autocast_dtype)

    def forward(self, batch: Batch, *, last: bool, known: Features | None = None) -> Features:
        """See ``protocol.Engine.forward``."""
        return self.towers(batch.images, batch.text, batch.seeds, known=known)

    def backward(self, surrogate: Tensor) -> None:
        """See ``protocol.Engine.backward``."""
        self._loss_scale.scaled(surrogate).backward()
        for parameter, master, grad in zip(self._parameters, self._masters, self._grads, strict=True):
            if parameter is not master and parameter.grad is not None:
                grad.add_(parameter.grad)
                parameter.grad = None

    def step(self, lr_factor: float, loss: Tensor) -> None:
        """See ``protocol.Engine.step``."""
        for piece in self._buffer.split(_REDUCE_NUMBERS):
            self._ranks.sum(piece)
        self.optimizer.factor, self.optimizer.loss = lr_factor, loss
        self.optimizer.step()
        self.refresh_weights()
        self._buffer.zero_()
        self._loss_scale.adjust()

    def refresh_weights(self) -> None:
        """See ``protocol.Engine.refresh_weights``."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter is not master:
                parameter.data.copy_(master)
