"""What an evaluation found, and how it is written and shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaclip.files import write_json


@dataclass(frozen=True)
class Predictions:
    """Each record's class and the class it was taken for, as places in the names; -1 where scores were not finite."""

    class_names: tuple[str, ...]
    labels: tuple[int, ...]
    predicted: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """One evaluated set; iterating gives (published name, value)."""

    name: str
    task: str
    metrics: dict[str, float]
    num_records: int
    """Records that the metrics are about."""
    predictions: Predictions | None = None
    """Of a classification."""
    templates: dict[str, float] | None = None
    """Template -> top1 by this template alone, of a classification that was asked for it."""

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return ((f"eval/{self.name}/{metric}", value) for metric, value in self.metrics.items())


def write_results(folder: Path, results: Sequence[Result]) -> None:
    """Write ``evaluation.json`` and, for classifications, ``predictions/NAME.json``; one rank does.

    ``evaluation.json`` is ``{name: {"task", "metrics", "num_records"}}``; a prediction file holds ``task``,
    ``metrics``, ``class_names``, ``labels`` and ``predictions``, with ``per_template`` also ``templates``. A value that
    is not finite is written as null.
    """
    summary: dict[str, Any] = {}
    for result in results:
        metrics = {name: value if math.isfinite(value) else None for name, value in result.metrics.items()}
        summary[result.name] = {"task": result.task, "metrics": metrics, "num_records": result.num_records}
        if result.predictions is not None:
            found: dict[str, Any] = {
                "task": result.task,
                "metrics": metrics,
                "class_names": result.predictions.class_names,
                "labels": result.predictions.labels,
                "predictions": result.predictions.predicted,
            }
            found |= {} if result.templates is None else {"templates": result.templates}
            (folder / "predictions").mkdir(parents=True, exist_ok=True)
            write_json(folder / "predictions" / f"{result.name}.json", found)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", summary, indent=2)


def format_table(results: Sequence[Result]) -> str:
    """A line per metric, aligned; the set's name and size stand on its first line."""
    rows = [("dataset", "records", "metric", "value")]
    for result in results:
        for number, (metric, value) in enumerate(result.metrics.items()):
            name, records = (result.name, str(result.num_records)) if not number else ("", "")
            rows.append((name, records, metric, f"{value:.4f}"))
    name, records, metric, number = (max(len(row[column]) for row in rows) for column in range(4))
    return "\n".join(f"{row[0]:<{name}}  {row[1]:>{records}}  {row[2]:<{metric}}  {row[3]:>{number}}" for row in rows)
