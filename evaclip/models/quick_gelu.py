"""OpenAI's approximation of the GELU, with which its CLIP models were trained."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def quick_gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``x sigmoid(1.702 x)`` (github.com/openai/CLIP, ``QuickGELU``)."""
    return x * torch.sigmoid(1.702 * x)
