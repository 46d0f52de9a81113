"""From a plan to batches: workers draw their slots' samples, the training process joins what they deliver.

A worker delivers, for every step, the part of its slots together with their states, so prefetched data never counts
as used and the batch of step t depends neither on the number of workers nor on that of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, repeat
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from evaclip.config import RunConfig
from evaclip.data.accounts import in_words
from evaclip.data.batch import Batch, PackedText, Place
from evaclip.data.order import (
    Plan,
    SlotCursor,
    SlotState,
    SourceOrder,
    layout_for,
    require_records,
    slots_of_rank,
    slots_of_worker,
)
from evaclip.data.readers import BadRecordError, FilteredRecordError, OpenedSource, Reader, Sample
from evaclip.data.workers import loader
from evaclip.errors import DataError

if TYPE_CHECKING:
    from evaclip.distributed import Ranks

_BAD_IN_A_ROW = 500  # a slot that meets this many unusable records one after the other gives up
_FILTERED_IN_A_ROW = 50_000  # the same of records that the filter leaves out: below one of 2,000 it comes to that


def make_plan(config: RunConfig, sources: Mapping[str, OpenedSource], slots: int) -> Plan:
    """The order of the run.

    Raises:
        DataError: There are fewer records than one global batch.
    """
    require_records(sum(sum(source.shard_records) for source in sources.values()), config.train.global_batch)
    orders = tuple(
        SourceOrder(
            name,
            config.data.sources[name].weight,
            layout_for(source.shard_records, slots, config.data.block_records),
        )
        for name, source in sources.items()
    )
    return Plan(config.seed, slots, config.data.window_blocks, orders)


# -------------------------------------------------------------------------------------------------------- streaming


class BadRecord(NamedTuple):
    """A record that was skipped."""

    place: Place
    pass_number: int
    reason: str
    name: str
    """Shard and key, looked up where the shard's index is at hand."""


class Delivery(NamedTuple):
    """What a rank has for one step."""

    micro_batches: list[Batch]
    states: dict[int, SlotState]
    """Of the rank's slots, behind this step."""
    skipped: list[BadRecord]
    """Bad records that others of the same slots replaced."""


class Part(NamedTuple):
    """What a worker delivers for one step."""

    images: Tensor
    """uint8 [samples, 3, size, size]."""
    tokens: Tensor
    """int32, all captions one after the other."""
    lengths: list[int]
    seeds: Tensor
    """int64 [samples]."""
    places: list[Place]
    states: list[SlotState]
    """Of the worker's slots, behind this step."""
    skipped: list[BadRecord]


class _SlotParts(IterableDataset[Any]):
    """The parts of one worker's slots, one per step."""

    def __init__(
        self,
        plan: Plan,
        readers: Sequence[Reader],
        slots: range,
        per_slot: int,
        states: Mapping[int, SlotState],
        steps: int,
    ) -> None:
        self.plan, self.readers, self.slots, self.per_slot = plan, readers, slots, per_slot
        self.states, self.steps = states, steps

    def __iter__(self) -> Iterator[Part | DataError]:
        worker = get_worker_info()
        own = slots_of_worker(self.slots, worker.id, worker.num_workers) if worker else self.slots
        cursors = [SlotCursor(self.plan, slot, self.states.get(slot)) for slot in own]
        for _ in range(self.steps):
            skipped: list[BadRecord] = []
            try:
                drawn = [self._next(cursor, skipped) for cursor in cursors for _ in range(self.per_slot)]
            except DataError as error:  # a worker's exception would arrive as a text with its stack trace
                yield error
                return
            samples, seeds, places = zip(*drawn, strict=True)
            yield Part(
                torch.stack([sample.image for sample in samples]),
                torch.tensor([token for sample in samples for token in sample.tokens], dtype=torch.int32),
                [len(sample.tokens) for sample in samples],
                torch.tensor(seeds, dtype=torch.int64),
                list(places),
                [cursor.state for cursor in cursors],
                skipped,
            )

    def _next(self, cursor: SlotCursor, skipped: list[BadRecord]) -> tuple[Sample, int, Place]:
        source = cursor.next_source()
        reader = self.readers[source]
        reasons, conditions = Counter[str](), Counter[str]()
        while True:
            pick = cursor.take(source)
            seed = self.plan.sample_seed(source, pick.pass_number, pick.shard, pick.record)
            try:
                sample = reader.load(pick.shard, pick.record, seed)
            except FilteredRecordError as error:
                cursor.filter(source, error.condition)
                conditions[error.condition] += 1
                if conditions.total() >= _FILTERED_IN_A_ROW:
                    last = reader.record_name(pick.shard, pick.record)
                    raise self._too_few_pass(source, conditions, last) from None
            except BadRecordError as error:
                cursor.skip(source, error.reason)
                place, name = Place(source, pick.shard, pick.record), reader.record_name(pick.shard, pick.record)
                skipped.append(BadRecord(place, pick.pass_number, error.reason, name))
                reasons[error.reason] += 1
                if reasons.total() >= _BAD_IN_A_ROW:
                    raise DataError(
                        f"source {self.plan.sources[source].name}: {reasons.total()} records in a row cannot be used, "
                        f"the last in {reader.shard_name(pick.shard)}: {in_words(reasons)}; "
                        f"mend the shard or take it out of the list"
                    ) from None
            else:
                cursor.deliver(source)
                return sample, seed, Place(source, pick.shard, pick.record)

    def _too_few_pass(self, source: int, conditions: Counter[str], last: str) -> DataError:
        name = self.plan.sources[source].name
        return DataError(
            f"source {name}: data.sources.{name}.filter left out {conditions.total():,} records in a row (by "
            f"{in_words(conditions)}; the last was {last}), so it lets almost nothing pass; compare its conditions "
            f"with what the shards hold, or write the records that pass into shards of their own"
        )


def _as_it_is(part: Any) -> Any:
    """In place of torch's conversion, which walks through every place and state of a part."""
    return part


class Stream:
    """A rank's part of each step: micro-batches, the state behind them, and what was skipped on the way.

    A step's samples lie in the order of their slots and are cut into ``micro_batches`` runs, equal to within a sample.
    ``states`` maps each of the rank's slots to where it stands; give the union over all ranks back to continue, on
    any number of ranks and workers.

    With ``train.overfit_one_batch`` every step is the first one of the run. The state stays behind it, so its records
    count once, however often they are seen, and those that it skipped are told once.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        sources: Mapping[str, OpenedSource],
        ranks: Ranks,
        *,
        steps: int,
        states: Mapping[int, SlotState],
        micro_batches: int = 1,
        token_multiple: int = 1,
    ) -> None:
        self.slots = slots_of_rank(plan.slots, ranks.rank, ranks.world_size)
        self._micro_batches = micro_batches
        self._token_multiple = token_multiple
        self._workers = min(config.data.workers, len(self.slots))
        readers = [source.reader for source in sources.values()]
        per_slot = config.train.global_batch // plan.slots
        self._steps, self._repeats, self._is_counted = steps, config.train.overfit_one_batch, bool(states)
        if self._repeats:
            steps, states = min(steps, 1), {}
        parts = _SlotParts(plan, readers, self.slots, per_slot, states, steps)
        self._loader = loader(parts, workers=self._workers, batch_size=None, collate_fn=_as_it_is)
        self._pin = ranks.device.type == "cuda"

    def __iter__(self) -> Iterator[Delivery]:
        return self._repeated() if self._repeats else self._deliveries()

    def _repeated(self) -> Iterator[Delivery]:
        """The run's first step, again and again."""
        for first in list(self._deliveries()):
            again = first._replace(skipped=[])
            yield again if self._is_counted else first
            yield from repeat(again, self._steps - 1)

    def _deliveries(self) -> Iterator[Delivery]:
        parts = iter(self._loader)
        # Workers answer in turn, so each group of as many parts is one step, in the order of the slots.
        for group in zip(*[parts] * max(1, self._workers), strict=True):
            yield self._join(group)

    def _join(self, parts: Sequence[Part | DataError]) -> Delivery:
        for part in parts:
            if isinstance(part, DataError):
                raise part
        parts = cast("Sequence[Part]", parts)
        captions: list[list[int]] = []
        for part in parts:
            tokens = part.tokens.tolist()
            start = 0
            for length in part.lengths:
                captions.append(tokens[start : start + length])
                start += length
        images, seeds = torch.cat([part.images for part in parts]), torch.cat([part.seeds for part in parts])
        places = [place for part in parts for place in part.places]
        states = [state for part in parts for state in part.states]
        bounds = [number * len(captions) // self._micro_batches for number in range(self._micro_batches + 1)]
        batches = [
            Batch(
                images=images[start:stop],
                text=PackedText.pack(captions[start:stop], multiple_of=self._token_multiple),
                seeds=seeds[start:stop],
                places=tuple(places[start:stop]),
            )
            for start, stop in pairwise(bounds)
        ]
        return Delivery(
            [batch.pin_memory() if self._pin else batch for batch in batches],
            dict(zip(self.slots, states, strict=True)),
            [record for part in parts for record in part.skipped],
        )
