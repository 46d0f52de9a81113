"""``evaclip inspect``: what the first steps of a run feed the model, as a contact sheet and in numbers.

Samples come out of the stream that training reads, kept patches out of the function by which the image tower draws
them. No weights are needed, and no run directory is made. Of large batches the first slots are read, as one rank of
several would do: what a sample is does not depend on the others.
"""

from __future__ import annotations

import io
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaclip.config import ImageTowerConfig, ModelConfig, RunConfig
from evaclip.contact_sheet import Tile, draw
from evaclip.data.batch import Place
from evaclip.data.file_tokenizer import tokenizer_of
from evaclip.data.order import Plan, choose_slots
from evaclip.data.pipeline import BadRecord, Stream, make_plan
from evaclip.data.readers import OpenedSource
from evaclip.distributed import Ranks
from evaclip.errors import ConfigError
from evaclip.models.token_drop import kept_patches
from evaclip.picture import require_png, write_png
from evaclip.sources import open_sources

_LEAST_SAMPLES = 256
"""Of a step, so that shares and lengths mean something."""
_WARM_UP = 2
"""Steps that a worker delivers before the loader's rate is taken: processes start, then queues fill."""
_MOST_NAMES = 3


class Sample(NamedTuple):
    """One sample that is shown."""

    step: int
    number: int
    """Within the step."""
    place: Place
    seed: int
    pixels: NDArray[np.uint8]
    """[size, size, 3]."""
    tokens: list[int]


@dataclass
class Reading:
    """What was found in the steps that were read."""

    workers: int
    per_step: int
    """Samples that were read of each step."""
    shown: list[Sample] = field(default_factory=list)
    sources: Counter[int] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens of a caption -> captions."""
    skipped: list[BadRecord] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """When each step had come, since the loader was asked for the first one."""


def inspect(config: RunConfig, *, batches: int, samples: int, output: Path) -> str:
    """Read the first steps and draw some of their samples.

    Args:
        config: Of the run.
        batches: How many steps are read.
        samples: How many of their samples are drawn, evenly spread.
        output: PNG to be written.

    Returns:
        Numbers for people.

    Raises:
        ConfigError: The batch cannot be dealt to slots, or ``output`` is no PNG.
        DataError: The sources cannot be used.
    """
    require_png(output)
    alone = Ranks()
    sources = open_sources(config, alone)
    plan = make_plan(config, sources, choose_slots(config.train.global_batch, alone.world_size, config.data.slots))
    reading = read(config, plan, sources, batches=batches, samples=samples)
    readers = [source.reader for source in sources.values()]
    sizes = [readers[source].stored_size(*at) for _, _, (source, *at), *_ in reading.shown]
    tiles = tiles_of(reading.shown, sizes, config.model, plan, sources)
    size, kept = config.model.image.image_size, tiles[0].kept
    what = f"{size} x {size} pixels" + ("" if kept.all() else f", {kept.sum()} of {kept.size} patches kept")
    steps = "step 1" if batches == 1 else f"steps 1 to {batches}"
    file = io.BytesIO()
    sheet = draw(f"{len(tiles)} samples of {steps}", what + ("" if kept.all() else ", grey ones are dropped"), tiles)
    sheet.save(file, "PNG")
    write_png(output, file.getvalue())
    return "\n".join([*report(reading, sizes, config, plan), f"{output}: {len(tiles)} samples, {what}"])


# ------------------------------------------------------------------------------------------------------------- reading


def first_rank(config: RunConfig, slots: int, least: int) -> Ranks:
    """The first of as many ranks as leave each ``least`` samples of a step, and a slot for every worker."""
    needed = max(config.data.workers, -(-least * slots // config.train.global_batch))
    worlds = (world for world in range(slots, 1, -1) if slots % world == 0 and slots // world >= needed)
    return Ranks(0, next(worlds, 1))


def read(config: RunConfig, plan: Plan, sources: Mapping[str, OpenedSource], *, batches: int, samples: int) -> Reading:
    """Take steps as training does; next to nothing else happens in between, so that the loader's rate can be told."""
    one = first_rank(config, plan.slots, max(_LEAST_SAMPLES, -(-samples // batches)))
    stream = Stream(config, plan, sources, one, steps=batches, states={})
    reading = Reading(min(config.data.workers, len(stream.slots)), config.train.global_batch // one.world_size)
    total = batches * reading.per_step
    wanted = np.linspace(0, total - 1, min(samples, total)).round().astype(int).tolist()
    start = time.perf_counter()
    for step, delivery in enumerate(stream):
        reading.seconds.append(time.perf_counter() - start)
        (batch,) = delivery.micro_batches
        reading.sources.update(place.source for place in batch.places)
        reading.lengths.update(dict(batch.text.groups))
        reading.skipped += delivery.skipped
        captions = batch.text.captions()
        for number in (n - step * reading.per_step for n in wanted if n // reading.per_step == step):
            seed, pixels = int(batch.seeds[number]), batch.images[number].permute(1, 2, 0).numpy().copy()
            reading.shown.append(Sample(step + 1, number + 1, batch.places[number], seed, pixels, captions[number]))
    return reading


def tiles_of(
    shown: Sequence[Sample],
    sizes: Sequence[tuple[int, int]],
    model: ModelConfig,
    plan: Plan,
    sources: Mapping[str, OpenedSource],
) -> list[Tile]:
    """What is drawn of samples, whose stored images have these widths and heights."""
    tokenizer = tokenizer_of(model.text)
    kept = kept_grids(model, torch.tensor([sample.seed for sample in shown]))
    tiles: list[Tile] = []
    for sample, (width, height), patches in zip(shown, sizes, kept, strict=True):
        place, name = sample.place, plan.sources[sample.place.source].name
        record = sources[name].reader.record_name(place.shard, place.record).rpartition("/")[2]
        heading = f"pass {pass_of(sample, plan)}, step {sample.step}, no. {sample.number}"
        facts = record, f"stored {width} x {height}, {len(sample.tokens)} tokens"
        tiles.append(Tile(sample.pixels, patches, name, facts, heading, tokenizer.decode(sample.tokens)))
    return tiles


def pass_of(sample: Sample, plan: Plan) -> int:
    """The pass over its source, from 0, that gives a sample its seed."""
    source, shard, record = sample.place
    return next(number for number in count() if plan.sample_seed(source, number, shard, record) == sample.seed)


def kept_grids(model: ModelConfig, seeds: Tensor) -> NDArray[np.bool_]:
    """Which patches the image tower takes of each sample: [samples, rows, columns], one patch where none are dropped.

    Raises:
        ConfigError: A tower of timm whose patches are no square grid.
    """
    patches = _num_patches(model)
    grid = math.isqrt(patches)
    if grid * grid != patches:
        raise ConfigError(
            f"the image tower drops some of {patches} patches, which are no square grid and cannot be drawn; "
            f"set model.image.token_drop=0 to see the images"
        )
    kept = torch.zeros(len(seeds), patches, dtype=torch.bool)
    kept.scatter_(1, kept_patches(seeds, patches, model.image.kept_of(patches)), value=True)
    return kept.view(-1, grid, grid).numpy()


def _num_patches(model: ModelConfig) -> int:
    """Of which some are dropped; 1 where none are. A tower of timm is built for it, without storage."""
    if model.image.token_drop == 0:
        return 1
    if isinstance(model.image, ImageTowerConfig):
        return model.image.grid**2
    from evaclip.models.timm_tower import TimmTower  # noqa: PLC0415  seconds, and not always needed

    return TimmTower(model.image, model.embed_dim).patches


# ------------------------------------------------------------------------------------------------------------- numbers


def report(reading: Reading, sizes: Sequence[tuple[int, int]], config: RunConfig, plan: Plan) -> list[str]:
    """The numbers in words."""
    batch, context = config.train.global_batch, config.model.text.context_length
    steps, samples = len(reading.seconds), reading.sources.total()
    part = f"all {batch:,}" if reading.per_step == batch else f"the first {reading.per_step:,} of {batch:,}"
    lines = [f"{steps} steps from step 1, {part} samples of each: {samples:,}"]
    weights = sum(source.weight for source in plan.sources)
    for number, source in enumerate(plan.sources):
        got = reading.sources[number]
        lines.append(
            f"source {source.name}: {got:,} samples, {got / samples:.1%}; its weight asks for "
            f"{source.weight / weights:.1%}; {source.layout.num_records:,} records"
        )
    lengths = np.repeat(list(reading.lengths), list(reading.lengths.values()))
    lines.append(
        f"caption tokens: {_quantiles(lengths)}; {np.mean(lengths == context):.1%} fill the context of {context}, "
        f"cut unless they just fit"
    )
    shorter = np.array([min(size) for size in sizes])
    lines.append(f"shorter side of the {len(sizes)} stored images drawn: {_quantiles(shorter)} pixels")
    if reading.skipped:
        reasons = Counter(record.reason for record in reading.skipped)
        told = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())
        first = ", ".join(f"{record.name} ({record.reason})" for record in reading.skipped[:_MOST_NAMES])
        lines.append(f"skipped as unusable: {told}; {'first ' * (len(reading.skipped) > _MOST_NAMES)}{first}")
    return [*lines, f"loader: {_rate(reading, config)}"]


def _quantiles(values: NDArray[np.int64]) -> str:
    low, middle, high, most = np.percentile(values, [0, 50, 95, 100], method="inverted_cdf").tolist()
    return f"min {low}, median {middle}, p95 {high}, max {most}"


def _rate(reading: Reading, config: RunConfig) -> str:
    """Samples per second between two steps that came when the loader was warm."""
    steps = len(reading.seconds)
    who = f"{reading.workers} workers" if reading.workers else "the training process itself (data.workers 0)"
    if config.train.overfit_one_batch:
        return f"read one batch by {who} in {reading.seconds[0]:.1f} s, and repeats it (train.overfit_one_batch)"
    if steps < _WARM_UP + 2:
        return f"{who}, first step after {reading.seconds[0]:.1f} s; its rate takes --batches {_WARM_UP + 2} or more"
    rate = (steps - _WARM_UP) * reading.per_step / (reading.seconds[-1] - reading.seconds[_WARM_UP - 1])
    return (
        f"{rate:,.0f} samples/s by {who} for one rank alone on this machine, in steps {_WARM_UP + 1} to {steps}; "
        f"the first step came after {reading.seconds[0]:.1f} s"
    )
