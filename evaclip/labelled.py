"""A labelled set in two splits, and its training split as an endless order of samples that is arithmetic.

Sample n of a run is the record to which pass n // N over the N records permutes n % N, cut out and mirrored as a hash
of seed, pass and record says. Nothing here knows ranks' work, towers or heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor
from torch.utils.data import Dataset

from evaclip.config import DataConfig, FinetuneConfig, ImageConfig, ZeroShotDataset
from evaclip.config_file import validate
from evaclip.data.images import decode, min_decode_size, train_crop
from evaclip.data.order import hash64, permute
from evaclip.data.workers import loader
from evaclip.distributed import Ranks, agreed
from evaclip.errors import DataError
from evaclip.evaluation.datasets import (
    Records,
    ShardRecords,
    class_names_of,
    image_of,
    label_of,
    open_splits,
    require_classes,
    templates_of,
)
from evaclip.evaluation.image_folder import ImageFolder

MAX_PIXELS: int = DataConfig.model_fields["max_image_pixels"].default
_ORDER, _SAMPLE = 0x6F726465, 0x73616D70
"""What hashes are drawn for (ASCII "orde" and "samp")."""


class Sets(NamedTuple):
    """A labelled set in two splits."""

    train: Records
    test: Records
    names: list[str]
    """Of the classes, by label."""
    templates: list[str]
    """Of a zero-shot head; empty for others."""

    def identity(self) -> dict[str, str]:
        """What the set is, wherever it lies; of folders the names of the files count, not their content."""
        found: dict[str, str] = {}
        for name, records in (("train", self.train), ("test", self.test)):
            source = records.source
            content = source.shards.digests if isinstance(source, ShardRecords) else (source.classes, source.records)
            found[name] = f"{len(records)} records, digest {xxhash.xxh3_64_hexdigest(json.dumps(content).encode())}"
        words = json.dumps([self.names, self.templates]).encode()
        return {**found, "classes": f"{len(self.names)}, digest {xxhash.xxh3_64_hexdigest(words)}"}


def open_sets(path: str, config: FinetuneConfig, ranks: Ranks) -> Sets:
    """Find and count both splits; communicates as ``open_splits``.

    Raises:
        DataError: A split, the names of the classes or the templates are missing, or the splits' classes differ.
    """
    dataset = validate(
        {"path": path, "class_names": config.class_names, "templates": config.templates, "split": config.test_split},
        "DATASET",
        ZeroShotDataset,
    )
    train, test = open_splits(dataset, config.train_split, None, ranks)
    names: list[str] = []
    templates: list[str] = []
    with agreed(ranks):
        names = _class_names(train, dataset, config)
        templates = templates_of(dataset) if config.head == "zero_shot" else []
    return Sets(train, test, names, templates)


def _class_names(train: Records, dataset: ZeroShotDataset, config: FinetuneConfig) -> list[str]:
    own = train.source
    named = dataset.class_names or (Path(dataset.path) / "classnames.txt").is_file()
    if isinstance(own, ImageFolder) and not named and config.head == "zero":
        return list(own.classes)
    names = class_names_of(dataset)
    require_classes(train, names)
    return names


# ------------------------------------------------------------------------------------------------------------ samples


class Batch(NamedTuple):
    """Training samples."""

    images: Tensor
    """uint8 [batch, 3, size, size]."""
    labels: Tensor
    """int64 [batch]."""
    seeds: Tensor
    """int64 [batch], 63 bits each."""


def epoch_ends(records: int, batch: int, epochs: int) -> list[int]:
    """Updates after which a pass is over; the last one of all takes what it needs beyond it."""
    return sorted({-(-epoch * records // batch) for epoch in range(1, epochs + 1)})


class Samples(Dataset[Any]):
    """Square, label and seed by the number of the sample; an error is a value, as in evaluation."""

    def __init__(self, sets: Sets, image: ImageConfig, config: FinetuneConfig) -> None:
        self.records, self.num_classes, self.image = sets.train, len(sets.names), image
        self.seed, self.augment = config.seed, config.augment

    def place(self, number: int) -> tuple[int, int]:
        """Record, and seed of all that is random about the sample."""
        epoch, place = divmod(number, len(self.records))
        record = permute(place, len(self.records), hash64(self.seed, _ORDER, epoch))
        return record, hash64(self.seed, _SAMPLE, epoch, record) >> 1

    def __getitem__(self, number: int) -> tuple[Tensor, int, int] | DataError:
        at, seed = self.place(number)
        try:
            record = self.records.read(at)
            (image,) = image_of(record, self.image, MAX_PIXELS, self.records.dataset, partial(self._square, seed=seed))
            return image, label_of(record, self.num_classes), seed
        except DataError as error:
            return error

    def _square(self, data: bytes, seed: int) -> Tensor:
        least = min_decode_size(self.image.image_size, self.augment)
        pixels = decode(data, max_pixels=MAX_PIXELS, min_size=least)
        return train_crop(pixels, self.image.image_size, self.augment, seed)


def batches(samples: Samples, spans: Sequence[Sequence[int]], *, workers: int, pin: bool) -> Iterator[Batch]:
    """Samples by their numbers, read ahead by so many processes, into page-locked memory if asked.

    Raises:
        DataError: A record cannot be used; names it.
    """
    options: dict[str, Any] = {"batch_sampler": spans, "collate_fn": _collate, "generator": torch.Generator()}
    for batch in loader(samples, workers=min(workers, len(spans)), pin_memory=pin, **options):
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _collate(items: Sequence[tuple[Tensor, int, int] | DataError]) -> Batch | DataError:
    samples: list[tuple[Tensor, int, int]] = []
    for item in items:
        if isinstance(item, DataError):
            return item
        samples.append(item)
    images, labels, seeds = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(seeds))
