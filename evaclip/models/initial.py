"""Initial weights: a pure function from a parameter's name to its distribution, and the draw.

Every parameter has its own generator, seeded by (seed, name): its values depend neither on the order of modules nor
on device or rank. A name that no rule covers is an error, never a random accident.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from evaclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from evaclip.data.order import hash64, name_hash
from evaclip.models.vision import ImageTower

if TYPE_CHECKING:
    from evaclip.models.clip import CLIP


class Initial(NamedTuple):
    """Normally distributed around ``mean``, or constant without ``std``."""

    mean: float
    std: float = 0.0


_ZERO, _ONE = Initial(0.0), Initial(1.0)
_NORM = {"norm.weight": _ONE, "norm.bias": _ZERO}
_BLOCK_NORMS = {"norm1.weight": _ONE, "norm1.bias": _ZERO, "norm2.weight": _ONE, "norm2.bias": _ZERO}


def initial(config: ModelConfig, name: str) -> Initial | None:
    """The distribution of a parameter of ``CLIP``; None if no rule covers it."""
    tower, _, inner = name.partition(".")
    block = re.match(r"blocks\.(\d+)\.", inner)
    inner = inner[block.end() :] if block else inner
    if tower == "image" and isinstance(config.image, ImageTowerConfig):
        return (_image_block(config.image, int(block[1])) if block else _image(config.image)).get(inner)
    if tower == "text":
        return (_text_block(config.text) if block else _text(config.text)).get(inner)
    return None


def _image(config: ImageTowerConfig) -> dict[str, Initial]:
    """As EVA-CLIP, whose truncation at 2 never meets a deviation of 0.02, but for the head.

    EVA-CLIP starts the head at a deviation of 2e-5. LAMB moves a tensor in proportion to its norm, so without a lower
    clamp on the trust ratio that head would take about 7 / lr steps to grow to use; ours starts at the scale of the
    text tower's projection.
    """
    return {
        "patch_embed.weight": Initial(0.0, 0.02),
        "patch_embed.bias": _ZERO,
        "class_token": Initial(0.0, 0.02),
        "position_embedding": Initial(0.0, 0.02),
        **{f"embed_{name}": value for name, value in _NORM.items()},
        "head.weight": Initial(0.0, config.width**-0.5),
        "head.bias": _ZERO,
        **_NORM,
    }


def _image_block(config: ImageTowerConfig, index: int) -> dict[str, Initial]:
    """As EVA-CLIP: a branch's last layer shrinks with the depth of its block (BEiT, arXiv:2106.08254).

    EVA-CLIP's deviation is 0.02 at every width. Below its width of 1024 ours keeps the gain of that width: at 128 a
    deviation of 0.02 leaves the branches nearly silent, and LAMB needs hundreds of steps to grow them.
    """
    std = max(0.02, 0.64 * config.width**-0.5)
    linear = Initial(0.0, std)
    last = Initial(0.0, std / (2 * (index + 1)) ** 0.5)
    layer_scale = Initial(config.layer_scale or 0.0)
    return {
        **_BLOCK_NORMS,
        **{f"attn.{name}": value for name, value in _NORM.items()},
        **{f"mlp.{name}": value for name, value in _NORM.items()},
        "attn.qkv.weight": linear,
        "attn.qkv.q_bias": _ZERO,
        "attn.qkv.k_bias": _ZERO,
        "attn.qkv.v_bias": _ZERO,
        "attn.proj.weight": last,
        "attn.proj.bias": _ZERO,
        "mlp.w12.weight": linear,
        "mlp.w12.bias": _ZERO,
        "mlp.w3.weight": last,
        "mlp.w3.bias": _ZERO,
        "mlp.fc1.weight": linear,
        "mlp.fc1.bias": _ZERO,
        "mlp.fc2.weight": last,
        "mlp.fc2.bias": _ZERO,
        "scale1": layer_scale,
        "scale2": layer_scale,
    }


def _text(config: TextTowerConfig) -> dict[str, Initial]:
    """As CLIP."""
    return {
        "token_embedding.weight": Initial(0.0, 0.02),
        "position_embedding": Initial(0.0, 0.01),
        "projection": Initial(0.0, config.width**-0.5),
        **_NORM,
    }


def _text_block(config: TextTowerConfig) -> dict[str, Initial]:
    """As CLIP: a branch's last layer shrinks with the number of branches."""
    last = Initial(0.0, (2 * config.depth * config.width) ** -0.5)
    return {
        **_BLOCK_NORMS,
        "attn.qkv.weight": Initial(0.0, config.width**-0.5),
        "attn.qkv.bias": _ZERO,
        "attn.proj.weight": last,
        "attn.proj.bias": _ZERO,
        "mlp.fc1.weight": Initial(0.0, (2 * config.width) ** -0.5),
        "mlp.fc1.bias": _ZERO,
        "mlp.fc2.weight": last,
        "mlp.fc2.bias": _ZERO,
    }


@torch.no_grad()
def draw(parameter: Tensor, name: str, config: ModelConfig, seed: int) -> None:
    """Fill a parameter of ``CLIP``; normal values are drawn on the CPU in fp32, whatever its device.

    Raises:
        RuntimeError: No rule covers its name.
    """
    distribution = initial(config, name)
    if distribution is None:
        raise RuntimeError(f"{name} was not initialised; add a rule to evaclip/models/initial.py")
    if distribution.std:
        generator = torch.Generator("cpu").manual_seed(hash64(seed, name_hash(name)))
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        parameter.copy_(values.normal_(distribution.mean, distribution.std, generator=generator))
    else:
        parameter.fill_(distribution.mean)


def initialise(model: CLIP, config: ModelConfig, seed: int) -> None:
    """Draw every parameter; a tower of timm draws its own.

    Raises:
        RuntimeError: No rule covers one.
    """
    for name, parameter in model.named_parameters():
        if not name.startswith("image.") or isinstance(model.image, ImageTower):
            draw(parameter, name, config, seed)
    if not isinstance(model.image, ImageTower):
        model.image.initialise(hash64(seed, name_hash("image")))
