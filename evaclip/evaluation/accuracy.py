"""From scores of classes to the metrics of a classification; who made the scores does not matter here."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

_NEAREST = 5  # classes that top5 looks at


def nearest_classes(scores: Float[Tensor, "batch classes"]) -> Int[Tensor, "batch nearest"]:
    """The five classes of the highest scores, best first; -1 for a score that is not finite, which is never right."""
    values, classes = scores.sort(dim=1, descending=True, stable=True)
    return classes[:, :_NEAREST].masked_fill(~values[:, :_NEAREST].isfinite(), -1)


def accuracies(
    labels: Int[Tensor, " records"], nearest: Int[Tensor, "records nearest"], num_classes: int
) -> tuple[float, float, float]:
    """Top-1, top-5 and the mean of the classes' own top-1 over the classes that occur, from integer counts."""
    hits = nearest == labels[:, None]
    present = labels.bincount(minlength=num_classes)
    right = labels[hits[:, 0]].bincount(minlength=num_classes)
    per_class = right[present > 0].double() / present[present > 0]
    return int(hits[:, 0].sum()) / len(labels), int(hits.any(1).sum()) / len(labels), float(per_class.mean())
