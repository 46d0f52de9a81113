"""What is done to the towers from outside; the model knows of none of it.

In this order: precision of the weights, activation checkpointing, compilation, autocast.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from evaclip.config import TrainConfig
    from evaclip.data.batch import PackedText
    from evaclip.models.clip import CLIP, Features

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PreparedTowers(nn.Module):
    """A CLIP whose forward and encoders run under the run's autocast."""

    def __init__(self, clip: CLIP, precision: str, device: torch.device) -> None:
        super().__init__()
        self.clip = clip
        self.autocast_dtype = _AUTOCAST.get(precision)
        self._device_type = device.type

    def _autocast(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._device_type, self.autocast_dtype)

    def forward(self, images: Tensor, text: PackedText, seeds: Tensor | None = None) -> Features:
        """See ``CLIP.forward``."""
        with self._autocast():
            return self.clip(images, text, seeds)

    def encode_image(self, images: Tensor, *, normalize: bool = False) -> Tensor:
        """See ``CLIP.encode_image``."""
        with self._autocast():
            return self.clip.encode_image(images, normalize=normalize)

    def encode_text(self, text: PackedText, *, normalize: bool = False) -> Tensor:
        """See ``CLIP.encode_text``."""
        with self._autocast():
            return self.clip.encode_text(text, normalize=normalize)


def prepare(clip: CLIP, config: TrainConfig, device: torch.device) -> PreparedTowers:
    """Apply the run's precision, checkpointing and compilation to freshly made towers, in place."""
    if config.precision == "bf16_weights":
        clip.to(torch.bfloat16)
    blocks = [*clip.image.blocks, *clip.text.blocks]
    if config.activation_checkpointing:
        for block in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if config.compile:
        # Captions of a step differ in length: on the CPU, where each length is a shape, text stays eager.
        for block in blocks if device.type == "cuda" else clip.image.blocks:
            block.compile()
    return PreparedTowers(clip, config.precision, device)
