"""Linear probe and k-shot: how well a logistic regression on frozen image features tells classes apart.

As arXiv:2103.00020, appendix A.3, with one difference: features are those of the common space, projected and
normalised, as in CLIP_benchmark and OpenAI's published example; the paper takes them before the projection. The penalty
is chosen on images of the training split that are held out. Which images are fitted to, held out or drawn is a function
of the labels in their order and of nothing else; text is never looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, pstdev

import torch
from jaxtyping import Float, Int
from torch import Tensor

from evaclip.config import LinearProbeDataset
from evaclip.data.order import hash64
from evaclip.distributed import Ranks, agreed
from evaclip.errors import DataError
from evaclip.evaluation.accuracy import accuracies, nearest_classes
from evaclip.evaluation.datasets import Records, label_of, open_splits
from evaclip.evaluation.encoding import Bench, in_order, share
from evaclip.evaluation.image_folder import ImageFolder
from evaclip.evaluation.logistic import fit, in_parts, scores
from evaclip.evaluation.results import Predictions, Result
from evaclip.heartbeat import beat
from evaclip.metrics import EVAL_METRICS, SHOTS_METRICS

FITTED, HELD_OUT = 1, 2
_PER_DECADE, _DECADES = 8, 6
"""Penalties that are tried at most: 10^-6 to 10^6."""


def probe(name: str, dataset: LinearProbeDataset, bench: Bench, index_dir: str | None) -> Result:
    """Fit to one split, measure the other.

    ``top1``, ``top5`` and ``mean_per_class`` are those of ``classify``, ``log10_l2`` is the penalty that was chosen.
    With ``shots`` all are means over the draws, ``top1_std`` is the standard deviation of top1, and there are no
    predictions; what is drawn alone is encoded, once.

    Communicates labels, six integers per test image and draw, and what ``fit`` does, up to sixteen times per draw.
    Features of training images stay where they are computed.

    Raises:
        DataError: On every rank, if a split, an image or a label is missing or wrong, the test split has labels that
            the training split has not, or there are fewer images per class than ``shots`` or a hold-out need.
    """
    ranks = bench.ranks
    train, test = open_splits(dataset, dataset.train_split, index_dir, ranks)
    labels, test_labels = _labels(train, ranks), _labels(test, ranks)
    with agreed(ranks):
        _require_classes(dataset, labels, test, test_labels)
    classes = labels.unique()
    targets, test_targets = (torch.searchsorted(classes, given) for given in (labels, test_labels))
    draws = [divide(targets, dataset.shots, seed) for seed in range(dataset.draws if dataset.shots else 1)]
    used = torch.stack(draws).any(0).nonzero().flatten()
    own = used[ranks.rank :: ranks.world_size]  # share() gives the last one to several ranks
    features = _features(train.chosen(used.tolist()), bench)[: len(own)]
    test_features = _features(test, bench)
    nearest: list[Tensor] = []
    values: list[tuple[float, ...]] = []
    for part in draws:
        own_targets, own_part = (given[own].to(ranks.device) for given in (targets, part))
        model, log10_l2 = _fit_best(features, own_targets, own_part, len(classes), bench, again=dataset.shots is None)
        nearest.append(in_order(_nearest(model, test_features), len(test), ranks).cpu())
        values.append((*accuracies(test_targets, nearest[-1], len(classes)), log10_l2))
    metrics = dict(zip(EVAL_METRICS["linear_probe"], map(fmean, zip(*values, strict=True)), strict=True))
    if dataset.shots:
        metrics |= dict(zip(SHOTS_METRICS, [pstdev([top1 for top1, *_ in values])], strict=True))
        return Result(name, "linear_probe", metrics, len(test))
    folders = train.source.classes if isinstance(train.source, ImageFolder) else None
    names = tuple(folders[label] if folders else str(label) for label in classes.tolist())
    predictions = Predictions(names, tuple(test_targets.tolist()), tuple(nearest[0][:, 0].tolist()))
    return Result(name, "linear_probe", metrics, len(test), predictions)


# ---------------------------------------------------------------------------------------------------------- decisions


def divide(targets: Int[Tensor, " images"], shots: int | None, seed: int) -> Int[Tensor, " images"]:
    """Which images of the training split are fitted to (1), held out to choose the penalty (2), or left alone (0).

    Without ``shots`` a fifth of each class is held out, at least one image, and never the last one. With them, so many
    of each class are fitted to, and of those that remain up to as many, four at most, are held out.

    Args:
        targets: Class of each image.
        shots: Images per class that are fitted to; None: all that are not held out.
        seed: Of the order in which the images of a class are taken.
    """
    drawn = torch.tensor([hash64(seed, number) >> 1 for number in range(len(targets))]).argsort()
    by_class = drawn[targets[drawn].argsort(stable=True)]
    sizes = targets.bincount()
    places = torch.empty_like(targets)
    places[by_class] = torch.arange(len(targets)) - (sizes.cumsum(0) - sizes)[targets[by_class]]
    if shots is None:
        held_out = places < torch.minimum((sizes + 4) // 5, sizes - 1)[targets]
        return torch.where(held_out, HELD_OUT, FITTED)
    held_out = (places >= shots) & (places < shots + min(shots, 4))
    return FITTED * (places < shots) + HELD_OUT * held_out


def search(score: Callable[[int], float]) -> int:
    """The best place on a grid of eight penalties per decade, from 10^-6 (-48) to 10^6 (48).

    arXiv:2103.00020, A.3: seven that are two decades apart, then on both sides of the best one half of the distance
    before, until they are neighbours. Fifteen are tried, each of the first seven after those of larger penalties. Of
    equally good ones the largest penalty is taken.

    Args:
        score: How good the penalty at a place is; called once for each.
    """
    found: dict[int, float] = {}
    end, distance = _PER_DECADE * _DECADES, 2 * _PER_DECADE
    places = range(end, -end - 1, -distance)
    while True:
        found |= {place: score(place) for place in places if place not in found}
        best = max(found, key=lambda place: (found[place], place))
        distance //= 2
        if not distance:
            return best
        places = [place for place in (best + distance, best - distance) if abs(place) <= end]


# ------------------------------------------------------------------------------------------------------------- acting


def _fit_best(
    features: Float[Tensor, "images dim"],
    targets: Int[Tensor, " images"],
    part: Int[Tensor, " images"],
    num_classes: int,
    bench: Bench,
    *,
    again: bool,
) -> tuple[Float[Tensor, "classes weights"], float]:
    """The model with the penalty of most hits among the held-out images, and the logarithm of that penalty.

    Args:
        features: Of this rank's images.
        targets: Their classes.
        part: As ``divide`` says.
        num_classes: On all ranks.
        bench: Its ranks, and who is asked between fits whether to go on.
        again: Fit to the held-out images too once the penalty is known.
    """
    ranks = bench.ranks
    zeros = features.new_zeros(num_classes, features.shape[1] + 1, dtype=torch.float64)
    if int(ranks.sum((~features.isfinite()).sum())):
        return zeros.fill_(math.nan), math.nan
    fitted, held_out = ((features[part == which], targets[part == which]) for which in (FITTED, HELD_OUT))
    models: dict[int, Tensor] = {}

    def fit_to(images: Tensor, classes: Tensor, place: int) -> None:
        with agreed(ranks):
            bench.between()
        start = min((known for known in models if known >= place), default=None)  # a larger penalty's is near
        near = zeros if start is None else models[start]
        models[place] = fit(images, classes, 10 ** (place / _PER_DECADE), near, ranks)

    def score(place: int) -> int:
        fit_to(*fitted, place)
        hits = _nearest(models[place], held_out[0])[:, 0] == held_out[1]
        return int(ranks.sum(hits.sum()))

    best = search(score)
    if again:
        fit_to(features, targets, best)
    return models[best], best / _PER_DECADE


def _labels(records: Records, ranks: Ranks) -> Int[Tensor, " records"]:
    """Every record's label, on every rank."""
    own: list[int] = []
    with agreed(ranks):
        for number in share(len(records), ranks):
            own.append(records.label(number))
            beat("evaluation")
    return in_order(torch.tensor(own, device=ranks.device), len(records), ranks).cpu()


def _features(records: Records, bench: Bench) -> Float[Tensor, "share dim"]:
    """Features of this rank's share."""
    return torch.cat([features for features, _ in bench.images(records, label_of)])


def _nearest(
    model: Float[Tensor, "classes weights"], features: Float[Tensor, "images dim"]
) -> Int[Tensor, "images nearest"]:
    """The classes of the highest scores."""
    return torch.cat([nearest_classes(scores(model, part)) for part in in_parts(features, model)])


def _require_classes(dataset: LinearProbeDataset, labels: Tensor, test: Records, test_labels: Tensor) -> None:
    """Raise ``DataError`` where labels allow no fit, or a test of something else than what was fitted."""
    classes, counts = labels.unique(return_counts=True)
    split = f"{dataset.path}: the split {dataset.train_split}"
    limited = "" if dataset.limit is None else f"; or raise limit, which is {dataset.limit}"
    if len(classes) == 1:
        raise DataError(f"{split} has one class alone, {int(classes)}; give it two or more{limited}")
    unknown = (~torch.isin(test_labels, classes)).nonzero().flatten().tolist()
    if unknown:
        raise DataError(
            f"{test.read(unknown[0]).where}: label {int(test_labels[unknown[0]])} has no image in the split "
            f"{dataset.train_split}, whose {len(classes)} labels are {int(classes[0])} to {int(classes[-1])} "
            f"({len(unknown)} of {len(test)} images of {dataset.split} have such labels); number the classes of both "
            f"splits alike, or take these images out{limited}"
        )
    shots, fewest = dataset.shots, int(counts.argmin())
    if shots and counts[fewest] < shots:
        raise DataError(
            f"{split} has {int(counts[fewest])} images of class {int(classes[fewest])}, fewer than shots {shots}; "
            f"lower shots to {int(counts[fewest])}{limited}"
        )
    if counts.max() <= (shots or 1):
        raise DataError(
            f"{split} has at most {int(counts.max())} images of a class, so none remain to choose the penalty on; "
            f"give it more{', or lower shots' if shots else ''}{limited}"
        )
