"""Zero-shot classification (arXiv:2103.00020, section 3.1): an image's class is the one whose prompts are nearest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median, pstdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from evaclip.config import ZeroShotDataset
from evaclip.distributed import agreed
from evaclip.evaluation.accuracy import accuracies, nearest_classes
from evaclip.evaluation.datasets import class_names_of, label_of, open_records, require_classes, templates_of
from evaclip.evaluation.encoding import Bench, in_batches, in_order, share
from evaclip.evaluation.results import Predictions, Result
from evaclip.metrics import EVAL_METRICS, TEMPLATE_METRICS


def classify(name: str, dataset: ZeroShotDataset, bench: Bench, index_dir: str | None) -> Result:
    """Classify every image of a set.

    ``top1`` and ``top5`` are shares of the images, ``mean_per_class`` is the mean of the classes' own top1 over the
    classes that occur. Classes of equal score rank by number. With five classes or fewer, ``top5`` is 1. With
    ``per_template``, ``template_top1_*`` are about the top1 of each template alone.

    Communicates a prototype per class (and template) and six integers per image (and one per template).

    Raises:
        DataError: On every rank, if class names, templates, an image or a label are missing or wrong.
    """
    names: list[str] = []
    templates: list[str] = []
    with agreed(bench.ranks):
        names, templates = class_names_of(dataset), templates_of(dataset)
    records = open_records(dataset, index_dir, bench.ranks)
    require_classes(records, names)
    classifier = classifier_of(bench, names, templates, alone=dataset.per_template)
    rows: list[Tensor] = []
    for features, labels in bench.images(records, partial(label_of, num_classes=len(names))):
        given = torch.tensor(labels, device=features.device)[:, None]
        alone = [nearest_classes(features @ prototypes.T)[:, :1] for prototypes in classifier.alone]
        rows.append(torch.cat([given, *alone, nearest_classes(features @ classifier.ensemble.T)], dim=1))
    found = in_order(torch.cat(rows), len(records), bench.ranks).cpu()
    labels, alone, nearest = found.tensor_split((1, 1 + len(classifier.alone)), dim=1)
    labels = labels[:, 0]
    metrics = dict(zip(EVAL_METRICS["zero_shot"], accuracies(labels, nearest, len(names)), strict=True))
    shares = [int(hits) / len(labels) for hits in (alone == labels[:, None]).sum(0)]
    if shares:
        spread = (min(shares), median(shares), max(shares), pstdev(shares))
        metrics |= dict(zip(TEMPLATE_METRICS, spread, strict=True))
    return Result(
        name,
        "zero_shot",
        metrics,
        len(records),
        Predictions(tuple(names), tuple(labels.tolist()), tuple(nearest[:, 0].tolist())),
        dict(zip(templates, shares, strict=True)) if shares else None,
    )


class Classifier(NamedTuple):
    """Unit vectors that images are compared with."""

    ensemble: Float[Tensor, "classes dim"]
    """The normalised mean over the templates (prompt ensembling)."""
    alone: Sequence[Float[Tensor, "classes dim"]]
    """Those of each template, where they are wanted."""


def classifier_of(bench: Bench, names: Sequence[str], templates: Sequence[str], *, alone: bool) -> Classifier:
    """Encode every class in every template.

    Classes are split over the ranks; every rank gets all vectors. The last classifier of a bench is kept: sets of the
    same classes share it.

    Args:
        bench: The text tower and the ranks.
        names: Of the classes.
        templates: With ``{c}`` for the name.
        alone: Give the templates' own vectors too.
    """
    asked = (tuple(names), tuple(templates), alone)
    if asked not in bench.classifiers:
        bench.classifiers.clear()
        parts: list[Tensor] = []
        for classes in in_batches(share(len(names), bench.ranks), max(1, bench.batch // len(templates))):
            prompts = [template.replace("{c}", names[number]) for number in classes for template in templates]
            features = bench.texts(prompts).unflatten(0, (len(classes), len(templates)))
            parts.append(features if alone else features.mean(1, keepdim=True))
        found = in_order(torch.cat(parts), len(names), bench.ranks)  # classes, templates or 1, dim
        bench.classifiers[asked] = Classifier(F.normalize(found.mean(1), dim=-1), found.unbind(1) if alone else ())
    return bench.classifiers[asked]
