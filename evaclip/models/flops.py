"""Floating-point operations of the towers, from their shapes alone."""

from __future__ import annotations

from evaclip.config import ImageTowerConfig, ModelConfig, TextTowerConfig


def forward_flops(config: ModelConfig, text_tokens: float, *, kept: int | None = None) -> float:
    """Operations of one sample's forward pass: 2 per multiply-add of every matrix product, attention included.

    Norms, activations and embeddings are left out (below 1 %). A backward pass costs twice as much again.

    Args:
        config: Shapes of the towers.
        text_tokens: Mean tokens of a caption. Its attention, below 2 % of the text tower, is counted at this length.
        kept: Patches that are computed; None: all.
    """
    return _image_flops(config.image, config.embed_dim, kept) + _text_flops(config.text, config.embed_dim, text_tokens)


def _image_flops(config: ImageTowerConfig, embed_dim: int, kept: int | None) -> float:
    patches = config.grid**2 if kept is None else kept
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
