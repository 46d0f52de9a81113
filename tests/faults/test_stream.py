"""Hundreds of damaged shards: whatever is wrong with them, every record is delivered, or counted and named.

A trial writes four shards, breaks records before and bytes after they are written, with or without an index of the
intact bytes, and reads a whole pass. What must become of each record follows from where the damage lies.
"""

import io
import logging
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from tables import record
from tiny import jpeg, tiny_config

from evaclip.data import shards
from evaclip.data.accounts import account, require_balance
from evaclip.data.index import build_index, index_path, read_index
from evaclip.data.order import choose_slots
from evaclip.data.pipeline import Stream, make_plan
from evaclip.data.shards import write_shards
from evaclip.distributed import Ranks
from evaclip.errors import DataError
from evaclip.sources import open_sources

RECORDS, SHARDS = 25, 4
GOOD, BAD, EITHER = "delivered", "skipped", "either"


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def bomb():
    """A PNG of 400 megapixels in 50 KB."""
    return encoded(Image.new("1", (20_000, 20_000)), "PNG")


BOMB = bomb()
JPEG = jpeg((200, 60, 60), size=48)
CMYK = encoded(Image.fromarray(noise(24, 24)).convert("CMYK"), "JPEG")
DEEP = encoded(Image.fromarray(noise(24, 24)[..., 0].astype(np.uint16) * 257), "PNG")
MOVING = encoded(Image.new("P", (24, 24)), "GIF", save_all=True, append_images=[Image.new("P", (24, 24), 1)])
STRIP = simplejpeg.encode_jpeg(noise(1, 30_000))

CONTENT_FAULTS = {  # kind -> change of the members, what becomes of the record
    "truncated JPEG": ({"jpg": JPEG[: len(JPEG) // 2]}, BAD),
    "truncated JPEG with its end marker restored": ({"jpg": JPEG[: len(JPEG) // 2] + b"\xff\xd9"}, BAD),
    "PNG bomb": ({"jpg": BOMB}, BAD),
    "30000 x 1 image": ({"jpg": STRIP}, GOOD),
    "1 x 1 image": ({"jpg": jpeg((9, 9, 9), size=1)}, GOOD),
    "CMYK image": ({"jpg": CMYK}, GOOD),
    "16-bit image": ({"jpg": DEEP}, GOOD),
    "animated image": ({"jpg": MOVING}, GOOD),
    "random bytes as image": ({"jpg": noise(20, 20).tobytes()}, BAD),
    "no bytes as image": ({"jpg": b""}, BAD),
    "no image": ({"jpg": None}, BAD),
    "caption not in UTF-8": ({"txt": b"caf\xe9"}, BAD),
    "empty caption": ({"txt": b"  \n"}, BAD),
    "huge caption": ({"txt": b"words " * 100_000}, GOOD),
    "no caption": ({"txt": None}, BAD),
    "unknown members": ({"exe": b"MZ" * 500, "pickle": b"cos\nsystem\n"}, GOOD),
}
TAR_FAULTS = (
    "cut off between members", "cut off within a member", "random header", "zeroed header", "early end marker",
    "flipped byte",
)  # fmt: skip


class Name(NamedTuple):
    """A record as it was written."""

    shard: int
    key: str


@dataclass
class Trial:
    """What was done to some shards, and what must become of their records."""

    folder: Path
    outcome: dict[Name, str] = field(default_factory=dict)
    lost: set[Name] = field(default_factory=set)
    """Records that need not be in the index, if the shard's damage is told."""
    damaged: set[int] = field(default_factory=set)
    faults: Counter = field(default_factory=Counter)
    twice: set[Name] = field(default_factory=set)
    """Keys of two records, of which one can be hit."""
    hit: dict[Name, str] = field(default_factory=dict)
    """Record -> the kind of fault that decides about it."""


def make_trial(folder, random):
    trial = Trial(folder)
    for shard in range(SHARDS):
        chosen = random.choice(list(CONTENT_FAULTS), random.integers(0, 5))
        places = random.choice(RECORDS, len(chosen), replace=False).tolist()
        broken = dict(zip(places, chosen.tolist(), strict=True))
        path = folder / f"{shard:05d}.tar"
        (written,) = write_shards(folder / "new", _records(trial, shard, broken, random), RECORDS + 2)
        written.rename(path)
        Path(index_path(written, None)).rename(index_path(path, None))
        if random.random() < 0.7:
            _break(trial, shard, path, str(random.choice(TAR_FAULTS)), random)
    return trial


def _records(trial, shard, broken, random):
    twice = int(random.integers(0, RECORDS)) if random.random() < 0.3 else None
    for number in range(RECORDS):
        name = Name(shard, f"{shard}{number:04d}")
        members = {"jpg": JPEG, "txt": f"record {name.key}".encode()}
        trial.outcome[name] = GOOD
        if number in broken:
            change, trial.outcome[name] = CONTENT_FAULTS[broken[number]]
            members = {key: value for key, value in {**members, **change}.items() if value is not None}
            trial.faults[broken[number]] += 1
            trial.hit[name] = broken[number]
        yield name.key, members
        if number == twice and number not in broken:
            trial.faults["duplicate key"] += 1
            trial.twice.add(name)
            yield name.key, members


def _break(trial, shard, path, kind, random):
    """Damage a tar's bytes; an index of the intact bytes is there or not."""
    index = build_index(path)
    indexed = bool(random.integers(0, 2)) or kind == "flipped byte"  # without one, nobody knows what the byte was
    content = bytearray(path.read_bytes())
    member = int(random.integers(2, len(index.offsets)))
    offset, size = int(index.offsets[member]), int(index.sizes[member])
    number = int(np.searchsorted(index.starts, member, side="right")) - 1
    before = int(index.offsets[member - 1] + index.sizes[member - 1])
    header = -(-before // 512) * 512  # the first of the member's header blocks
    names = [Name(shard, key) for key in index.keys]
    told = f"{kind}, {'with' if indexed else 'without'} an index"
    if kind == "flipped byte" and not size:
        return
    trial.faults[told] += 1
    trial.hit.update(dict.fromkeys(names[number:] if kind.startswith("cut off") else [names[number]], told))
    if kind == "flipped byte":
        content[offset + int(random.integers(size))] ^= 1 << int(random.integers(8))
        trial.outcome[names[number]] = BAD
    elif kind.startswith("cut off"):
        cut = header if kind.endswith("between members") else offset + max(0, size - 1)
        del content[cut:]
        trial.damaged.add(shard)
        for name in names[number:]:
            trial.outcome[name] = BAD
            trial.lost.add(name)
        if indexed and size == 0 and kind.endswith("within a member"):
            trial.outcome[names[number]] = EITHER
        if not indexed:
            needed = index.extensions[index.kinds[member]] in ("jpg", "txt")
            trial.outcome[names[number]] = BAD if size and needed else EITHER
    elif kind == "early end marker":
        content[header:header] = bytes(1024)
        trial.damaged.add(shard)
    else:
        block = random.integers(0, 256, 512, dtype=np.uint8).tobytes() if kind == "random header" else bytes(512)
        content[header : header + 512] = block
        if not indexed:
            trial.damaged.add(shard)
            trial.outcome[names[number]] = EITHER  # an extended header can go without harm
            trial.lost.add(names[number])
    path.write_bytes(content)
    if not indexed:
        Path(index_path(path, None)).unlink()


def read_a_pass(trial):
    """Names delivered and skipped (with reasons) until every slot has begun its second pass."""
    source = {"shards": str(trial.folder / f"{{00000..{SHARDS - 1:05d}}}.tar")}
    changes = {"train__global_batch": 20, "data__slots": 4, "data__max_bad_fraction": 0.9}
    config = tiny_config(trial.folder / "run", source, **changes)
    sources = open_sources(config, Ranks())
    plan = make_plan(config, sources, choose_slots(20, 1, 4))
    reader = sources["tiny"].reader
    delivered, skipped, before = Counter(), Counter(), {}

    def name(place):
        location, _, key = reader.record_name(place.shard, place.record).rpartition(":")
        return Name(int(Path(location).stem), key), place

    for delivery in Stream(config, plan, sources, Ranks(), steps=100, states={}):
        delivered.update(name(place) for batch in delivery.micro_batches for place in batch.places)
        skipped.update((*name(record.place), record.reason) for record in delivery.skipped)
        require_balance(plan, before, delivery.states)
        before = delivery.states
        if all(state.positions[0].pass_number > 0 for state in before.values()):
            break
    total = account(plan, before)["tiny"]
    assert (total.delivered, total.num_skipped) == (delivered.total(), skipped.total())
    assert total.skipped == Counter({r: sum(n for (*_, why), n in skipped.items() if why == r) for *_, r in skipped})
    places = {place for _, place in delivered} | {place for _, place, _ in skipped}
    assert len(places) == sum(sources["tiny"].shard_records), "delivered + skipped = indexed"
    return {name for name, _ in delivered}, {name: reason for name, _, reason in skipped}


def check(trial, caplog):
    """Counts of (kind of fault, what became of the record)."""
    caplog.clear()
    delivered, skipped = read_a_pass(trial)
    told = {shard for shard in range(SHARDS) if f"{shard:05d}.tar" in caplog.text}
    assert trial.damaged <= told, "damage is told by the shard's name"
    ends = Counter()
    for name, outcome in trial.outcome.items():
        found = name in delivered, name in skipped
        if name in trial.lost and not any(found):
            ends[trial.hit[name], "not in the index, damage told"] += 1
            continue
        allowed = {GOOD: [(True, False)], BAD: [(False, True)], EITHER: [(True, False), (False, True)]}[outcome]
        if name in trial.twice:
            allowed += [(True, True), *([(True, False)] if name in trial.lost else [])]
        assert found in allowed, (name, outcome, found, skipped.get(name))
        if name in trial.hit:
            ends[trial.hit[name], "delivered" if found[0] else "skipped and counted"] += 1
    return ends, Counter(skipped.values())


@pytest.mark.parametrize("faults", [60, pytest.param(1000, marks=pytest.mark.faults)])
def test_every_record_of_damaged_shards_is_delivered_or_named(tmp_path, faults, caplog):
    caplog.set_level(logging.WARNING)
    injected, reasons, ends, number = Counter(), Counter(), Counter(), 0
    while injected.total() < faults:
        folder = tmp_path / str(number)
        folder.mkdir()
        trial = make_trial(folder, np.random.default_rng([7, number]))
        found = check(trial, caplog)
        ends, reasons = ends + found[0], reasons + found[1]
        injected += trial.faults
        number += 1
    if faults == 1000:
        assert {*CONTENT_FAULTS} <= {*injected}
        assert all(any(kind.startswith(fault) for kind in injected) for fault in TAR_FAULTS)
        for kind, count in sorted(injected.items()):
            record("Damaged shards: faults, and the records they hit", kind, "injected", count)
            for end in ("delivered", "skipped and counted", "not in the index, damage told"):
                record("Damaged shards: faults, and the records they hit", kind, end, ends[kind, end])
    assert {"checksum", "undecodable", "no_caption", "no_image", "too_large"} <= {*reasons}


def test_too_much_damage_stops_the_run_and_names_the_worst_shard(tmp_path):
    paths = write_shards(tmp_path, ((f"{n:04d}", {"jpg": JPEG, "txt": b"words"}) for n in range(100)), 50)
    index = build_index(paths[1])
    content = bytearray(paths[1].read_bytes())
    for member in range(60):
        content[int(index.offsets[member]) - 512 : int(index.offsets[member])] = bytes(512)
    paths[1].write_bytes(content)
    Path(index_path(paths[1], None)).unlink()
    config = tiny_config(tmp_path / "run", {"shards": str(tmp_path / "{00000..00001}.tar")})
    with pytest.raises(
        DataError, match=r"source tiny: about \d+ of \d+ records are lost in 1 damaged shards.*00001\.tar"
    ):
        open_sources(config, Ranks())
    saved = read_index(index_path(paths[1], None))
    assert saved, "the next start need not scan again"
    assert saved.gaps


# ------------------------------------------------------------------------------------------------------ during the run


def stream_of(folder, **changes):
    source = {"shards": str(folder / "{00000..00003}.tar")}
    options = {"train__global_batch": 20, "data__slots": 4, "data__max_bad_fraction": 0.9, **changes}
    config = tiny_config(folder / "run", source, **options)
    sources = open_sources(config, Ranks())
    return Stream(config, make_plan(config, sources, 4), sources, Ranks(), steps=200, states={})


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path, ((f"{n:04d}", {"jpg": JPEG, "txt": b"words"}) for n in range(100)), 25)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_stops_the_run_with_its_name(folder, workers, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 1)  # so that it is opened again
    stream = iter(stream_of(folder, data__workers=workers))
    next(stream)
    (folder / "00002.tar").unlink()
    with pytest.raises(DataError, match=r"00002.tar cannot be read \(No such file or directory\); check the path"):
        for _ in stream:
            pass


def test_a_shard_that_is_cut_off_during_the_run_costs_its_records_alone(folder):
    stream = iter(stream_of(folder))
    next(stream)
    with (folder / "00002.tar").open("r+b") as file:
        file.truncate(20_000)
    reasons = Counter()
    for _ in range(20):
        reasons.update((record.reason, record.place.shard) for record in next(stream).skipped)
    assert {*reasons} == {("cut_off", 2)}


def test_a_shard_whose_bytes_change_during_the_run_costs_its_records_alone(folder):
    stream = iter(stream_of(folder))
    next(stream)
    (folder / "00002.tar").write_bytes(bytes((folder / "00002.tar").stat().st_size))
    reasons = Counter()
    for _ in range(20):
        reasons.update((record.reason, record.place.shard) for record in next(stream).skipped)
    assert {*reasons} == {("checksum", 2)}


def test_a_source_of_nothing_but_bad_records_ends_with_a_message(tmp_path):
    write_shards(tmp_path, ((f"{n:04d}", {"jpg": b"", "txt": b"words"}) for n in range(100)), 25)
    with pytest.raises(DataError, match=r"source tiny: 500 records in a row cannot be used, the last in .*500 empty"):
        next(iter(stream_of(tmp_path)))


# -------------------------------------------------------------------------------------------------------------- memory

MEMORY = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from faults.test_stream import BOMB, JPEG, STRIP
from tiny import tiny_config
from evaclip.data.pipeline import Stream, make_plan
from evaclip.distributed import Ranks
from evaclip.sources import open_sources
config = tiny_config("unused", {{"shards": {shards!r}}}, train__global_batch={slots}, data__slots={slots},
    data__max_bad_fraction=0.9)
sources = open_sources(config, Ranks())
stream = Stream(config, make_plan(config, sources, {slots}), sources, Ranks(), steps={steps}, states={{}})
next(iter(Stream(config, make_plan(config, sources, {slots}), sources, Ranks(), steps=1, states={{}})))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in stream:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def growth(shards, slots, steps):
    """KiB by which the peak memory of a process grows while it reads some steps, the first aside."""
    code = MEMORY.format(tests=str(Path(__file__).parents[1]), shards=str(shards), slots=slots, steps=steps)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.faults
def test_2048_slots_in_one_process_hold_no_records_back(tmp_path):
    """A window of 16 blocks of 64 such records per slot would be 2 GB; what grows is cursors and pages of indexes."""
    write_shards(tmp_path, ((f"{n:06d}", {"jpg": JPEG, "txt": b"words"}) for n in range(20_000)), 5000)
    assert growth(tmp_path / "{00000..00003}.tar", 2048, 5) < 150_000


def test_hostile_images_take_no_more_memory_than_one_that_is_allowed(tmp_path):
    """A 400-megapixel PNG would take 1.2 GB, and a hundred megapixels are allowed: 300 MB, and once more on the way."""
    kinds = [BOMB, STRIP, JPEG, b"\x89PNG" + bytes(100)]
    write_shards(tmp_path, ((f"{n:04d}", {"jpg": kinds[n % 4], "txt": b"words"}) for n in range(80)), 40)
    assert growth(tmp_path / "{00000..00001}.tar", 16, 20) < 100_000
