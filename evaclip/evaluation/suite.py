"""A suite of sets: which are there, what each is worth, averages over them, and how far they are from published values.

A set that is not there has no value, and an average that lacks a set has none either: a mean over fewer sets would be
another quantity under the same name. Pure but for ``missing_sets`` and ``write_suite``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from evaclip.config import Dataset, Published, SuiteConfig, SuiteDataset, SuiteRetrieval
from evaclip.data.shards import missing_files
from evaclip.data.storage import is_remote
from evaclip.data.tar import expand_names
from evaclip.errors import ConfigError
from evaclip.evaluation.results import Result
from evaclip.files import write_json, write_text
from evaclip.metrics import AVERAGE_METRICS, EVAL_METRICS, TEMPLATE_METRICS


@dataclass(frozen=True)
class Row:
    """A value of a set or an average; shares, not percent."""

    name: str
    metric: str
    value: float | None = None
    """None: it was not measured."""
    note: str = ""
    """Why not, or what to know about it."""
    resize: str | None = None
    records: int | None = None
    published: tuple[tuple[float, str], ...] = ()
    """Values of the same model, and where they were published."""


@dataclass(frozen=True)
class Outcome:
    """What became of a set."""

    results: Mapping[str, Result]
    """Of each resize mode; empty where the set was not measured."""
    problem: str = "not measured yet"
    """Why not."""


def placed(suite: SuiteConfig, limit: int | None) -> dict[str, dict[str, Dataset]]:
    """Set -> resize mode -> what to measure, with paths below the root; "" stands for the model's own mode."""

    def below(path: str | None) -> str | None:
        return path if path is None or is_remote(path) else str(Path(suite.root, path))

    found: dict[str, dict[str, Dataset]] = {}
    for name, dataset in suite.datasets.items():
        changes: dict[str, Any] = {
            key: below(getattr(dataset, key, None)) for key in ("path", "class_names", "templates")
        }
        changes = {key: value for key, value in changes.items() if value is not None}
        changes |= {} if limit is None else {"limit": limit}
        modes = [dataset.resize] if dataset.resize else [*suite.resizes] or [None]
        found[name] = {mode or "": dataset.model_copy(update={**changes, "resize": mode}) for mode in modes}
    return found


def missing_sets(sets: Mapping[str, Mapping[str, Dataset]]) -> dict[str, str]:
    """Sets of which nothing is there, with the path where they are looked for.

    Raises:
        ConfigError: There is none of them.
    """
    paths = {name: next(iter(modes.values())).path for name, modes in sets.items()}
    missing: dict[str, str] = {}
    for name, path in paths.items():
        shards = expand_names(path)
        if not Path(path).is_dir() and len(missing_files(shards)) == len(shards):
            missing[name] = path
    if len(missing) == len(sets):
        raise ConfigError(f"no set of the suite is there, for instance {next(iter(paths.values()))}; check its root")
    return missing


# -------------------------------------------------------------------------------------------------------------- values


def value_of(dataset: SuiteDataset, metrics: Mapping[str, float]) -> float:
    """What a set counts for in averages."""
    if isinstance(dataset, SuiteRetrieval):
        return fmean(metrics[name] for name in EVAL_METRICS["retrieval"])
    if dataset.metric == "mean_top1_top5":
        return fmean((metrics["top1"], metrics["top5"]))
    return metrics[dataset.metric]


def rows_of(suite: SuiteConfig, outcomes: Mapping[str, Outcome], model: str | None) -> list[Row]:
    """The sets in their order, with all recalls of a retrieval set, then the averages.

    Args:
        suite: Says what counts.
        outcomes: Of every set.
        model: Whose published values are compared; None: nobody's.
    """
    published = suite.published.get(model or "", ())
    sets = [
        row
        for name, dataset in suite.datasets.items()
        for row in _set_rows(name, dataset, outcomes[name], compared=bool(published))
    ]
    values = {row.name: row.value for row in reversed(sets)}  # a set's first row counts
    averages = [row for name in suite.averages for row in _average_rows(suite, name, values)]
    firsts: set[str] = set()
    compared: list[Row] = []
    for row in (*sets, *averages):
        keys = (f"{row.name}.{row.metric}", *([] if row.name in firsts else [row.name]))
        firsts.add(row.name)
        compared.append(replace(row, published=tuple(_published(published, keys))))
    return compared


def averages_of(suite: SuiteConfig, rows: Sequence[Row]) -> list[Result]:
    """The averages that have a value, as results: of the task ``average``, with ``mean`` and perhaps ``gap``.

    Args:
        suite: Names them.
        rows: Of ``rows_of``.
    """
    found: list[Result] = []
    for name, average in suite.averages.items():
        values = [row.value for row in rows if row.name == name]
        metrics = {metric: value for metric, value in zip(AVERAGE_METRICS, values, strict=False) if value is not None}
        if metrics:
            firsts = {row.name: row.records or 0 for row in reversed(rows)}
            found.append(Result(name, "average", metrics, sum(firsts[member] for member in average.of)))
    return found


def _published(sources: Sequence[Published], keys: Sequence[str]) -> Iterator[tuple[float, str]]:
    return ((rows.values[key] / 100, rows.source) for rows in sources for key in keys if key in rows.values)


def _set_rows(name: str, dataset: SuiteDataset, outcome: Outcome, *, compared: bool) -> Iterator[Row]:
    retrieval = isinstance(dataset, SuiteRetrieval)
    metric = "mean_recall" if retrieval else dataset.metric
    if not outcome.results:
        yield Row(name, metric, note=outcome.problem)
        return
    values = {mode: value_of(dataset, result.metrics) for mode, result in outcome.results.items()}
    best = max(values, key=values.__getitem__)
    result = outcome.results[best]
    notes = [f"{mode} {100 * value:.1f}" for mode, value in values.items() if mode != best]
    if compared and dataset.records is not None and dataset.records != result.num_records:
        notes.append(f"published values are of {dataset.records:,} records")
    if result.templates:
        low, middle, high, std = (100 * result.metrics[name] for name in TEMPLATE_METRICS)
        notes.append(f"single templates {low:.1f} to {high:.1f}, median {middle:.1f}, std {std:.1f}")
    first = Row(name, metric, values[best], "; ".join(notes), best or None, result.num_records)
    yield first
    for other in EVAL_METRICS["retrieval"] if retrieval else ():
        yield replace(first, metric=other, value=result.metrics[other], note="")


def _average_rows(suite: SuiteConfig, name: str, values: Mapping[str, float | None]) -> Iterator[Row]:
    average = suite.averages[name]
    found = {member: values[member] for member in average.of}
    lacking = [member for member, value in found.items() if value is None]
    note = f"incomplete: {len(lacking)} of {len(found)} sets have no value: {', '.join(lacking)}" if lacking else ""
    mean = None if lacking else fmean(value for value in found.values() if value is not None)
    yield Row(name, f"mean of {len(found)}", mean, note)
    if average.gap_from:
        origin = values[average.gap_from]
        gap = None if mean is None or origin is None else origin - mean
        yield Row(name, f"gap: {average.gap_from} - mean", gap, "" if gap is not None else "incomplete")


# ------------------------------------------------------------------------------------------------------------- showing


def format_suite(rows: Sequence[Row]) -> str:
    """A Markdown table in percent, aligned for the terminal, and the sources of published values."""
    sources = list(dict.fromkeys(source for row in rows for _, source in row.published))
    cells = [("set", "metric", "value", "resize", "records", "published", "difference", "note")]
    for row in rows:
        published = [f"{100 * value:.1f} [{sources.index(source) + 1}]" for value, source in row.published]
        differences = [] if row.value is None else [f"{100 * (row.value - value):+.1f}" for value, _ in row.published]
        line = (
            row.name,
            row.metric,
            "none" if row.value is None else f"{100 * row.value:.1f}",
            row.resize or "",
            "" if row.records is None else f"{row.records:,}",
            ", ".join(published),
            ", ".join(differences),
            " ".join(row.note.replace("|", "\\|").split()),
        )
        cells.append(line)
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]) - 1)] + [4]  # notes are long
    right = (2, 4)
    lines = [
        "| " + " | ".join(f"{cell:{'>' if n in right else '<'}{widths[n]}}" for n, cell in enumerate(line)) + " |"
        for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 1) + ("-:"[n in right]) for n, width in enumerate(widths)) + "|"
    notes = [f"[{number}] {source}" for number, source in enumerate(sources, 1)]
    return "\n".join([lines[0], rule, *lines[1:], *([""] if notes else []), *notes])


def write_suite(folder: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write ``suite.json`` and ``suite.md``; one rank does.

    ``suite.json`` holds ``about`` and ``rows``: name, metric, value (a share, null where there is none), note, resize,
    records and ``published``, a list of value, source and difference.
    """
    plain: list[dict[str, Any]] = []
    for row in rows:
        published = [
            {"value": value, "source": source, "difference": None if row.value is None else row.value - value}
            for value, source in row.published
        ]
        plain.append({**asdict(row), "published": published})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "suite.json", {**about, "rows": plain}, indent=2)
    heading = "\n".join(f"- {key}: {value}" for key, value in about.items() if value is not None)
    write_text(folder / "suite.md", f"# Evaluation suite\n\n{heading}\n\n{format_suite(rows)}\n")
