"""Named models have the published sizes, and other tools' names lead to them."""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch
from torch import nn

from evaclip.config import ModelConfig
from evaclip.models.clip import CLIP, create_model
from evaclip.models.registry import ALIASES, PRESETS

# Parameters of image tower and text tower. EVA-CLIP: counted on its own code, meta device; ViT: on open_clip 3.3.
PUBLISHED = {
    "EVA01-CLIP-B-16": (86_201_600, 63_428_096),
    "EVA01-CLIP-g-14": (1_012_588_928, 123_846_912),
    "EVA01-CLIP-g-14-plus": (1_012_588_928, 354_032_640),
    "EVA02-CLIP-B-16": (86_263_040, 63_428_096),
    "EVA02-CLIP-L-14": (304_105_152, 123_650_304),
    "EVA02-CLIP-L-14-336": (304_432_832, 123_650_304),
    "EVA02-CLIP-bigE-14": (4_350_556_928, 354_032_640),
    "EVA02-CLIP-bigE-14-plus": (4_350_556_928, 694_332_160),
    "EVA-CLIP-8B": (7_526_088_704, 694_659_840),
    "EVA-CLIP-8B-plus": (7_529_234_432, 694_659_840),
    "EVA-CLIP-18B": (17_630_494_720, 694_987_520),
    "ViT-B-32": (87_849_216, 63_428_096),
    "ViT-B-16": (86_192_640, 63_428_096),
    "ViT-L-14": (303_966_208, 123_650_304),
}


def on_meta(name: str) -> CLIP:
    with torch.device("meta"):
        return CLIP(ModelConfig(name=name))


@pytest.mark.parametrize(("name", "counts"), PUBLISHED.items())
def test_published_models_have_exactly_the_published_numbers_of_parameters(name: str, counts: tuple[int, int]) -> None:
    model = on_meta(name)
    assert tuple(sum(p.numel() for p in tower.parameters()) for tower in (model.image, model.text)) == counts


def test_quick_gelu_is_the_only_difference_of_openais_models() -> None:
    for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14"):
        plain, quick = ModelConfig(name=name), ModelConfig(name=f"{name}-quickgelu")
        towers = {"image": plain.image, "text": plain.text}
        changed = {key: tower.model_copy(update={"mlp": "quick_gelu"}) for key, tower in towers.items()}
        assert plain.model_copy(update={"name": quick.name, **changed}) == quick


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny")])
def test_tiny_models_compute_features(name: str) -> None:
    model = create_model(ModelConfig(name=name))
    features = model.encode_image(torch.zeros(2, 3, 28, 28, dtype=torch.uint8), seeds=torch.arange(2))
    assert features.shape == (2, 24)
    features.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.image.parameters())


def test_aliases_name_models_that_their_origin_has_too() -> None:
    timm_names = [alias for alias in ALIASES if "patch" in alias]
    assert timm_names
    for alias in timm_names:
        assert timm.is_model(alias)
        tower = on_meta(alias).image
        with torch.device("meta"):
            peer = timm.create_model(alias, num_classes=tower.head.out_features)
        assert size_below_head(tower) == size_below_head(peer), alias


def test_names_of_open_clip_lead_to_towers_of_the_same_shape() -> None:
    names = [alias for alias in ALIASES if "patch" not in alias]
    assert len(names) == 7
    for name in names:
        theirs, ours = open_clip.get_model_config(name), ModelConfig(name=name)
        text = theirs["text_cfg"]
        assert (theirs["embed_dim"], theirs["vision_cfg"]["image_size"]) == (ours.embed_dim, ours.image.image_size)
        assert (text["width"], text["layers"], text["heads"]) == (ours.text.width, ours.text.depth, ours.text.heads)


def size_below_head(tower: nn.Module) -> int:
    """timm's heads always have a bias."""
    return sum(p.numel() for name, p in tower.named_parameters() if name != "head.bias")
