"""Make a run's report: RUN_DIR/report.html for people, RUN_DIR/report.json for scripts.

    python tools/report.py runs/demo --require digits.top1=0.97

Reads ``metrics.jsonl``, ``evaluation.json``, ``predictions/`` and ``config.yaml`` of the run, the images of its evaluation
sets, and, where there is a retrieval set, the model, to show which caption it finds. Every score stands beside what
guessing would give. With ``--require DATASET.METRIC=VALUE`` the report says whether the value is reached, and the tool
exits 1 where it is not. This module decides how results are shown; it measures nothing itself.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from evaclip import config_file
from evaclip.api import Clip, load
from evaclip.config import IMAGE_KEYS, RetrievalDataset, RunConfig, ZeroShotDataset
from evaclip.data.images import load_eval
from evaclip.distributed import Ranks
from evaclip.errors import DataError, EvaclipError
from evaclip.evaluation.datasets import captions_of, open_records
from evaclip.history import Row, load_history

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
        metric: As in ``evaclip.evaluation.results.METRICS``.
        classes: Of a classification; None for retrieval.
        images: Of a retrieval set.
        captions: Of a retrieval set, equally many per image.
    """
    if classes is not None:
        return min(1.0, 5 / classes) if metric == "top5" else 1 / classes
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
    ends = [_number(row, "samples") for row in timed]
    took = [
        (end - start) / _number(row, "speed/samples_per_second")
        for row, start, end in zip(timed, [0.0, *ends], ends, strict=False)
    ]
    if not timed:
        return {}
    waited = sum(seconds * _number(row, "speed/data_wait_fraction") for row, seconds in zip(timed, took, strict=True))
    return {
        "samples_per_second": ends[-1] / sum(took),
        "training_seconds": sum(took),
        "data_wait_fraction": waited / sum(took),
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


@dataclass(frozen=True)
class Sample:
    """A held-out image, what it shows and what it was taken for."""

    source: str
    """The file's bytes as a data URI."""
    truth: str
    predicted: str
    right: bool


def image_bytes(members: Mapping[str, bytes]) -> bytes:
    """The image of a record as it lies in the shard."""
    return next(members[key] for key in IMAGE_KEYS if key in members)


def data_uri(image: bytes) -> str:
    """An image as text; browsers look at the bytes to tell JPEG from PNG."""
    return f"data:image;base64,{base64.b64encode(image).decode()}"


def choose(count: int) -> list[int]:
    """The records to show: random, and the same every time."""
    return sorted(Random("samples").sample(range(count), min(SAMPLES, count)))  # noqa: S311  no secret


def classified_samples(dataset: ZeroShotDataset, found: Mapping[str, Any], index_dir: str | None) -> list[Sample]:
    """Random records of a classification set with their predictions."""
    records = open_records(dataset, index_dir, Ranks())
    names: Sequence[str] = found["class_names"]
    samples: list[Sample] = []
    for number in choose(len(records)):
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
    chosen = choose(len(records))
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


# ------------------------------------------------------------------------------------------------------------- curves

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def panels(evaluation: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Title of each plot -> metric -> label of its curve; the published names of ``evaclip.metrics``."""

    def scores(task: str, metrics: Mapping[str, str]) -> dict[str, str]:
        sets = [name for name, result in evaluation.items() if result["task"] == task]
        return {f"eval/{name}/{metric}": title(name) + label for name in sets for metric, label in metrics.items()}

    recall = {"image_to_text_recall@1": ", image to text", "text_to_image_recall@1": ", text to image"}
    return {
        "loss, in nats": {"train/loss": "training", **scores("loss", {"loss": ""})},
        "accuracy within a batch": {
            "train/accuracy_image_to_text": "image to text",
            "train/accuracy_text_to_image": "text to image",
        },
        "zero-shot top-1 (dotted: chance)": scores("zero_shot", {"top1": ""}),
        "retrieval recall@1": scores("retrieval", recall),
        "learning rate": {"lr/image": "image tower", "lr/text": "text tower"},
        "samples per second": {"speed/samples_per_second": "training"},
    }


def curves(rows: Sequence[Row], evaluation: Mapping[str, Any]) -> str:
    """The run over its samples, as SVG.

    Args:
        rows: Of ``metrics.jsonl``.
        evaluation: The part of that name of ``summarise``'s result.

    Raises:
        DataError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415  an optional dependency, and slow
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise DataError("the curves need matplotlib, which is missing; pip install 'evaclip[demo]'") from error

    look = {"svg.hashsalt": "evaclip", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(look):  # the salt makes equal runs give equal files
        figure = Figure(figsize=(11, 6), layout="constrained")
        for axes, (heading, names) in zip(figure.subplots(2, 3).flat, panels(evaluation).items(), strict=True):
            axes.set_title(heading, loc="left")
            axes.set_xlabel("training samples")
            for colour, (name, label) in zip(COLOURS, names.items(), strict=False):
                points = [(row["samples"], row[name]) for row in rows if row.get(name) is not None]
                x, y = zip(*points, strict=True) if points else ((), ())
                axes.plot(x, y, color=colour, label=label, marker="o" if len(points) < 30 else "", markersize=3)
                dataset, _, metric = name.removeprefix("eval/").partition("/")
                if metric == "top1":
                    axes.axhline(evaluation[dataset]["metrics"][metric]["chance"], color=colour, linestyle=":")
            axes.set_ylim(bottom=0)
            if names:
                axes.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]


# --------------------------------------------------------------------------------------------------------------- page

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
svg { width: 100%; height: auto } table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left } th { font-weight: 600 }
.note { color: #555 } .good { color: #006b3c } .bad { color: #b3261e }
.cards, .samples { display: flex; flex-wrap: wrap; gap: 1rem }
.card { border: 1px solid #ccc; border-radius: .5rem; padding: .7rem 1rem; min-width: 12rem }
.card b { display: block; font-size: 2rem; line-height: 1.2 }
.samples figure { width: 11.5rem; margin: 0; font-size: .8rem; line-height: 1.3 }
.samples img { width: 6rem; height: 6rem; object-fit: contain; display: block; background: #f4f4f4 }
.confusion td, .confusion th { text-align: center; min-width: 2.2rem; padding: .2rem }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto }
"""


def title(name: str) -> str:
    """A name from the configuration as words."""
    return name.replace("_", " ")


def percent(value: float | None) -> str:
    """A share as people read it."""
    return "not finite" if value is None else f"{100 * value:.2f} %" if value < 0.01 else f"{100 * value:.1f} %"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """An HTML table; cells are HTML already."""
    lines = [f'<table class="{kind}"><tr>', *(f"<th>{cell}</th>" for cell in header), "</tr>"]
    for row in rows:
        lines += ["<tr>", *(cell if cell.startswith("<t") else f"<td>{cell}</td>" for cell in row), "</tr>"]
    return "\n".join([*lines, "</table>"])


def cards(summary: Mapping[str, Any]) -> str:
    """The headline numbers."""
    wanted = {verdict["name"]: verdict for verdict in summary["requirements"]}
    shown = {"zero_shot": ("top1",), "retrieval": ("image_to_text_recall@1", "text_to_image_recall@1")}
    found: list[str] = []
    for name, result in summary["evaluation"].items():
        for metric in shown.get(result["task"], ()):
            score = result["metrics"][metric]
            verdict = wanted.get(f"{name}.{metric}")
            lines = [f"{html.escape(title(name))}, {title(metric)}", f"<b>{percent(score['value'])}</b>"]
            lines.append(f"chance {percent(score['chance'])}")
            if verdict is not None:
                word = mark("passed" if verdict["passed"] else "not passed", good=verdict["passed"])
                lines.append(f"<br>required {percent(verdict['required'])}: {word}")
            found.append(f'<div class="card">{" ".join(lines)}</div>')
    return f'<div class="cards">{"".join(found)}</div>'


def mark(text: str, *, good: bool) -> str:
    """A word in the colour of success or failure."""
    return f'<strong class="{"good" if good else "bad"}">{html.escape(text)}</strong>'


def scores_table(evaluation: Mapping[str, Any]) -> str:
    """Every score with its chance level and its value before training."""
    rows: list[list[str]] = []
    for name, result in evaluation.items():
        show = percent if result["task"] != "loss" else lambda value: "not finite" if value is None else f"{value:.4f}"
        for metric, score in result["metrics"].items():
            guess = "" if score["chance"] is None else show(score["chance"])
            before = "" if score["at_start"] is None else show(score["at_start"])
            where = f"{html.escape(title(name))} ({result['num_records']:,})"
            rows.append([where, title(metric), show(score["value"]), guess, before])
    return table(["set (records)", "score", "value", "chance", "before training"], rows)


def retrieval_table(evaluation: Mapping[str, Any]) -> str:
    """Recall of each retrieval set, both ways."""
    rows: list[list[str]] = []
    for name, result in evaluation.items():
        for way in ("image_to_text", "text_to_image") if result["task"] == "retrieval" else ():
            scores = {metric: score for metric, score in result["metrics"].items() if metric.startswith(way)}
            cells = [f"{percent(score['value'])} ({percent(score['chance'])})" for score in scores.values()]
            size = f"{result['images']:,} images, {result['captions']:,} captions"
            rows.append([f"{html.escape(title(name))}, {title(way)}", *cells, size])
    return table(["set", "recall@1 (chance)", "recall@5 (chance)", "recall@10 (chance)", "among"], rows)


def confusion_table(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A confusion matrix, each row shaded by its shares."""
    rows: list[list[str]] = []
    for name, row in zip(names, counts, strict=True):
        cells = [f"<th>{html.escape(name)}</th>"]
        for column, count in enumerate(row):
            share = count / max(1, sum(row))
            colour = "0, 114, 178" if column == len(rows) else "213, 94, 0"
            ink = "#fff" if share > 0.5 else "#1a1a1a"
            cells.append(f'<td style="background: rgba({colour}, {share:.3f}); color: {ink}">{count or ""}</td>')
        rows.append(cells)
    return table(["", *map(html.escape, names)], rows, "confusion")


def gallery(samples: Sequence[Sample]) -> str:
    """Images with what they show and what they were taken for."""
    figures = [
        f'<figure><img src="{sample.source}" alt="{html.escape(sample.truth)}">'
        f"{mark('right' if sample.right else 'wrong', good=sample.right)}: {html.escape(sample.predicted)}"
        + ("" if sample.right else f'<br><span class="note">is: {html.escape(sample.truth)}</span>')
        + "</figure>"
        for sample in samples
    ]
    return f'<div class="samples">{"".join(figures)}</div>'
