"""Make a run's report: RUN_DIR/report.html for people, RUN_DIR/report.json for scripts.

    python tools/report.py runs/demo --require digits.top1=0.97

Reads ``metrics.jsonl``, ``evaluation.json``, ``predictions/`` and ``config.yaml`` of the run, the images of its
evaluation sets, and, where there is a retrieval set, the model, to show which caption it finds. Every score stands
beside what guessing would give. With ``--require DATASET.METRIC=VALUE`` the report says whether the value is reached,
and the tool exits 1 where it is not. This module decides which numbers are shown; it measures nothing itself.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from report_page import Sample, curves, page

from evaclip import config_file
from evaclip.api import Clip, load
from evaclip.checkpoint import CheckpointReader, find_checkpoint
from evaclip.config import IMAGE_KEYS, RetrievalDataset, RunConfig, ZeroShotDataset
from evaclip.data.images import load_eval
from evaclip.distributed import Ranks
from evaclip.errors import DataError, EvaclipError
from evaclip.evaluation.datasets import captions_of, open_records
from evaclip.history import Row, load_history, training_time

SAMPLES = 24  # images shown of each evaluation set
LARGEST_CONFUSION = 20  # classes of the largest confusion matrix that a page can show


# ------------------------------------------------------------------------------------------------------------ numbers


@dataclass(frozen=True)
class Requirement:
    """A score that a run has to reach."""

    dataset: str
    metric: str
    least: float

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        return f"{self.dataset}.{self.metric}"


def parse_requirement(text: str) -> Requirement:
    """Read ``DATASET.METRIC=VALUE``."""
    name, _, value = text.partition("=")
    dataset, _, metric = name.rpartition(".")
    try:
        least = float(value)
    except ValueError:
        least = math.nan
    if not dataset or not metric or not math.isfinite(least):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form DATASET.METRIC=VALUE, such as digits.top1=0.97")
    return Requirement(dataset, metric, least)


def judge(requirements: Sequence[Requirement], evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Value and verdict of each requirement; a value that is not finite (null) is never enough.

    Raises:
        DataError: The run has no such dataset or metric.
    """
    verdicts: list[dict[str, Any]] = []
    for wanted in requirements:
        metrics = evaluation.get(wanted.dataset, {}).get("metrics", {})
        if wanted.metric not in metrics:
            there = ", ".join(f"{name}.{metric}" for name, result in evaluation.items() for metric in result["metrics"])
            raise DataError(f"--require {wanted.name}: the run has no such result; it has {there}")
        value = metrics[wanted.metric]
        passed = value is not None and value >= wanted.least
        verdicts.append({"name": wanted.name, "required": wanted.least, "value": value, "passed": passed})
    return verdicts


def chance(metric: str, *, classes: int | None = None, images: int = 0, captions: int = 0) -> float | None:
    """What guessing gives on average; None where that says nothing.

    Args:
        metric: As in ``evaclip.metrics.EVAL_METRICS``.
        classes: Of a classification; None for retrieval.
        images: Of a retrieval set.
        captions: Of a retrieval set, equally many per image.
    """
    if classes is not None:
        near = {"top1": 1, "mean_per_class": 1, "top5": 5}.get(metric)
        return None if near is None else min(1.0, near / classes)
    direction, _, k = metric.partition("_recall@")
    if direction == "text_to_image":
        return min(1.0, int(k) / images)
    if direction == "image_to_text":
        own = captions // images
        missed = math.prod(max(0, captions - own - draw) / (captions - draw) for draw in range(min(int(k), captions)))
        return 1 - missed
    return None


def confusion(labels: Iterable[int], predictions: Iterable[int], classes: int) -> list[list[int]]:
    """How often each class (row) was taken for each (column); images without a prediction (-1) are left out."""
    counts = [[0] * classes for _ in range(classes)]
    for label, predicted in zip(labels, predictions, strict=True):
        if predicted >= 0:
            counts[label][predicted] += 1
    return counts


def throughput(rows: Sequence[Row]) -> dict[str, float]:
    """Samples per second of training over the whole run, and the share of it spent waiting for data."""
    timed = [row for row in rows if row.get("speed/samples_per_second")]
    if not timed:
        return {}
    passed = training_time(timed)
    took = [after - before for (_, before), (_, after) in pairwise(passed)]
    waited = sum(seconds * _number(row, "speed/data_wait_fraction") for row, seconds in zip(timed, took, strict=True))
    samples, seconds = passed[-1]
    return {
        "samples_per_second": samples / seconds,
        "training_seconds": seconds,
        "data_wait_fraction": waited / seconds,
    }


def _number(row: Row, name: str) -> float:
    """A value of a row; 0 where it is missing or was not finite."""
    return row.get(name) or 0.0


def at_start(rows: Sequence[Row], name: str) -> float | None:
    """A score before the first step; None where the run did not measure it."""
    return rows[0].get(name) if rows[0]["step"] == 0 else None


def summarise(
    rows: Sequence[Row],
    evaluation: Mapping[str, Any],
    predictions: Mapping[str, Any],
    captions: Mapping[str, Sequence[Sequence[str]]],
    requirements: Sequence[Requirement],
) -> dict[str, Any]:
    """The numbers of the report.

    Args:
        rows: Of ``metrics.jsonl``.
        evaluation: ``evaluation.json``.
        predictions: Classification -> its file of ``predictions/``.
        captions: Retrieval set -> the captions of each image.
        requirements: What has to be reached.

    Raises:
        DataError: A requirement names what the run has not, or there is no row.
    """
    if not rows:
        raise DataError("metrics.jsonl has no rows; train first")
    results: dict[str, Any] = {}
    for name, result in evaluation.items():
        sizes: dict[str, int] = {}
        if name in predictions:
            sizes = {"classes": len(predictions[name]["class_names"])}
        elif name in captions:
            sizes = {"images": len(captions[name]), "captions": sum(map(len, captions[name]))}
        metrics = {
            metric: {
                "value": value,
                "chance": chance(metric, **sizes) if sizes else None,
                "at_start": at_start(rows, f"eval/{name}/{metric}"),
            }
            for metric, value in result["metrics"].items()
        }
        results[name] = {"task": result["task"], "num_records": result["num_records"], **sizes, "metrics": metrics}
    verdicts = judge(requirements, evaluation)
    return {
        "steps": rows[-1]["step"],
        "samples": rows[-1]["samples"],
        "passed": all(verdict["passed"] for verdict in verdicts),
        "requirements": verdicts,
        "evaluation": results,
        "confusion": {
            name: confusion(found["labels"], found["predictions"], len(found["class_names"]))
            for name, found in predictions.items()
            if len(found["class_names"]) <= LARGEST_CONFUSION
        },
        "throughput": throughput(rows),
    }


# ------------------------------------------------------------------------------------------------------------- images


def image_bytes(members: Mapping[str, bytes]) -> bytes:
    """The image of a record as it lies in the shard."""
    return next(members[key] for key in IMAGE_KEYS if key in members)


def data_uri(image: bytes) -> str:
    """An image as text; browsers look at the bytes to tell JPEG from PNG."""
    return f"data:image;base64,{base64.b64encode(image).decode()}"


def choose(numbers: Sequence[int]) -> list[int]:
    """At most ``SAMPLES`` of some records: random, and the same every time."""
    return sorted(Random("samples").sample(numbers, min(SAMPLES, len(numbers))))  # noqa: S311  no secret


def groups(found: Mapping[str, Any]) -> tuple[Sequence[int], list[int]]:
    """All records of a classification, and those that it got wrong."""
    pairs = enumerate(zip(found["labels"], found["predictions"], strict=True))
    return range(len(found["labels"])), [number for number, (label, predicted) in pairs if label != predicted]


def classified_samples(
    dataset: ZeroShotDataset, found: Mapping[str, Any], numbers: Sequence[int], index_dir: str | None
) -> list[Sample]:
    """Records of a classification set with their predictions."""
    records = open_records(dataset, index_dir, Ranks())
    names: list[str] = found["class_names"]
    samples: list[Sample] = []
    for number in numbers:
        label, predicted = found["labels"][number], found["predictions"][number]
        taken_for = names[predicted] if predicted >= 0 else "no finite score"
        uri = data_uri(image_bytes(records.read(number).members))
        samples.append(Sample(uri, names[label], taken_for, label == predicted))
    return samples


def retrieved_samples(
    dataset: RetrievalDataset, captions: Sequence[Sequence[str]], config: RunConfig, clip: Clip
) -> list[Sample]:
    """Random records of a retrieval set with the nearest of all its captions."""
    records = open_records(dataset, config.data.index_dir, Ranks())
    texts = [(number, text) for number, image in enumerate(captions) for text in image]
    chosen = choose(range(len(records)))
    members = [records.read(number).members for number in chosen]
    pixels = [load_eval(image_bytes(found), max_pixels=config.data.max_image_pixels) for found in members]
    with torch.no_grad():
        images = clip.encode_image(torch.stack([clip.preprocess(image) for image in pixels]), normalize=True)
        features = [
            clip.encode_text(clip.tokenize([text for _, text in texts[start : start + 256]]), normalize=True)
            for start in range(0, len(texts), 256)
        ]
        nearest = (images @ torch.cat(features).T).argmax(1).tolist()
    return [
        Sample(data_uri(image_bytes(found)), captions[number][0], texts[best][1], texts[best][0] == number)
        for number, found, best in zip(chosen, members, nearest, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------ running


def commands(run_dir: Path) -> dict[str, str]:
    """What to type to do it again, in the repository with its environment active."""
    config = run_dir / "config.yaml"
    ranks = CheckpointReader(find_checkpoint(run_dir)).state.versions.get("ranks", "1")
    train = f"OMP_NUM_THREADS=1 launch/local.sh {ranks}"
    return {
        "Repeat the run from the start, elsewhere; the same machine gives the same numbers:": (
            f"{train} {config} run_dir={run_dir}-again"
        ),
        "Resume it, if it was interrupted, from its newest checkpoint:": f"{train} {config}",
        "Evaluate its newest checkpoint on its own sets:": f"evaclip evaluate {run_dir}",
        "Make this report again:": f"python tools/report.py {run_dir}",
    }


def make_report(run_dir: Path, requirements: Sequence[Requirement]) -> dict[str, Any]:
    """Write ``report.html`` and ``report.json``; returns what the latter holds.

    Raises:
        EvaclipError: Something of the run is missing, or a requirement names what it has not.
    """
    for name in ("metrics.jsonl", "evaluation.json", "config.yaml"):
        if not (run_dir / name).is_file():
            raise DataError(f"{run_dir / name} does not exist; give the directory of a run that has evaluated")
    rows = load_history(run_dir / "metrics.jsonl")
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    config = config_file.load(run_dir / "config.yaml")
    predictions: dict[str, Any] = {}
    captions: dict[str, list[list[str]]] = {}
    samples: dict[str, list[Sample]] = {}
    mistakes: dict[str, list[Sample]] = {}
    clip: Clip | None = None
    for name in evaluation:
        dataset = config.eval.datasets.get(name)
        if dataset is None:
            raise DataError(
                f"evaluation.json has {name!r}, config.yaml has not; run evaclip evaluate {run_dir} --output {run_dir}"
            )
        if isinstance(dataset, ZeroShotDataset):
            predictions[name] = json.loads((run_dir / "predictions" / f"{name}.json").read_text())
            samples[name], mistakes[name] = (
                classified_samples(dataset, predictions[name], choose(numbers), config.data.index_dir)
                for numbers in groups(predictions[name])
            )
        elif isinstance(dataset, RetrievalDataset):
            clip = clip or load(run_dir)
            records = open_records(dataset, config.data.index_dir, Ranks())
            captions[name] = [captions_of(records.read(number), per_line=True) for number in range(len(records))]
            samples[name] = retrieved_samples(dataset, captions[name], config, clip)
    summary = summarise(rows, evaluation, predictions, captions, requirements) | {"commands": commands(run_dir)}
    names = {name: found["class_names"] for name, found in predictions.items()}
    text = page(str(run_dir), summary, names, samples, mistakes, curves(rows, summary["evaluation"]))
    (run_dir / "report.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    (run_dir / "report.html").write_text(text, encoding="utf-8")
    return summary


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run_dir", type=Path, help="directory of a run that has evaluated")
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        type=parse_requirement,
        metavar="DATASET.METRIC=VALUE",
        help="least value of a score, such as digits.top1=0.97; exit 1 if it is missed; may be repeated",
    )
    arguments = parser.parse_args(argv)
    try:
        summary = make_report(arguments.run_dir, arguments.require)
    except (ValueError, KeyError, TypeError) as error:
        print(
            f"error: {arguments.run_dir} holds results that cannot be read ({error}); evaluate again", file=sys.stderr
        )
        return 1
    except (EvaclipError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, result in summary["evaluation"].items():
        for metric, score in result["metrics"].items():
            guess = "" if score["chance"] is None else f"  (chance {score['chance']:.4f})"
            print(f"{name}.{metric}: {score['value']}{guess}")
    for verdict in summary["requirements"]:
        relation, word = (">=", "passed") if verdict["passed"] else ("<", "NOT PASSED")
        print(f"{word}: {verdict['name']} {verdict['value']} {relation} {verdict['required']}")
    print(f"{arguments.run_dir / 'report.html'}")
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
