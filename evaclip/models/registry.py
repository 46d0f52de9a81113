"""Named models, as plain data: the published EVA-CLIP configurations, OpenAI's vision transformers, and tiny ones.

Sources: ``EVA-CLIP/rei/eva_clip/model_configs`` and ``EVA-CLIP-18B/shinji`` of github.com/baaivision/EVA (MIT licence);
Table 20 of arXiv:2103.00020. No torch here: the configuration reads this table to resolve ``model.name``.
"""

from __future__ import annotations

from typing import Any


def _text(width: int, depth: int) -> dict[str, Any]:
    """A CLIP text tower with heads of 64 channels."""
    return {"width": width, "depth": depth, "heads": width // 64, "mlp_width": 4 * width}


def _vit(patch: int, width: int, depth: int, embed_dim: int, text: dict[str, Any], mlp: str = "gelu") -> dict[str, Any]:
    """OpenAI's vision transformer, heads of 64 channels in both towers."""
    image = {
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "heads": width // 64,
        "mlp_width": 4 * width,
        "mlp": mlp,
        "norm_eps": 1e-5,
        "embed_norm": True,
        "qkv_bias": "qkv",
        "patch_bias": False,
        "head_bias": False,
    }
    return {"embed_dim": embed_dim, "image": image, "text": {**text, "mlp": mlp}}


_EVA02 = {"mlp": "swiglu", "sub_norm": True, "rope": True}
_GIANT = {"patch_size": 14, "width": 1408, "depth": 40, "heads": 16, "mlp_width": 6144}
_LARGE = {"patch_size": 14, "width": 1024, "depth": 24, "heads": 16, "mlp_width": 2730, **_EVA02}
_ENORMOUS = {"patch_size": 14, "width": 1792, "depth": 64, "heads": 16, "mlp_width": 15360, "post_norm": True}
_BILLIONS = {"patch_size": 14, "norm": "rms_norm", "qkv_bias": "none", "head_bias": False}
_8B = {**_BILLIONS, "width": 4096, "depth": 32, "heads": 32, "mlp_width": 20480}
_18B = {**_BILLIONS, "width": 5120, "depth": 48, "heads": 40, "mlp_width": 25600, "post_norm": True}

_TINY = {"image_size": 28, "patch_size": 7, "width": 32, "depth": 2, "heads": 2, "mlp_width": 64}
_TINY_TEXT = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 128}
_TINY_KINDS: dict[str, dict[str, Any]] = {
    "EVA01": {"layer_scale": 0.1},
    "EVA02": {"mlp_width": 48, **_EVA02},
    "E": {"post_norm": True},
    "8B": {"norm": "rms_norm", "qkv_bias": "none", "head_bias": False},
    "18B": {"norm": "rms_norm", "qkv_bias": "none", "head_bias": False, "post_norm": True},
}

PRESETS: dict[str, dict[str, Any]] = {
    "EVA01-CLIP-B-16": {"embed_dim": 512, "image": {"layer_scale": 0.1}, "text": _text(512, 12)},
    "EVA01-CLIP-g-14": {"embed_dim": 1024, "image": {**_GIANT, "drop_path": 0.4}, "text": _text(768, 12)},
    "EVA01-CLIP-g-14-plus": {"embed_dim": 1024, "image": _GIANT, "text": _text(1024, 24)},
    "EVA02-CLIP-B-16": {"embed_dim": 512, "image": {"mlp_width": 2048, **_EVA02}, "text": _text(512, 12)},
    "EVA02-CLIP-L-14": {"embed_dim": 768, "image": _LARGE, "text": _text(768, 12)},
    "EVA02-CLIP-L-14-336": {"embed_dim": 768, "image": {**_LARGE, "image_size": 336}, "text": _text(768, 12)},
    "EVA02-CLIP-bigE-14": {"embed_dim": 1024, "image": _ENORMOUS, "text": _text(1024, 24)},
    "EVA02-CLIP-bigE-14-plus": {"embed_dim": 1024, "image": _ENORMOUS, "text": _text(1280, 32)},
    "EVA-CLIP-8B": {"embed_dim": 1280, "image": _8B, "text": _text(1280, 32)},
    "EVA-CLIP-8B-plus": {"embed_dim": 1280, "image": {**_8B, "image_size": 448}, "text": _text(1280, 32)},
    "EVA-CLIP-18B": {"embed_dim": 1536, "image": _18B, "text": _text(1280, 32)},
    "ViT-B-32": _vit(32, 768, 12, 512, _text(512, 12)),
    "ViT-B-16": _vit(16, 768, 12, 512, _text(512, 12)),
    "ViT-L-14": _vit(14, 1024, 24, 768, _text(768, 12)),
    "ViT-B-32-quickgelu": _vit(32, 768, 12, 512, _text(512, 12), "quick_gelu"),
    "ViT-B-16-quickgelu": _vit(16, 768, 12, 512, _text(512, 12), "quick_gelu"),
    "ViT-L-14-quickgelu": _vit(14, 1024, 24, 768, _text(768, 12), "quick_gelu"),
    **{
        f"tiny-{kind}": {"embed_dim": 24, "image": {**_TINY, **own}, "text": _TINY_TEXT}
        for kind, own in _TINY_KINDS.items()
    },
    "tiny-ViT": {
        "embed_dim": 24,
        "text": {**_TINY_TEXT, "mlp": "quick_gelu"},
        "image": {**_vit(7, 64, 2, 24, {}, "quick_gelu")["image"], **_TINY},
    },
}
"""Name -> the keys of ``config.ModelConfig`` that differ from its defaults."""

ALIASES: dict[str, str] = {
    "EVA01-g-14": "EVA01-CLIP-g-14",
    "EVA01-g-14-plus": "EVA01-CLIP-g-14-plus",
    "EVA02-B-16": "EVA02-CLIP-B-16",
    "EVA02-L-14": "EVA02-CLIP-L-14",
    "EVA02-L-14-336": "EVA02-CLIP-L-14-336",
    "EVA02-E-14": "EVA02-CLIP-bigE-14",
    "EVA02-E-14-plus": "EVA02-CLIP-bigE-14-plus",
    "eva_giant_patch14_clip_224": "EVA01-CLIP-g-14",
    "eva02_base_patch16_clip_224": "EVA02-CLIP-B-16",
    "eva02_large_patch14_clip_224": "EVA02-CLIP-L-14",
    "eva02_large_patch14_clip_336": "EVA02-CLIP-L-14-336",
    "eva02_enormous_patch14_clip_224": "EVA02-CLIP-bigE-14",
    "vit_base_patch32_clip_224": "ViT-B-32",
    "vit_base_patch16_clip_224": "ViT-B-16",
    "vit_large_patch14_clip_224": "ViT-L-14",
    "vit_base_patch32_clip_quickgelu_224": "ViT-B-32-quickgelu",
    "vit_base_patch16_clip_quickgelu_224": "ViT-B-16-quickgelu",
    "vit_large_patch14_clip_quickgelu_224": "ViT-L-14-quickgelu",
}
"""Names of open_clip and of timm, which knows image towers only -> ours, the smaller one where two share a tower."""
