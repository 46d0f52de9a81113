"""A list of keys out of features: which records it names, and which features it is refused of."""

import json

import numpy as np
import pytest
import select_keys

from evaclip.features import About, Features, Part, Shard, Skipped

SIMILARITY = (0.1, 0.4, 0.3, 0.3, 0.2, -0.1, 0.35)


def write(folder, keys="abcdefg", similarity=SIMILARITY, parts=2):
    """Features of two shards, the second of which has a record without any."""
    shards = (Shard("0.tar", 4, "x"), Shard("1.tar", len(keys) - 3, "y"))
    features = Features(folder, About("m", "run", "fp32", 2, shards))
    features.claim()
    for number, own in list(enumerate((slice(0, 4), slice(4, None))))[:parts]:
        values = np.array(similarity[own], np.float32)
        vectors = np.zeros((len(values), 2), np.float16)
        names = list(keys[own])
        skipped = [Skipped("z", "no_image")] if number else []
        features.write(number, Part(vectors, vectors, names, names, values, skipped))
    return folder


def chosen(folder, *rule):
    assert select_keys.main([str(folder), *rule, "--output", str(folder / "keys.txt")]) == 0
    return (folder / "keys.txt").read_text()


def test_records_of_at_least_the_similarity_are_named_in_the_order_of_the_shards(tmp_path, capsys):
    assert chosen(write(tmp_path), "--min-similarity", "0.3") == "b\nc\nd\ng\n"
    out = capsys.readouterr().out
    assert "keys.txt: 4 of 7 records, those of similarity 0.3000 and more" in out
    assert "0 %: -0.1000" in out
    assert "50 %: 0.3000" in out
    assert "100 %: 0.4000" in out


@pytest.mark.parametrize(
    ("fraction", "keys"), [("0.01", "b"), ("0.29", "bg"), ("0.43", "bcdg"), ("0.6", "bcdg"), ("1", "abcdefg")]
)
def test_a_fraction_of_the_most_similar_keeps_equally_similar_ones_together(tmp_path, fraction, keys):
    assert chosen(write(tmp_path), "--top-fraction", fraction) == "".join(f"{key}\n" for key in keys)


def test_no_record_that_is_similar_enough_gives_an_empty_list(tmp_path):
    assert chosen(write(tmp_path), "--min-similarity", "0.9") == ""


def refused(folder, capsys):
    output = folder / "keys.txt"
    assert select_keys.main([str(folder), "--min-similarity", "0", "--output", str(output)]) == 1
    assert not output.exists()
    return capsys.readouterr().err


def test_incomplete_features_are_refused(tmp_path, capsys):
    assert "lacks 1 of 2 parts, the first is that of 1.tar; run evaclip embed" in refused(
        write(tmp_path, parts=1), capsys
    )


def test_half_a_part_is_none(tmp_path, capsys):
    (write(tmp_path) / "text_emb/text_emb_0.npy").unlink()
    assert "lacks 1 of 2 parts, the first is that of 0.tar" in refused(tmp_path, capsys)


def test_keys_that_name_several_records_are_refused(tmp_path, capsys):
    assert "1 keys occur more than once, such as 'b'" in refused(write(tmp_path, keys="abcdebg"), capsys)


def test_a_key_with_a_line_break_is_refused(tmp_path, capsys):
    assert r"the key 'b\nx' has a line break" in refused(write(tmp_path, keys=["a", "b\nx", *"cdefg"]), capsys)


def test_features_of_no_record_are_refused(tmp_path, capsys):
    write(tmp_path, parts=0)
    saved = json.loads((tmp_path / "features.json").read_text())
    (tmp_path / "features.json").write_text(json.dumps({**saved, "shards": []}))
    assert "has features of no record" in refused(tmp_path, capsys)


@pytest.mark.parametrize(
    "rule", [[], ["--min-similarity", "2"], ["--top-fraction", "0"], ["--min-similarity", "0", "--top-fraction", "0.5"]]
)
def test_rules_that_say_nothing_are_refused(tmp_path, rule):
    with pytest.raises(SystemExit):
        select_keys.main([str(write(tmp_path)), *rule, "--output", str(tmp_path / "keys.txt")])
