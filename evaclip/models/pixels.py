"""Images as towers take them: uint8 pixels, or floats that are normalised already."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from evaclip.config import ImageConfig


def pixel_normalisation(config: ImageConfig) -> Float[Tensor, "2 3 1 1"]:
    """Gain and shift per colour: (pixel / 255 - mean) / std = pixel * gain + shift."""
    mean = torch.tensor(config.mean, dtype=torch.float64, device="cpu")
    std = torch.tensor(config.std, dtype=torch.float64, device="cpu")
    return torch.stack([1 / (255 * std), -mean / std]).float()[..., None, None]


def require_images(images: Tensor, size: int) -> None:
    """Refuse what is no batch of square images of this size.

    Raises:
        ValueError: Another shape, or integers that are not uint8.
    """
    if images.shape[1:] != (3, size, size):
        raise ValueError(f"images have shape {list(images.shape)}; this tower takes [batch, 3, {size}, {size}]")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; give uint8 pixels, or floats normalised by mean and std")
