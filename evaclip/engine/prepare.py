"""What is done to the towers from outside; the model knows of none of it.

In this order: precision of the weights, activation checkpointing, compilation, autocast. What is frozen (``freezing``)
is so before.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evaclip.errors import ConfigError
from evaclip.models.vision import ImageTower

if TYPE_CHECKING:
    from collections.abc import Iterable

    from evaclip.config import TrainConfig
    from evaclip.data.batch import PackedText
    from evaclip.models.clip import CLIP, Features
    from evaclip.models.timm_tower import TimmTower

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PreparedTowers(nn.Module):
    """A CLIP whose forward and encoders run under the run's autocast.

    What it computes depends on what learns, which is the same on all ranks.
    """

    def __init__(self, clip: CLIP, precision: str, device: torch.device) -> None:
        super().__init__()
        self.clip = clip
        self.autocast_dtype = _AUTOCAST.get(precision)
        self._device_type = device.type
        self._learns = {name: _learns(tower) for name, tower in clip.named_children()}

    def _autocast(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._device_type, self.autocast_dtype)

    def forward(
        self, images: Tensor, text: PackedText, seeds: Tensor | None = None, known: Features | None = None
    ) -> Features:
        """See ``CLIP.forward``; ``known`` features of the same samples are kept of a tower that is frozen whole."""
        with self._autocast():
            if known is None or all(self._learns.values()):
                return self.clip(images, text, seeds)
            if self._learns["image"]:
                return known._replace(image=self.clip.encode_image(images, normalize=True, seeds=seeds))
            return known._replace(text=self.clip.encode_text(text, normalize=True))

    def encode_image(self, images: Tensor, *, normalize: bool = False, seeds: Tensor | None = None) -> Tensor:
        """See ``CLIP.encode_image``."""
        with self._autocast():
            return self.clip.encode_image(images, normalize=normalize, seeds=seeds)

    def encode_text(self, text: PackedText, *, normalize: bool = False) -> Tensor:
        """See ``CLIP.encode_text``."""
        with self._autocast():
            return self.clip.encode_text(text, normalize=normalize)


def prepare(clip: CLIP, config: TrainConfig, device: torch.device) -> PreparedTowers:
    """Apply the run's precision, checkpointing and compilation to towers, in place.

    Raises:
        ConfigError: Blocks are to be checkpointed or compiled, and the image tower has none.
    """
    if config.precision == "bf16_weights":
        # Weights that ``placing`` has cast stay as they are, and so do our tables (``Constant``); timm's are rounded.
        clip.to(torch.bfloat16)
    # Captions of a step differ in length: on the CPU, where each length is a shape, text stays eager.
    compile_text = config.compile and device.type == "cuda"
    if isinstance(clip.image, ImageTower):
        _prepare_blocks(clip.image.blocks, config, compiled=config.compile)
    else:
        _prepare_foreign_blocks(clip.image, config)
    _prepare_blocks(clip.text.blocks, config, compiled=compile_text)
    return PreparedTowers(clip, config.precision, device)


def _prepare_blocks(blocks: Iterable[nn.Module], config: TrainConfig, *, compiled: bool) -> None:
    for block in blocks:
        if config.activation_checkpointing and _learns(block):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if compiled:
            block.compile()


def _prepare_foreign_blocks(tower: TimmTower, config: TrainConfig) -> None:
    """The same the other way round: the second forward of a block is given its draw, which dynamo cannot do."""
    if not (config.activation_checkpointing or config.compile):
        return
    if not tower.blocks:
        raise ConfigError(
            f"train.activation_checkpointing and train.compile go block by block, and timm's {tower.config.model} has "
            f"no blocks under the usual names; set both to false"
        )
    for block in tower.blocks:
        if config.compile:
            block.forward = torch.compile(block.forward)
        if config.activation_checkpointing and _learns(block):
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, context_fn=tower.recomputation
            )


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
