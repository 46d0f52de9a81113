"""``evaclip evaluate``: measure a run, a checkpoint or an export, on one rank or, under torchrun, on several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evaclip import api
from evaclip.checkpoint import CheckpointReader
from evaclip.config import DataConfig, EvalConfig
from evaclip.distributed import Ranks, agreed, started
from evaclip.engine.prepare import PreparedTowers
from evaclip.errors import ConfigError, DataError, writing
from evaclip.evaluation import format_table, measure, open_bench, write_results
from evaclip.evaluation.results import Result
from evaclip.evaluation.suite import (
    Outcome,
    Row,
    averages_of,
    format_suite,
    missing_sets,
    placed,
    rows_of,
    write_suite,
)
from evaclip.evaluation.suite_plot import plot_suite
from evaclip.loss import Similarity
from evaclip.weights.origin import ABOUT
from evaclip.weights.stored import find_model

if TYPE_CHECKING:
    from evaclip.config import Dataset, ModelConfig, SuiteConfig


@dataclass(frozen=True)
class Request:
    """What is to be measured, and how."""

    datasets: Mapping[str, Dataset] | None = None
    """None: the suite's, or the run's own."""
    suite: SuiteConfig | None = None
    """Many sets, with averages and published values."""
    limit: int | None = None
    """Only so many records of each dataset; nothing published is compared then."""
    batch: int | None = None
    """Images per rank and forward pass; None: the run's."""
    precision: str | None = None
    """bf16, fp16 or fp32; None: the run's (fp32 for bf16_weights, whose masters are loaded), and fp32 of an export."""
    output: Path | None = None
    """Where ``evaluation.json`` and predictions are written, and a suite's table and plot."""
    ema: bool = False
    """Measure the averaged weights of the run."""


@dataclass(frozen=True)
class _Opened:
    """A model, ready to be measured."""

    name: Path
    """What it is called."""
    model: ModelConfig
    datasets: Mapping[str, Dataset]
    """Its run's own."""
    ranks: Ranks
    measure: Callable[[str, Dataset], Result]


def evaluate_model(path: Path, request: Request) -> None:
    """Measure a model and print a table.

    Args:
        path: Run directory, checkpoint or export.
        request: What to measure.

    Raises:
        DataError: A set cannot be used; of a suite the others are measured and written first.
        EvaclipError: With a message for the user.
    """
    with started(need_group=False) as ranks:
        with agreed(ranks):
            own = find_model(path) if ranks.is_main else None
        place = ranks.from_main(own)
        assert place is not None
        measure_model(place, request, ranks)


def measure_model(place: Path, request: Request, ranks: Ranks, name: Path | None = None) -> list[Result]:
    """The same on ranks that have met already; every rank calls this and gets all results.

    Args:
        place: Checkpoint or export.
        request: What to measure.
        ranks: Who measures.
        name: What the model is called; None: its place.
    """
    opened = _open(place, request, ranks, name or place)
    if request.suite:
        return _measure_suite(opened, request.suite, request)
    return _measure_datasets(opened, request)


def _open(place: Path, request: Request, ranks: Ranks, name: Path) -> _Opened:
    run = None if (place / ABOUT).is_file() else CheckpointReader(place).config
    evaluation, data = (run.eval, run.data) if run else (EvalConfig(), DataConfig.model_construct())
    clip = api.load(place, device=ranks.device, ema=request.ema)
    similarity = Similarity(clip.logit_scale, clip.logit_bias)
    bench = open_bench(
        PreparedTowers(clip.model, request.precision or (run.train.precision if run else "fp32"), ranks.device),
        clip.config,
        ranks,
        batch=request.batch or evaluation.batch,
        workers=data.workers,
        max_image_pixels=data.max_image_pixels,
    )

    def one(name: str, dataset: Dataset) -> Result:
        return measure(name, dataset, bench, data.index_dir, similarity)

    return _Opened(name, clip.config, evaluation.datasets, ranks, one)


def _measure_datasets(opened: _Opened, request: Request) -> list[Result]:
    chosen = opened.datasets if request.datasets is None else dict(request.datasets)
    if request.limit is not None:
        chosen = {name: dataset.model_copy(update={"limit": request.limit}) for name, dataset in chosen.items()}
    if not chosen:
        raise ConfigError(f"{opened.name} names no datasets; give one with --dataset PATH")
    results = [opened.measure(name, dataset) for name, dataset in chosen.items()]
    if opened.ranks.is_main:
        print(f"{opened.name}\n{format_table(results)}", flush=True)  # noqa: T201  what the command is for
        if request.output:
            with writing(f"--output {request.output}"):
                write_results(request.output, results)
    return results


def _measure_suite(opened: _Opened, suite: SuiteConfig, request: Request) -> list[Result]:
    """Measure the sets of a suite, print a table, and write ``suite.json``, ``suite.md`` and ``suite.png``.

    A set that is not there is listed; one that cannot be used is left behind and named at the end, so that it does not
    cost the others. What is measured so far is written after each set.
    """
    ranks, limit, output = opened.ranks, request.limit, request.output
    sets = placed(suite, limit)
    missing: dict[str, str] = {}
    with agreed(ranks):
        missing = missing_sets(sets) if ranks.is_main else {}
    missing = ranks.from_main(missing)
    outcomes = {name: Outcome({}) for name in sets}
    outcomes |= {name: Outcome({}, f"missing: {place} does not exist") for name, place in missing.items()}
    model = opened.model.name
    about = {"checkpoint": str(opened.name), "model": model, "limit": limit}
    failed: dict[str, str] = {}
    rows: list[Row] = []
    for name in (name for name in sets if name not in missing):
        try:
            found = {
                mode: opened.measure(f"{name}.{mode}" if len(sets[name]) > 1 else name, dataset)
                for mode, dataset in sets[name].items()
            }
            outcomes[name] = Outcome(found)
        except DataError as error:
            failed[name] = str(error)
            outcomes[name] = Outcome({}, f"failed: {error}")
        rows = rows_of(suite, outcomes, model if limit is None else None)
        with agreed(ranks), writing(f"--output {output}"):
            if ranks.is_main:
                _tell(rows, name)
                if output:
                    write_suite(output, rows, about)
    results = [result for outcome in outcomes.values() for result in outcome.results.values()]
    results += averages_of(suite, rows)
    if ranks.is_main:
        print(f"{opened.name}\n{format_suite(rows)}", flush=True)  # noqa: T201  what the command is for
        if output:
            with writing(f"--output {output}"):
                write_results(output, results)
                plot_suite(rows, f"{opened.name}, {model or 'no published model'}", output / "suite.png")
    if failed:
        several = "; ".join(f"{name}: {message}" for name, message in failed.items())
        error = DataError(f"{len(failed)} of {len(sets)} sets could not be measured: {several}")
        error.on_all_ranks = True
        raise error
    return results


def _tell(rows: list[Row], name: str) -> None:
    row = next(row for row in rows if row.name == name)
    told = row.note if row.value is None else f"{row.metric} {100 * row.value:.2f} of {row.records:,} records"
    print(f"{name}: {told}", flush=True)  # noqa: T201  hours may pass until the table
