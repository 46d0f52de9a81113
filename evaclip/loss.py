"""The contrastive loss: value and gradients over the global batch, without ever storing the logits.

``info_nce`` is a plain function of features; its gradients come back as tensors, so that the towers' backward can run
later and in parts. ``ContrastiveLoss`` adds the temperature, the one parameter that belongs to the loss.

Communication per step, with W ranks of b samples and D channels, B = W b: text features are gathered (b D numbers sent
by each rank), their gradients come back by reduce-scatter, and four vectors of B or fewer numbers are all-reduced:
column maxima, column sums, scale gradient with the loss, and the count of correct columns. On one rank nothing is sent.
A ring exchange would replace the gather where B x D numbers no longer fit beside the towers.
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

_TILE_NUMBERS = 1 << 22  # of one tile of logits: 16 MiB in fp32


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
    sweep over tiles of rows forms both log-sum-exps, a second one forms the tiles again for
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
    diagonal = scale * (image * text).sum(1)

    row_lse, row_max, column_max = image.new_empty(batch), image.new_empty(batch), image.new_full((total,), -math.inf)
    column_sum = image.new_zeros(total)
    for rows, logits in _tiles(image, all_text, scale):
        row_max[rows] = logits.amax(1)
        row_lse[rows] = logits.logsumexp(1)
        maximum = torch.maximum(column_max, logits.amax(0))
        column_sum = column_sum * (column_max - maximum).exp() + (logits - maximum).exp().sum(0)
        column_max = maximum
    maximum = ranks.max(column_max.clone())
    column_lse = maximum + ranks.sum(column_sum * (column_max - maximum).exp()).log()

    own = slice(first, first + batch)
    image_grad, all_text_grad = torch.empty_like(image), torch.zeros_like(all_text)
    scale_grad = image.new_zeros(())
    correct_rows = correct_columns = image.new_zeros(())
    for rows, logits in _tiles(image, all_text, scale):
        grad = (logits - row_lse[rows, None]).exp_() + (logits - column_lse).exp_()
        places = torch.arange(first + rows.start, first + rows.stop, device=image.device)
        matched = logits.gather(1, places[:, None])[:, 0]
        correct_rows = correct_rows + (matched >= row_max[rows]).sum()
        correct_columns = correct_columns + (matched >= maximum[places]).sum()
        grad.scatter_add_(1, places[:, None], grad.new_full((len(places), 1), -2.0))
        grad /= 2 * total
        scale_grad = scale_grad + (grad * logits).sum()
        image_grad[rows] = scale * grad @ all_text
        all_text_grad.addmm_(grad.T, image[rows])
    text_grad = scale * ranks.sum_own_rows(all_text_grad)

    loss = (row_lse + column_lse[own] - 2 * diagonal).sum() / (2 * total)
    sums = ranks.sum(torch.stack([loss, scale_grad, correct_rows / total, correct_columns / total]))
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

    image_grad, all_text_grad = torch.empty_like(image), torch.zeros_like(all_text)
    matched, row_max, column_max = image.new_empty(batch), image.new_empty(batch), image.new_full((total,), -math.inf)
    loss, scale_grad, bias_grad = torch.zeros(3, dtype=torch.float64, device=image.device)
    for rows, logits in _tiles(image, all_text, scale):
        places = torch.arange(first + rows.start, first + rows.stop, device=image.device)[:, None]
        matched[rows], row_max[rows] = logits.gather(1, places)[:, 0], logits.amax(1)
        column_max = torch.maximum(column_max, logits.amax(0))
        signed = (logits + bias).scatter_(1, places, -(matched[rows, None] + bias))  # -y z
        loss = loss + F.softplus(signed).sum(1).double().sum()
        grad = signed.sigmoid_()
        grad.scatter_(1, places, -grad.gather(1, places))
        grad /= total
        scale_grad, bias_grad = (
            scale_grad + (grad * logits).sum(1).double().sum(),
            bias_grad + grad.sum(1).double().sum(),
        )
        image_grad[rows] = scale * grad @ all_text
        all_text_grad.addmm_(grad.T, image[rows])
    text_grad = scale * ranks.sum_own_rows(all_text_grad)

    column_max = ranks.max(column_max)[first : first + batch]
    correct = torch.stack([(matched >= row_max).sum(), (matched >= column_max).sum()])
    sums = ranks.sum(torch.cat([torch.stack([loss / total, scale_grad, bias_grad]), correct / total])).to(image.dtype)
    return LossOutput(sums[0], image_grad, text_grad, *sums[1:], finite=_finite(image, text))


def _finite(image: Float[Tensor, "batch dim"], text: Float[Tensor, "batch dim"]) -> Bool[Tensor, " batch"]:
    return image.isfinite().all(1) & text.isfinite().all(1)


def _tiles(
    image: Float[Tensor, "batch dim"], text: Float[Tensor, "total dim"], scale: Float[Tensor, ""]
) -> Iterator[tuple[slice, Float[Tensor, "rows total"]]]:
    """Rows of logits, a bounded number of them at a time."""
    rows = max(1, _TILE_NUMBERS // len(text))
    for start in range(0, len(image), rows):
        tile = slice(start, min(start + rows, len(image)))
        yield tile, scale * (image[tile] @ text.T)


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
