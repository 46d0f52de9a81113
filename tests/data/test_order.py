import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaclip.data.order import (
    Layout,
    Plan,
    SlotCursor,
    SlotState,
    SourceOrder,
    choose_slots,
    layout_for,
    permute,
    require_records,
    slots_of_rank,
    slots_of_worker,
    uniform,
)
from evaclip.errors import ConfigError, DataError

shard_sizes = st.lists(st.integers(1, 90), min_size=1, max_size=6)


def plan_of(sizes, slots, *, weights=(1.0,), seed=0, window_blocks=4):
    layout = layout_for(sizes, slots, 16)
    return Plan(seed, slots, window_blocks, tuple(SourceOrder(f"s{i}", w, layout) for i, w in enumerate(weights)))


def samples_of(plan, slot, count, state=None):
    cursor = SlotCursor(plan, slot, state)
    picks = []
    for _ in range(count):
        source = cursor.next_source()
        picks.append(cursor.take(source))
        cursor.deliver(source)
    return picks, cursor.state


@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_of_different_keys_differ():
    assert len({tuple(permute(i, 20, key) for i in range(20)) for key in range(50)}) == 50


def test_permute_puts_every_element_everywhere():
    counts = Counter(permute(0, 10, key) for key in range(5000))
    # 5000 draws over 10 places: 500 expected, standard deviation 21; six of them
    assert set(counts) == set(range(10))
    assert max(abs(n - 500) for n in counts.values()) < 130


def test_uniform_is_uniform_and_repeatable():
    drawn = [uniform(7, n) for n in range(4000)]
    assert drawn == [uniform(7, n) for n in range(4000)]
    assert 0 <= min(drawn) < max(drawn) < 1
    assert abs(sum(drawn) / 4000 - 0.5) < 0.03  # six standard errors


@given(sizes=shard_sizes, block=st.integers(1, 40))
def test_blocks_cover_every_record_once(sizes, block):
    layout = Layout(tuple(sizes), block)
    seen = [(b.shard, b.first + i) for b in map(layout.block, range(layout.num_blocks)) for i in range(b.size)]
    assert seen == [(shard, record) for shard, size in enumerate(sizes) for record in range(size)]


@settings(deadline=None, max_examples=40)
@given(sizes=shard_sizes, slots=st.sampled_from([1, 2, 3, 8]), seed=st.integers(0, 5))
def test_each_pass_takes_every_record_once_over_all_slots(sizes, slots, seed):
    plan = plan_of(sizes, slots, seed=seed)
    for wanted in (0, 1):
        taken = []
        for slot in range(slots):
            cursor = SlotCursor(plan, slot)
            while (pick := cursor.take(0)).pass_number <= wanted:
                if pick.pass_number == wanted:
                    taken.append((pick.shard, pick.record))
        assert sorted(taken) == [(s, r) for s, size in enumerate(sizes) for r in range(size)]


def test_passes_are_shuffled_differently():
    plan = plan_of([64, 64], 2)
    picks, _ = samples_of(plan, 0, 200)
    passes = [[(p.shard, p.record) for p in picks if p.pass_number == n] for n in (0, 1)]
    assert passes[0] != sorted(passes[0])
    assert set(passes[0]) != set(passes[1])  # other blocks were dealt to the slot


@settings(deadline=None, max_examples=25)
@given(done=st.integers(0, 150), sizes=shard_sizes)
def test_a_cursor_continues_from_its_state_as_if_never_stopped(done, sizes):
    plan = plan_of(sizes, 2, weights=(2.0, 1.0))
    straight, _ = samples_of(plan, 1, done + 40)
    _, state = samples_of(plan, 1, done)
    again, _ = samples_of(plan, 1, 40, SlotState.parse(json.loads(json.dumps(state))))
    assert again == straight[done:]


def test_sources_are_drawn_by_weight():
    plan = plan_of([500], 1, weights=(3.0, 1.0))
    drawn = Counter(plan.source_of(0, n) for n in range(4000))
    assert abs(drawn[0] / 4000 - 0.75) < 0.042  # six standard errors


def test_a_skipped_record_is_replaced_from_the_same_source_and_counted():
    plan = plan_of([50], 1)
    clean, _ = samples_of(plan, 0, 12)
    cursor = SlotCursor(plan, 0)
    cursor.take(0)
    cursor.skip(0, "truncated")
    taken = []
    for _ in range(11):
        taken.append(cursor.take(0))
        cursor.deliver(0)
    assert taken == clean[1:]
    assert cursor.state.delivered == (11,)
    assert cursor.state.skipped == ((0, "truncated", 1),)


def test_small_sources_get_small_blocks_so_that_every_slot_has_some():
    assert layout_for([10_000] * 40, 256, 64).block_records == 64
    small = layout_for([300], 256, 64)
    assert small.block_records == 1
    assert small.num_blocks >= 256


def test_sample_seeds_differ_by_pass_and_record():
    plan = plan_of([40, 40], 2, weights=(1.0, 1.0))
    seeds = {
        plan.sample_seed(s, p, shard, r) for s in range(2) for p in range(3) for shard in range(2) for r in range(40)
    }
    assert len(seeds) == 2 * 3 * 2 * 40
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("batch", "ranks", "slots"), [(256, 1, 256), (256, 2, 256), (1024, 1, 256), (768, 2, 256), (48, 4, 48)]
)
def test_default_slots_are_the_smallest_divisor_from_256_up(batch, ranks, slots):
    assert choose_slots(batch, ranks) == slots


def test_batch_that_ranks_cannot_divide_is_refused_with_the_nearest_choices():
    with pytest.raises(ConfigError, match=r"256 cannot be divided among 3 ranks; the nearest that can are 255 and 258"):
        choose_slots(256, 3)


def test_ranks_that_do_not_divide_the_slots_are_refused_instead_of_changing_the_order():
    with pytest.raises(ConfigError, match=r"data\.slots 256 .* of the 3 ranks; a new run can have 3, 6, 12"):
        choose_slots(768, 3)


def test_slots_that_do_not_fit_are_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"data\.slots 6 must divide .* can have 4, 8, 16"):
        choose_slots(16, 4, 6)


@given(slots=st.sampled_from([4, 8, 24]), world=st.sampled_from([1, 2, 4]), workers=st.integers(1, 5))
def test_ranks_and_workers_split_the_slots_in_order(slots, world, workers):
    joined = [
        slot
        for rank in range(world)
        for worker in range(workers)
        for slot in slots_of_worker(slots_of_rank(slots, rank, world), worker, workers)
    ]
    assert joined == list(range(slots))


def test_fewer_records_than_a_batch_are_refused():
    with pytest.raises(DataError, match=r"hold 99 records, fewer than train\.global_batch 100"):
        require_records(99, 100)
