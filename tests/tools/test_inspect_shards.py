"""tools/inspect_shards.py: counts, bad records by the judgement of training, duplicates."""

import tracemalloc
from collections import Counter

import inspect_shards
import numpy as np
import pytest
from tiny import jpeg, tiny_config

from evaclip.data.order import choose_slots
from evaclip.data.pipeline import Stream, make_plan
from evaclip.data.shards import write_shards
from evaclip.data.tokenizer import Tokenizer
from evaclip.distributed import Ranks
from evaclip.sources import open_sources

BAD = {
    "000003": ("undecodable", {"jpg": jpeg((1, 2, 3))[:-200], "txt": b"cut"}),
    "000008": ("not_an_image", {"jpg": b"<html>", "txt": b"gone"}),
    "000009": ("not_an_image", {"jpg": b"<html>", "txt": b"gone"}),
    "000011": ("no_caption", {"jpg": jpeg((4, 5, 6)), "txt": b" "}),
    "000012": ("no_image", {"txt": b"words alone"}),
    "000014": ("undecodable_caption", {"jpg": jpeg((7, 8, 9)), "txt": b"\xff\xfe\xff"}),
    "000021": ("too_large", {"jpg": jpeg((7, 8, 9), size=160), "txt": b"large"}),
}
LIMIT = 120 * 120


def good(number):
    return {"jpg": jpeg((number, 99, 200), size=24 + number, seed=number), "txt": b"word " * (number + 1)}


@pytest.fixture
def shards(tmp_path):
    """Three shards of 12 records, of which one more has rotted since it was indexed."""
    pairs = {f"{n:06d}": BAD.get(f"{n:06d}", ("", good(n)))[1] for n in range(36)}
    paths = write_shards(tmp_path / "s", pairs.items(), 12)
    content = bytearray(paths[2].read_bytes())
    content[content.index(pairs["000030"]["jpg"]) + 50] ^= 1
    paths[2].write_bytes(content)
    return paths


def told(capsys, *arguments):
    code = inspect_shards.main([*map(str, arguments), "--workers", "1"])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_counts_lengths_and_sides_are_those_of_the_usable_records(shards, capsys):
    code, out, _ = told(capsys, *shards, "--max-image-pixels", LIMIT)
    assert code == 0
    assert "36 records in 3 shards, 0.00 GB\nmembers: 36 txt, 35 jpg\n" in out
    usable = [n for n in range(36) if f"{n:06d}" not in BAD and n != 30]
    lengths = sorted(len(Tokenizer().encode(good(n)["txt"].decode())) for n in usable)
    assert f"min {lengths[0]}, median {lengths[13]}, p95 {lengths[26]}, max {lengths[-1]}\n" in out
    assert f"shorter side of images in pixels: min 24, median {24 + usable[13]}, p95 {24 + usable[26]}, max 59" in out
    small = sum(24 + n < 32 for n in usable)
    assert f"  {'0 to 31':>14} {small:>13,} {small / 28:>6.1%} #" in out


def test_the_same_records_are_bad_for_the_same_reasons_as_in_training(shards, capsys, tmp_path):
    _, out, _ = told(capsys, *shards, "--max-image-pixels", LIMIT)
    config = tiny_config(tmp_path, {"shards": [str(path) for path in shards]}, data__max_image_pixels=LIMIT)
    sources = open_sources(config, Ranks())
    plan = make_plan(config, sources, choose_slots(16, 1))
    skipped = {}
    for delivery in Stream(config, plan, sources, Ranks(), steps=6, states={}):  # more than a pass
        skipped |= {record.name: record.reason for record in delivery.skipped}
    assert len(skipped) == len(BAD) + 1
    assert "bad records, which training skips: 8, 22.22%\n" in out
    for reason, count in Counter(skipped.values()).items():
        names = "".join(f"    {name}\n" for name in sorted(skipped) if skipped[name] == reason)
        assert f"  {reason}: {count}\n{names}" in out


def test_equal_images_and_keys_are_found_in_all_shards(tmp_path, capsys):
    pairs = [(f"{n:06d}", good(n)) for n in range(20)]
    pairs[17] = ("000017", {**good(17), "jpg": good(2)["jpg"]})
    pairs[5] = ("000005", {**good(5), "jpg": good(2)["jpg"]})
    pairs[12] = ("000012", {**good(12), "jpg": good(9)["jpg"]})
    pairs[19] = ("000001", good(19))
    first, second = write_shards(tmp_path, pairs, 10)
    _, out, _ = told(capsys, first, second)
    assert (
        f"equal images: 5 records in 2 groups, 3 too many\n"
        f"  3 x {first}:000002, {first}:000005, {second}:000017\n"
        f"  2 x {first}:000009, {second}:000012\n\n"
        f"equal keys: 2 records in 1 groups, 1 too many\n"
        f"  2 x {first}:000001, {second}:000001\n"
    ) in out


def test_two_processes_tell_the_same_as_one(shards, capsys):
    alone = told(capsys, *shards)
    inspect_shards.main([*map(str, shards), "--workers", "2"])
    assert capsys.readouterr().out == alone[1]


def test_only_the_first_are_named_unless_all_are_asked_for(tmp_path, capsys):
    write_shards(tmp_path, ((f"{n:03d}", {"jpg": b"bad", "txt": b"x"}) for n in range(15)), 15)
    _, few, _ = told(capsys, tmp_path / "00000.tar")
    assert few.count("00000.tar:") == 10
    assert "  ... and 5 more; --all lists them" in few
    _, every, _ = told(capsys, tmp_path / "00000.tar", "--all")
    assert every.count("00000.tar:") == 15


def test_another_caption_is_judged_where_it_is_asked_for(tmp_path, capsys):
    pairs = ((f"{n:03d}", {**good(n), "json": b'{"short": "two words"}' if n else b"{}"}) for n in range(5))
    write_shards(tmp_path, pairs, 5)
    _, out, _ = told(capsys, tmp_path / "00000.tar", "--caption", "json.short")
    assert "tokens of json.short, start and end included: min 4, median 4, p95 4, max 4" in out
    assert f"  no_caption: 1\n    {tmp_path}/00000.tar:000\n" in out


def test_damaged_and_unreadable_shards_are_named_and_the_others_told(shards, capsys):
    shards[0].write_bytes(shards[0].read_bytes()[:30_000])
    shards[0].with_name("00000.tar.index.safetensors").unlink()
    shards[1].with_name("00001.tar.index.safetensors").unlink()
    shards[1].with_name("00001.tar.index.safetensors").mkdir()
    code, out, err = told(capsys, *shards)
    assert code == 1
    assert "records in 2 shards" in out
    assert f"damaged: {shards[0]}: " in out
    assert "00001.tar.index.safetensors" in err
    code, _, err = told(capsys, "/nowhere/0.tar")
    assert (code, err.startswith("error: /nowhere/0.tar does not exist")) == (1, True)


@pytest.mark.parametrize("size", [0, 1, 2, 300])
def test_equal_values_are_found_as_by_counting(size):
    values = np.random.default_rng(size).integers(0, 120, size).astype(np.uint64)
    groups = inspect_shards.equal(values)
    found = [groups.places(number).tolist() for number in range(len(groups.sizes))]
    expected = [
        np.flatnonzero(values == value).tolist() for value, n in Counter(values.tolist()).items() if value and n > 1
    ]
    assert found == sorted(expected, key=lambda places: (-len(places), places[0]))


def test_a_record_takes_the_bytes_that_the_help_states():
    """Both checksums of all records, and the search for equal ones, half of which have an equal."""
    count = 200_000
    tracemalloc.start()
    images, keys = (np.random.default_rng(seed).integers(1, count, count, np.uint64) for seed in (1, 2))
    inspect_shards.equal(np.concatenate([images[:1000], images[1000:]]))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(keys) == count
    assert 40 < most / count < 60
