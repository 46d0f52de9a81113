import json
import pickle
from collections import Counter

import pytest

from evaclip.data.captions import BadCaptionError, choose_caption


def record(text: bytes | str | None = None, **fields: object) -> dict[str, bytes]:
    members = {"jpg": b"..."}
    if text is not None:
        members["txt"] = text.encode() if isinstance(text, str) else text
    if fields:
        members["json"] = json.dumps(fields).encode()
    return members


def test_single_caption_is_returned_without_white_space_around_it():
    assert choose_caption(record("  a red bicycle \n"), {"txt": 1.0}, seed=3) == "a red bicycle"


def test_json_field_and_nested_field_are_read():
    members = record(recaption="a cat", texts={"short": "cat"})
    assert choose_caption(members, {"json.recaption": 1.0}, seed=0) == "a cat"
    assert choose_caption(members, {"json.texts.short": 1.0}, seed=0) == "cat"


def test_choice_is_a_function_of_the_seed():
    members, keys = record("plain", recaption="rich"), {"txt": 0.5, "json.recaption": 0.5}
    chosen = [choose_caption(members, keys, seed) for seed in range(50)]
    assert chosen == [choose_caption(members, keys, seed) for seed in range(50)]
    assert set(chosen) == {"plain", "rich"}


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_choice_follows_the_probabilities_whatever_their_sum(scale):
    members = record("a", b="b", c="c")
    keys = {"txt": 0.2 * scale, "json.b": 0.5 * scale, "json.c": 0.3 * scale}
    counts = Counter(choose_caption(members, keys, seed) for seed in range(4000))
    # Five standard deviations of a binomial share of 4000 draws are at most 0.04.
    assert [counts[name] / 4000 for name in "abc"] == pytest.approx([0.2, 0.5, 0.3], abs=0.04)


@pytest.mark.parametrize("empty", [record(), record(""), record(" \n\t"), record(b"\xef\xbb\xbf")])
@pytest.mark.parametrize("missing", [{}, {"first": None}, {"first": " "}, {"first": "", "other": {"deep": None}}])
def test_missing_or_empty_captions_fall_back_to_the_first_that_is_not(empty, missing):
    members = empty | record(**missing, second="2", third="3")
    keys = {"txt": 1.0, "json.first": 1.0, "json.other.deep": 1.0, "json.second": 1e-9, "json.third": 1e-9}
    assert {choose_caption(members, keys, seed) for seed in range(20)} == {"2"}


@pytest.mark.parametrize("members", [record(), record("  "), record(recaption=None), record("", recaption="")])
def test_record_without_any_caption_is_reported_as_such(members):
    with pytest.raises(
        BadCaptionError, match=r"no_caption: txt, json\.recaption are missing or empty; there are jpg"
    ) as bad:
        choose_caption(members, {"txt": 0.5, "json.recaption": 0.5}, seed=1)
    assert bad.value.reason == "no_caption"


@pytest.mark.parametrize(
    "content",
    [
        b'{"recaption": "torn',
        b'{"recaption": "\xff\xfe"}',
        b'{"recaption": 7}',
        b'{"recaption": ["a"]}',
        b'["recaption"]',
        rb'{"recaption": "half a pair \ud83d"}',
        b"[" * 100_000,
        b"",
    ],
)
def test_damaged_json_is_undecodable_even_where_another_caption_is_fine(content):
    members = record("fine") | {"json": content}
    with pytest.raises(BadCaptionError, match=r"undecodable_caption: json\.recaption") as bad:
        choose_caption(members, {"json.recaption": 1.0, "txt": 1e-9}, seed=1)
    assert bad.value.reason == "undecodable_caption"


def test_field_inside_something_that_is_no_object_is_undecodable():
    with pytest.raises(BadCaptionError, match="short lies in a str, not in an object"):
        choose_caption(record(texts="flat"), {"json.texts.short": 1.0}, seed=1)


@pytest.mark.parametrize("content", [b"caf\xe9", b"\xff\xfea\x00", b"cut \xf0\x9f\x98"])
def test_text_that_is_not_utf8_is_undecodable(content):
    with pytest.raises(BadCaptionError) as bad:
        choose_caption(record(content), {"txt": 1.0}, seed=1)
    assert bad.value.reason == "undecodable_caption"


def test_damage_that_no_choice_looks_at_does_no_harm():
    assert choose_caption(record("fine") | {"json": b"{"}, {"txt": 1.0}, seed=1) == "fine"


def test_byte_order_mark_is_no_part_of_the_caption():
    assert choose_caption(record(b"\xef\xbb\xbfa dog"), {"txt": 1.0}, seed=1) == "a dog"


def test_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(BadCaptionError("no_caption", "txt is missing")))
    assert (error.reason, str(error)) == ("no_caption", "no_caption: txt is missing")
