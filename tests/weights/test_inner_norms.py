"""Inner norms that MIM weights lack can be fitted so that the tower computes nearly what it did without them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from models.peers import shake
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from evaclip.config import ModelConfig
from evaclip.models.clip import create_model
from evaclip.models.vision import ImageTower
from evaclip.weights.inner_norms import fit_inner_norms


def tower_without_norms() -> tuple[ImageTower, ImageTower]:
    """A tower whose inner norms are one and zero, and the same without them, as MIM trained it."""
    tower = create_model(ModelConfig(name="tiny-EVA02"), seed=2).image
    shake(tower, std=0.1)
    for block in tower.blocks:
        nn.init.ones_(block.attn.norm.weight)
        nn.init.zeros_(block.attn.norm.bias)
    bare = copy.deepcopy(tower)
    for block in bare.blocks:
        block.attn.norm = nn.Identity()
    return tower, bare


def pictures(count: int, seed: int) -> Tensor:
    random = np.random.default_rng(seed)
    colours = random.integers(0, 256, (count, 3, 4, 4), np.uint8)
    return torch.from_numpy(colours).repeat_interleave(7, 2).repeat_interleave(7, 3)


@torch.no_grad()
def kept(tower: ImageTower, bare: ImageTower) -> float:
    """Mean cosine of the features with and without norms, on other images than were fitted on."""
    images = pictures(32, seed=1)
    mean = bare(images).mean(0)
    return float(cosine_similarity(tower(images) - mean, bare(images) - mean).mean())


def test_fitted_norms_keep_what_ones_and_zeros_change() -> None:
    tower, bare = tower_without_norms()
    assert kept(tower, bare) < 0.7
    unexplained = fit_inner_norms(tower, pictures(64, seed=0))
    assert kept(tower, bare) > 0.9  # not 1: a line per channel cannot undo a division per token
    assert len(unexplained) == len(tower.blocks)
    assert all(0 <= share < 0.2 for share in unexplained)
    assert all(isinstance(block.attn.norm, nn.LayerNorm) for block in tower.blocks)


def test_towers_without_inner_norms_are_refused() -> None:
    with pytest.raises(ValueError, match="has no inner norms"):
        fit_inner_norms(create_model(ModelConfig(name="tiny-EVA01")).image, pictures(2, seed=0))
