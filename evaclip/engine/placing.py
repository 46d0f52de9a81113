"""Bringing weights to where an engine wants them, from towers that have no memory yet.

Whole on every rank, or, for ZeRO-3, module by module into shards: a rank then never holds more than its shards and the
parameters of one module, whatever the size of the model. Every rank fills every module; DeepSpeed sends rank 0's values
to the others before it shards them, once 4 bytes per parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import nn

from evaclip.models.constant import Constant

Fill = Callable[[str, nn.Parameter], None]
"""Sets a parameter of ``CLIP``, given its name, in fp32."""
Shard = Callable[[nn.Module], None]
"""Leaves each rank a part of a module's parameters."""


def place(
    model: nn.Module,
    fill: Fill,
    device: torch.device,
    dtype: torch.dtype,
    shard: Shard | None = None,
) -> None:
    """Allocate what of a model lies on the meta device, fill it and cast it.

    Args:
        model: What does not learn is frozen already.
        fill: Called once per parameter, in fp32, in the same order on every rank.
        device: Where the weights go.
        dtype: That they have afterwards.
        shard: Called for each module with parameters of its own, once these are set; None: everything stays whole.
    """
    for prefix, module in _children_first(model):
        if any(tensor.is_meta for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False))):
            module.to_empty(device=device, recurse=False)
        elif isinstance(module, Constant):
            module.to(device)  # computed where the model was built
        own = list(module.named_parameters(prefix, recurse=False))
        with torch.no_grad():
            for name, parameter in own:
                fill(name, parameter)
                parameter.data = parameter.data.to(dtype)
        if own and shard is not None:
            shard(module)


def _children_first(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, each behind its children."""
    for name, child in module.named_children():
        yield from _children_first(child, f"{prefix}.{name}" if prefix else name)
    yield prefix, module
