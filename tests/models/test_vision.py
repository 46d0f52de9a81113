from __future__ import annotations

import pytest
import timm
import torch
from peers import gradients, largest_relative_difference, load_image, noise, shake, timm_eva, timm_tensors, weights
from torch import Tensor

from evaclip.config import ImageTowerConfig, ModelConfig
from evaclip.models.clip import create_model
from evaclip.models.token_drop import drop_path_scales, kept_patches
from evaclip.models.vision import ImageTower

EVA02 = {"mlp": "swiglu", "sub_norm": True, "rope": True}
SMALL = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 3, "heads": 2, "mlp_width": 48}
TEXT = {"width": 16, "depth": 1, "heads": 1, "mlp_width": 16}


def make_tower(embed_dim: int = 24, **options: object) -> ImageTower:
    config = ModelConfig.model_validate({"embed_dim": embed_dim, "image": options, "text": TEXT})
    tower = create_model(config).image
    shake(tower)
    return tower


def pixels(batch: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)


def normalised(images: Tensor, config: ImageTowerConfig) -> Tensor:
    mean, std = (torch.tensor(colour)[:, None, None] for colour in (config.mean, config.std))
    return (images.float() / 255 - mean) / std


KINDS = {
    "EVA-01-B (layer scale)": {**SMALL, "layer_scale": 0.1},
    "EVA-01-g (heads of 88)": {**SMALL, "width": 176, "mlp_width": 200},
    "bigE (post-norm)": {**SMALL, "post_norm": True},
    "EVA-02": {**SMALL, **EVA02},
    "EVA-02 (odd hidden width)": {**SMALL, **EVA02, "mlp_width": 43},
    "EVA-02 (24 x 24 patches)": {**SMALL, **EVA02, "depth": 1, "image_size": 96, "patch_size": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_gradients_equal_timms_for_the_same_weights(kind: str) -> None:
    tower = make_tower(**KINDS[kind])
    peer = timm_eva(tower.config, embed_dim=24)
    load_image(peer, tower)
    images = noise(3, 3, tower.config.image_size, tower.config.image_size)
    ours, theirs = tower(images), peer(images)
    direction = noise(*ours.shape, seed=1)
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()

    assert (ours - theirs).abs().max() < 1e-5
    # Sums over samples, tokens and layers in another order: some hundred roundings of 6e-8.
    worst = largest_relative_difference(timm_tensors(gradients(tower), tower), gradients(peer))
    assert worst[0] < 2e-5, worst


def test_a_block_of_base_width_equals_timms_within_1e_5() -> None:
    shape = {"mlp_width": 2048, "depth": 2, **EVA02}
    tower = make_tower(embed_dim=512, **shape)
    peer = timm.create_model("eva02_base_patch16_clip_224", pretrained=False, depth=2, num_classes=512)
    load_image(peer, tower)
    x = noise(2, 197, 768)
    assert tower.rope is not None
    with torch.no_grad():
        for ours, theirs in zip(tower.blocks, peer.blocks, strict=True):
            difference = ours(x, tower.rope.value[:, None], None) - theirs(x, rope=peer.rope.get_embed())
            assert difference.abs().max() < 1e-5
        images = noise(2, 3, 224, 224)
        assert (tower(images) - peer(images)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["bigE (post-norm)", "EVA-02"])
def test_dropping_patches_equals_the_peers_computation_on_the_kept_ones(kind: str) -> None:
    tower = make_tower(**KINDS[kind], token_drop=0.5)
    peer = timm_eva(tower.config, embed_dim=24)
    load_image(peer, tower)
    images, seeds = noise(3, 3, 32, 32), torch.tensor([3, 1 << 62, 7])
    kept = kept_patches(seeds, 16, 8)

    x, rope = peer._pos_embed(peer.patch_embed(images))
    rows = torch.cat([torch.zeros(3, 1, dtype=torch.int64), 1 + kept], dim=1)
    x = x[torch.arange(3)[:, None], rows]
    rope = None if rope is None else rope[kept][:, None]  # timm: (batch, 1, kept, sine and cosine)
    for block in peer.blocks:
        x = block(x, rope=rope)
    theirs = peer.head(peer.norm(x)[:, 0])

    ours = tower(images, seeds)
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - tower(images)).abs().max() > 1e-2, "dropping patches must change features"


def test_gradients_flow_through_dropped_patches_as_through_the_gather() -> None:
    tower = make_tower(**SMALL, **EVA02, token_drop=0.75)
    images = noise(2, 3, 32, 32).requires_grad_()
    seeds = torch.tensor([5, 6])
    tower(images, seeds).sum().backward()
    assert images.grad is not None
    touched = images.grad.unflatten(3, (4, 8)).unflatten(2, (4, 8)).abs().sum(dim=(1, 3, 5)).flatten(1) > 0
    assert [row.nonzero().flatten().tolist() for row in touched] == kept_patches(seeds, 16, 4).tolist()
    positions = tower.position_embedding.grad
    assert positions is not None
    used = positions.abs().sum(dim=1).nonzero().flatten().tolist()
    assert used == sorted({0, *(1 + kept_patches(seeds, 16, 4)).flatten().tolist()})


def test_a_sample_with_seed_has_the_same_features_in_any_batch() -> None:
    tower = make_tower(**SMALL, **EVA02, token_drop=0.5, drop_path=0.5)
    images, seeds = pixels(6, 32), torch.arange(6) * 1_000_003
    together = tower(images, seeds)
    apart = torch.cat([tower(images[i : i + 1], seeds[i : i + 1]) for i in (4, 2)])
    assert torch.allclose(together[[4, 2]], apart, atol=1e-6)  # matrix products of other sizes round differently


def test_without_seeds_nothing_is_dropped_in_training_mode_either() -> None:
    tower = make_tower(**SMALL, **EVA02, token_drop=0.5, drop_path=0.5)
    plain = make_tower(**SMALL, **EVA02)
    plain.load_state_dict(tower.state_dict())
    images = pixels(2, 32)
    assert torch.equal(tower.train()(images), plain.eval()(images))
    assert torch.equal(tower(images), tower(images))


def test_seeds_change_nothing_where_nothing_is_dropped() -> None:
    tower = make_tower(**SMALL, **EVA02)
    images = pixels(2, 32)
    assert torch.equal(tower(images), tower(images, torch.tensor([1, 2])))


@pytest.mark.parametrize("kind", ["EVA-01-B (layer scale)", "bigE (post-norm)", "EVA-02"])
def test_drop_path_skips_or_enlarges_whole_branches(kind: str) -> None:
    tower = make_tower(**KINDS[kind], drop_path=0.6)
    images, seeds = pixels(8, 32), torch.arange(8)
    scales = drop_path_scales(seeds, torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64))
    expected = []
    for sample in range(8):  # the same blocks, a branch at a time
        x = tower.embed(images[sample : sample + 1])
        rope = tower.rotations()
        for block, (first, second) in zip(tower.blocks, scales[:, :, sample], strict=True):
            once = block(x, rope, torch.tensor([[1.0], [0.0]]))
            x = x + first * (once - x)
            both = block(x, rope, torch.tensor([[0.0], [1.0]]))
            x = x + second * (both - x)
        expected.append(tower.head(tower.norm(x[:, 0])))
    assert (scales == 0).any()
    assert torch.allclose(tower(images, seeds), torch.cat(expected), atol=1e-5)


def test_a_skipped_branch_leaves_its_input_and_gets_no_gradient() -> None:
    tower = make_tower(**SMALL, **EVA02)
    x = noise(2, 17, 32)
    block, rope = tower.blocks[0], tower.rotations()
    out = block(x, rope, torch.tensor([[0.0, 0.0], [0.0, 0.0]]))
    out.sum().backward()
    assert torch.equal(out, x)
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients(block).values())


@pytest.mark.parametrize("token_drop", [0.0, 0.5])
def test_uint8_pixels_and_normalised_floats_give_the_same_features(token_drop: float) -> None:
    tower = make_tower(**SMALL, **EVA02, token_drop=token_drop)
    images, seeds = pixels(2, 32), torch.tensor([1, 2])
    # One multiply-add instead of a division, a difference and a division: a few roundings of pixels around 1.
    assert torch.allclose(tower(images, seeds), tower(normalised(images, tower.config), seeds), atol=1e-5)


def test_images_of_another_size_or_dtype_are_refused() -> None:
    tower = make_tower(**SMALL)
    with pytest.raises(ValueError, match=r"shape \[2, 3, 32, 40\]; this tower takes \[batch, 3, 32, 32\]"):
        tower(torch.zeros(2, 3, 32, 40))
    with pytest.raises(ValueError, match=r"images are torch.int64; give uint8 pixels, or floats"):
        tower(torch.zeros(2, 3, 32, 32, dtype=torch.int64))


def test_weights_of_16_bits_leave_rotations_and_pixel_statistics_in_fp32() -> None:
    tower = make_tower(**SMALL, **EVA02, token_drop=0.5, drop_path=0.5)
    images, seeds = pixels(2, 32), torch.tensor([1, 2])
    exact, rope, statistics = tower(images, seeds), tower.rope.value, tower.pixels.value
    tower.to(torch.bfloat16)
    out = tower(images, seeds)
    assert out.dtype == torch.bfloat16
    assert torch.equal(tower.rope.value, rope)
    assert torch.equal(tower.pixels.value, statistics)
    assert torch.nn.functional.cosine_similarity(out.float(), exact).min() > 0.999  # 8 bits, 3 blocks


def test_state_holds_parameters_alone() -> None:
    tower = make_tower(**SMALL, **EVA02, drop_path=0.5)
    assert tower.state_dict().keys() == weights(tower).keys()
