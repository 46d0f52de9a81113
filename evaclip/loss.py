"""The contrastive loss: value and gradients over the global batch, without ever storing the logits.

``info_nce`` is a plain function of features; its gradients come back as tensors, so that the towers' backward can run
later and in parts. ``ContrastiveLoss`` adds the temperature, the one parameter that belongs to the loss.

Communication per step, with W ranks of b samples and D channels, B = W b: text features are gathered (b D numbers sent
by each rank), their gradients come back by reduce-scatter, and three vectors of B or fewer numbers are all-reduced:
column maxima, column sums, and loss, scale gradient and counts of what is right together. On one rank nothing is sent.
A ring exchange, instead of ``gather_rows`` and ``sum_own_rows``, would pay where gathered features and
their gradients, 8 B D bytes, no longer fit beside the towers: 0.5 GiB at B = 65,536 and D = 1024, 8 GiB at a million.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from evaclip.config import SigmoidConfig
from evaclip.models.clip import at_least_fp32

if TYPE_CHECKING:
    from evaclip.config import LossConfig
    from evaclip.distributed import Ranks

_TILE_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Of one square tile of logits; there are two. In fp32 8 MiB, near a processor's cache; 256 MiB, few launches."""


class LossOutput(NamedTuple):
    """The loss over the global batch and its gradients; scalars are equal on all ranks."""

    loss: Float[Tensor, ""]
    image_grad: Float[Tensor, "batch dim"]
    """Of this rank's image features."""
    text_grad: Float[Tensor, "batch dim"]
    """Of this rank's text features."""
    scale_grad: Float[Tensor, ""]
    """Of the logarithm of the logit scale."""
    bias_grad: Float[Tensor, ""]
    """Of the summand of the logits; 0 for InfoNCE, which does not have one."""
    image_to_text: Float[Tensor, ""]
    """Share of images whose own caption is nearest; the same caption twice in a batch is right twice."""
    text_to_image: Float[Tensor, ""]
    """Share of captions whose own image is nearest."""
    finite: Bool[Tensor, " batch"]
    """Which of this rank's samples have two finite features; one that has not makes the loss NaN on all ranks."""

    def surrogate(
        self, image: Float[Tensor, "rows dim"], text: Float[Tensor, "rows dim"], rows: slice = slice(None)
    ) -> Float[Tensor, ""]:
        """A scalar whose gradient, added up over ranks and ``rows``, is that of the loss for what made these features.

        Args:
            image: Image features of this rank's samples ``rows``, with graph.
            text: Their text features.
            rows: Which of the rank's samples these are.
        """
        return (image * self.image_grad[rows]).sum() + (text * self.text_grad[rows]).sum()


def info_nce(
    image: Float[Tensor, "batch dim"], text: Float[Tensor, "batch dim"], scale: Float[Tensor, ""], ranks: Ranks
) -> LossOutput:
    """Symmetric InfoNCE (arXiv:2103.00020, figure 3) of normalised features.

    With logits z = scale * image @ text.T and B pairs, loss = sum_i (row_lse_i + column_lse_i - 2 z_ii) / 2B. A first
    sweep over square tiles forms both log-sum-exps, a second one forms the tiles again for
    dz = (exp(z - row_lse) + exp(z - column_lse) - 2 I) / 2B.

    Args:
        image: This rank's image features; 16-bit ones are taken as fp32.
        text: This rank's text features.
        scale: Multiplier of the cosine similarities.
        ranks: The peers; each has equally many samples.
    """
    image, text = at_least_fp32(image.detach()), at_least_fp32(text.detach())
    batch, total = len(image), len(image) * ranks.world_size
    all_text = ranks.gather_rows(text)
    first = ranks.rank * batch  # column of this rank's first pair

    matched, row_max, row_sum = image.new_empty(batch), image.new_full((batch,), -math.inf), image.new_zeros(batch)
    column_max, column_sum = image.new_full((total,), -math.inf), image.new_zeros(total)
    for rows, columns, logits, free in _tiles(image, all_text, scale):
        pairs, diagonal = _pairs(rows, columns, logits, first)
        matched[pairs] = diagonal
        for maxima, sums, at, dim in ((row_max, row_sum, rows, 1), (column_max, column_sum, columns, 0)):
            maximum = torch.maximum(maxima[at], logits.amax(dim))
            added = torch.sub(logits, maximum.unsqueeze(dim), out=free).exp_().sum(dim)
            sums[at] = sums[at] * (maxima[at] - maximum).exp() + added
            maxima[at] = maximum
    row_lse = row_max + row_sum.log()
    maximum = ranks.max(column_max.clone())
    column_lse = maximum + ranks.sum(column_sum * (column_max - maximum).exp()).log()

    image_grad, all_text_grad = torch.zeros_like(image), torch.zeros_like(all_text)
    for rows, columns, logits, free in _tiles(image, all_text, scale):
        torch.sub(logits, column_lse[columns], out=free).exp_()
        grad = logits.sub_(row_lse[rows, None]).exp_().add_(free)
        _pairs(rows, columns, grad, first)[1].sub_(2)
        image_grad[rows].addmm_(grad, all_text[columns])
        all_text_grad[columns].addmm_(grad.T, image[rows])
    image_grad *= scale / (2 * total)
    text_grad = ranks.sum_own_rows(all_text_grad).mul_(scale / (2 * total))
    scale_grad = (image_grad * image).sum()  # sum of dz_ij z_ij

    own = slice(first, first + batch)
    loss = (row_lse + column_lse[own] - 2 * matched).sum() / (2 * total)
    correct = torch.stack([(matched >= row_max).sum(), (matched >= maximum[own]).sum()]) / total
    sums = ranks.sum(torch.cat([torch.stack([loss, scale_grad]), correct]))
    no_bias = torch.zeros_like(sums[1])
    return LossOutput(sums[0], image_grad, text_grad, sums[1], no_bias, sums[2], sums[3], _finite(image, text))


def sigmoid_loss(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    ranks: Ranks,
) -> LossOutput:
    """Pairwise sigmoid loss (SigLIP, arXiv:2303.15343, algorithm 1) of normalised features.

    With z = scale * image @ text.T + bias and y = 1 for pairs, -1 for all others, the loss is the sum of
    log(1 + exp(-y_ij z_ij)) over all i and j, divided by B. No logit depends on another: one sweep over the tiles is
    enough.

    Args:
        image: This rank's image features; 16-bit ones are taken as fp32.
        text: This rank's text features.
        scale: Multiplier of the cosine similarities.
        bias: Summand of the logits.
        ranks: The peers; each has equally many samples.
    """
    image, text = at_least_fp32(image.detach()), at_least_fp32(text.detach())
    batch, total = len(image), len(image) * ranks.world_size
    all_text = ranks.gather_rows(text)
    first = ranks.rank * batch

    image_grad, all_text_grad = torch.zeros_like(image), torch.zeros_like(all_text)
    matched, row_max, column_max = (image.new_full((n,), -math.inf) for n in (batch, batch, total))
    loss, bias_grad = torch.zeros(2, dtype=torch.float64, device=image.device)
    for rows, columns, logits, free in _tiles(image, all_text, scale):
        pairs, diagonal = _pairs(rows, columns, logits, first)
        matched[pairs] = diagonal
        row_max[rows] = torch.maximum(row_max[rows], logits.amax(1))
        column_max[columns] = torch.maximum(column_max[columns], logits.amax(0))
        signed = torch.add(logits, bias, out=free)  # -y z
        _pairs(rows, columns, signed, first)[1].neg_()
        loss = loss + F.softplus(signed).sum(1).double().sum()
        grad = signed.sigmoid_()
        _pairs(rows, columns, grad, first)[1].neg_()
        bias_grad = bias_grad + grad.sum(1).double().sum()
        image_grad[rows].addmm_(grad, all_text[columns])
        all_text_grad[columns].addmm_(grad.T, image[rows])
    image_grad *= scale / total
    text_grad = ranks.sum_own_rows(all_text_grad).mul_(scale / total)
    scale_grad, bias_grad = (image_grad * image).sum(1).double().sum(), bias_grad / total

    column_max = ranks.max(column_max)[first : first + batch]
    correct = torch.stack([(matched >= row_max).sum(), (matched >= column_max).sum()])
    sums = ranks.sum(torch.cat([torch.stack([loss / total, scale_grad, bias_grad]), correct / total])).to(image.dtype)
    return LossOutput(sums[0], image_grad, text_grad, *sums[1:], finite=_finite(image, text))


def _finite(image: Float[Tensor, "batch dim"], text: Float[Tensor, "batch dim"]) -> Bool[Tensor, " batch"]:
    return image.isfinite().all(1) & text.isfinite().all(1)


def _tiles(
    image: Float[Tensor, "batch dim"], text: Float[Tensor, "total dim"], scale: Float[Tensor, ""]
) -> Iterator[tuple[slice, slice, Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]]:
    """Square tiles of logits, each with as much free memory; the next tile overwrites both."""
    side = max(1, math.isqrt(_TILE_NUMBERS[image.device.type]))
    memory = image.new_empty(2, min(side, len(image)) * min(side, len(text)))
    for top in range(0, len(image), side):
        rows = slice(top, min(top + side, len(image)))
        scaled = scale * image[rows]
        for left in range(0, len(text), side):
            columns = slice(left, min(left + side, len(text)))
            shape = rows.stop - top, columns.stop - left
            logits, free = (part[: math.prod(shape)].view(shape) for part in memory)
            yield rows, columns, torch.mm(scaled, text[columns].T, out=logits), free


def _pairs(
    rows: slice, columns: slice, tile: Float[Tensor, "rows columns"], first: int
) -> tuple[slice, Float[Tensor, " pairs"]]:
    """The rows whose pairs lie in a tile, and a view of these; ``first`` is the column of row 0's pair."""
    offset = first + rows.start - columns.start
    begin = max(0, -offset)
    if not -len(tile) < offset < tile.shape[1]:
        return slice(0, 0), tile[:0, 0]
    diagonal = tile.diagonal(offset)
    return slice(rows.start + begin, rows.start + begin + len(diagonal)), diagonal


class Similarity(NamedTuple):
    """From a cosine to a logit: ``scale * cosine + bias``; only the sigmoid loss has a bias."""

    scale: float
    bias: float | None = None


class ContrastiveLoss(nn.Module):
    """A loss with its scalars, fp32, replicated on every rank.

    Attributes:
        logit_scale: Logarithm of the multiplier, shape [1].
        logit_bias: Summand of the sigmoid loss, shape [1]; None for InfoNCE.
    """

    def __init__(self, config: LossConfig, device: torch.device) -> None:
        super().__init__()
        start = torch.full((1,), math.log(config.logit_scale), device=device)
        self.logit_scale = nn.Parameter(start, requires_grad=config.learn_logit_scale)
        self.logit_bias: nn.Parameter | None = None
        if isinstance(config, SigmoidConfig):
            bias = torch.full((1,), config.logit_bias, device=device)
            self.logit_bias = nn.Parameter(bias, requires_grad=config.learn_logit_bias)

    @property
    def similarity(self) -> Similarity:
        """The scalars as numbers; waits for the device."""
        bias = None if self.logit_bias is None else float(self.logit_bias.detach())
        return Similarity(float(self.logit_scale.detach().exp()), bias)

    def forward(self, image: Float[Tensor, "batch dim"], text: Float[Tensor, "batch dim"], ranks: Ranks) -> LossOutput:
        """The loss over the global batch; leaves the gradients of the scalars in their ``grad``."""
        scale = self.logit_scale.detach().exp()[0]
        if self.logit_bias is None:
            output = info_nce(image, text, scale, ranks)
        else:
            output = sigmoid_loss(image, text, scale, self.logit_bias.detach()[0], ranks)
        for parameter, grad in ((self.logit_scale, output.scale_grad), (self.logit_bias, output.bias_grad)):
            if parameter is not None and parameter.requires_grad:
                parameter.grad = grad.reshape(1)
        return output
