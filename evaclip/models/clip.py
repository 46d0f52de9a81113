"""CLIP: two towers whose features meet in one space.

The temperature is not here: the loss owns it. Neither is anything that depends on ranks or precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from evaclip.config import ImageTowerConfig, ModelConfig
from evaclip.data.batch import PackedText
from evaclip.models.initial import initialise
from evaclip.models.text import TextTower
from evaclip.models.vision import ImageTower

if TYPE_CHECKING:
    from evaclip.models.timm_tower import TimmTower


class Features(NamedTuple):
    """Unit vectors in fp32, in the order of the samples."""

    image: Float[Tensor, "images embed_dim"]
    text: Float[Tensor, "captions embed_dim"]


class CLIP(nn.Module):
    """An image tower and a text tower.

    Args:
        config: Shapes of both.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.image = _image_tower(config)
        self.text = TextTower(config.text, config.embed_dim)

    def forward(
        self,
        images: Shaped[Tensor, "batch 3 height width"],
        text: PackedText,
        seeds: Int[Tensor, " batch"] | None = None,
    ) -> Features:
        """Normalised features of images and captions.

        Args:
            images: uint8 pixels, or floats normalised by the tower's mean and std.
            text: Captions, not necessarily as many as images.
            seeds: One per image, int64: draws the patches and branches to drop. None drops nothing.
        """
        return Features(self.encode_image(images, normalize=True, seeds=seeds), self.encode_text(text, normalize=True))

    def encode_image(
        self,
        images: Shaped[Tensor, "batch 3 height width"],
        *,
        normalize: bool = False,
        seeds: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch embed_dim"]:
        """Features of images; arguments as in ``forward``."""
        features = self.image(images, seeds)
        return _normalised(features) if normalize else at_least_fp32(features)

    def encode_text(self, text: PackedText, *, normalize: bool = False) -> Float[Tensor, "captions embed_dim"]:
        """Features of captions, in the order in which they were packed from."""
        features = self.text(text)
        return _normalised(features) if normalize else at_least_fp32(features)


def _image_tower(config: ModelConfig) -> ImageTower | TimmTower:
    if isinstance(config.image, ImageTowerConfig):
        return ImageTower(config.image, config.embed_dim)
    from evaclip.models.timm_tower import TimmTower  # noqa: PLC0415  seconds, and not always needed

    return TimmTower(config.image, config.embed_dim)


def _normalised(features: Tensor) -> Tensor:
    """Unit vectors in fp32: cosines of 16-bit features, times a scale of 100, would come in steps of a half."""
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(at_least_fp32(features), dim=-1)


def at_least_fp32(features: Tensor) -> Tensor:
    """16-bit features as fp32; what is wider stays as it is."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def empty_model(config: ModelConfig, device: torch.device | str = "cpu") -> CLIP:
    """A model whose fp32 weights are allocated, but not set; what is computed and not learned is there."""
    model = _allocated(config, device)
    if not isinstance(model.image, ImageTower):
        model.image.initialise(0)  # whose tables come with its weights
    return model


def _allocated(config: ModelConfig, device: torch.device | str) -> CLIP:
    """Built without memory, then allocated once on its device."""
    with torch.device("meta"):
        model = CLIP(config)
    return model.to_empty(device=device)


def create_model(config: ModelConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> CLIP:
    """A model with random weights in fp32, as ``models.initial`` draws them, or timm.

    Args:
        config: Shapes of the towers.
        seed: The weights are a function of it and of the parameters' names.
        device: Where the model lives.

    Raises:
        ConfigError: timm has no such image tower, or it cannot be used as configured.
    """
    model = _allocated(config, device)
    initialise(model, config, seed)
    return model
