"""Filters of sources: which records pass, what is read of those that do not, and that nothing else changes."""

import json
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
from tiny import colour_records, merged, tiny_config

from evaclip import config_file
from evaclip import train as train_module
from evaclip.config import FieldFilter, FilterConfig
from evaclip.data import storage
from evaclip.data.accounts import account
from evaclip.data.filters import KeyList, RecordFilter
from evaclip.data.order import SlotState
from evaclip.data.pipeline import Stream, make_plan
from evaclip.data.shards import Shard, expand, write_shards
from evaclip.distributed import Ranks
from evaclip.errors import CheckpointError, ConfigError, DataError
from evaclip.history import load_history
from evaclip.sources import open_sources
from evaclip.train import train

COUNT = 70
KEPT = range(0, COUNT, 3)
"""Records that the lists name."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards whose json holds the record's number, and, in every fifth, nothing."""
    folder = tmp_path_factory.mktemp("numbered")
    records = []
    for number, (key, members) in enumerate(colour_records(COUNT)):
        about = {} if number % 5 == 4 else {"number": number, "colour": members["txt"].split()[1].decode()}
        records.append((key, {**members, "json": json.dumps(about).encode()}))
    write_shards(folder, records, 30)
    return str(folder / "{00000..00002}.tar")


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "keys.txt").write_text("".join(f"{number:06d}\n" for number in KEPT))
    return str(tmp_path / "keys.txt")


def opened(folder, source, **changes):
    config = tiny_config(folder, source, **changes)
    sources = open_sources(config, Ranks())
    return config, sources, make_plan(config, sources, 16)


def deliveries(folder, source, steps, states=None, world=1, **changes):
    """Places of the global batches, and the states behind them."""
    config, sources, plan = opened(folder, source, **changes)
    streams = [Stream(config, plan, sources, Ranks(r, world), steps=steps, states=states or {}) for r in range(world)]
    places, after = [], {}
    for parts in zip(*streams, strict=True):
        places.append([place for part in parts for batch in part.micro_batches for place in batch.places])
        after = {slot: state for part in parts for slot, state in part.states.items()}
    return places, after


def numbers(batches):
    return {30 * place.shard + place.record for batch in batches for place in batch}


# ---------------------------------------------------------------------------------------------------------- conditions


@pytest.mark.parametrize(
    ("condition", "passing", "failing"),
    [
        ({"min": 0.3}, [0.3, 1, 10**400, "0.31", " 2 "], [0.29, -1, None, True, "many", [1], float("nan"), "nan"]),
        ({"max": 5}, [5, -(10**400), "-7"], [5.1, "6", {}, False]),
        ({"min": 2, "max": 2}, [2, 2.0, "2"], [1, 3]),
        ({"one_of": ["en", True]}, ["en", True], ["de", "True", 1, False, None, ["en"]]),
        ({"none_of": ["nc"]}, ["", "en", False], ["nc", None, 3]),
        ({"one_of": ["a", "b"], "none_of": ["b"]}, ["a"], ["b", "c"]),
    ],
)
def test_a_condition_lets_its_values_pass_and_no_others(condition, passing, failing):
    conditions = RecordFilter(FilterConfig(fields={"a.b": FieldFilter(**condition)}))
    for values, expected in ((passing, None), (failing, "fields.a.b")):
        for value in values:
            assert conditions.failed_by_json(json.dumps({"a": {"b": value}}).encode()) == expected, value
    for lacking in (b"{}", b"[]", b"3", b'{"a": null}', b'{"a": "text"}', b'{"a.b": "en"}', None):
        assert conditions.failed_by_json(lacking) == "fields.a.b"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_damage_and_not_filtered(content):
    with pytest.raises(ValueError):  # noqa: PT011  of any kind
        RecordFilter(FilterConfig(fields={"a": FieldFilter(min=0)})).failed_by_json(content)


def test_lists_hold_exactly_their_keys_in_any_order(tmp_path):
    words = [f"{number:09d}" for number in range(5000)] + ["folder/Zoë", "caf\udce9"]
    for name, some in (("up", words), ("down", [*reversed(words), words[7]])):
        content = "\r\n \n".join(some).encode(errors="surrogateescape")
        (tmp_path / name).write_bytes(content)
    up, down = (KeyList(str(tmp_path / name)) for name in ("up", "down"))
    assert all(word in up for word in words)
    assert not any(word in up for word in ("", "5000", "00000", "folder/Zoe", " ", "000000001 "))
    assert up.digest == down.digest
    (tmp_path / "more").write_bytes(b"one more\n" + (tmp_path / "up").read_bytes())
    assert KeyList(str(tmp_path / "more")).digest != up.digest


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({}, r"filter: a filter needs fields, keys or drop_keys"),
        ({"fields": {"a": {}}}, r"filter\.fields\.a: give min, max or both for numbers, else one_of, none_of or both"),
        ({"fields": {"a": {"min": 1, "one_of": ["b"]}}}, r"filter\.fields\.a: give min, max or both"),
        ({"fields": {"a": {"min": 2, "max": 1}}}, r"filter\.fields\.a: min 2\.0 is above max 1\.0"),
        ({"fields": {"a": {"one_of": [1]}}}, r"filter\.fields\.a\.one_of"),
        ({"fields": {"a": {"one_of": []}}}, r"filter\.fields\.a\.one_of"),
        ({"keys": "${NOT_SET_ANYWHERE}"}, r"filter\.keys: environment variable NOT_SET_ANYWHERE is not set"),
    ],
)
def test_filters_that_say_nothing_are_refused(tmp_path, filters, message):
    with pytest.raises(ConfigError, match=rf"data\.sources\.tiny\.{message}"):
        tiny_config(tmp_path, {"shards": "a.tar", "filter": filters})


def test_lists_that_are_missing_or_empty_are_refused_by_name(tmp_path, shards):
    with pytest.raises(DataError, match=r"the list of keys .*gone\.txt cannot be read \(No such file.*check the path"):
        opened(tmp_path, {"shards": shards, "filter": {"keys": str(tmp_path / "gone.txt")}})
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"the list of keys .*empty\.txt is empty; it needs the key of a record in"):
        opened(tmp_path, {"shards": shards, "filter": {"drop_keys": str(tmp_path / "empty.txt")}})


def test_fields_need_shards_with_json(tmp_path, colour_shards):
    source = {"shards": str(colour_shards / "00000.tar"), "filter": {"fields": {"a": {"min": 1}}}}
    with pytest.raises(DataError, match=r"hold no fields to filter by: wanted members json.*sources\.tiny\.filter\.f"):
        opened(tmp_path, source)


def test_lists_that_differ_between_ranks_are_refused(tmp_path, shards, keys, monkeypatch):
    monkeypatch.setattr(Ranks, "gather_objects", lambda self, own: [own, "-keys-another" if own else own])
    with pytest.raises(DataError, match=r"source tiny: the lists of keys that rank 1 reads hold other keys than those"):
        opened(tmp_path, {"shards": shards, "filter": {"keys": keys}})


# ------------------------------------------------------------------------------------------------------------- reading


def passing(filters):
    """Numbers of the records that pass, by their definition."""
    kept = set(KEPT) if "keys" in filters else set(range(COUNT))
    kept -= set(KEPT) if "drop_keys" in filters else set()
    if "fields" in filters:
        kept = {n for n in kept if n % 5 != 4 and n >= 10 and n % 4 != 0}  # every fourth is red
    return kept


FIELDS = {"number": {"min": 10}, "colour": {"none_of": ["red"]}}


@pytest.mark.parametrize("names", [("keys",), ("drop_keys",), ("fields",), ("fields", "keys"), ("fields", "drop_keys")])
def test_what_passes_is_delivered_and_all_records_are_accounted_for(tmp_path, shards, keys, names):
    filters = {name: FIELDS if name == "fields" else keys for name in names}
    source = {"shards": shards, "filter": filters}
    _, _, plan = opened(tmp_path, source)
    batches, states = deliveries(tmp_path, source, 12)
    assert numbers(batches) == passing(filters)
    entry = account(plan, states)["tiny"]
    taken = sum(
        plan.records_between(0, s, SlotState.first(1).positions[0], state.positions[0]) for s, state in states.items()
    )
    assert (entry.delivered, entry.num_skipped) == (12 * 16, 0)
    assert entry.delivered + entry.num_filtered == entry.num_taken == taken
    assert {condition.partition(".")[0] for condition in entry.filtered} == {*names}


def reads(folder, source, steps):
    """Kind of each range that was read of the tars -> how often; ranges are known by the records' members."""
    config, sources, plan = opened(folder, source)
    spans = {}
    for number, path in enumerate(sources["tiny"].reader.shards.locations):
        index = Shard(path).index
        for record in range(index.num_records):
            first, last = int(index.starts[record]), int(index.starts[record + 1])
            for member in range(first, last):
                spans[path, int(index.offsets[member])] = (number, record, index.extensions[index.kinds[member]])
    found = Counter()
    original = storage._LocalFile.read

    def read(file, start, length, **options):
        if file.location.endswith(".tar"):
            found[spans[file.location, start]] += 1
        return original(file, start, length, **options)

    with patch.object(storage._LocalFile, "read", read):
        (*steps,) = Stream(config, plan, sources, Ranks(), steps=steps, states={})
    return (
        found,
        [[place for batch in step.micro_batches for place in batch.places] for step in steps],
        steps[-1].states,
    )


def test_nothing_is_read_of_a_record_whose_key_does_not_pass(tmp_path, shards, keys):
    found, batches, _ = reads(tmp_path, {"shards": shards, "filter": {"keys": keys}}, 5)
    delivered = Counter((place.shard, place.record, "jpg") for batch in batches for place in batch)
    assert found == delivered


def test_nothing_but_its_json_is_read_of_a_record_whose_fields_do_not_pass(tmp_path, shards):
    found, batches, states = reads(tmp_path, {"shards": shards, "filter": {"fields": FIELDS}}, 5)
    images = Counter({place: count for place, count in found.items() if place[2] == "jpg"})
    assert images == Counter((place.shard, place.record, "jpg") for batch in batches for place in batch)
    filtered = sum(count for state in states.values() for *_, count in state.filtered)
    assert sum(count for place, count in found.items() if place[2] == "json") == images.total() + filtered


def test_a_filter_changes_neither_the_order_nor_the_seeds_of_what_passes(tmp_path, shards, keys):
    """What a slot delivers is what it would deliver without the filter, less the records that do not pass."""

    def by_slot(filters, steps):
        config, sources, plan = opened(tmp_path, {"shards": shards, "filter": filters})
        found = [[] for _ in range(16)]
        for step in Stream(config, plan, sources, Ranks(), steps=steps, states={}):
            (batch,) = step.micro_batches
            for slot, (place, seed) in enumerate(zip(batch.places, batch.seeds.tolist(), strict=True)):
                found[slot].append((30 * place.shard + place.record, seed))
        return found

    everything, some = by_slot(None, 40), by_slot({"keys": keys}, 6)
    for without, filtered in zip(everything, some, strict=True):
        assert filtered == [sample for sample in without if sample[0] in KEPT][:6]


def test_batches_depend_neither_on_ranks_nor_on_workers_nor_on_stops(tmp_path, shards, keys):
    source = {"shards": shards, "filter": {"keys": keys, "fields": {"number": {"min": 10}}}}
    straight, end = deliveries(tmp_path, source, 9)
    for world, workers in ((2, 0), (4, 2), (1, 2)):
        first, states = deliveries(tmp_path, source, 4, world=world, data__workers=workers)
        states = {slot: SlotState.parse(json.loads(json.dumps(state))) for slot, state in states.items()}
        second, states = deliveries(tmp_path, source, 5, states, world=world // 2 or 2)
        assert first + second == straight
        assert states == end


def test_a_json_that_cannot_be_decoded_is_a_bad_record(tmp_path):
    records = [
        (key, {**members, "json": b"{" if n % 4 == 0 else b'{"a": 1}'})
        for n, (key, members) in enumerate(colour_records(40))
    ]
    write_shards(tmp_path / "shards", records, 40)
    source = {"shards": str(tmp_path / "shards/00000.tar"), "filter": {"fields": {"a": {"min": 1}}}}
    config, sources, plan = opened(tmp_path, source)
    *_, last = Stream(config, plan, sources, Ranks(), steps=4, states={})
    entry = account(plan, last.states)["tiny"]
    assert set(entry.skipped) == {"undecodable_json"}
    assert entry.filtered == {}


@pytest.mark.parametrize(
    ("filters", "why"),
    [({"fields": {"number": {"min": 1000}}}, r"50,000 fields\.number"), ({"keys": "wrong.txt"}, r"50,000 keys")],
)
def test_a_filter_that_lets_nothing_pass_ends_with_a_message(tmp_path, shards, monkeypatch, filters, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.txt").write_text("000001.jpg\n")
    expected = (
        rf"source tiny: data\.sources\.tiny\.filter left out 50,000 records in a row \(by {why}; the last was "
        rf".*0000\d\.tar:\d{{6}}\), so it lets almost nothing pass; compare its conditions with what the shards hold"
    )
    with pytest.raises(DataError, match=expected):
        deliveries(tmp_path, {"shards": shards, "filter": filters}, 1)


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def damaged(tmp_path, shards):
    """The shards with a record without an image among those that the list names."""
    opened = [Shard(path) for path in expand(shards)]
    records = [shard.read(number) for shard in opened for number in range(shard.num_records)]
    records[9].members["jpg"] = b"no image"
    write_shards(tmp_path / "damaged", records, 30)
    return str(tmp_path / "damaged" / "{00000..00002}.tar")


OPTIONS = {"train__steps": 8, "checkpoint__every_steps": 4}


def rows(folder):
    wanted = (
        "step",
        "train/loss",
        "data/delivered/tiny",
        "data/skipped/tiny",
        "data/filtered/tiny",
        "data/passes/tiny",
    )
    return [
        {name: row[name] for name in wanted} for row in load_history(folder / "metrics.jsonl") if "train/loss" in row
    ]


def killed_at(step):
    original = train_module.Report.publish

    def publish(report, run, factor):
        original(report, run, factor)
        if run.step == step:
            raise KeyboardInterrupt

    return publish


def test_a_run_with_a_filter_continues_exactly_and_keeps_its_books(tmp_path, damaged, keys, caplog, monkeypatch):
    source = {"shards": damaged, "filter": {"keys": keys}}
    train(tiny_config(tmp_path / "straight", source, **OPTIONS))
    (line,) = [line for line in caplog.messages if line.startswith("source tiny: 128 delivered")]
    last = rows(tmp_path / "straight")[-1]
    skipped, filtered = int(last["data/skipped/tiny"]), int(last["data/filtered/tiny"])
    assert skipped > 0
    assert f"+ {skipped} skipped ({skipped} not_an_image) + {filtered:,} filtered ({filtered:,} keys) = " in line
    assert f"= {128 + skipped + filtered:,} records" in line
    bad = [json.loads(text) for text in (tmp_path / "straight/bad_records.jsonl").read_text().splitlines()]
    assert len(bad) == skipped
    with monkeypatch.context() as patched:
        patched.setattr(train_module.Report, "publish", killed_at(6))
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(tmp_path / "run", source, **OPTIONS))
    listed = (tmp_path / "keys.txt").read_text().splitlines()
    (tmp_path / "moved.txt").write_text("\n".join(reversed(listed)))
    moved = {"shards": damaged, "filter": {"keys": str(tmp_path / "moved.txt")}}
    train(tiny_config(tmp_path / "run", moved, **OPTIONS, data__workers=2))
    assert "continuing" in caplog.text
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")


def test_records_that_are_filtered_do_not_count_as_bad(tmp_path, shards, keys):
    source = {"shards": shards, "filter": {"keys": keys}}
    train(tiny_config(tmp_path / "run", source, train__steps=8, data__max_bad_fraction=0.0))
    assert rows(tmp_path / "run")[-1]["data/filtered/tiny"] > 128
    assert not (tmp_path / "run/bad_records.jsonl").exists()


def test_another_filter_is_refused_where_a_run_is_continued(tmp_path, shards, keys):
    source = {"shards": shards, "filter": {"keys": keys, "fields": {"number": {"min": 10}}}}
    train(tiny_config(tmp_path / "run", source, train__steps=2))
    for changes, what in (
        ({"filter__fields__number__min": 11}, r"filter\.fields\.number\.min: 10\.0 -> 11\.0"),
        ({"filter": None}, r"filter\.fields\.number\.min: 10\.0 -> absent"),
        ({"filter__drop_keys": keys}, r"filter"),
    ):
        wanted = tiny_config(tmp_path / "run", merged(source, **changes), train__steps=4)
        with pytest.raises((ConfigError, CheckpointError), match=rf"(?s)use a new run_dir|other keys.*{what}"):
            train(wanted)
    (tmp_path / "keys.txt").write_text("000000\n000003\n")
    with pytest.raises(CheckpointError, match=r"source tiny holds other records, or its filter other keys, than when"):
        train(tiny_config(tmp_path / "run", source, train__steps=4))


def test_a_filter_survives_the_way_into_the_runs_own_configuration(tmp_path, keys):
    source = {"shards": "a.tar", "filter": {"keys": keys, "fields": {"a.b": {"one_of": ["x", True]}}}}
    config = tiny_config(tmp_path, source)
    again = config_file.validate(config_file.parse_yaml(config_file.dump(config)), "test")
    assert again == config


def test_states_of_before_there_were_filters_are_read():
    state = SlotState.parse([[[1, 2, 3]], [7], [[0, "checksum", 2]]])
    assert (state.delivered, state.skipped, state.filtered) == ((7,), ((0, "checksum", 2),), ())


def test_looking_up_a_key_does_not_copy_the_list(tmp_path):
    """Mixed integer types would make numpy turn all hashes into floats, each time."""
    (tmp_path / "keys.txt").write_text("a\n")
    keys = KeyList(str(tmp_path / "keys.txt"))
    assert keys._hashes.dtype == np.uint64
