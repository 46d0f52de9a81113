"""Our weights under the names of timm and open_clip, and the helpers that comparisons with them share."""

from __future__ import annotations

import re

import torch
from timm.layers import RmsNorm
from timm.models.eva import Eva
from torch import Tensor, nn

from evaclip.config import ImageTowerConfig
from evaclip.models.text import TextTower
from evaclip.models.vision import ImageTower

_IMAGE_NAMES = [
    (r"patch_embed\.", "patch_embed.proj."),
    (r"class_token", "cls_token"),
    (r"position_embedding", "pos_embed"),
    (r"attn\.qkv\.([qv]_bias)", r"attn.\1"),
    (r"scale([12])", r"gamma_\1"),
    (r"mlp\.w3\.", "mlp.fc2."),
]
_TEXT_NAMES = [
    (r"position_embedding", "positional_embedding"),
    (r"^blocks\.", "transformer.resblocks."),
    (r"norm([12])\.", r"ln_\1."),
    (r"^norm\.", "ln_final."),
    (r"attn\.qkv\.", "attn.in_proj_"),
    (r"attn\.proj\.", "attn.out_proj."),
    (r"mlp\.fc1\.", "mlp.c_fc."),
    (r"mlp\.fc2\.", "mlp.c_proj."),
    (r"^projection$", "text_projection"),
]


def timm_eva(config: ImageTowerConfig, embed_dim: int) -> Eva:
    """timm's tower of the same shape."""
    return Eva(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=(config.mlp_width + 0.5) / config.width,  # timm truncates width * ratio
        swiglu_mlp=config.mlp == "swiglu",
        scale_mlp=config.sub_norm,
        scale_attn_inner=config.sub_norm,
        qkv_fused=not config.sub_norm,
        qkv_bias=config.qkv_bias != "none",
        use_rot_pos_emb=config.rope,
        ref_feat_shape=(16, 16),
        use_post_norm=config.post_norm,
        init_values=config.layer_scale,
        global_pool="token",
        num_classes=embed_dim,
        **({"norm_layer": RmsNorm} if config.norm == "rms_norm" else {}),
    )


def _renamed(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def timm_tensors(tensors: dict[str, Tensor], tower: ImageTower) -> dict[str, Tensor]:
    """Weights or gradients of an image tower (or of a part of it) as timm's ``Eva`` names and shapes them."""
    patch = tower.config.patch_size
    split = tower.config.sub_norm  # timm keeps queries, keys and values apart in its EVA-02
    found: dict[str, Tensor] = {}
    for ours, tensor in tensors.items():
        name = _renamed(ours, _IMAGE_NAMES)
        if name == "patch_embed.proj.weight":
            found[name] = tensor.unflatten(1, (3, patch, patch))
        elif name == "cls_token":
            found[name] = tensor[None, None]
        elif name == "pos_embed":
            found[name] = tensor[None]
        elif split and name.endswith("attn.qkv.weight"):
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace("qkv", f"{part}_proj")] = value
        elif split and name.endswith(("q_bias", "v_bias")):
            found[f"{name[:-6]}{name[-6]}_proj.bias"] = tensor
        elif ".w12." in f".{name}":
            gate, value = tensor.chunk(2)
            found[name.replace("w12", "fc1_g")] = gate
            found[name.replace("w12", "fc1_x")] = value
        else:
            found[name] = tensor
    return found


def open_clip_text_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of a text tower as open_clip's ``TextTransformer`` names them."""
    return {_renamed(name, _TEXT_NAMES): tensor for name, tensor in tensors.items()}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad
    return found


@torch.no_grad()
def shake(module: nn.Module, seed: int = 0, std: float = 0.02) -> None:
    """Move every parameter at random: zero biases and unit gains would hide that they are used wrongly."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(torch.empty(parameter.shape).normal_(0, std, generator=generator))


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Give every parameter random values, gains around one: quicker than an initialisation for large models."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        parameter.uniform_(-0.03, 0.03, generator=generator)
        if re.search(r"norm\d?\.weight$", name):
            parameter.add_(1)


def load_image(peer: nn.Module, tower: ImageTower) -> None:
    peer.load_state_dict(timm_tensors(weights(tower), tower), strict=True)


def load_text(peer: nn.Module, tower: TextTower) -> None:
    peer.load_state_dict(open_clip_text_tensors(weights(tower)), strict=True)


def largest_relative_difference(ours: dict[str, Tensor], peers: dict[str, Tensor]) -> tuple[float, str]:
    """Over all tensors: the norm of the difference over the norm of the peer's, and whose it is."""
    assert ours.keys() == peers.keys()
    return max((float((ours[name] - peers[name]).norm() / peers[name].norm()), name) for name in ours)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def captions(lengths: list[int], vocab_size: int = 49408, seed: int = 0) -> list[list[int]]:
    """Random captions whose last token, as CLIP's end token, is the largest id."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [*torch.randint(1, vocab_size - 1, (length - 1,), generator=generator).tolist(), vocab_size - 1]
        for length in lengths
    ]


def padded(texts: list[list[int]], context_length: int) -> Tensor:
    """Captions as open_clip takes them: one row each, zeros behind the end token."""
    rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    return rows
