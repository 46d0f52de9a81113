"""What is measured on data that was not trained on: zero-shot classification, linear probe, retrieval, validation loss.

Every rank calls ``evaluate`` and gets all results; values do not depend on the number of ranks beyond the rounding of
the features. Which set is measured how is the configuration's to say, when it happens the loop's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import assert_never

from evaclip.config import (
    Dataset,
    EvalConfig,
    LinearProbeDataset,
    ModelConfig,
    RetrievalDataset,
    ValidationLossDataset,
    ZeroShotDataset,
)
from evaclip.data.file_tokenizer import tokenizer_of
from evaclip.distributed import Ranks, agreed
from evaclip.evaluation.encoding import Bench, Encoder
from evaclip.evaluation.linear_probe import probe
from evaclip.evaluation.results import Predictions, Result, format_table, write_results
from evaclip.evaluation.retrieval import retrieve
from evaclip.evaluation.validation_loss import measure_loss
from evaclip.evaluation.zero_shot import classify
from evaclip.loss import Similarity

__all__ = [
    "Encoder",
    "Predictions",
    "Result",
    "evaluate",
    "format_table",
    "measure",
    "open_bench",
    "write_results",
]

_tokenizer = lru_cache(maxsize=1)(tokenizer_of)  # building one takes longer than a small set


def evaluate(
    encoder: Encoder,
    similarity: Similarity,
    config: EvalConfig,
    model: ModelConfig,
    ranks: Ranks,
    *,
    workers: int,
    index_dir: str | None,
    max_image_pixels: int,
    between: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """Measure the datasets of a configuration, one after the other.

    Args:
        encoder: The two towers, on ``ranks.device``.
        similarity: From cosines to logits, for the validation loss.
        config: Names the sets and the batch.
        model: What the encoder was made from: image size, normalisation, tokenizer, context length.
        ranks: Every rank must call this and take all results.
        workers: Processes per rank that read and decode; 0: this one does.
        index_dir: Where shard indexes are kept; None: beside each shard.
        max_image_pixels: Larger images are refused.
        between: Called before each batch of images; an ``EvaclipError`` that it raises on one rank is raised on all.

    Yields:
        A result per set; iterating over one gives ``(eval/NAME/METRIC, value)``.

    Raises:
        ConfigError: On every rank, if the tokenizer's file cannot be used.
        DataError: On every rank, if something in a set is missing or wrong; nothing is skipped.
    """
    bench = open_bench(
        encoder,
        model,
        ranks,
        batch=config.batch,
        workers=workers,
        max_image_pixels=max_image_pixels,
        between=between,
    )
    for name, dataset in config.datasets.items():
        yield measure(name, dataset, bench, index_dir, similarity)


def open_bench(
    encoder: Encoder,
    model: ModelConfig,
    ranks: Ranks,
    *,
    batch: int,
    workers: int,
    max_image_pixels: int,
    between: Callable[[], None] = lambda: None,
) -> Bench:
    """What ``measure`` measures on; arguments and errors as of ``evaluate``."""
    with agreed(ranks):
        tokenizer = _tokenizer(model.text)  # type: ignore[arg-type]  sections are frozen, so they have a hash
    return Bench(encoder, model, tokenizer, ranks, batch, workers, max_image_pixels, between)


def measure(name: str, dataset: Dataset, bench: Bench, index_dir: str | None, similarity: Similarity) -> Result:
    """Measure one set as its configuration says; as ``evaluate``."""
    match dataset:
        case ZeroShotDataset():
            return classify(name, dataset, bench, index_dir)
        case LinearProbeDataset():
            return probe(name, dataset, bench, index_dir)
        case RetrievalDataset():
            return retrieve(name, dataset, bench, index_dir)
        case ValidationLossDataset():
            return measure_loss(name, dataset, bench, index_dir, similarity)
        case _:
            assert_never(dataset)
