"""What preflight finds on one machine; several nodes are looked at in ``tests/slurm``."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_config

from evaclip.data.shards import write_shards
from evaclip.errors import EvaclipError
from evaclip.preflight import preflight


def test_table_of_a_machine_that_is_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preflight(tiny_config(tmp_path / "run", {"kind": "synthetic", "num_records": 200}))
    heading, row, speed = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["node", "GPUs", "torch"]
    assert row.split()[-1] == "none"
    assert speed.startswith("all-reduce over 1 ranks")


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
