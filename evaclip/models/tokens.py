"""Features of single patches and words, behind a chosen block: what multimodal models, detectors and generators read.

Layers count as in timm and open_clip (``forward_intermediates``): 0 is the first block, -1 the last, and a tower's last
norm is not applied, behind no layer. Blocks behind the chosen one are not computed. This module knows the towers' parts
and their order, nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from evaclip.data.batch import PackedText
from evaclip.errors import ConfigError
from evaclip.models.pixels import require_images
from evaclip.models.text import TextTower
from evaclip.models.vision import ImageTower

if TYPE_CHECKING:
    from evaclip.models.timm_tower import TimmTower


class TextTokens(NamedTuple):
    """Features of the tokens of some texts, each filled up to the length of the longest."""

    features: Float[Tensor, "texts length channels"]
    """0 behind a text's end."""
    mask: Bool[Tensor, "texts length"]
    """Where there is a token: start, words and end."""


def image_tokens(
    tower: ImageTower | TimmTower,
    images: Shaped[Tensor, "batch 3 height width"],
    layer: int,
    *,
    prefix_tokens: bool,
) -> Float[Tensor, "batch tokens channels"]:
    """Features of an image's patches, row by row.

    Args:
        tower: Any; the stages of one that is convolutional are its layers, the places of a map its patches.
        images: uint8 pixels, or floats normalised by the tower's mean and std.
        layer: Which block; negative ones count from the end.
        prefix_tokens: Whether what stands before the patches (class token, registers) comes with them.

    Raises:
        ConfigError: The tower is timm's, and has no ``forward_intermediates``.
        ValueError: There is no such layer, or images of another size or dtype than the tower takes.
    """
    require_images(images, tower.config.image_size)
    if not isinstance(tower, ImageTower):
        return _timm_tokens(tower, images, layer, prefix_tokens=prefix_tokens)
    blocks = _up_to(tower.blocks, layer)
    x, rope = tower.embed_norm(tower.embed(images)), tower.rotations()
    for block in blocks:
        x = block(x, rope, None)
    return x if prefix_tokens else x[:, 1:]


def text_tokens(tower: TextTower, text: PackedText, layer: int) -> TextTokens:
    """Features of the tokens of texts, in the order in which they were packed from.

    Args:
        tower: Ours.
        text: Packed captions.
        layer: Which block; negative ones count from the end.

    Raises:
        ValueError: There is no such layer, or a caption is longer than the context.
    """
    blocks = _up_to(tower.blocks, layer)
    x = tower.embed(text)
    for block in blocks:
        x = block(x, text)
    lengths = text.cu_seqlens.diff()[: text.num_captions]
    mask = torch.arange(text.max_length, device=x.device) < lengths[:, None]
    features = x.new_zeros(*mask.shape, x.shape[-1])
    features[mask] = x[: len(x) - text.padding]  # rows of both lie in the order of the captions
    return TextTokens(features[text.restore], mask[text.restore])


def _up_to(blocks: nn.ModuleList, layer: int) -> nn.ModuleList:
    """The blocks that lead to a layer."""
    _require_layer(layer, len(blocks))
    return blocks[: layer + 1 or None]


def _require_layer(layer: int, count: int) -> None:
    if not -count <= layer < count:
        raise ValueError(f"layer {layer} is not in {-count}..{count - 1}; the tower has {count}")


def _timm_tokens(tower: TimmTower, images: Tensor, layer: int, *, prefix_tokens: bool) -> Tensor:
    trunk: Any = tower.trunk
    if not hasattr(trunk, "forward_intermediates"):
        raise ConfigError(
            f"model.image.model {tower.config.model}: timm gives no features of its layers (forward_intermediates); "
            f"choose a model that has them"
        )
    _require_layer(layer, len(trunk.feature_info))
    several = prefix_tokens and getattr(trunk, "num_prefix_tokens", 0) > 0
    options = {"return_prefix_tokens": True} if several else {}  # those without such tokens do not take it
    (found,) = trunk.forward_intermediates(
        tower.normalised(images), indices=[layer], stop_early=True, intermediates_only=True, **options
    )
    maps, *prefix = found if several else (found,)
    return torch.cat([*prefix, maps.flatten(2).transpose(1, 2)], dim=1)  # (batch, width, rows, columns) as patches
