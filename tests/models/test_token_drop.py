from __future__ import annotations

import pytest
import torch

from evaclip.data import order
from evaclip.models import token_drop
from evaclip.models.token_drop import drop_path_scales, hash64, kept_patches

SEEDS = torch.tensor([0, 1, 2, 12345, (1 << 62) + 17, (1 << 63) - 1, -1, -(1 << 63)])


def test_hash_has_the_bits_of_the_one_for_plain_integers() -> None:
    for word in (0, 5, 1 << 40):
        expected = [order.hash64(seed, word, 7) for seed in SEEDS.tolist()]
        assert [value % (1 << 64) for value in hash64(SEEDS, word, torch.tensor(7)).tolist()] == expected


@pytest.mark.parametrize(("num_patches", "keep"), [(196, 98), (256, 128), (64, 32), (1, 1), (5, 5), (577, 1)])
def test_kept_patches_are_as_many_as_asked_ascending_and_distinct(num_patches: int, keep: int) -> None:
    kept = kept_patches(SEEDS, num_patches, keep)
    assert kept.shape == (len(SEEDS), keep)
    assert kept.dtype == torch.int64
    assert kept.min() >= 0
    assert kept.max() < num_patches
    assert (kept.diff(dim=1) > 0).all()


def test_kept_patches_are_those_with_the_smallest_numbers() -> None:
    def number(seed: int, patch: int) -> int:
        unsigned = order.hash64(seed, 0x70617463, patch) & ~0xFF | patch
        return unsigned - (1 << 64) if unsigned >> 63 else unsigned

    for seed, kept in zip(SEEDS.tolist(), kept_patches(SEEDS, 196, 50).tolist(), strict=True):
        assert kept == sorted(sorted(range(196), key=lambda patch: number(seed, patch))[:50])


def test_kept_patches_of_a_seed_do_not_depend_on_the_batch() -> None:
    alone = torch.cat([kept_patches(SEEDS[i : i + 1], 196, 98) for i in range(len(SEEDS))])
    assert torch.equal(kept_patches(SEEDS, 196, 98), alone)
    assert torch.equal(kept_patches(SEEDS.flip(0), 196, 98).flip(0), alone)


def test_every_patch_is_kept_equally_often_and_independently_of_its_neighbour() -> None:
    samples = 20_000
    kept = kept_patches(torch.arange(samples), 64, 16)
    mask = torch.zeros(samples, 64).scatter_(1, kept, 1.0)
    # Kept with p = 1/4: the mean of 20,000 has a deviation of 0.0031; five deviations over 64 patches.
    assert (mask.mean(dim=0) - 0.25).abs().max() < 0.0155
    both = (mask[:, :-1] * mask[:, 1:]).mean(dim=0)
    assert (both - 16 * 15 / (64 * 63)).abs().max() < 0.0120  # five deviations of 0.0024


@pytest.mark.usefixtures("unchecked_shapes")
def test_kept_patches_compile_to_the_same() -> None:
    compiled = torch.compile(token_drop.kept_patches, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(SEEDS, 196, 98), kept_patches(SEEDS, 196, 98))


def test_drop_path_scales_are_zero_or_keep_the_mean() -> None:
    probabilities = torch.tensor([0.0, 0.25, 0.8], dtype=torch.float64)
    scales = drop_path_scales(torch.arange(40_000), probabilities)
    assert scales.shape == (3, 2, 40_000)
    assert scales.dtype == torch.float32
    for layer, probability in enumerate([0.0, 0.25, 0.8]):
        kept = torch.tensor(1 / (1 - probability))
        assert scales[layer].unique().tolist() == ([1.0] if probability == 0 else [0.0, float(kept)])
        # A mean of 40,000 draws of variance p / (1 - p), at most 4: five deviations of 0.01.
        assert (scales[layer].mean(dim=1) - 1).abs().max() < 0.05


def test_branches_of_all_blocks_are_skipped_independently() -> None:
    skipped = (drop_path_scales(torch.arange(20_000), torch.full((4,), 0.5, dtype=torch.float64)) == 0).double()
    correlation = torch.corrcoef(skipped.flatten(0, 1))
    assert (correlation - torch.eye(8)).abs().max() < 0.036  # five deviations of 1 / sqrt(20,000)


def test_drop_path_of_a_seed_does_not_depend_on_the_batch() -> None:
    probabilities = torch.linspace(0, 0.9, 5, dtype=torch.float64)
    alone = torch.cat([drop_path_scales(SEEDS[i : i + 1], probabilities) for i in range(len(SEEDS))], dim=-1)
    assert torch.equal(drop_path_scales(SEEDS, probabilities), alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cpu_and_gpu_drop_the_same() -> None:
    seeds = torch.cat([SEEDS, torch.arange(4096) * 0x9E3779B97F4A7]).cuda()
    probabilities = torch.linspace(0, 0.9, 5, dtype=torch.float64)
    assert torch.equal(kept_patches(seeds, 196, 98).cpu(), kept_patches(seeds.cpu(), 196, 98))
    assert torch.equal(
        drop_path_scales(seeds, probabilities.cuda()).cpu(), drop_path_scales(seeds.cpu(), probabilities)
    )
