"""``evaclip evaluate``: measure a run, a checkpoint or an export, on one rank or, under torchrun, on several."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evaclip import api
from evaclip.checkpoint import CheckpointReader, find_checkpoint
from evaclip.config import DataConfig, EvalConfig
from evaclip.distributed import Ranks, agreed, started
from evaclip.engine.prepare import PreparedTowers
from evaclip.errors import ConfigError, DataError, writing
from evaclip.evaluation import format_table, measure, open_bench, write_results
from evaclip.evaluation.results import Result
from evaclip.evaluation.suite import Outcome, Row, format_suite, missing_sets, placed, rows_of, write_suite
from evaclip.evaluation.suite_plot import plot_suite
from evaclip.loss import Similarity
from evaclip.weights.origin import ABOUT

if TYPE_CHECKING:
    from evaclip.config import Dataset, ModelConfig, SuiteConfig


@dataclass(frozen=True)
class _Opened:
    """A model, ready to be measured."""

    place: Path
    model: ModelConfig
    datasets: Mapping[str, Dataset]
    """Its run's own."""
    ranks: Ranks
    measure: Callable[[str, Dataset], Result]


@contextmanager
def _opened(path: Path, *, batch: int | None, precision: str | None, ema: bool) -> Generator[_Opened]:
    """The model at ``path``, and the ranks that measure it."""
    with started(need_group=False) as ranks:
        with agreed(ranks):
            exported = (path / ABOUT).is_file()
            own = (path if exported else find_checkpoint(path)) if ranks.is_main else None
        place = ranks.from_main(own)
        assert place is not None
        run = None if exported else CheckpointReader(place).config
        evaluation, data = (run.eval, run.data) if run else (EvalConfig(), DataConfig.model_construct())
        clip = api.load(place, device=ranks.device, ema=ema)
        similarity = Similarity(clip.logit_scale, clip.logit_bias)
        bench = open_bench(
            PreparedTowers(clip.model, precision or (run.train.precision if run else "fp32"), ranks.device),
            clip.config,
            ranks,
            batch=batch or evaluation.batch,
            workers=data.workers,
            max_image_pixels=data.max_image_pixels,
        )

        def one(name: str, dataset: Dataset) -> Result:
            return measure(name, dataset, bench, data.index_dir, similarity)

        yield _Opened(place, clip.config, evaluation.datasets, ranks, one)


def evaluate_checkpoint(
    path: Path,
    datasets: Mapping[str, Dataset] | None,
    *,
    limit: int | None,
    batch: int | None,
    precision: str | None,
    output: Path | None,
    ema: bool = False,
) -> None:
    """Evaluate and print a table.

    Args:
        path: Run directory, checkpoint or export.
        datasets: What to measure; None: the run's own.
        limit: Only so many records of each dataset.
        batch: Images per rank and forward pass; None: the run's.
        precision: bf16, fp16 or fp32; None: the run's (fp32 for bf16_weights, whose masters are loaded), and fp32 of an
            export.
        output: Where ``evaluation.json`` and predictions are written.
        ema: Measure the averaged weights of the run.

    Raises:
        EvaclipError: With a message for the user.
    """
    with _opened(path, batch=batch, precision=precision, ema=ema) as opened:
        chosen = opened.datasets if datasets is None else dict(datasets)
        if limit is not None:
            chosen = {name: dataset.model_copy(update={"limit": limit}) for name, dataset in chosen.items()}
        if not chosen:
            raise ConfigError(f"{opened.place} names no datasets; give one with --dataset PATH")
        results = [opened.measure(name, dataset) for name, dataset in chosen.items()]
        if opened.ranks.is_main:
            print(f"{opened.place}\n{format_table(results)}")  # noqa: T201  what the command is for
            if output:
                with writing(f"--output {output}"):
                    write_results(output, results)


def evaluate_suite(
    path: Path,
    suite: SuiteConfig,
    *,
    limit: int | None,
    batch: int | None,
    precision: str | None,
    output: Path | None,
    ema: bool = False,
) -> None:
    """Measure the sets of a suite, print a table, and write ``suite.json``, ``suite.md`` and ``suite.png``.

    A set that is not there is listed; one that cannot be used is left behind and named at the end, so that it does not
    cost the others. What is measured so far is written after each set.

    Args:
        path: Run directory, checkpoint or export.
        suite: What to measure.
        limit: Only so many records of each set; nothing published is compared then.
        batch: As of ``evaluate_checkpoint``.
        precision: As of ``evaluate_checkpoint``.
        output: Where the files are written, and those of ``evaluate_checkpoint``.
        ema: As of ``evaluate_checkpoint``.

    Raises:
        DataError: Sets that are there could not be measured.
        EvaclipError: With a message for the user.
    """
    with _opened(path, batch=batch, precision=precision, ema=ema) as opened:
        ranks, sets = opened.ranks, placed(suite, limit)
        missing: dict[str, str] = {}
        with agreed(ranks):
            missing = missing_sets(sets) if ranks.is_main else {}
        missing = ranks.from_main(missing)
        outcomes = {name: Outcome({}) for name in sets}
        outcomes |= {name: Outcome({}, f"missing: {place} does not exist") for name, place in missing.items()}
        model = opened.model.name
        about = {"checkpoint": str(opened.place), "model": model, "limit": limit}
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
        if ranks.is_main:
            print(f"{opened.place}\n{format_suite(rows)}")  # noqa: T201  what the command is for
            if output:
                with writing(f"--output {output}"):
                    write_results(output, [r for outcome in outcomes.values() for r in outcome.results.values()])
                    plot_suite(rows, f"{opened.place}, {model or 'no published model'}", output / "suite.png")
        if failed:
            several = "; ".join(f"{name}: {message}" for name, message in failed.items())
            error = DataError(f"{len(failed)} of {len(sets)} sets could not be measured: {several}")
            error.on_all_ranks = True
            raise error


def _tell(rows: list[Row], name: str) -> None:
    row = next(row for row in rows if row.name == name)
    told = row.note if row.value is None else f"{row.metric} {100 * row.value:.2f} of {row.records:,} records"
    print(f"{name}: {told}", flush=True)  # noqa: T201  hours may pass until the table
