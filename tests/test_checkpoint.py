import errno
import json
import math
import shutil

import pytest
import torch
from tiny import tiny_config

from evaclip import checkpoint
from evaclip.checkpoint import (
    CheckpointReader,
    Entry,
    RunState,
    damage,
    find_checkpoint,
    newest_intact,
    set_aside,
    to_delete,
)
from evaclip.checkpoint_writer import CheckpointWriter
from evaclip.config import CheckpointConfig
from evaclip.distributed import Ranks
from evaclip.errors import CheckpointError


def write(folder, step, value=0.0, metrics=None):
    state = RunState(
        step, 16 * step, step, 1.0, 16, {3: [[[0, 1, 2]], [5], []]}, {}, {"a": [2, 3]}, metrics or {}, {}, {}
    )
    values = torch.full((6,), value)
    writer = CheckpointWriter(folder, tiny_config(folder / "run", checkpoint__keep_last=9), Ranks())
    return writer.save(state, [Entry("weight", "a", 0, values)], final=True)


@pytest.mark.parametrize(
    ("steps", "options", "current", "gone"),
    [
        ([10, 20, 30], {"keep_last": 2}, 30, [10]),
        ([10, 20, 30], {"keep_last": 1, "keep_every_steps": 10}, 30, []),
        ([10, 20, 30, 40], {"keep_last": 1, "keep_every_steps": 20}, 40, [10, 30]),
        ([20, 25, 30], {"keep_last": 1}, 25, [20]),  # 30 is newer and may be damaged: 25 stays
        ([10], {"keep_last": 1}, 10, []),
        ([], {"keep_last": 1}, None, []),
    ],
)
def test_retention_keeps_the_newest_the_multiples_and_the_current(steps, options, current, gone):
    assert to_delete([(step, None) for step in steps], CheckpointConfig(**options), current) == gone


@pytest.mark.parametrize(("best_is", "gone"), [("max", [10, 30]), ("min", [20, 30])])
def test_retention_keeps_the_best_by_its_metric_and_ignores_what_is_not_finite(best_is, gone):
    scores = [(10, 0.1), (20, 0.9), (30, math.nan), (40, None)]
    config = CheckpointConfig(keep_last=1, keep_best="eval/x/top1", best_is=best_is)
    assert to_delete(scores, config, 40) == gone


def test_state_and_tensors_survive(tmp_path):
    path = write(tmp_path, 7, 1.5, {"eval/x/top1": 0.25})
    reader = CheckpointReader(path)
    assert (reader.state.step, reader.state.slot_states, reader.state.metrics) == (
        7, {3: [[[0, 1, 2]], [5], []]}, {"eval/x/top1": 0.25},
    )  # fmt: skip
    assert reader.weights()["a"].tolist() == [[1.5] * 3] * 2
    assert (tmp_path / "latest").read_text() == "step_00000007\n"


def test_any_run_of_elements_is_put_together_from_any_parts(tmp_path):
    state = RunState(1, 16, 1, 1.0, 16, {}, {}, {"a": [6]}, {}, {}, {})
    values = torch.arange(6.0)
    entries = [Entry("weight", "a", 0, values[:2]), Entry("weight", "a", 2, values[2:])]
    writer = CheckpointWriter(tmp_path, tiny_config(tmp_path / "run"), Ranks())
    reader = CheckpointReader(writer.save(state, entries, final=True))
    wanted = torch.empty(3)
    reader.fill(Entry("weight", "a", 1, wanted))
    assert wanted.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(CheckpointError, match="exp_avg of a is incomplete"):
        reader.fill(Entry("exp_avg", "a", 0, wanted))


@pytest.mark.parametrize("harm", ["flip", "cut", "delete", "meta", "number", "no parts"])
def test_damage_is_seen_named_and_set_aside(tmp_path, harm):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    part, meta = path / "part_00000.safetensors", path / "meta.json"
    content = bytearray(part.read_bytes())
    if harm == "flip":
        content[-1] ^= 1
        part.write_bytes(content)
    elif harm == "cut":
        part.write_bytes(content[:-1])
    elif harm == "delete":
        part.unlink()
    elif harm == "meta":
        meta.write_text(meta.read_text()[:100])
    elif harm == "number":
        meta.write_text(meta.read_text().replace('"step": 2', '"step": 3'))
    else:
        meta.write_text(json.dumps({"format": checkpoint.FORMAT}))
    assert damage(path)
    intact, problems = newest_intact(tmp_path)
    assert intact is not None
    assert intact.name == "step_00000001"
    assert len(problems) == 1
    assert set_aside(tmp_path) == (intact, problems)
    assert not path.exists()
    assert newest_intact(tmp_path) == (intact, [])


def test_damage_everywhere_is_said_at_every_start(tmp_path):
    path = write(tmp_path, 1)
    (path / "part_00000.safetensors").write_bytes(b"")
    for _ in range(2):
        assert len(set_aside(tmp_path)[1]) == 1
        assert newest_intact(tmp_path)[0] is None
    assert path.exists()


def test_a_damaged_old_checkpoint_does_not_stop_retention(tmp_path):
    (write(tmp_path, 1) / "meta.json").write_text("{")
    write(tmp_path, 2)
    write(tmp_path, 3)
    checkpoint.delete_old(tmp_path, CheckpointConfig(keep_last=1, keep_best="eval/x/top1"), 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003"]


def test_nothing_is_deleted_while_the_best_cannot_be_read(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        write(tmp_path, step)

    def refuse(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "_RETRY_SECONDS", ())
    monkeypatch.setattr(checkpoint, "_read_text", refuse)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.delete_old(tmp_path, CheckpointConfig(keep_last=1, keep_best="eval/x/top1"), 3)
    assert len(list(tmp_path.glob("step_*"))) == 3


def test_leftovers_of_interrupted_writes_are_removed(tmp_path):
    write(tmp_path, 1)
    for name in (".step_00000002.tmp", ".step_00000000.deleted"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_backup").mkdir()
    set_aside(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001", "step_backup"]


def test_what_a_finished_replacement_left_is_removed(tmp_path):
    path = write(tmp_path, 1)
    (tmp_path / ".step_00000001.replaced").mkdir()
    assert set_aside(tmp_path) == (path, [])
    assert not (tmp_path / ".step_00000001.replaced").exists()


def test_checkpoint_of_another_format_is_refused(tmp_path):
    path = write(tmp_path, 1)
    meta = {**json.loads((path / "meta.json").read_text()), "format": 99}
    meta.pop("xxh3")
    (path / "meta.json").write_text(json.dumps({**meta, "xxh3": checkpoint.meta_checksum(meta)}))
    for read in (CheckpointReader, find_checkpoint, lambda path: set_aside(path.parent)):
        with pytest.raises(CheckpointError, match="has format 99, this version reads 1; use the code that wrote it"):
            read(path)
    assert path.exists()


def fail(monkeypatch, number, error):
    """Let reading of parts fail so many times."""
    original, calls = checkpoint.file_checksum, iter(range(100))

    def checksum(path):
        if next(calls) < number:
            raise error
        return original(path)

    monkeypatch.setattr(checkpoint, "_RETRY_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(checkpoint, "file_checksum", checksum)


def test_a_storage_that_fails_for_a_moment_sets_no_checkpoint_aside(tmp_path, monkeypatch):
    path = write(tmp_path, 1)
    fail(monkeypatch, 2, OSError(errno.EIO, "Input/output error"))
    assert set_aside(tmp_path) == (path, [])


@pytest.mark.parametrize(
    "error", [OSError(errno.ESTALE, "Stale file handle"), PermissionError(13, "Permission denied")]
)
def test_a_storage_that_does_not_read_is_no_damage_and_stops_with_the_file_and_the_fault(tmp_path, monkeypatch, error):
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    fail(monkeypatch, 99, error)
    expected = rf"step_00000002/part_00000.safetensors cannot be read: .*{error.strerror}; .* check the storage"
    with pytest.raises(CheckpointError, match=expected):
        set_aside(tmp_path)
    assert path.exists()


def test_the_files_of_another_step_are_no_checkpoint(tmp_path):
    other, path = write(tmp_path, 1), write(tmp_path, 2)
    shutil.rmtree(path)
    shutil.copytree(other, path)
    assert damage(path) == f"{path} holds step 1: its files are another checkpoint's"
    assert damage(shutil.copytree(other, tmp_path / "best")) is None  # a name of one's own is fine


def test_metadata_that_is_no_mapping_is_refused(tmp_path):
    path = write(tmp_path, 1)
    (path / "meta.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"meta\.json is no checkpoint's: it holds a list"):
        CheckpointReader(path)


def test_steps_are_in_the_order_of_numbers_beyond_8_digits(tmp_path):
    for step in (99_999_999, 100_000_000):
        write(tmp_path, step)
    (tmp_path / "step_100000000" / "meta.json").unlink()
    intact, _ = set_aside(tmp_path)
    assert intact == tmp_path / "step_99999999"
    assert (tmp_path / ".step_100000000.damaged").exists()
