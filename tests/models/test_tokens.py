"""Patch and token features against those that timm and open_clip give for the same weights."""

from __future__ import annotations

import pytest
import torch
from open_clip.transformer import TextTransformer
from peers import captions, load_image, load_text, noise, padded, shake, timm_eva
from timm_towers import bare, images_of, shared
from torch import nn

from evaclip.api import Clip
from evaclip.config import ModelConfig
from evaclip.data.batch import PackedText
from evaclip.errors import ConfigError
from evaclip.models.clip import create_model
from evaclip.models.text import TextTower
from evaclip.models.tokens import image_tokens, text_tokens
from evaclip.models.vision import ImageTower

IMAGE = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 3, "heads": 2, "mlp_width": 48}
TEXT = {"width": 48, "depth": 3, "heads": 2, "mlp_width": 192}
LENGTHS = [9, 3, 20, 9, 77, 3, 12]
KINDS = {
    "EVA-01": {"layer_scale": 0.1},
    "post-norm": {"post_norm": True},
    "EVA-02": {"mlp": "swiglu", "sub_norm": True, "rope": True},
}


def make_clip(image: dict[str, object] | None = None) -> Clip:
    config = {"embed_dim": 16, "image": {**IMAGE, **(image or {})}, "text": TEXT}
    model = create_model(ModelConfig.model_validate(config))
    shake(model)
    return Clip(model, 1.0)


@pytest.mark.parametrize("layer", [0, 1, -1, -2, -3])
@pytest.mark.parametrize("kind", KINDS)
def test_patches_of_any_layer_equal_timms_for_the_same_weights(kind: str, layer: int) -> None:
    clip = make_clip(KINDS[kind])
    assert isinstance(clip.model.image, ImageTower)
    peer = timm_eva(clip.model.image.config, embed_dim=16)
    load_image(peer, clip.model.image)
    images = noise(3, 3, 32, 32)
    with torch.no_grad():
        ((patches, class_token),) = peer.forward_intermediates(
            images, indices=[layer], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        assert (clip.image_tokens(images, layer) - patches).abs().max() < 1e-5
        both = clip.image_tokens(images, layer, prefix_tokens=True)
    assert (both - torch.cat([class_token, patches], dim=1)).abs().max() < 1e-5


@pytest.mark.parametrize("layer", [0, -1, -2])
@pytest.mark.parametrize("multiple_of", [1, 64])
def test_words_of_any_layer_equal_open_clips_for_the_same_weights(layer: int, multiple_of: int) -> None:
    tower = make_clip().model.text
    peer = TextTransformer(width=48, heads=2, layers=3, output_dim=16)
    load_text(peer, tower)
    texts = captions(LENGTHS)
    with torch.no_grad():
        found = text_tokens(tower, PackedText.pack(texts, multiple_of), layer)
        (expected,) = peer.forward_intermediates(padded(texts, 77), indices=[layer], output_fmt="NLC")[
            "text_intermediates"
        ]
    assert found.mask.sum(1).tolist() == LENGTHS
    assert found.features.shape == (len(LENGTHS), 77, 48)
    for ours, theirs, length in zip(found.features, expected, LENGTHS, strict=True):
        assert (ours[:length] - theirs[:length]).abs().max() < 1e-5
        assert not ours[length:].any()


@pytest.mark.parametrize("kind", ["vit", "dinov3", "eva02", "convnext", "clip_resnet"])
def test_patches_of_a_timm_tower_are_timms_own(kind: str) -> None:
    model = shared(kind)
    images, peer = images_of(model), bare(model)
    with torch.no_grad():
        found = image_tokens(model.image, images, -2, prefix_tokens=False)
        (maps,) = peer.forward_intermediates(images, indices=[-2], intermediates_only=True)
        assert torch.equal(found, maps.flatten(2).transpose(1, 2))  # the same operations, so the same bits
        everything = image_tokens(model.image, images, -2, prefix_tokens=True)
    prefix = {"vit": 1, "dinov3": 5, "eva02": 1}.get(kind, 0)
    assert everything.shape[1] == prefix + found.shape[1]
    assert torch.equal(everything[:, prefix:], found)


def test_the_last_layer_leads_to_the_towers_feature() -> None:
    clip = make_clip(KINDS["EVA-02"])
    images, text = noise(2, 3, 32, 32), PackedText.pack(captions([4, 9]))
    model = clip.model
    assert isinstance(model.image, ImageTower)
    assert isinstance(model.text, TextTower)
    seen = clip.image_tokens(images, -1, prefix_tokens=True)
    assert torch.allclose(model.image.head(model.image.norm(seen[:, 0])), clip.encode_image(images), atol=1e-6)
    words, mask = clip.text_tokens(text, -1)
    ends = words[torch.arange(2), mask.sum(1) - 1]
    assert torch.allclose(model.text.norm(ends) @ model.text.projection, clip.encode_text(text), atol=1e-6)


def test_blocks_behind_the_layer_are_not_computed() -> None:
    clip = make_clip()
    assert isinstance(clip.model.image, ImageTower)
    for tower in (clip.model.image, clip.model.text):
        tower.blocks[2] = nn.Identity()  # would fail: it takes one argument
    assert clip.image_tokens(noise(1, 3, 32, 32)).shape == (1, 16, 32)
    assert clip.text_tokens(PackedText.pack(captions([4, 9]))).features.shape == (2, 9, 48)


def test_gradients_flow_to_the_pixels_and_the_embedding() -> None:
    clip = make_clip()
    images = noise(1, 3, 32, 32).requires_grad_()
    (clip.image_tokens(images).sum() + clip.text_tokens(PackedText.pack(captions([4, 9]))).features.sum()).backward()
    assert images.grad is not None
    assert images.grad.any()
    assert clip.model.text.token_embedding.weight.grad is not None


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    clip = make_clip()
    with pytest.raises(ValueError, match=rf"layer {layer} is not in -3\.\.2; the tower has 3"):
        clip.image_tokens(noise(1, 3, 32, 32), layer)
    with pytest.raises(ValueError, match=rf"layer {layer} is not in -3\.\.2"):
        clip.text_tokens(PackedText.pack(captions([4])), layer)
    with pytest.raises(ValueError, match=r"layer 99 is not in"):
        image_tokens(shared("vit").image, images_of(shared("vit")), 99, prefix_tokens=False)


def test_a_timm_tower_without_layers_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared("vit")
    monkeypatch.delattr(type(model.image.trunk), "forward_intermediates")
    with pytest.raises(ConfigError, match=r"model test_vit: timm gives no features of its layers .*; choose a model"):
        image_tokens(model.image, images_of(model), -1, prefix_tokens=False)
