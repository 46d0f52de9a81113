"""tools/index_shards.py: shards that others made are indexed ahead of training, and the damaged ones are named."""

import pickle
import re
from concurrent.futures import wait
from pathlib import Path

import index_shards

from evaclip.data.index import index_path
from evaclip.data.shards import Shard, write_shards


def shards_without_index(folder, count):
    paths = write_shards(folder, ((f"{number:03d}", {"txt": b"x"}) for number in range(2 * count)), 2)
    for path in paths:
        Path(index_path(path, None)).unlink()
    return paths


def test_existing_shards_are_indexed_and_counted(tmp_path, capsys):
    paths = shards_without_index(tmp_path, 3)
    assert index_shards.main([f"{tmp_path}/{{00000..00002}}.tar", str(paths[0]), "--processes", "2"]) == 0
    out = capsys.readouterr().out
    assert sorted(out.splitlines()[:-1]) == [f"{path}: 2 records" for path in paths]
    text = r"6 records in 3 shards, 0\.0 GB, \d+\.\d s; 160,000 such shards: \d+\.\d h on this machine"
    assert re.fullmatch(text, out.splitlines()[-1])
    assert all(Path(index_path(path, None)).is_file() for path in paths)


def test_damaged_shards_are_all_named_and_the_others_indexed(tmp_path, capsys):
    paths = shards_without_index(tmp_path, 3)
    paths[0].write_bytes(paths[0].read_bytes()[:700])
    paths[2].write_bytes(b"not a tar at all")
    assert index_shards.main([str(tmp_path / "{00000..00002}.tar"), "--index-dir", str(tmp_path / "indexes")]) == 1
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    assert first == f"error: {paths[0]}: a damaged header at byte 0; restore it"
    assert second == f"error: {paths[2]}: the file is cut off at byte 0; restore it"
    assert captured.out.splitlines()[-1].startswith("2 records in 3 shards")
    assert Path(index_path(paths[1], str(tmp_path / "indexes"))).is_file()


def test_tasks_of_a_slurm_array_share_the_shards(tmp_path, capsys, monkeypatch):
    paths = shards_without_index(tmp_path, 3)
    task = {"SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
    for number, own in (("2", [paths[0], paths[2]]), ("4", [paths[1]])):
        for name, value in {**task, "SLURM_ARRAY_TASK_ID": number}.items():
            monkeypatch.setenv(name, value)
        assert index_shards.main([str(tmp_path / "{00000..00002}.tar"), "--processes", "1"]) == 0
        assert sorted(capsys.readouterr().out.splitlines()[:-1]) == [f"{path}: 2 records" for path in own]
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "18")
    assert index_shards.main([str(tmp_path / "{00000..00002}.tar")]) == 0
    assert capsys.readouterr().out == "this task of the array has no shards\n"


def test_rebuild_notices_other_content_of_the_same_size(tmp_path):
    (path,) = write_shards(tmp_path, [("a", {"txt": b"old"})], 1)
    before = Shard(path).index.digest
    path.write_bytes(path.read_bytes().replace(b"old", b"new"))
    assert index_shards.main([str(path), "--rebuild"]) == 0
    assert Shard(path).index.digest != before
    assert Shard(path).read(0).members == {"txt": b"new"}


def test_indexes_stay_in_the_workers_and_few_shards_wait_at_a_time(tmp_path, monkeypatch):
    paths = [str(path) for path in shards_without_index(tmp_path, 30)]
    waiting = []
    monkeypatch.setattr(
        index_shards, "wait", lambda some, **options: waiting.append(len(some)) or wait(some, **options)
    )
    found = list(index_shards.index_all(paths, None, rebuild=False, processes=1))
    assert sorted(each.location for each in found) == paths
    assert max(waiting) == 4
    assert {len(pickle.dumps(each)) < 1000 for each in found} == {True}


def test_rebuild_of_urls_needs_a_local_folder_for_the_indexes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert index_shards.main(["s3://bucket/{0..1}.tar", "--rebuild", "--processes", "1"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: s3://bucket/{n}.tar.index.safetensors cannot be written there; set --index-dir to a local folder"
        for n in range(2)
    ]
    assert list(tmp_path.iterdir()) == []


def test_missing_shards_are_refused(tmp_path, capsys):
    assert index_shards.main([str(tmp_path / "{0..1}.tar")]) == 1
    assert "does not exist" in capsys.readouterr().err
