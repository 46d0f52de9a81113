from __future__ import annotations

import math

import pytest
import torch
from peers import noise
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat

from evaclip.models.rope import rotate, rotation_table


@pytest.mark.parametrize("grid", [14, 16, 24])
def test_table_equals_timms(grid: int) -> None:
    peer = RotaryEmbeddingCat(dim=64, in_pixels=False, feat_shape=(grid, grid), ref_feat_shape=(16, 16))
    sine, cosine = peer.get_embed().chunk(2, dim=-1)
    table = rotation_table(grid, 64)
    # timm computes angles up to 16 in fp32, whose spacing there is 1e-6.
    assert torch.allclose(table[0, 1:], cosine, atol=2e-6)
    assert torch.allclose(table[1, 1:], sine, atol=2e-6)


def test_class_token_does_not_turn() -> None:
    table = rotation_table(4, 8)
    assert table.shape == (2, 17, 8)
    x = noise(2, 17, 3, 8)
    assert torch.equal(rotate(x, table[:, None])[:, 0], x[:, 0])


def test_pairs_turn_as_complex_numbers_rows_first() -> None:
    head_dim, grid = 8, 4
    x = noise(1, 17, 1, head_dim, dtype=torch.float64)
    table = rotation_table(grid, head_dim).double()
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    for patch in range(grid**2):
        row, column = divmod(patch, grid)
        angles = [place / grid * 16 * 10_000 ** (-2 * i / 4) for place in (row, column) for i in range(2)]
        turned = pairs[0, 1 + patch, 0] * torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles])
        expected = torch.view_as_real(turned).flatten()
        assert torch.allclose(rotate(x, table[:, None])[0, 1 + patch, 0], expected, atol=1e-6)  # the table is fp32


def test_scores_depend_on_distance_alone() -> None:
    table = rotation_table(4, 8)[:, None].double()
    q, k = (noise(1, 1, 1, 8, seed=seed, dtype=torch.float64).expand(1, 17, 1, 8) for seed in (0, 1))
    scores = torch.einsum("bqhd,bkhd->qk", rotate(q, table), rotate(k, table))[1:, 1:].reshape(4, 4, 4, 4)
    assert torch.allclose(scores[0, 0, 1, 2], scores[2, 1, 3, 3], atol=1e-6)
    assert not torch.allclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1], atol=1e-3)


def test_half_precision_is_rotated_in_fp32_and_returned_in_half() -> None:
    x, table = noise(1, 17, 2, 8).bfloat16(), rotation_table(4, 8)[:, None]
    out = rotate(x, table)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rotate(x.float(), table).bfloat16())


def test_queries_and_keys_together_turn_as_apart() -> None:
    table = rotation_table(4, 8)[:, None].expand(2, 3, 17, 8)
    qk = noise(3, 17, 2, 5, 8)
    apart = torch.stack([rotate(part, table) for part in qk.unbind(2)], dim=2)
    assert torch.equal(rotate(qk, table), apart)
