"""How a run's report looks: curves as SVG, tables and images as one HTML page that needs no other file.

Pure functions from numbers to text. What the numbers are and where they come from is ``report``'s to say.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from evaclip.errors import DataError
from evaclip.history import Row

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

    look: dict[Any, Any] = {
        "svg.hashsalt": "evaclip",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(look):  # the salt makes equal runs give equal files
        shown = {heading: names for heading, names in panels(evaluation).items() if names}
        figure = Figure(figsize=(11, 3 * math.ceil(len(shown) / 3)), layout="constrained")
        for place, (heading, names) in enumerate(shown.items(), 1):
            axes = figure.add_subplot(math.ceil(len(shown) / 3), 3, place)
            axes.set_title(heading, loc="left")
            axes.set_xlabel("thousands of training samples")
            for colour, (name, label) in zip(cycle(COLOURS), names.items(), strict=False):
                points = [((row["samples"] or 0) / 1000, row[name]) for row in rows if row.get(name) is not None]
                x, y = zip(*points, strict=True) if points else ((), ())
                axes.plot(x, y, color=colour, label=label, marker="o" if len(points) < 30 else "", markersize=3)
                dataset, _, metric = name.removeprefix("eval/").partition("/")
                if metric == "top1":
                    axes.axhline(evaluation[dataset]["metrics"][metric]["chance"], color=colour, linestyle=":")
            axes.set_ylim(bottom=0)
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


@dataclass(frozen=True)
class Sample:
    """A held-out image, what it shows and what it was taken for."""

    source: str
    """The file's bytes as a data URI."""
    truth: str
    predicted: str
    right: bool


def title(name: str) -> str:
    """A name from the configuration as words."""
    return name.replace("_", " ")


def percent(value: float | None) -> str:
    """A share as people read it."""
    return "not finite" if value is None else f"{100 * value:.2f} %" if value < 0.01 else f"{100 * value:.1f} %"


def plain(value: float | None) -> str:
    """A number that is no share."""
    return "not finite" if value is None else f"{value:.4f}"


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
        for metric, score in result["metrics"].items():
            show = plain if metric in {"loss", "log10_l2"} else percent
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


def page(
    run_dir: str,
    summary: Mapping[str, Any],
    class_names: Mapping[str, Sequence[str]],
    samples: Mapping[str, Sequence[Sample]],
    mistakes: Mapping[str, Sequence[Sample]],
    plots: str,
) -> str:
    """The whole page.

    Args:
        run_dir: As it is to stand in the commands.
        summary: ``report.summarise``'s result, with ``commands``.
        class_names: Classification -> its classes.
        samples: Set -> images drawn at random.
        mistakes: Set -> images that were taken for something else.
        plots: ``curves``'s result.
    """
    missed = [verdict["name"] for verdict in summary["requirements"] if not verdict["passed"]]
    parts = [f"<h1>{html.escape(run_dir)}</h1>"]
    parts.append(f'<p class="note">{summary["steps"]:,} steps, {summary["samples"]:,} training samples</p>')
    if summary["requirements"]:
        verdict = f"not passed: {', '.join(missed)}" if missed else "passed: all required scores are reached"
        parts.append(f"<p>{mark(verdict, good=not missed)}</p>")
    parts += [cards(summary), "<h2>Training</h2>", plots, speed(summary["throughput"])]
    parts += ["<h2>Scores on held-out data</h2>", scores_table(summary["evaluation"])]
    if any(result["task"] == "retrieval" for result in summary["evaluation"].values()):
        parts += ["<h2>Retrieval</h2>", retrieval_table(summary["evaluation"])]
    for name, counts in summary["confusion"].items():
        parts.append(f"<h2>Confusion: {html.escape(title(name))}</h2>")
        parts.append('<p class="note">Rows are what an image shows, columns what it was taken for.</p>')
        parts.append(confusion_table(counts, class_names[name]))
    for name, shown in samples.items():
        right = sum(sample.right for sample in shown)
        parts.append(f"<h2>Images: {html.escape(title(name))}</h2>")
        parts.append(f'<p class="note">{right} of {len(shown)} right; drawn at random, not chosen.</p>')
        parts.append(gallery(shown))
        if mistakes.get(name):
            parts.append(f"<h3>Mistakes, {len(mistakes[name])} shown</h3>")
            parts.append(gallery(mistakes[name]))
    parts.append("<h2>Commands</h2>")
    for what, command in summary["commands"].items():
        parts.append(f"<p>{html.escape(what)}</p><pre>{html.escape(command)}</pre>")
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(run_dir)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def speed(found: Mapping[str, float]) -> str:
    """Throughput in a sentence."""
    if not found:
        return ""
    return (
        f"<p>{found['samples_per_second']:,.0f} samples per second over {found['training_seconds']:,.0f} s of "
        f"training, {percent(found['data_wait_fraction'])} of it waiting for data; evaluation is not counted.</p>"
    )
