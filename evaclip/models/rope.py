"""Rotary position embedding on the patch grid: rows turn one half of a head's channels, columns the other.

RoFormer (arXiv:2104.09864) in the axial form of EVA-02 (arXiv:2303.11331): channels rotate in neighbouring pairs, and
the grid is stretched to 16 positions a side whatever its size. This module knows grids and angles, no tokens to drop.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_THETA = 10_000.0
_STRETCHED_GRID = 16
"""Side of the grid at which EVA-02 was pre-trained: positions of any grid are interpolated into it."""


def rotation_table(grid: int, head_dim: int) -> Float[Tensor, "2 tokens head_dim"]:
    """Cosines and sines of the class token, which does not turn, and of the patches row by row.

    Args:
        grid: Patches along one side.
        head_dim: Channels of a head, a multiple of 4.

    Returns:
        fp32 on the CPU, computed in fp64: [0] cosines, [1] sines, for 1 + grid * grid tokens.
    """
    half = head_dim // 2
    frequencies = _THETA ** (-torch.arange(0, half, 2, dtype=torch.float64, device="cpu") / half)
    positions = torch.arange(grid, dtype=torch.float64, device="cpu") / grid * _STRETCHED_GRID
    angles = torch.outer(positions, frequencies).repeat_interleave(2, dim=1)  # (grid, half): both of a pair turn alike
    rows = angles[:, None].expand(grid, grid, half)
    columns = angles[None, :].expand(grid, grid, half)
    patches = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    tokens = torch.cat([torch.zeros(1, head_dim, dtype=torch.float64, device="cpu"), patches])
    return torch.stack([tokens.cos(), tokens.sin()]).float()


def rotate(
    x: Float[Tensor, "batch tokens *heads head_dim"], table: Float[Tensor, "2 rows tokens head_dim"]
) -> Float[Tensor, "batch tokens *heads head_dim"]:
    """Turn each pair of channels (a, b) by its angle: (a cos - b sin, b cos + a sin).

    Args:
        x: Queries and keys of any number of heads.
        table: Rotations of each sample's tokens, or one row for all samples.

    Returns:
        Computed in the wider dtype of the two, returned in that of ``x``.
    """
    rows, tokens, head_dim = table.shape[1:]
    cosine, sine = table.view(2, rows, tokens, *[1] * (x.ndim - 3), head_dim).unbind()
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (x * cosine + turned * sine).to(x.dtype)
