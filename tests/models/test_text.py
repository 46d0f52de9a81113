from __future__ import annotations

import pytest
import torch
from open_clip.transformer import TextTransformer
from peers import (
    captions,
    gradients,
    largest_relative_difference,
    load_text,
    noise,
    open_clip_text_tensors,
    padded,
    shake,
)

from evaclip.config import ModelConfig
from evaclip.data.batch import PackedText
from evaclip.models.attention import use_kernel
from evaclip.models.clip import create_model
from evaclip.models.text import TextTower

LENGTHS = [9, 3, 20, 9, 77, 3, 12]
TEXT = {"width": 48, "depth": 2, "heads": 2, "mlp_width": 192}
IMAGE = {"image_size": 8, "patch_size": 8, "width": 8, "depth": 1, "heads": 1, "mlp_width": 8}


def make_tower(**options: object) -> TextTower:
    config = ModelConfig.model_validate({"embed_dim": 16, "image": IMAGE, "text": {**TEXT, **options}})
    tower = create_model(config).text
    shake(tower)
    return tower


@pytest.mark.parametrize("multiple_of", [1, 64])
def test_features_and_gradients_equal_open_clips_on_padded_captions(multiple_of: int) -> None:
    tower = make_tower()
    peer = TextTransformer(width=48, heads=2, layers=2, output_dim=16)
    load_text(peer, tower)
    texts = captions(LENGTHS)
    ours, theirs = tower(PackedText.pack(texts, multiple_of)), peer(padded(texts, 77))
    direction = noise(*ours.shape)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()

    assert (ours - theirs).abs().max() < 1e-5
    # Sums over captions and tokens in another order: some hundred roundings of 6e-8.
    worst = largest_relative_difference(open_clip_text_tensors(gradients(tower)), gradients(peer))
    assert worst[0] < 2e-5, worst


def test_packed_features_equal_each_caption_alone() -> None:
    tower = make_tower()
    texts = captions(LENGTHS)
    alone = torch.cat([tower(PackedText.pack([text])) for text in texts])
    assert torch.allclose(tower(PackedText.pack(texts)), alone, atol=1e-6)
    with use_kernel("reference"):
        assert torch.allclose(tower(PackedText.pack(texts, 32)), alone, atol=1e-5)


def test_features_follow_the_captions_order() -> None:
    tower = make_tower()
    texts = captions(LENGTHS)
    forwards, backwards = tower(PackedText.pack(texts)), tower(PackedText.pack(texts[::-1]))
    assert torch.allclose(forwards, backwards.flip(0), atol=1e-6)
    assert (forwards[0] - forwards[1]).abs().max() > 1e-2


@pytest.mark.parametrize("multiple_of", [8, 256])
def test_padding_changes_neither_features_nor_gradients(multiple_of: int) -> None:
    tower = make_tower()
    texts = captions([5, 9, 5])
    plain = tower(PackedText.pack(texts))
    plain.square().sum().backward()
    expected = {name: gradient.clone() for name, gradient in gradients(tower).items()}
    tower.zero_grad()
    filled = tower(PackedText.pack(texts, multiple_of))
    filled.square().sum().backward()
    assert torch.allclose(filled, plain, atol=1e-6)
    worst = largest_relative_difference(gradients(tower), expected)
    assert worst[0] < 1e-5, worst  # matrix products of other sizes round differently
    gradient = tower.token_embedding.weight.grad
    assert gradient is not None
    assert float(gradient[0].abs().max()) == 0, "the padding's id 0 occurs in no caption"


def test_a_caption_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="a caption has 12 tokens, more than the context of 10; cut it"):
        make_tower(context_length=10)(PackedText.pack(captions([4, 12])))


def test_padding_longer_than_the_context_is_no_error() -> None:
    assert make_tower(context_length=10)(PackedText.pack(captions([4, 10]), 64)).isfinite().all()
