"""The EVA image tower: pixels in, one feature per image out.

EVA-01 (arXiv:2211.07636) and EVA-02 (arXiv:2303.11331) as EVA-CLIP trains them (arXiv:2303.15389): class-token
pooling, a learned position embedding, and per model rotary positions, SwiGLU, inner norms, norms behind the branches,
root-mean-square norms or a learned scale per channel; and OpenAI's vision transformer (arXiv:2103.00020), which has one
more norm and other biases. Patches that a sample drops are never normalised, embedded or attended to.

This module decides what is computed. It does not know ranks, precision policy, how blocks are compiled or
checkpointed, or whether it is being trained: only ``seeds`` bring in randomness. Every parameter is used in the
forward of the module that owns it, so that an engine may bring parameters in module by module.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from evaclip.config import ImageTowerConfig
from evaclip.models.attention import attention
from evaclip.models.constant import Constant
from evaclip.models.pixels import pixel_normalisation, require_images
from evaclip.models.quick_gelu import quick_gelu
from evaclip.models.rope import rotate, rotation_table
from evaclip.models.token_drop import drop_path_scales, kept_patches


class ImageTower(nn.Module):
    """A vision transformer that reads its feature from the class token.

    Args:
        config: Shape and kind of the tower.
        embed_dim: Channels of the feature.

    Attributes:
        outlets: How the names of the parameters that lead into the common space begin.
    """

    outlets = ("head.",)

    def __init__(self, config: ImageTowerConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        num_patches = config.grid**2
        self.pixels = Constant(pixel_normalisation(config))
        self.patch_embed = PatchEmbedding(3 * config.patch_size**2, config.width, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.empty(config.width))
        self.position_embedding = nn.Parameter(torch.empty(1 + num_patches, config.width))
        self.rope = Constant(rotation_table(config.grid, config.width // config.heads)) if config.rope else None
        probabilities = torch.linspace(0, config.drop_path, config.depth, dtype=torch.float64, device="cpu")
        self.drop_path = Constant(probabilities) if config.drop_path else None
        self.embed_norm = _norm(config, config.width) if config.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = _norm(config, config.width)
        self.head = nn.Linear(config.width, embed_dim, bias=config.head_bias)

    def forward(
        self,
        images: Shaped[Tensor, "batch 3 height width"],
        seeds: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch embed_dim"]:
        """Features, not normalised.

        Args:
            images: uint8 pixels, which are normalised here, or floats that already are.
            seeds: One per sample, int64: draws the patches and branches to drop. None computes everything.

        Raises:
            ValueError: Images of another size or dtype than the tower takes.
        """
        require_images(images, self.config.image_size)
        kept = None
        if seeds is not None and self.config.kept_patches < self.config.grid**2:
            kept = kept_patches(seeds, self.config.grid**2, self.config.kept_patches)
        x = self.embed_norm(self.embed(images, kept))
        rope = self.rotations(kept)
        scales = None if seeds is None or self.drop_path is None else drop_path_scales(seeds, self.drop_path.value)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, None if scales is None else scales[layer])
        return self.head(self.norm(x[:, 0]))

    @property
    def description(self) -> str:
        """For the log: what it drops."""
        return f"keeps {self.config.kept_patches} of {self.config.grid**2} patches in training"

    def embed(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Class token and patches with their positions: [batch, 1 + patches, width]."""
        grid, patch = self.config.grid, self.config.patch_size
        # (batch, 3, grid * patch, grid * patch) -> (batch, grid, grid, 3, patch, patch), a view
        patches = images.unflatten(3, (grid, patch)).unflatten(2, (grid, patch)).permute(0, 2, 4, 1, 3, 5)
        if kept is None:
            patches = patches.flatten(1, 2)
            positions = self.position_embedding[1:]
        else:
            rows, columns = kept // grid, kept % grid
            patches = patches[torch.arange(len(images), device=images.device)[:, None], rows, columns]
            positions = F.embedding(1 + kept, self.position_embedding)
        if images.dtype == torch.uint8:
            gain, shift = self.pixels.value
            patches = torch.addcmul(shift, patches.float(), gain)
        tokens = self.patch_embed(patches.flatten(2)) + positions
        first = (self.class_token + self.position_embedding[0]).expand(len(images), 1, -1)
        return torch.cat([first.to(tokens.dtype), tokens], dim=1)

    def rotations(self, kept: Tensor | None = None) -> Tensor | None:
        """The table that all blocks share, its rows picked once: [2, batch or 1, 1 + patches, head_dim]."""
        if self.rope is None:
            return None
        if kept is None:
            return self.rope.value[:, None]
        return self.rope.value[:, F.pad(1 + kept, (1, 0))]  # row 0 is the class token


def _norm(config: ImageTowerConfig, channels: int) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms_norm" else nn.LayerNorm
    return kind(channels, eps=config.norm_eps)


class PatchEmbedding(nn.Linear):
    """The patch convolution as a linear layer, for patches that lie in any order or are left out.

    The columns of the weight are ordered as a convolution's: channel, row, column.
    """

    def forward(self, input: Float[Tensor, "batch patches pixels"]) -> Float[Tensor, "batch patches width"]:  # noqa: A002
        """Embed flattened patches, in the weights' dtype unless autocast decides."""
        return super().forward(input.to(self.weight.dtype))


class Block(nn.Module):
    """Attention and feed-forward, each added to its input."""

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.norm1 = _norm(config, config.width)
        self.attn = Attention(config)
        self.norm2 = _norm(config, config.width)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else MLP(config)
        scaled = config.layer_scale is not None
        self.scale1 = nn.Parameter(torch.empty(config.width)) if scaled else None
        self.scale2 = nn.Parameter(torch.empty(config.width)) if scaled else None

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        rope: Float[Tensor, "2 rows tokens head_dim"] | None,
        branch_scales: Float[Tensor, "2 batch"] | None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Add both branches.

        Args:
            x: Tokens.
            rope: Cosines and sines of the tokens' rotations.
            branch_scales: Each sample's factor on each branch (drop path).
        """
        attended = self.norm1(self.attn(x, rope)) if self.post_norm else self.attn(self.norm1(x), rope)
        if self.scale1 is not None:
            attended = attended * self.scale1
        if branch_scales is not None:
            attended = attended * branch_scales[0, :, None, None].to(attended.dtype)
        x = x + attended
        fed = self.norm2(self.mlp(x)) if self.post_norm else self.mlp(self.norm2(x))
        if self.scale2 is not None:
            fed = fed * self.scale2
        if branch_scales is not None:
            fed = fed * branch_scales[1, :, None, None].to(fed.dtype)
        return x + fed


class Attention(nn.Module):
    """Multi-head self-attention with rotated queries and keys, and a norm before its last layer, where asked."""

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = QKV(config.width, config.qkv_bias)
        self.norm = _norm(config, config.width) if config.sub_norm else nn.Identity()
        self.proj = nn.Linear(config.width, config.width)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], rope: Float[Tensor, "2 rows tokens head_dim"] | None
    ) -> Float[Tensor, "batch tokens width"]:
        """Attend within each sample."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (batch, tokens, 3, heads, head_dim)
        if rope is None:
            q, k, v = qkv.unbind(2)
        else:
            qk, v = qkv.split([2, 1], dim=2)
            q, k = rotate(qk, rope).unbind(2)
            v = v.squeeze(2)
        return self.proj(self.norm(attention(q, k, v).flatten(2)))


class QKV(nn.Module):
    """Queries, keys and values by one matrix.

    The keys' bias is zero by construction, since softmax cancels it, where a model was not trained with one.
    """

    def __init__(self, width: int, biases: Literal["qv", "qkv", "none"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias = nn.Parameter(torch.empty(width)) if biases != "none" else None
        self.k_bias = nn.Parameter(torch.empty(width)) if biases == "qkv" else None
        self.v_bias = nn.Parameter(torch.empty(width)) if biases != "none" else None

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens qkv"]:
        """Queries, keys, values, one behind the other."""
        if self.q_bias is None or self.v_bias is None:
            return F.linear(x, self.weight)
        k_bias = torch.zeros_like(self.q_bias) if self.k_bias is None else self.k_bias
        return F.linear(x, self.weight, torch.cat([self.q_bias, k_bias, self.v_bias]))


class MLP(nn.Module):
    """Two linear layers around a GELU (EVA-01)."""

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.activation = quick_gelu if config.mlp == "quick_gelu" else F.gelu
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.norm = _norm(config, config.mlp_width) if config.sub_norm else nn.Identity()
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Each token by itself."""
        return self.fc2(self.norm(self.activation(self.fc1(x))))


class SwiGLU(nn.Module):
    """w3 (silu(w1 x) * w2 x) with w1 and w2 as one matrix (arXiv:2002.05202; EVA-02)."""

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.width, 2 * config.mlp_width)
        self.norm = _norm(config, config.mlp_width) if config.sub_norm else nn.Identity()
        self.w3 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Each token by itself."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.norm(F.silu(gate) * value))
