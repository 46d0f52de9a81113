"""Multinomial logistic regression with an L2 penalty, by L-BFGS in fp64, over samples that lie on many ranks.

The objective is that of scikit-learn's ``LogisticRegression(C=1 / l2)``: the sum of the samples' cross-entropies plus
``l2 / 2`` times the sum of squared weights; the biases are free.

Every rank keeps its own samples, and the main rank walks: where it stands is told to all in one sum of
``classes * (dim + 1)`` numbers, and loss and gradient there are another one. The others follow it instead of walking
themselves, because two machines whose roundings differ would ask for unequal numbers of sums, and wait for each other.
On one rank sums are the identity.

L-BFGS needs several times fewer steps where the objective is as steep in one direction as in another. So it walks in
coordinates in which the Hessian where it starts is about the identity, which changes nothing of the minimum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.linalg import solve_triangular

from evaclip.distributed import Ranks
from evaclip.heartbeat import beat

_NUMBERS = 1 << 22  # of the samples and scores that are looked at together: 32 MiB
_MOST_ITERATIONS = 1000  # as arXiv:2103.00020, A.3
_LEAST_GAIN = 1e-12  # nats per sample; a step that gains less is the last one
_SURVEYED = 8  # samples per feature by which the Hessian is guessed


def fit(
    features: Float[Tensor, "samples dim"],
    targets: Int[Tensor, " samples"],
    l2: float,
    start: Float[Tensor, "classes weights"],
    ranks: Ranks,
) -> Float[Tensor, "classes weights"]:
    """The model of least objective, equal on all ranks, which all must call this.

    Args:
        features: Of this rank's samples, none of which another rank has.
        targets: Classes of these.
        l2: The penalty, above 0.
        start: Where to begin, in fp64, equal on all ranks: a model for another penalty, or zeros. The last column of a
            model is the bias.
        ranks: The peers.
    """
    model = start.clone()
    count = float(ranks.sum(start.new_tensor(float(len(targets)))))
    if not ranks.is_main:
        while _follow(model, ranks, more=False):
            _objective(model, features, targets, l2, ranks)
        return model
    curvature = _curvature(start, features[:: max(1, len(features) // (_SURVEYED * features.shape[1]))], count)
    root = torch.linalg.cholesky(curvature + l2 * torch.eye(len(curvature), dtype=start.dtype, device=start.device))
    position = torch.nn.Parameter(start @ root)

    def closure() -> Tensor:
        with torch.no_grad():
            model.copy_(solve_triangular(root, position, upper=False, left=False))
            _follow(model, ranks, more=True)
            loss, gradient = _objective(model, features, targets, l2, ranks)
            position.grad = solve_triangular(root.T, gradient, upper=True, left=False).contiguous()
        return loss

    optimizer = torch.optim.LBFGS(
        [position],
        max_iter=_MOST_ITERATIONS,
        tolerance_grad=0,
        tolerance_change=_LEAST_GAIN * count,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)
    model.copy_(solve_triangular(root, position.detach(), upper=False, left=False))
    _follow(model, ranks, more=False)
    return model


def _follow(model: Tensor, ranks: Ranks, *, more: bool) -> bool:
    """Bring every rank's model to where the main rank's is; whether that one has ``more`` to ask."""
    told = F.pad(model.flatten(), (1, 0), value=float(more))
    ranks.sum(told if ranks.is_main else told.zero_())
    model.copy_(told[1:].view_as(model))
    return bool(told[0])


def _objective(model: Tensor, features: Tensor, targets: Tensor, l2: float, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Value and gradient, over all ranks."""
    beat("evaluation")
    total = model.new_zeros(1 + model.numel())
    gradient = total[1:].view_as(model)
    for some, given in zip(in_parts(features, model), in_parts(targets, model), strict=True):
        rows, right = _with_ones(some), given[:, None]
        found = rows @ model.T
        norm = found.logsumexp(1, keepdim=True)
        total[0] += (norm - found.gather(1, right)).sum()
        residual = (found - norm).exp_()
        residual.scatter_add_(1, right, residual.new_tensor(-1.0).expand(right.shape))
        gradient.addmm_(residual.T, rows)
    ranks.sum(total)
    total[0] += l2 / 2 * model[:, :-1].square().sum()
    gradient[:, :-1] += l2 * model[:, :-1]
    return total[0], gradient


def _curvature(model: Tensor, features: Tensor, count: float) -> Float[Tensor, "weights weights"]:
    """About the Hessian of a class's weights, the mean over classes: of these samples, as if there were ``count``."""
    rows = _with_ones(features)
    shares = (rows @ model.T).softmax(1)
    weights = (shares * (1 - shares)).mean(1, keepdim=True)
    return rows.T @ (weights * rows) * (count / max(1, len(rows)))


def scores(
    model: Float[Tensor, "classes weights"], features: Float[Tensor, "samples dim"]
) -> Float[Tensor, "samples classes"]:
    """What a model says of samples, in fp64; the softmax of it are probabilities."""
    return _with_ones(features) @ model.T


def in_parts(samples: Tensor, model: Tensor) -> Iterator[Tensor]:
    """Consecutive samples, so many at a time that their features and scores in fp64 take little memory."""
    return iter(samples.split(max(1, _NUMBERS // sum(model.shape))))


def _with_ones(features: Tensor) -> Tensor:
    """In fp64, with a feature for the bias."""
    return F.pad(features.double(), (0, 1), value=1.0)
