"""At the published widths, with few blocks, towers filled from timm's compute what timm's compute, gradients too."""

from __future__ import annotations

import pytest
import torch
from models.peers import noise, randomise, timm_eva
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from evaclip.config import ModelConfig
from evaclip.models.token_drop import kept_patches
from evaclip.models.vision import ImageTower
from evaclip.weights.load import load_tower
from evaclip.weights.names import rules

SHAPES = {
    "EVA01-CLIP-B-16": 2,
    "EVA01-CLIP-g-14": 2,
    "EVA02-CLIP-B-16": 2,
    "EVA02-CLIP-L-14": 2,
    "EVA02-CLIP-L-14-336": 1,
    "EVA02-CLIP-bigE-14": 1,
    "EVA-CLIP-8B": 1,
}
"""Model -> blocks of the published depth that fit into a test."""


def pair(name: str, depth: int) -> tuple[ImageTower, nn.Module]:
    """Our tower and timm's, with the same random weights."""
    published = ModelConfig(name=name)
    config = published.image.model_copy(update={"depth": depth, "token_drop": 0.5, "drop_path": 0.0})
    if config.rope:  # tables that a model built without memory would lack
        peer = timm_eva(config, published.embed_dim)
    else:
        with torch.device("meta"):
            peer = timm_eva(config, published.embed_dim)
        peer.to_empty(device="cpu")
        for bias in peer.buffers():  # of the keys: zeros
            bias.zero_()
    randomise(peer)
    if not config.head_bias:
        nn.init.zeros_(peer.head.bias)
    with torch.device("meta"):
        tower = ImageTower(config, published.embed_dim)
    tower.to_empty(device="cpu")
    report = load_tower(tower, "image", peer.state_dict(), "peer", alone=False)
    assert (report.initialised, report.resized) == ([], [])
    return tower, peer.eval()


def on_kept_patches(peer: nn.Module, images: Tensor, kept: Tensor) -> Tensor:
    """timm's features of some patches of each image."""
    x, rope = peer._pos_embed(peer.patch_embed(images))
    first = torch.zeros(len(kept), 1, dtype=torch.int64)
    x = x[torch.arange(len(kept))[:, None], torch.cat([first, 1 + kept], dim=1)]
    rope = None if rope is None else rope[kept][:, None]
    for block in peer.blocks:
        x = block(x, rope=rope)
    return peer.head(peer.norm(x)[:, 0])


@pytest.mark.parametrize("name", SHAPES)
def test_features_and_gradients_of_published_shapes_equal_timms_in_full_and_of_kept_patches(name: str) -> None:
    tower, peer = pair(name, SHAPES[name])
    images = noise(1, 3, tower.config.image_size, tower.config.image_size)
    seeds = torch.tensor([1 << 40])
    kept = kept_patches(seeds, tower.config.grid**2, tower.config.kept_patches)
    with torch.no_grad():
        ours, theirs = tower(images), peer(images)
    assert (ours - theirs).abs().max() < 1e-5 * max(1, theirs.abs().max())
    ours, theirs = tower(images, seeds), on_kept_patches(peer, images, kept)
    assert (ours - theirs).abs().max() < 1e-5 * max(1, theirs.abs().max())
    direction = noise(*ours.shape, seed=1)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    grads = {name: parameter.grad for name, parameter in tower.named_parameters()}
    yours = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for rule in rules("image", "timm", grads):
        keys = next(keys for keys in rule.theirs if all(yours.get(key) is not None for key in keys))
        mine = torch.cat([grads[name] for name in rule.ours])
        there = torch.cat([rule.to_ours(yours[key]) for key in keys])
        cosine = cosine_similarity(mine.flatten(), there.flatten(), dim=0)
        assert cosine > 0.99999, f"{rule.ours}: {cosine}"
