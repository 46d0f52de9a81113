"""Floating-point operations of the towers, from their shapes alone."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from evaclip.config import Freeze, ImageTowerConfig, ModelConfig, TextTowerConfig, TimmTowerConfig

T = TypeVar("T", ImageTowerConfig, TextTowerConfig)


def forward_flops(config: ModelConfig, text_tokens: float, *, training: bool = False) -> float:
    """Operations of one sample's forward pass: 2 per multiply-add of every matrix product, attention included.

    Norms, activations and embeddings are left out (below 1 %). A backward pass costs twice as much again.

    Args:
        config: Shapes of the towers.
        text_tokens: Mean tokens of a caption. Its attention, below 2 % of the text tower, is counted at this length.
        training: Whether patches are dropped.
    """
    text = _text_flops(config.text, config.embed_dim, text_tokens)
    if isinstance(config.image, ImageTowerConfig):
        return _image_flops(config.image, config.embed_dim, training) + text
    key: Any = (config.image, config.embed_dim, training)  # frozen sections are hashable
    return _timm_flops(*key)[0] + text


def training_flops(config: ModelConfig, text_tokens: float, *, frozen: tuple[Freeze, Freeze] = (0, 0)) -> float:
    """Operations of one sample's forward and backward pass; what is frozen has no backward.

    Args:
        config: Shapes of the towers.
        text_tokens: Mean tokens of a caption.
        frozen: ``freeze`` of the image tower and of the text tower. A part of a tower of timm is taken for its share of
            the layers.
    """
    image, text = frozen
    below = 0.0
    if image and isinstance(config.image, ImageTowerConfig):
        below = _image_flops(*_part(config.image, config.embed_dim, image), True)
    elif image:
        key: Any = (config.image, config.embed_dim, True)
        flops, layers = _timm_flops(*key)
        below = flops if image == "all" else flops * image / layers
    below += _text_flops(*_part(config.text, config.embed_dim, text), text_tokens) if text else 0.0
    return 3 * forward_flops(config, text_tokens, training=True) - 2 * below


def _part(tower: T, embed_dim: int, freeze: Freeze) -> tuple[T, int]:
    """Shapes of what is frozen: without the blocks above, and without the way into the common space."""
    return (tower, embed_dim) if freeze == "all" else (tower.model_copy(update={"depth": freeze}), 0)


@functools.cache
def _timm_flops(config: TimmTowerConfig, embed_dim: int, training: bool) -> tuple[float, int]:
    """Counted in a forward without numbers; and the number of layers."""
    from evaclip.models.timm_tower import TimmTower  # noqa: PLC0415  seconds, and not always needed

    tower, size = TimmTower(config, embed_dim).to("meta"), config.image_size
    tower.requires_grad_(False)  # the counter follows gradients, and asserts where a parameter is a module's input
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.int64) if training else None)
    return float(counter.get_total_flops()), tower.layers().last


def _image_flops(config: ImageTowerConfig, embed_dim: int, training: bool) -> float:
    patches = config.kept_patches if training else config.grid**2
    tokens, width = 1 + patches, config.width
    matrices = 3 if config.mlp == "swiglu" else 2
    per_token = 4 * width**2 + matrices * width * config.mlp_width  # qkv, proj; feed-forward
    attention = 2 * tokens**2 * width  # scores; weighted sum
    embedding = patches * 3 * config.patch_size**2 * width
    return 2.0 * (embedding + config.depth * (tokens * per_token + attention) + width * embed_dim)


def _text_flops(config: TextTowerConfig, embed_dim: int, tokens: float) -> float:
    width = config.width
    per_token = 4 * width**2 + 2 * width * config.mlp_width
    attention = tokens * (tokens + 1) * width  # half of the square, and the diagonal
    return 2.0 * (config.depth * (tokens * per_token + attention) + width * embed_dim)
