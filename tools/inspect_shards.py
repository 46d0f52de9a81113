"""Look through WebDataset shards before training on them: what they hold, what of it is bad, and what is there twice.

    python tools/inspect_shards.py '/data/laion/{00000..00099}.tar'

Every record is read, checked against its checksum, decoded and tokenized by the code that trains, so a record is bad
here if it would be skipped there, for the same reason. Missing indexes are built and kept, as training does.

Exact duplicates are usable records with the same image bytes, by a checksum of 64 bits (xxh3): in a set of 100 million
records a wrong pair is as likely as 1 in 3,700. A process holds the index of one shard at a time, and what a decoder
needs; the main one up to 60 bytes per record of the whole set: 60 MB per million.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import xxhash
from index_shards import over_processes
from numpy.typing import NDArray
from tqdm import tqdm

from evaclip.config import AugmentConfig, DataConfig
from evaclip.data.images import stored_size
from evaclip.data.index import ensure_index
from evaclip.data.readers import BadRecordError, ShardReader
from evaclip.data.shards import ShardSet, expand
from evaclip.data.tokenizer import Tokenizer
from evaclip.errors import DataError, EvaclipError

K = TypeVar("K")

_SIZE = 224
"""Side of the crops whose decoding is tried."""
_LONGEST = 1 << 16
"""Tokens after which a caption is not counted on."""
_FEW = 10
_TOKENS = (0, 4, 8, 12, 16, 24, 32, 48, 64, 78, 128, 256, 512, _LONGEST + 1)
_SIDES = (0, 32, 64, 128, 224, 256, 336, 448, 640, 896, 1280, 2560, 1 << 30)
_BAR = 40


class Found(NamedTuple):
    """What a shard holds."""

    location: str
    digest: str
    tar_size: int
    damage: str
    """In words, empty if there is none."""
    extensions: Counter[str]
    lengths: Counter[int]
    """Tokens of a usable record's caption -> records."""
    sides: Counter[int]
    """Shorter side of a usable record's image, in pixels -> records."""
    bad: list[tuple[int, str]]
    """Records that cannot be used, and why."""
    images: NDArray[np.uint64]
    """Checksum of each record's image, 0 for bad ones."""
    keys: NDArray[np.uint64]
    """Checksum of each record's key."""


def inspect_one(location: str, *, index_dir: str | None, caption: str, max_pixels: int) -> Found | str:
    """Read a shard from end to end; what it holds, or why it cannot be read."""
    try:
        index = ensure_index(location, index_dir)
        shards = ShardSet([location], index_dir, [index.digest])
        reader = ShardReader(shards, {caption: 1.0}, AugmentConfig(), _SIZE, max_pixels, Tokenizer(_LONGEST))
        lengths, sides, bad = Counter[int](), Counter[int](), list[tuple[int, str]]()
        images = np.zeros(index.num_records, np.uint64)
        for record in range(index.num_records):
            try:
                pair = reader.pair(0, record, seed=0)
                reader.decode(pair.image)
            except BadRecordError as error:
                bad.append((record, error.reason))
                continue
            images[record] = xxhash.xxh3_64_intdigest(pair.image)
            lengths[len(reader.tokenizer.encode(pair.caption))] += 1
            sides[min(stored_size(pair.image))] += 1
    except (DataError, OSError) as error:
        return str(error)
    keys = np.array([xxhash.xxh3_64_intdigest(os.fsencode(key)) for key in index.keys], np.uint64)
    kinds = Counter({index.extensions[kind]: int(n) for kind, n in enumerate(np.bincount(index.kinds))})
    damage = index.damage and f"{index.damage}, perhaps {index.lost_records} records are lost"
    return Found(location, index.digest, index.tar_size, damage, kinds, lengths, sides, bad, images, keys)


# ------------------------------------------------------------------------------------------------------------ telling


class Findings:
    """Of all shards that could be read, in their order."""

    def __init__(self, shards: Sequence[Found], index_dir: str | None, most: int) -> None:
        self.shards = shards
        self.most = most
        """Names that are told of each kind."""
        self.ends = np.cumsum([len(shard.keys) for shard in shards])
        self._set = ShardSet([shard.location for shard in shards], index_dir, [shard.digest for shard in shards])

    def lines(self, caption: str) -> Iterator[str]:
        """All of it for people."""
        records, size = int(self.ends[-1]), sum(shard.tar_size for shard in self.shards)
        yield f"{records:,} records in {len(self.shards):,} shards, {size / 1e9:,.2f} GB"
        extensions = _added(shard.extensions for shard in self.shards)
        yield f"members: {', '.join(f'{count:,} {name}' for name, count in extensions.most_common())}"
        lengths = _added(shard.lengths for shard in self.shards)
        yield f"\ntokens of {caption}, start and end included: {summary(lengths)}"
        yield from histogram(lengths, _TOKENS)
        sides = _added(shard.sides for shard in self.shards)
        yield f"\nshorter side of images in pixels: {summary(sides)}"
        yield from histogram(sides, _SIDES)
        yield from self._bad(records)
        for shard in self.shards:
            if shard.damage:
                yield f"damaged: {shard.location}: {shard.damage}"
        yield from self._equal("images", [shard.images for shard in self.shards])
        yield from self._equal("keys", [shard.keys for shard in self.shards])

    def name(self, number: int) -> str:
        """Shard and key of the ``number``-th record of all."""
        shard = int(np.searchsorted(self.ends, number, side="right"))
        found = self.shards[shard]
        return f"{found.location}:{self._set.key(shard, number - int(self.ends[shard]) + len(found.keys))}"

    def _bad(self, records: int) -> Iterator[str]:
        reasons: dict[str, list[int]] = {}
        for shard, end in zip(self.shards, self.ends.tolist(), strict=True):
            for record, reason in shard.bad:
                reasons.setdefault(reason, []).append(end - len(shard.keys) + record)
        count = sum(map(len, reasons.values()))
        yield f"\nbad records, which training skips: {count:,}, {count / max(1, records):.2%}"
        for reason, numbers in sorted(reasons.items(), key=lambda entry: -len(entry[1])):
            yield f"  {reason}: {len(numbers):,}"
            yield from (f"    {self.name(number)}" for number in numbers[: self.most])
            yield from _more(len(numbers) - self.most)

    def _equal(self, what: str, parts: list[NDArray[np.uint64]]) -> Iterator[str]:
        groups = equal(np.concatenate(parts))
        number, count = len(groups.sizes), int(groups.sizes.sum())
        told = f"{count:,} records in {number:,} groups, {count - number:,} too many"
        yield f"\nequal {what}: {told if number else 'none'}"
        for places in (groups.places(group) for group in range(min(number, self.most))):
            names = ", ".join(self.name(place) for place in places[: self.most].tolist())
            rest = f" and {len(places) - self.most:,} more" if len(places) > self.most else ""
            yield f"  {len(places):,} x {names}{rest}"
        yield from _more(number - self.most)


class Groups(NamedTuple):
    """Places of equal values; the largest groups first, in each the places ascending."""

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    """Where in ``order`` a group begins."""
    sizes: NDArray[np.int64]

    def places(self, number: int) -> NDArray[np.int64]:
        """The places of one group."""
        return self.order[self.starts[number] : self.starts[number] + self.sizes[number]]


def equal(values: NDArray[np.uint64]) -> Groups:
    """Find values that are there more than once; zeros do not count."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(values)])
    sizes = np.diff(starts, append=len(values))
    several = (sizes > 1) & (ordered[starts] != 0)
    starts, sizes = starts[several], sizes[several]
    ranked = np.lexsort((order[starts], -sizes))
    return Groups(order, starts[ranked], sizes[ranked])


def summary(counts: Mapping[int, int]) -> str:
    """Quantiles of counted values."""
    if not counts:
        return "none"
    values = np.array(sorted(counts))
    ends = np.cumsum([counts[value] for value in values.tolist()])
    low, middle, high, most = (values[np.searchsorted(ends, level * ends[-1])] for level in (0.0, 0.5, 0.95, 1.0))
    return f"min {low:,}, median {middle:,}, p95 {high:,}, max {most:,}"


def histogram(counts: Mapping[int, int], edges: Sequence[int]) -> list[str]:
    """A bar for each range of values from the first to the last that has any."""
    sums = [sum(n for value, n in counts.items() if low <= value < high) for low, high in pairwise(edges)]
    filled = [place for place, number in enumerate(sums) if number]
    lines: list[str] = []
    for place in range(filled[0], filled[-1] + 1) if filled else ():
        span = f"{edges[place]:,} to {edges[place + 1] - 1:,}" if place + 2 < len(edges) else f"from {edges[place]:,}"
        bar = "#" * -(-_BAR * sums[place] // max(sums))
        lines.append(f"  {span:>14} {sums[place]:>13,} {sums[place] / sum(sums):>6.1%} {bar}")
    return lines


def _added(counters: Iterator[Counter[K]]) -> Counter[K]:
    total: Counter[K] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _more(number: int) -> list[str]:
    return [f"  ... and {number:,} more; --all lists them"] if number > 0 else []


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("shards", nargs="+", help="tars, with brace ranges such as '/data/{00000..00099}.tar'")
    parser.add_argument("--index-dir", help="where the indexes are, as data.index_dir (default: beside each shard)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s here)")
    parser.add_argument("--caption", default="txt", help="as a key of a source's captions (default: %(default)s)")
    parser.add_argument(
        "--max-image-pixels",
        type=int,
        default=DataConfig.model_fields["max_image_pixels"].default,
        help="as data.max_image_pixels (default: %(default)s)",
    )
    parser.add_argument("--all", action="store_true", help=f"name all that is bad or equal, not the first {_FEW} only")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers} is not positive")
    try:
        return _inspect(arguments)
    except EvaclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _inspect(arguments: argparse.Namespace) -> int:
    paths = list(dict.fromkeys(expand(arguments.shards)))
    work = partial(
        inspect_one,
        index_dir=arguments.index_dir,
        caption=arguments.caption,
        max_pixels=arguments.max_image_pixels,
    )
    results = over_processes(work, paths, arguments.workers) if arguments.workers > 1 else map(work, paths)
    found: dict[str, Found] = {}
    problems: list[str] = []
    for result in tqdm(results, "inspecting", len(paths), disable=not sys.stderr.isatty(), leave=False):
        if isinstance(result, str):
            problems.append(result)
        else:
            found[result.location] = result
    if found:
        readable = [found[path] for path in paths if path in found]
        findings = Findings(readable, arguments.index_dir, sys.maxsize if arguments.all else _FEW)
        print("\n".join(findings.lines(arguments.caption)))
    print("".join(f"error: {problem}\n" for problem in sorted(problems)), end="", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
