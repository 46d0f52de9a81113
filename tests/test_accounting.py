"""The books of a whole run: bad records are listed once, with their shard, through restarts and over ranks."""

import json

import pytest
from data.range_server import serving
from tiny import colour_records, tiny_config

from evaclip import train as train_module
from evaclip.data.shards import write_shards
from evaclip.errors import TrainingStoppedError
from evaclip.history import load_history
from evaclip.train import train


@pytest.fixture
def shards(tmp_path):
    """Two shards of 20 records; the second holds three that are bad."""
    records = [(key, dict(members)) for key, members in colour_records(40)]
    records[25][1]["jpg"] = b"no image"
    records[30][1]["txt"] = b"\xff\xfe\xfd"
    del records[35][1]["txt"]
    write_shards(tmp_path / "shards", records, 20)
    return str(tmp_path / "shards" / "{00000..00001}.tar")


def bad_records(run):
    path = run / "bad_records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_bad_records_are_listed_with_shard_and_reason(tmp_path, shards, caplog):
    train(tiny_config(tmp_path / "run", {"shards": shards}, train__steps=8, log__every_steps=3))
    rows = bad_records(tmp_path / "run")
    assert len(rows) == load_history(tmp_path / "run" / "metrics.jsonl")[-1]["data/skipped/tiny"]
    assert {(row["record"].rpartition(":")[2], row["reason"]) for row in rows} == {
        ("000025", "not_an_image"), ("000030", "undecodable_caption"), ("000035", "no_caption"),
    }  # fmt: skip
    assert {row["shard"].rpartition("/")[2] for row in rows} == {"00001.tar"}
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert len({(row["record"], row["pass"]) for row in rows}) == len(rows)
    assert f"source tiny: 128 delivered + {len(rows)} skipped" in caplog.text
    assert "most in " in caplog.text


def test_a_restart_lists_nothing_twice(tmp_path, shards, monkeypatch):
    options = {"train__steps": 8, "checkpoint__every_steps": 3, "log__every_steps": 2}
    train(tiny_config(tmp_path / "whole", {"shards": shards}, **options))
    original, calls = train_module.Report.step, []

    def killed(self, *arguments):
        original(self, *arguments)
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_module.Report, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(tmp_path / "run", {"shards": shards}, **options))
    assert bad_records(tmp_path / "run")
    monkeypatch.setattr(train_module.Report, "step", original)
    train(tiny_config(tmp_path / "run", {"shards": shards}, **options))
    listed = [sorted((r["record"], r["pass"]) for r in bad_records(tmp_path / name)) for name in ("run", "whole")]
    assert listed[0] == listed[1]


def test_too_many_bad_records_stop_the_run_and_name_the_worst_shard(tmp_path):
    records = [
        (key, {**members, "jpg": b"" if n % 3 else members["jpg"]})
        for n, (key, members) in enumerate(colour_records(60))
    ]
    write_shards(tmp_path / "shards", records, 30)
    source = {"shards": str(tmp_path / "shards" / "{00000..00001}.tar")}
    with pytest.raises(
        TrainingStoppedError, match=r"records cannot be used \(\d+ empty\).*the worst shard is .*0000[01]\.tar with"
    ):
        train(tiny_config(tmp_path / "run", source, train__steps=8))


def test_remote_shards_train_as_local_ones(tmp_path, shards):
    local = tiny_config(tmp_path / "local", {"shards": shards}, train__steps=3)
    train(local)
    with serving(tmp_path / "shards") as server:
        source = {"shards": server.url + "/{00000..00001}.tar"}
        options = {"data__cache_dir": str(tmp_path / "cache"), "data__workers": 2, "train__steps": 3}
        train(tiny_config(tmp_path / "remote", source, **options))
    losses = [
        [row["train/loss"] for row in load_history(tmp_path / run / "metrics.jsonl")] for run in ("local", "remote")
    ]
    assert losses[0] == losses[1]
