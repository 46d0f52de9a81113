"""Zero-shot classification (arXiv:2103.00020, section 3.1): an image's class is the one whose prompts are nearest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from evaclip.config import ZeroShotDataset
from evaclip.distributed import agreed
from evaclip.evaluation.datasets import class_names_of, label_of, open_records, templates_of
from evaclip.evaluation.encoding import Bench, in_batches, in_order, share
from evaclip.evaluation.results import Predictions, Result
from evaclip.metrics import EVAL_METRICS

_NEAREST = 5  # classes that top5 looks at


def classify(name: str, dataset: ZeroShotDataset, bench: Bench, index_dir: str | None) -> Result:
    """Classify every image of a set.

    ``top1`` and ``top5`` are shares of the images, ``mean_per_class`` is the mean of the classes' own top1 over the
    classes that occur. Classes of equal score rank by number. With five classes or fewer, ``top5`` is 1.

    Communicates a prototype per class and six integers per image.

    Raises:
        DataError: On every rank, if class names, templates, an image or a label are missing or wrong.
    """
    names: list[str] = []
    templates: list[str] = []
    with agreed(bench.ranks):
        names, templates = class_names_of(dataset), templates_of(dataset)
    records = open_records(dataset, index_dir, bench.ranks)
    prototypes = class_prototypes(bench, names, templates)
    rows: list[Tensor] = []
    for features, labels in bench.images(records, partial(label_of, num_classes=len(names))):
        nearest = nearest_classes(features @ prototypes.T)
        rows.append(torch.cat([torch.tensor(labels, device=nearest.device)[:, None], nearest], dim=1))
    found = in_order(torch.cat(rows), len(records), bench.ranks).cpu()
    labels, nearest = found[:, 0], found[:, 1:]
    values = _metrics(labels, nearest, len(names))
    return Result(
        name,
        "zero_shot",
        dict(zip(EVAL_METRICS["zero_shot"], values, strict=True)),
        len(records),
        Predictions(tuple(names), tuple(labels.tolist()), tuple(nearest[:, 0].tolist())),
    )


def class_prototypes(bench: Bench, names: Sequence[str], templates: Sequence[str]) -> Float[Tensor, "classes dim"]:
    """A unit vector per class: the mean over its templates' unit vectors, normalised (prompt ensembling).

    Classes are split over the ranks; every rank gets all prototypes.
    """
    means: list[Tensor] = []
    for classes in in_batches(share(len(names), bench.ranks), max(1, bench.batch // len(templates))):
        prompts = [template.replace("{c}", names[number]) for number in classes for template in templates]
        means.append(bench.texts(prompts).unflatten(0, (len(classes), len(templates))).mean(1))
    return F.normalize(in_order(torch.cat(means), len(names), bench.ranks), dim=-1)


def nearest_classes(scores: Float[Tensor, "batch classes"]) -> Int[Tensor, "batch nearest"]:
    """The five classes of the highest scores, best first; -1 for a score that is not finite, which is never right."""
    values, classes = scores.sort(dim=1, descending=True, stable=True)
    return classes[:, :_NEAREST].masked_fill(~values[:, :_NEAREST].isfinite(), -1)


def _metrics(
    labels: Int[Tensor, " records"], nearest: Int[Tensor, "records nearest"], num_classes: int
) -> tuple[float, float, float]:
    """Top-1, top-5 and mean per class, from integer counts."""
    hits = nearest == labels[:, None]
    present = labels.bincount(minlength=num_classes)
    right = labels[hits[:, 0]].bincount(minlength=num_classes)
    per_class = right[present > 0].double() / present[present > 0]
    return int(hits[:, 0].sum()) / len(labels), int(hits.any(1).sum()) / len(labels), float(per_class.mean())
