"""Who reads what, and when: the order of samples as arithmetic (DESIGN section 5).

Everything here is a pure function of small integers, without torch and without I/O: a stream that stops can start
again anywhere, on any number of ranks and workers. This module does not know what a record contains.

A source is a list of shards; a shard is a list of blocks of consecutive records. Each pass over a source permutes its
blocks and deals them to ``slots``; a slot takes its blocks in windows and shuffles the records of a window. A slot
fills ``global_batch / slots`` samples of every step, and a rank owns ``slots / world_size`` neighbouring slots.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from evaclip.errors import ConfigError, DataError

_MASK = (1 << 64) - 1
_BLOCKS, _RECORDS, _SOURCE = 1, 2, 3  # what a hash is drawn for


def hash64(*words: int, state: int = 0) -> int:
    """Mix integers into 64 bits (the finaliser of splitmix64, doi:10.1145/2714064.2660195, once per word).

    ``state`` is the hash of words that come before these.
    """
    for word in words:
        state = (state + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


@lru_cache(1 << 14)
def _prefix(*words: int) -> int:
    """The hash of words that many hashes begin with."""
    return hash64(*words)


def name_hash(name: str) -> int:
    """A name as 64 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def uniform(seed: int, *words: int) -> float:
    """A number in [0, 1) that is a function of its arguments."""
    return (hash64(seed, *words) >> 11) / (1 << 53)


def permute(index: int, size: int, key: int) -> int:
    """Where ``index`` goes in the permutation of ``range(size)`` that ``key`` names.

    A four-round Feistel network over the next even number of bits, walked until it lands inside the range (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): no table, at most four rounds of the network on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    rounds = [_prefix(key, number) for number in range(4)]
    while True:
        left, right = index >> half, index & low
        for state in rounds:
            left, right = right, left ^ (hash64(right, state=state) & low)
        index = left << half | right
        if index < size:
            return index


class Block(NamedTuple):
    """Consecutive records of one shard."""

    shard: int
    first: int
    size: int


@dataclass(frozen=True)
class Layout:
    """How a source's records fall into blocks."""

    shard_records: tuple[int, ...]
    block_records: int

    @cached_property
    def _block_ends(self) -> list[int]:
        return list(accumulate(-(-records // self.block_records) for records in self.shard_records))

    @cached_property
    def first_records(self) -> list[int]:
        """For each shard, how many records lie in the shards before it."""
        return [0, *accumulate(self.shard_records)][:-1]

    @property
    def num_records(self) -> int:
        """Records of all shards."""
        return sum(self.shard_records)

    @property
    def num_blocks(self) -> int:
        """Blocks of all shards."""
        return self._block_ends[-1]

    def block(self, index: int) -> Block:
        """The ``index``-th block."""
        shard = bisect.bisect_right(self._block_ends, index)
        within = index - (self._block_ends[shard - 1] if shard else 0)
        first = within * self.block_records
        return Block(shard, first, min(self.block_records, self.shard_records[shard] - first))


def layout_for(shard_records: Sequence[int], slots: int, block_records: int) -> Layout:
    """The layout with the largest blocks, up to ``block_records``, that gives every slot four of them in a pass.

    Small sources get small blocks, in the end single records: few shards are normal.
    """
    records = tuple(shard_records)
    layout = Layout(records, block_records)
    while layout.block_records > 1 and layout.num_blocks < 4 * slots:
        layout = Layout(records, layout.block_records // 2)
    return layout


@dataclass(frozen=True)
class SourceOrder:
    """What the order needs to know of a source."""

    name: str
    weight: float
    layout: Layout

    @cached_property
    def key(self) -> int:
        """The source's name as a number."""
        return name_hash(self.name)


@dataclass(frozen=True)
class Plan:
    """The order of a whole run."""

    seed: int
    slots: int
    window_blocks: int
    sources: tuple[SourceOrder, ...]

    @cached_property
    def _shares(self) -> list[float]:
        total = sum(source.weight for source in self.sources)
        return list(accumulate(source.weight / total for source in self.sources))

    def source_of(self, slot: int, number: int) -> int:
        """Index of the source that gives the slot's ``number``-th sample."""
        if len(self.sources) == 1:
            return 0
        drawn = uniform(self.seed, _SOURCE, slot, number)
        return min(bisect.bisect_right(self._shares, drawn), len(self.sources) - 1)

    def window(self, source: int, pass_number: int, slot: int, window: int) -> list[Block]:
        """Blocks of a slot's window in a pass; empty behind the last one."""
        order = self.sources[source]
        blocks = order.layout.num_blocks
        key = hash64(self.seed, _BLOCKS, order.key, pass_number)
        # Dealing begins with another slot in each pass, so that a source with few blocks reaches all slots.
        start = (slot + pass_number) % self.slots + window * self.window_blocks * self.slots
        dealt = range(start, min(blocks, start + self.window_blocks * self.slots), self.slots)
        return [order.layout.block(permute(position, blocks, key)) for position in dealt]

    def shuffled(self, source: int, pass_number: int, slot: int, window: int, offset: int, size: int) -> int:
        """Place, among a window's ``size`` records, of the one that comes ``offset``-th."""
        return permute(offset, size, _prefix(self.seed, _RECORDS, self.sources[source].key, pass_number, slot, window))

    def records_between(self, source: int, slot: int, start: Position, stop: Position) -> int:
        """How many records a slot takes of a source from one place to a later one."""
        assert start <= stop, f"{start} lies behind {stop}"
        records, place = stop.offset - start.offset, start
        while place[:2] < stop[:2]:
            size = sum(block.size for block in self.window(source, place.pass_number, slot, place.window))
            records += size
            place = Position(place.pass_number, place.window + 1) if size else Position(place.pass_number + 1)
        return records

    def sample_seed(self, source: int, pass_number: int, shard: int, record: int) -> int:
        """63 random bits for everything that is random about a sample."""
        order = self.sources[source]
        number = order.layout.first_records[shard] + record
        return hash64(number, state=_prefix(self.seed, order.key, pass_number)) >> 1


class Position(NamedTuple):
    """Where a slot stands in a source: the next record to take."""

    pass_number: int = 0
    window: int = 0
    offset: int = 0


class Pick(NamedTuple):
    """One record that a slot takes."""

    source: int
    pass_number: int
    shard: int
    record: int


class SlotState(NamedTuple):
    """All that a slot remembers: JSON keeps it as four lists."""

    positions: tuple[Position, ...]
    """Per source."""
    delivered: tuple[int, ...]
    """Samples per source."""
    skipped: tuple[tuple[int, str, int], ...] = ()
    """Source, reason, number of bad records."""
    filtered: tuple[tuple[int, str, int], ...] = ()
    """Source, condition, number of records that its filter left out."""

    @classmethod
    def first(cls, num_sources: int) -> SlotState:
        """Nothing is taken yet."""
        return cls((Position(),) * num_sources, (0,) * num_sources)

    @classmethod
    def parse(cls, value: Sequence[Any]) -> SlotState:
        """The state that JSON kept; before there were filters, it had three lists."""
        positions, delivered, *counted = value
        return cls(
            tuple(Position(*position) for position in positions),
            tuple(delivered),
            *(tuple((*entry,) for entry in entries) for entries in counted),
        )


class SlotCursor:
    """A slot's walk through its records.

    Its owner takes a record from ``next_source()`` and says what became of it: ``deliver``, ``skip`` or ``filter``.
    One that is not delivered is replaced by taking again from the same source, so delivered + skipped + filtered =
    taken, for every source and slot.
    """

    def __init__(self, plan: Plan, slot: int, state: SlotState | None = None) -> None:
        self.plan = plan
        self.slot = slot
        state = state or SlotState.first(len(plan.sources))
        self._positions = list(state.positions)
        self._delivered = list(state.delivered)
        self._skipped = {(source, why): number for source, why, number in state.skipped}
        self._filtered = {(source, why): number for source, why, number in state.filtered}
        self._windows: dict[int, tuple[tuple[int, int], list[Block], int]] = {}

    @property
    def state(self) -> SlotState:
        """What a new cursor needs to go on from here."""
        skipped, filtered = (
            tuple((source, why, number) for (source, why), number in sorted(counts.items()))
            for counts in (self._skipped, self._filtered)
        )
        return SlotState(tuple(self._positions), tuple(self._delivered), skipped, filtered)

    def next_source(self) -> int:
        """Source of the next sample to deliver."""
        return self.plan.source_of(self.slot, sum(self._delivered))

    def deliver(self, source: int) -> None:
        """Count the record taken last as a sample."""
        self._delivered[source] += 1

    def skip(self, source: int, reason: str) -> None:
        """Count the record taken last as bad."""
        self._skipped[source, reason] = self._skipped.get((source, reason), 0) + 1

    def filter(self, source: int, condition: str) -> None:
        """Count the record taken last as one that its source's filter leaves out."""
        self._filtered[source, condition] = self._filtered.get((source, condition), 0) + 1

    def take(self, source: int) -> Pick:
        """The next record of a source."""
        while True:
            place = self._positions[source]
            blocks, size = self._window(source, place)
            if place.offset < size:
                break
            # A pass ends with its first empty window; a slot that is dealt no block of a small source skips the pass.
            self._positions[source] = (
                Position(place.pass_number, place.window + 1) if size else Position(place.pass_number + 1)
            )
        self._positions[source] = place._replace(offset=place.offset + 1)
        within = self.plan.shuffled(source, place.pass_number, self.slot, place.window, place.offset, size)
        for block in blocks:
            if within < block.size:
                return Pick(source, place.pass_number, block.shard, block.first + within)
            within -= block.size
        raise AssertionError("a window holds as many records as its blocks")

    def _window(self, source: int, place: Position) -> tuple[list[Block], int]:
        at = (place.pass_number, place.window)
        cached = self._windows.get(source)
        if cached is None or cached[0] != at:
            blocks = self.plan.window(source, place.pass_number, self.slot, place.window)
            cached = self._windows[source] = (at, blocks, sum(block.size for block in blocks))
        return cached[1], cached[2]


# ------------------------------------------------------------------------------------------ slots, ranks and workers


def choose_slots(global_batch: int, world_size: int, wanted: int | None = None) -> int:
    """Number of slots: ``wanted``, or the smallest divisor of the global batch from 256 up (below that, the batch).

    The default follows from the batch alone, so the order never depends on the ranks that happen to be there.

    Raises:
        ConfigError: The global batch, the slots or the ranks do not divide one another.
    """
    if global_batch % world_size:
        below = global_batch - global_batch % world_size
        near = [batch for batch in (below, below + world_size) if batch > 0]
        raise ConfigError(
            f"train.global_batch {global_batch} cannot be divided among {world_size} ranks; "
            f"the nearest that can are {' and '.join(map(str, near))}"
        )
    slots = wanted or next(d for d in range(min(256, global_batch), global_batch + 1) if global_batch % d == 0)
    if global_batch % slots or slots % world_size:
        fitting = [d for d in range(world_size, global_batch + 1, world_size) if global_batch % d == 0]
        raise ConfigError(
            f"data.slots {slots} must divide train.global_batch {global_batch} and be a multiple of the "
            f"{world_size} ranks; a new run can have {', '.join(map(str, fitting[:12]))}, a continued one needs "
            f"a number of ranks that divides {slots}"
        )
    return slots


def slots_of_rank(slots: int, rank: int, world_size: int) -> range:
    """A rank's slots: neighbours, so that the ranks' batches joined in rank order are the global batch."""
    share = slots // world_size
    return range(rank * share, (rank + 1) * share)


def slots_of_worker(rank_slots: range, worker: int, workers: int) -> range:
    """A worker's slots: neighbours again, shares differ by one at most."""
    start, stop = (len(rank_slots) * part // workers for part in (worker, worker + 1))
    return rank_slots[start:stop]


def require_records(records: int, global_batch: int) -> None:
    """Refuse data that cannot fill one update.

    Raises:
        DataError: There are fewer records than samples in a batch.
    """
    if records < global_batch:
        raise DataError(
            f"the sources hold {records} records, fewer than train.global_batch {global_batch}; "
            f"add shards or lower train.global_batch"
        )
