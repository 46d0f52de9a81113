"""Towers of timm that tests of them share."""

from __future__ import annotations

import functools
from typing import Any

import timm
import torch
from peers import noise
from torch import Tensor

from evaclip.config import ModelConfig
from evaclip.models.clip import CLIP, create_model

SEEDS = torch.tensor([3, -8, 1 << 60])
TEXT = {"width": 32, "depth": 1, "heads": 2, "mlp_width": 32, "context_length": 8}
KINDS: dict[str, dict[str, Any]] = {
    "vit": {"model": "test_vit", "image_size": 48},
    "siglip": {"model": "vit_base_patch16_siglip_224", "image_size": 32, "embed_dim": 768, "projection": "none"},
    "dinov3": {"model": "vit_small_patch16_dinov3", "image_size": 48},
    "eva02": {"model": "eva02_tiny_patch14_224", "image_size": 42},
    "convnext": {"model": "test_convnext", "image_size": 64},
    "clip_resnet": {"model": "resnet50_clip", "image_size": 64},
}
TOKENS = ("vit", "dinov3", "eva02")
"""Those that drop patches; SigLIP's does as well, and its smallest has 93 M parameters."""


def config_of(kind: str = "vit", **options: Any) -> ModelConfig:
    given = {**KINDS.get(kind, {"model": kind, "image_size": 32}), **options}
    embed_dim = given.pop("embed_dim", 24)
    return ModelConfig.model_validate({"embed_dim": embed_dim, "image": {"kind": "timm", **given}, "text": TEXT})


def build(kind: str = "vit", **options: Any) -> CLIP:
    return create_model(config_of(kind, **options))


@functools.cache
def shared(kind: str) -> CLIP:
    """A model that no test changes, with statistics and biases that are not what they start as."""
    model = build(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.image.parameters():
            parameter.add_(torch.empty(parameter.shape).uniform_(0, 0.02, generator=generator))
    return model


def bare(model: CLIP, **options: Any) -> Any:
    """The timm model alone, with the same weights."""
    config, size = model.config.image, model.config.image.image_size
    if timm.get_pretrained_cfg(config.model).fixed_input_size:
        options["img_size"] = size
    classes = 0 if config.projection == "none" else model.config.embed_dim
    peer = timm.create_model(config.model, num_classes=classes, **options)
    missing, unexpected = peer.load_state_dict(model.image.trunk.state_dict(), strict=False)
    assert unexpected == []
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return peer.eval()


def images_of(model: CLIP, count: int = 3, seed: int = 0) -> Tensor:
    size = model.config.image.image_size
    return noise(count, 3, size, size, seed=seed)
