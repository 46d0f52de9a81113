"""Named models: the published EVA-CLIP configurations, as plain data.

Sources: ``EVA-CLIP/rei/eva_clip/model_configs`` of github.com/baaivision/EVA (MIT licence). No torch here: the
configuration reads this table to resolve ``model.name``.
"""

from __future__ import annotations

from typing import Any


def _text(width: int, depth: int) -> dict[str, Any]:
    """A CLIP text tower with heads of 64 channels."""
    return {"width": width, "depth": depth, "heads": width // 64, "mlp_width": 4 * width}


_EVA02 = {"mlp": "swiglu", "sub_norm": True, "rope": True}
_GIANT = {"patch_size": 14, "width": 1408, "depth": 40, "heads": 16, "mlp_width": 6144}
_LARGE = {"patch_size": 14, "width": 1024, "depth": 24, "heads": 16, "mlp_width": 2730, **_EVA02}
_ENORMOUS = {"patch_size": 14, "width": 1792, "depth": 64, "heads": 16, "mlp_width": 15360, "post_norm": True}

PRESETS: dict[str, dict[str, Any]] = {
    "EVA01-CLIP-B-16": {"embed_dim": 512, "image": {"layer_scale": 0.1}, "text": _text(512, 12)},
    "EVA01-CLIP-g-14": {"embed_dim": 1024, "image": {**_GIANT, "drop_path": 0.4}, "text": _text(768, 12)},
    "EVA01-CLIP-g-14-plus": {"embed_dim": 1024, "image": _GIANT, "text": _text(1024, 24)},
    "EVA02-CLIP-B-16": {"embed_dim": 512, "image": {"mlp_width": 2048, **_EVA02}, "text": _text(512, 12)},
    "EVA02-CLIP-L-14": {"embed_dim": 768, "image": _LARGE, "text": _text(768, 12)},
    "EVA02-CLIP-L-14-336": {"embed_dim": 768, "image": {**_LARGE, "image_size": 336}, "text": _text(768, 12)},
    "EVA02-CLIP-bigE-14": {"embed_dim": 1024, "image": _ENORMOUS, "text": _text(1024, 24)},
    "EVA02-CLIP-bigE-14-plus": {"embed_dim": 1024, "image": _ENORMOUS, "text": _text(1280, 32)},
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
}
"""open_clip's names -> ours."""
