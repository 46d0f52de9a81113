"""``evaclip evaluate``: measure what a run or a checkpoint holds, on one rank or, under torchrun, on several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from evaclip import api
from evaclip.checkpoint import CheckpointReader, find_checkpoint
from evaclip.distributed import agreed, started
from evaclip.engine.prepare import PreparedTowers
from evaclip.errors import ConfigError, writing
from evaclip.evaluation import evaluate, format_table, write_results
from evaclip.loss import Similarity

if TYPE_CHECKING:
    from evaclip.config import Dataset


def evaluate_checkpoint(
    path: Path,
    datasets: Mapping[str, Dataset] | None,
    *,
    limit: int | None,
    batch: int | None,
    precision: str | None,
    output: Path | None,
) -> None:
    """Evaluate and print a table.

    Args:
        path: Run directory or checkpoint.
        datasets: What to measure; None: the run's own.
        limit: Only so many records of each dataset.
        batch: Images per rank and forward pass; None: the run's.
        precision: bf16, fp16 or fp32; None: the run's (fp32 for bf16_weights, whose masters are loaded).
        output: Where ``evaluation.json`` and predictions are written.

    Raises:
        EvaclipError: With a message for the user.
    """
    with started(need_group=False) as ranks:
        with agreed(ranks):
            own = find_checkpoint(path) if ranks.is_main else None
        checkpoint = ranks.from_main(own)
        assert checkpoint is not None
        config = CheckpointReader(checkpoint).config
        chosen = config.eval.datasets if datasets is None else dict(datasets)
        if limit is not None:
            chosen = {name: dataset.model_copy(update={"limit": limit}) for name, dataset in chosen.items()}
        if not chosen:
            raise ConfigError(f"{checkpoint} names no datasets; give one with --dataset PATH")
        clip = api.load(checkpoint, device=ranks.device)
        results = list(
            evaluate(
                PreparedTowers(clip.model, precision or config.train.precision, ranks.device),
                Similarity(clip.logit_scale, clip.logit_bias),
                config.eval.model_copy(update={"datasets": chosen, "batch": batch or config.eval.batch}),
                config.model,
                ranks,
                workers=config.data.workers,
                index_dir=config.data.index_dir,
                max_image_pixels=config.data.max_image_pixels,
            )
        )
        if ranks.is_main:
            print(f"{checkpoint}\n{format_table(results)}")  # noqa: T201  what the command is for
            if output:
                with writing(f"--output {output}"):
                    write_results(output, results)
