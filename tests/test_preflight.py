"""What preflight finds on one machine; several nodes are looked at in ``tests/slurm``."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_config

from evaclip.data.shards import write_shards
from evaclip.errors import EvaclipError
from evaclip.preflight import _facts, _write, _wrong_clocks, preflight


def test_table_of_a_machine_that_is_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preflight(tiny_config(tmp_path / "run", {"kind": "synthetic", "num_records": 200}))
    heading, row, speed = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["node", "GPUs", "torch"]
    assert row.split()[-1] == "none"
    assert speed == "one rank: no all-reduce; clocks within 0.00 s"
    assert not list((tmp_path / "run/preflight").iterdir())


def test_a_clock_that_is_not_as_the_others_is_named() -> None:
    assert _wrong_clocks({"n1": 100.0, "n2": 101.9, "n3": 100.1}) == []
    assert _wrong_clocks({"n1": 100.0, "n2": 100.1, "n7": 97.0}) == [("n7", -3.0)]


def test_everything_that_is_wrong_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (shard,) = write_shards(tmp_path / "shards", ((f"{n:06d}", {"jpg": b"", "txt": b"a"}) for n in range(200)), 200)
    config = tiny_config(tmp_path / "run", {"shards": [str(shard), str(tmp_path / "gone.tar")]})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(EvaclipError) as caught:
        preflight(config)
    message = str(caught.value)
    assert f"shard {tmp_path}/gone.tar of source tiny cannot be read: No such file or directory" in message
    assert "0.0 GiB are free for checkpoints" in message
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "2"


def test_nodes_that_say_nothing_or_differ_are_named_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path / "run", {"kind": "synthetic", "num_records": 200})
    variables = {"RANK": "0", "WORLD_SIZE": "3", "EVACLIP_NODE": "n1", "EVACLIP_NODES": "n1,n2,n3"}
    for name, value in {**variables, "EVACLIP_START": "7-1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run/preflight/7-1").mkdir(parents=True)
    own = _facts(config, 1)
    _write(tmp_path / "run/preflight/7-1", own._replace(node="n2", versions={**own.versions, "torch": "1.0"}))
    monkeypatch.setattr("evaclip.preflight._MEET_SECONDS", 0.3)
    with pytest.raises(EvaclipError) as caught:
        preflight(config)
    message = str(caught.value)
    assert message.startswith("preflight found 2 problems: n3: no word")
    assert f"n3: no word in {tmp_path}/run/preflight for 0 s: it does not see this run_dir" in message
    assert f"n2: torch 1.0, elsewhere {own.versions['torch']}; install the same everywhere" in message
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["node", "n1", "n2"]


def test_too_few_cores_for_all_workers_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tmp_path, {"kind": "synthetic", "num_records": 200}, data__workers=3)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    assert _facts(config, 1).cores == 3
    assert "3 cores for 4 ranks and data workers" in caplog.text
