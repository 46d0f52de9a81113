"""Inner norms for EVA-02 towers that start from MIM weights, which have none.

EVA-CLIP put a norm before the last layer of each attention (``inner_attn_ln``) that its MIM models do not have. Drawn
as one and zero, it changes what the tower computes. Its gain and shift can be fitted so that the tower computes nearly
what it did: per channel a line through what the attention gave without the norm, over some images, block after block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from evaclip.models.vision import Block, ImageTower

_EPS = 1e-12
"""Keeps channels finite that are the same everywhere."""


@torch.no_grad()
def fit_inner_norms(tower: ImageTower, images: UInt8[Tensor, "images 3 height width"]) -> list[float]:
    """Fill the inner norms of a tower whose other weights are loaded.

    Args:
        tower: With inner norms, whose values are overwritten.
        images: What the tower is to compute as before; some hundred are enough.

    Returns:
        Per block, the share of the attention's variance that the fitted norm does not explain.

    Raises:
        ValueError: The tower has no inner norms.
    """
    if not tower.config.sub_norm:
        raise ValueError("the tower has no inner norms; only those with model.image.sub_norm do")
    before = fitted = tower.embed_norm(tower.embed(images))
    rope = tower.rotations()
    unexplained: list[float] = []
    for block in tower.blocks:
        assert isinstance(block, Block)
        norm = block.attn.norm
        assert isinstance(norm, nn.LayerNorm)
        target = _attended(block, before, rope)
        found = _attended(block, fitted, rope)
        normalised = F.layer_norm(found, found.shape[-1:], eps=norm.eps)
        gain, shift, rest = _line(normalised.flatten(0, 1).double(), target.flatten(0, 1).double())
        block.attn.norm = nn.Identity()
        before = block(before, rope, None)
        block.attn.norm = norm
        norm.weight.copy_(gain)
        norm.bias.copy_(shift)
        fitted = block(fitted, rope, None)
        unexplained.append(rest)
    return unexplained


def _attended(block: Block, x: Tensor, rope: Tensor | None) -> Float[Tensor, "images tokens width"]:
    """What a block's inner norm is given."""
    given: list[Tensor] = []
    hook = block.attn.norm.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    block(x, rope, None)
    hook.remove()
    return given[0]


def _line(
    x: Float[Tensor, "tokens width"], y: Float[Tensor, "tokens width"]
) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"], float]:
    """Per channel the line y = gain x + shift with the least squares, and the share of y's variance off it."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    gain = (x * y).mean(0) / (x.square().mean(0) + _EPS)
    rest = (y - gain * x).square().sum() / (y.square().sum() + _EPS)
    return gain, mean_y - gain * mean_x, float(rest)
