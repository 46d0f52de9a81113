"""Tensors that are computed, not learned: they follow their model to a device, and keep their precision."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Constant(nn.Module):
    """A fixed tensor that moves with the model but is never cast, stored or left empty.

    Casting a model to 16 bits would round the rotations of RoPE by 2e-3, and ``to_empty`` would leave a plain buffer
    undefined. Here every move copies the tensor anew from where it was computed.

    Attributes:
        value: The tensor, on the model's device.
    """

    value: Tensor

    def __init__(self, source: Tensor) -> None:
        super().__init__()
        assert source.device.type == "cpu", "compute constants on the CPU, also under torch.device('meta')"
        self._source = source
        self.register_buffer("value", source.clone(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constant:
        super()._apply(fn, recurse)
        self.value = self._source.to(self.value.device, copy=True)
        return self
