"""The text tower: packed captions in, one feature per caption out.

The pre-norm causal transformer of CLIP (arXiv:2103.00020), with exact GELU or OpenAI's. It sees captions behind one
another (``PackedText``) and computes nothing for padding but what the packing asks for. It does not know the tokenizer:
the feature is read at a caption's last token, whatever that is. Every parameter is used in the forward of the module
that owns it, so that an engine may bring parameters in module by module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from evaclip.config import TextTowerConfig
from evaclip.data.batch import PackedText
from evaclip.models.attention import packed_causal_attention
from evaclip.models.quick_gelu import quick_gelu

_NORM_EPS = 1e-5


class TextTower(nn.Module):
    """A causal transformer that reads its feature from the end token.

    Args:
        config: Shape of the tower.
        embed_dim: Channels of the feature.

    Attributes:
        outlets: How the names of the parameters that lead into the common space begin.
    """

    outlets = ("projection",)

    def __init__(self, config: TextTowerConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=_NORM_EPS)
        self.projection = nn.Parameter(torch.empty(config.width, embed_dim))

    def forward(self, text: PackedText) -> Float[Tensor, "captions embed_dim"]:
        """Features in the caller's order, not normalised.

        Raises:
            ValueError: A caption is longer than the context.
        """
        x = self.embed(text)
        for block in self.blocks:
            x = block(x, text)
        last = text.cu_seqlens[1 : 1 + text.num_captions] - 1
        return (self.norm(x[last]) @ self.projection)[text.restore]

    def embed(self, text: PackedText) -> Float[Tensor, "tokens width"]:
        """Tokens with their positions; raises as ``forward``."""
        if text.max_length > self.config.context_length:
            raise ValueError(
                f"a caption has {text.max_length} tokens, more than the context of {self.config.context_length}; "
                "cut it with a tokenizer of that context length"
            )
        return self.token_embedding(text.ids) + F.embedding(text.positions, self.position_embedding)


class TextBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=_NORM_EPS)
        self.attn = TextAttention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=_NORM_EPS)
        self.mlp = TextMLP(config)

    def forward(self, x: Float[Tensor, "tokens width"], text: PackedText) -> Float[Tensor, "tokens width"]:
        """Add both branches."""
        x = x + self.attn(self.norm1(x), text)
        return x + self.mlp(self.norm2(x))


class TextAttention(nn.Module):
    """Multi-head causal self-attention within each caption."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Float[Tensor, "tokens width"], text: PackedText) -> Float[Tensor, "tokens width"]:
        """Attend within each caption."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # each (tokens, heads, head_dim)
        return self.proj(packed_causal_attention(q, k, v, text).flatten(1))


class TextMLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.activation = quick_gelu if config.mlp == "quick_gelu" else F.gelu
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        """Each token by itself."""
        return self.fc2(self.activation(self.fc1(x)))
