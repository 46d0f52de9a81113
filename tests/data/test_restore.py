"""Going on in the middle of a shard takes no longer than beginning."""

import time
from random import Random
from unittest.mock import patch

import pytest
from tables import record
from tiny import jpeg, tiny_config

from evaclip.data.order import SlotCursor
from evaclip.data.pipeline import Stream, make_plan
from evaclip.data.readers import ShardReader
from evaclip.data.shards import write_shards
from evaclip.distributed import Ranks
from evaclip.sources import open_sources

SLOTS = 16


def written(folder, records):
    """A shard with its index, as a source."""
    image = jpeg((220, 30, 30))
    named = ((f"{number:06d}", {"jpg": image, "txt": f"number {number}".encode()}) for number in range(records))
    return {"shards": str(write_shards(folder, named, records)[0])}


def first_batch_after(folder, source, delivered):
    """Open the source and go on behind so many samples of a slot: seconds to the first batch, and records loaded."""
    config = tiny_config(folder, source, data__slots=SLOTS)
    plan = make_plan(config, open_sources(config, Ranks()), SLOTS)
    states, expected = {}, []
    for slot in range(SLOTS):  # arithmetic alone: nothing is read
        cursor = SlotCursor(plan, slot)
        for _ in range(delivered):
            cursor.take(0)
            cursor.deliver(0)
        states[slot] = cursor.state
        expected.append(cursor.take(0))
    with patch.object(ShardReader, "load", autospec=True, side_effect=ShardReader.load) as load:
        start = time.perf_counter()
        stream = Stream(config, plan, open_sources(config, Ranks()), Ranks(), steps=1, states=states)
        ((batch,), *_) = next(iter(stream))
        seconds = time.perf_counter() - start
    assert [(place.shard, place.record) for place in batch.places] == [(p.shard, p.record) for p in expected]
    return seconds, load.call_count


@pytest.mark.parametrize("delivered", [0, 7, 150])
def test_nothing_is_read_again_to_restore_a_position(tmp_path, delivered):
    _, loaded = first_batch_after(tmp_path, written(tmp_path, 200), delivered)
    assert loaded == SLOTS


@pytest.mark.faults
def test_any_position_of_a_shard_of_10_000_samples_is_restored_within_a_second(tmp_path):
    source = written(tmp_path, 10_000)
    random = Random(0)
    found = [first_batch_after(tmp_path, source, random.randrange(3 * 10_000 // SLOTS)) for _ in range(20)]
    assert {loaded for _, loaded in found} == {SLOTS}
    slowest = max(seconds for seconds, _ in found)
    record(
        "Position in a shard of 10,000 samples, restored", "20 random positions in three passes", "slowest, s", slowest
    )
    assert slowest < 1
