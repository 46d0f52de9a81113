"""What the training loop asks of an engine. The loop does not know which one it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from evaclip.data.batch import Batch
    from evaclip.engine.prepare import PreparedTowers
    from evaclip.models.clip import Features
    from evaclip.optim.base import TableOptimizer


class Engine(Protocol):
    """Forward, backward and update of the towers, over all ranks."""

    towers: PreparedTowers
    optimizer: TableOptimizer

    def forward(self, batch: Batch, *, last: bool, known: Features | None = None) -> Features:
        """Features of a micro-batch of this rank's samples, with graph, under the run's precision.

        Args:
            batch: The samples.
            last: Whether this forward's backward is the last one before ``step``.
            known: Features of these samples in this step; a tower that is frozen whole does not compute them again.
        """
        ...

    def backward(self, surrogate: Tensor) -> None:
        """Add the gradient of this rank's share; the shares of all ranks are added up."""
        ...

    def step(self, lr_factor: float, loss: Tensor) -> None:
        """Update the weights on all ranks, or on none; ``loss`` is equal on all."""
        ...

    def refresh_weights(self) -> None:
        """Bring what forward uses in line with the optimizer's weights, after a load changed these."""
        ...
