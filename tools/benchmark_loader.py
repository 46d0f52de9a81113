"""What accounts and determinism cost the loader: the stream against the same reading without them.

    python tools/benchmark_loader.py

Both sides read the same records by offset, decode, crop and tokenize them with the same code, and join batches, in one
process without workers. The plain side leaves out what the promises need: checksums, an order and crops that are
functions of the seed, slot states and their balance; it takes records in the order of a shuffled list and draws from
Python's generator. A slot gives 16 samples to a step, as with 256 slots and a global batch of 4,096. The sides take
their steps in turn, so that other work on the machine meets both; figures are medians over rounds of processor time,
the ratio is the median of each round's ratio.

The script fails if the two sides do not read the same records of a pass, or not the same pixels of a record.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from evaclip.config import RunConfig
from evaclip.data import captions, images
from evaclip.data.accounts import account, require_balance
from evaclip.data.batch import Place
from evaclip.data.index import ShardIndex, build_index
from evaclip.data.order import SlotState
from evaclip.data.pipeline import Part, Stream, make_plan
from evaclip.data.readers import ShardReader
from evaclip.data.shards import Record, write_shards
from evaclip.data.storage import open_file
from evaclip.distributed import Ranks
from evaclip.sources import open_sources

ALLOWED = 1.05
"""Most that the stream may cost, of the plain side."""
_PER_SLOT = 16


def picture(number: int, size: int) -> bytes:
    """A JPEG of smooth colours and some noise, about as large as a photograph of that size."""
    generator = np.random.default_rng(number)
    coarse = torch.from_numpy(generator.uniform(0, 255, (1, 3, 12, 12)))
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")[0].permute(1, 2, 0).numpy()
    pixels = np.clip(smooth + generator.normal(0, 12, (size, size, 3)), 0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=85, colorspace="RGB")


class PlainShards:
    """Records by offset, believed as they are."""

    def __init__(self, paths: list[Path]) -> None:
        self.files = [open_file(str(path)) for path in paths]
        self.indexes: list[ShardIndex] = [build_index(path) for path in paths]

    def read(self, shard: int, record: int) -> Record:
        """One request per record, as on the other side."""
        index = self.indexes[shard]
        first, last = int(index.starts[record]), int(index.starts[record + 1]) - 1
        start = int(index.offsets[first])
        data = self.files[shard].read(start, int(index.offsets[last] + index.sizes[last]) - start)
        members = {
            index.extensions[index.kinds[m]]: data[index.offsets[m] - start :][: index.sizes[m]]
            for m in range(first, last + 1)
        }
        return Record(index.keys[record], members)


def plain_parts(reader: ShardReader, shards: PlainShards, batch: int, steps: int) -> Iterator[Part]:
    """Shuffled records as parts, without states."""
    reader = dataclasses.replace(reader, shards=shards)  # type: ignore[arg-type]
    places = [(shard, n) for shard, index in enumerate(shards.indexes) for n in range(index.num_records)]
    random.shuffle(places)
    for step in range(steps):
        own = [places[number % len(places)] for number in range(step * batch, (step + 1) * batch)]
        seeds = [random.getrandbits(63) for _ in own]
        samples = [reader.load(shard, record, seed) for (shard, record), seed in zip(own, seeds, strict=True)]
        yield Part(
            torch.stack([sample.image for sample in samples]),
            torch.tensor([token for sample in samples for token in sample.tokens], dtype=torch.int32),
            [len(sample.tokens) for sample in samples],
            torch.tensor(seeds, dtype=torch.int64),
            [Place(0, *place) for place in own],
            [],
            [],
        )


@contextmanager
def without_seeds() -> Iterator[None]:
    """Crops and captions draw from Python's generator."""
    kept = images.uniform, captions.uniform
    images.uniform = captions.uniform = lambda *words: random.random()  # noqa: S311
    try:
        yield
    finally:
        images.uniform, captions.uniform = kept


class Loaders:
    """Both sides on one set of shards."""

    def __init__(self, folder: Path, *, records: int, size: int, batch: int) -> None:
        pictures = (
            (f"{n:06d}", {"jpg": picture(n, size), "txt": b"a photo of smooth colours"}) for n in range(records)
        )
        self.paths = write_shards(folder, pictures, max(1, records // 4))
        self.batch, self.steps = batch, records // batch
        tree: Any = {
            "run_dir": str(folder / "run"),
            "model": {"name": "EVA02-CLIP-B-16"},
            "data": {
                "workers": 0,
                "slots": max(1, batch // _PER_SLOT),
                "sources": {"own": {"shards": [str(path) for path in self.paths]}},
            },
            "train": {"steps": 1, "global_batch": batch},
            "schedule": {"warmup_steps": 0},
        }
        self.config = RunConfig.model_validate(tree)
        self.sources = open_sources(self.config, Ranks())
        self.plan = make_plan(self.config, self.sources, max(1, batch // _PER_SLOT))
        self.shards = PlainShards(self.paths)

    def stream(self) -> Stream:
        """A stream of one pass."""
        return Stream(self.config, self.plan, self.sources, Ranks(), steps=self.steps, states={})

    def ours(self) -> Iterator[list[Place]]:
        """One pass, step by step, with all that the promises need; the places that were read."""
        before: dict[int, SlotState] = {}
        for delivery in self.stream():
            require_balance(self.plan, before, delivery.states)
            account(self.plan, before)
            before = delivery.states
            yield list(delivery.micro_batches[0].places)

    def plain(self) -> Iterator[list[Place]]:
        """As many steps without."""
        reader, stream = self.sources["own"].reader, self.stream()
        assert isinstance(reader, ShardReader)
        stream.slots = range(0)
        for part in plain_parts(reader, self.shards, self.batch, self.steps):
            yield list(stream._join([part]).micro_batches[0].places)

    def race(self) -> tuple[float, float]:
        """Processor seconds per sample of both sides, which take their steps in turn."""
        seconds, sides = [0.0, 0.0], [self.ours(), self.plain()]
        for step in range(self.steps):
            for side in (step % 2, 1 - step % 2):
                with without_seeds() if side else nullcontext():
                    start = time.process_time()
                    next(sides[side])
                    seconds[side] += time.process_time() - start
        return seconds[0] / (self.steps * self.batch), seconds[1] / (self.steps * self.batch)

    def agree(self) -> bool:
        """Whether both read the same records, and the same pixels of one."""
        reader = self.sources["own"].reader
        assert isinstance(reader, ShardReader)
        plain = dataclasses.replace(reader, shards=self.shards)  # type: ignore[arg-type]
        same = all(torch.equal(reader.load(0, n, 5).image, plain.load(0, n, 5).image) for n in range(5))
        return same and sorted(chain(*self.ours())) == sorted(chain(*self.plain()))


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1024, help="records of the set (default: %(default)s)")
    parser.add_argument("--size", type=int, default=384, help="side of the pictures (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="samples of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.records % arguments.batch or arguments.rounds < 1:
        parser.error("--records must be a multiple of --batch, and --rounds positive")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loaders = Loaders(Path(folder), records=arguments.records, size=arguments.size, batch=arguments.batch)
        if not loaders.agree():
            print("the two sides do not read the same", file=sys.stderr)
            return 1
        times = [loaders.race() for _ in range(arguments.rounds)]
        size = sum(path.stat().st_size for path in loaders.paths) / arguments.records
    ours, plain = (statistics.median(side) * 1e3 for side in zip(*times, strict=True))
    ratio = statistics.median(one / other for one, other in times)
    print(f"{arguments.records} records of {size / 1e3:.1f} KB, {arguments.size} pixels to 224, one process")
    print(
        f"with accounts and determinism  {ours:.3f} ms a sample\nwithout                        {plain:.3f} ms a sample"
    )
    print(f"ratio {ratio:.3f} (at most {ALLOWED})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
