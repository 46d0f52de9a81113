"""Which patches and branches a training sample leaves out: a pure function of the sample's seed.

Nothing here has state: the same seed drops the same things in a replay, on any rank, in any batch, on any device.
Everything runs on the seeds' device without waiting for it, in 64-bit integers, so results are equal to the bit.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_PATCHES, _BRANCHES = 0x70617463, 0x6272616E  # what a hash is drawn for; no other part of a sample uses these words


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit unsigned integer."""
    return word - (1 << 64) if word >> 63 else word


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: ``>>`` alone copies the sign into the free bits."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash64(first: Int[Tensor, "..."], *words: Int[Tensor, "..."] | int) -> Int[Tensor, "..."]:
    """The bits of ``data.order.hash64``, for tensors that broadcast: splitmix64 (doi:10.1145/2714064.2660195)."""
    state = torch.zeros_like(first)
    for word in (first, *words):
        state = state + word + _signed(0x9E3779B97F4A7C15)
        state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
        state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
        state = state ^ _shift_right(state, 31)
    return state


def kept_patches(seeds: Int[Tensor, " batch"], num_patches: int, keep: int) -> Int[Tensor, "batch keep"]:
    """Random patches of each sample (FLIP, arXiv:2212.00794).

    Every patch has a random number, and the smallest ``keep`` win. A number's low bits are those of the patch, so no
    two are equal and the winners need no tie-breaking.

    Args:
        seeds: One per sample, int64.
        num_patches: Patches of an image.
        keep: How many of them stay, at most ``num_patches``.

    Returns:
        Indices into the patches, ascending, int64.
    """
    assert 0 < keep <= num_patches
    low_bits = (1 << (num_patches - 1).bit_length()) - 1
    patches = torch.arange(num_patches, device=seeds.device)
    numbers = hash64(seeds[:, None], _PATCHES, patches) & ~low_bits | patches
    smallest = numbers.topk(keep, dim=1, largest=False, sorted=False).values
    return (smallest & low_bits).sort(dim=1).values


def drop_path_scales(
    seeds: Int[Tensor, " batch"], probabilities: Float[Tensor, " layers"]
) -> Float[Tensor, "layers 2 batch"]:
    """Factors on the two branches of each block (stochastic depth, arXiv:1603.09382).

    Args:
        seeds: One per sample, int64.
        probabilities: With which each block's branches are skipped, fp64, below 1.

    Returns:
        0 for a skipped branch, 1 / (1 - probability) for the others; fp32.
    """
    layers = torch.arange(probabilities.shape[0], device=seeds.device)[:, None, None]
    branches = torch.arange(2, device=seeds.device)[:, None]
    drawn = _shift_right(hash64(seeds, _BRANCHES, layers, branches), 11).double() / (1 << 53)  # uniform in [0, 1)
    skipped = probabilities[:, None, None]
    return ((drawn >= skipped) / (1 - skipped)).float()
