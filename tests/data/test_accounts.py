"""Accounts of slots: what was taken is what lies between two places, and too much that is bad stops the run."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaclip.data.accounts import SourceAccount, account, require_balance, require_few_bad
from evaclip.data.order import Plan, SlotCursor, SlotState, SourceOrder, layout_for
from evaclip.errors import DataError


def plan_of(slots=3, records=((7, 30, 1), (5,)), window=2):
    sources = tuple(
        SourceOrder(name, 1.0, layout_for(shards, slots, 4)) for name, shards in zip("ab", records, strict=True)
    )
    return Plan(0, slots, window, sources)


def walk(plan, slot, steps, bad_every=0):
    """States after each record a slot takes."""
    cursor = SlotCursor(plan, slot)
    for number in range(steps):
        source = cursor.next_source()
        cursor.take(source)
        if bad_every and number % bad_every == 0:
            cursor.skip(source, "checksum")
        else:
            cursor.deliver(source)
        yield cursor.state


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 200), st.integers(0, 5), st.data())
@settings(max_examples=40)
def test_what_a_slot_took_lies_between_its_places(slots, window, steps, bad_every, data):
    plan = plan_of(slots, window=window)
    slot = data.draw(st.integers(0, slots - 1))
    states = [None, *walk(plan, slot, steps, bad_every)]
    first, second = sorted(data.draw(st.tuples(st.integers(0, steps), st.integers(0, steps))))
    if second:
        require_balance(plan, {slot: states[first]} if first else {}, {slot: states[second]})


@pytest.mark.parametrize("error", [-1, 1])
def test_a_record_too_many_or_too_few_is_found_and_placed(error):
    plan = plan_of()
    *_, state = walk(plan, 1, 40, bad_every=3)
    wrong = SlotState(state.positions, (state.delivered[0] + error, state.delivered[1]), state.skipped)
    with pytest.raises(
        DataError,
        match=r"source a, slot 1: \d+ records were delivered, skipped or filtered where the order has \d+ .*shards num",
    ):
        require_balance(plan, {}, {1: wrong})


def test_accounts_add_up_over_slots():
    plan = plan_of()
    states = {}
    for slot in range(3):
        *_, states[slot] = walk(plan, slot, 40, bad_every=4)
    accounts = account(plan, states)
    assert sum(entry.delivered for entry in accounts.values()) == 90
    assert [entry.num_skipped for entry in accounts.values()] == [
        sum(count for state in states.values() for which, _, count in state.skipped if which == number)
        for number in (0, 1)
    ]
    assert accounts["a"].passes == (accounts["a"].delivered + accounts["a"].num_skipped) / 38


def test_a_few_bad_records_are_borne_and_too_many_stop_the_run():
    require_few_bad({"a": SourceAccount(0.1, 5, {"checksum": 10})}, 0.05, str)
    require_few_bad({"a": SourceAccount(0.1, 950, {"checksum": 50})}, 0.05, str)
    with pytest.raises(
        DataError,
        match=r"source a: 51 of 1000 records cannot be used \(11 checksum, 40 no_caption\), more than "
        r"data.max_bad_fraction 0.05; the worst shard is 7.tar with 30; mend the shards \(bad_records.jsonl names",
    ):
        require_few_bad(
            {"a": SourceAccount(0.1, 949, {"no_caption": 40, "checksum": 11})}, 0.05, lambda _: "7.tar with 30"
        )
