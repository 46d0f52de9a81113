"""Checkpoints behind the training: what it waits for, what is written, and what happens where writing fails."""

import dataclasses
import errno
import json
import logging
import os
import resource
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import xxhash
from safetensors.torch import load_file
from tiny import tiny_config

from evaclip import checkpoint_writer
from evaclip.checkpoint import CheckpointReader, Entry, RunState, damage, find_checkpoint, set_aside
from evaclip.checkpoint_writer import CheckpointWriter, Staging, write_part
from evaclip.distributed import Ranks
from evaclip.errors import CheckpointError
from evaclip.loss import ContrastiveLoss
from evaclip.train import train

STATE = RunState(1, 16, 1, 1.0, 16, {}, {}, {"a": [4096]}, {}, {}, {})


@pytest.fixture
def writer(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "_RETRY_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(checkpoint_writer, "_WAITED_FOR_SECONDS", (0.01, 0.01))
    writer = CheckpointWriter(tmp_path / "checkpoints", tiny_config(tmp_path, checkpoint__keep_last=9), Ranks())
    yield writer
    writer.leave()


def save(writer, step, value=0.0, *, final=True):
    state = dataclasses.replace(STATE, step=step)
    return writer.save(state, [Entry("weight", "a", 0, torch.full((4096,), float(value)))], final=final)


def names(writer):
    return sorted(path.name for path in writer._folder.iterdir())


@pytest.fixture
def gate(monkeypatch):
    """Writing stops here until the event is set."""
    event = threading.Event()
    original = checkpoint_writer.write_blocks

    def waiting(*arguments):
        assert event.wait(30)
        return original(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_blocks", waiting)
    yield event
    event.set()


# ------------------------------------------------------------------------------------------------------------- format


def test_a_part_is_a_file_of_the_safetensors_library_wherever_the_buffers_end(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "_CHUNK", 8)
    monkeypatch.setattr(checkpoint_writer, "_BLOCK", 12)
    values = {
        "weight/a@3": torch.arange(20.0),
        "weight/b@0": torch.arange(6.0).view(2, 3),
        "exp_avg/c@0": torch.arange(4.0).bfloat16(),
        "exp_avg/none@0": torch.empty(0),
        "exp_avg_sq/a@3": -torch.arange(16.0),
    }
    entries = [Entry(*key.partition("@")[0].split("/"), int(key[-1]), value) for key, value in values.items()]
    staging = Staging(pinned=False)
    header = staging.fill(entries)
    assert len(header) % 8 == 0
    written = write_part(tmp_path / "part", header, staging)
    content = (tmp_path / "part").read_bytes()
    assert written == {"size": len(content), "xxh3": xxhash.xxh3_64_hexdigest(content)}
    loaded = load_file(tmp_path / "part")
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[key], value.float().flatten()) for key, value in values.items())


def test_a_rank_without_entries_writes_a_part_that_can_be_read(tmp_path):
    staging = Staging(pinned=False)
    write_part(tmp_path / "part", staging.fill([]), staging)
    assert load_file(tmp_path / "part") == {}


def test_a_checkpoint_has_12_bytes_per_parameter_and_metadata(tmp_path):
    train(tiny_config(tmp_path))
    path = find_checkpoint(tmp_path)
    parameters = sum(torch.Size(shape).numel() for shape in CheckpointReader(path).state.shapes.values())
    size = sum(file.stat().st_size for file in path.iterdir())
    metadata = size - 12 * parameters
    entries = 3 * len(CheckpointReader(path).state.shapes)
    assert 0 < metadata < 200 * entries + 10_000  # a name with its place for each entry; configuration and slots
    assert {file.name for file in path.iterdir()} == {"config.yaml", "meta.json", "part_00000.safetensors"}


def test_buffers_are_allocated_once(monkeypatch):
    staging = Staging(pinned=False)
    staging.fill([Entry("weight", "a", 0, torch.ones(5))])
    before = [buffer.data_ptr() for buffer in staging._buffers]
    monkeypatch.setattr(torch, "empty", None)
    staging.fill([Entry("weight", "a", 0, torch.zeros(4))])
    assert [buffer.data_ptr() for buffer in staging._buffers] == before


# -------------------------------------------------------------------------------------------------- behind the training


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_reach_into_it(writer, gate):
    values = torch.ones(4096)
    path = writer.save(STATE, [Entry("weight", "a", 0, values)], final=False)
    values.zero_()
    assert not path.exists()
    assert writer.newest is None
    gate.set()
    writer.leave()
    assert writer.newest == 1
    assert CheckpointReader(path).weights()["a"].tolist() == [1.0] * 4096


def test_a_second_checkpoint_waits_for_the_first_one(writer, gate):
    first = save(writer, 1, 1, final=False)
    threading.Timer(0.3, gate.set).start()
    started = time.monotonic()
    second = save(writer, 2, 2, final=False)
    assert time.monotonic() - started >= 0.25  # the timer may have started a little earlier
    assert first.exists()
    writer.leave()
    assert [float(CheckpointReader(path).weights()["a"][0]) for path in (first, second)] == [1.0, 2.0]


def test_an_error_in_training_does_not_lose_the_checkpoint_under_way(tmp_path, monkeypatch, gate):
    original, calls = ContrastiveLoss.forward, iter(range(10))

    def broken(self, *arguments):
        if next(calls) == 1 + 3:  # after the trial
            threading.Timer(0.2, gate.set).start()
            raise RuntimeError("a bug")
        return original(self, *arguments)

    monkeypatch.setattr(ContrastiveLoss, "forward", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train(tiny_config(tmp_path))
    assert find_checkpoint(tmp_path).name == "step_00000002"


def test_rows_go_to_wandb_only_when_their_checkpoint_is_complete(tmp_path, monkeypatch):
    told = []

    class Tracker:
        def __init__(self, *_arguments):
            pass

        def alert_restarts(self):
            pass

        def log_checkpoints(self, *_arguments):
            pass

        def commit(self, history, step):
            told.append((step, (tmp_path / f"checkpoints/step_{step:08d}").exists()))

        def finish(self, code):
            told.append(code)

    original = checkpoint_writer.write_blocks

    def slow(*arguments):
        time.sleep(0.3)  # several steps
        return original(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_blocks", slow)
    monkeypatch.setattr("evaclip.train.Tracker", Tracker)
    train(tiny_config(tmp_path, train__steps=6, checkpoint__every_steps=2, checkpoint__keep_last=9))
    assert told[-2:] == [(6, True), 0]
    assert all(there for _, there in told[:-1])


# ----------------------------------------------------------------------------------------------------------- failures


def test_what_fails_once_is_tried_again(writer, monkeypatch, caplog):
    original, calls = os.fsync, iter(range(100))

    def flaky(descriptor):
        if next(calls) == 0:
            raise OSError(5, "Input/output error")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", flaky)
    assert damage(save(writer, 1)) is None
    assert "could not be written: [Errno 5] Input/output error; check run_dir; trying again in 0.01 s" in caplog.text


def test_a_checkpoint_that_cannot_be_written_costs_neither_the_run_nor_the_one_before(writer, caplog):
    older = save(writer, 1, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as on a full disk
    try:
        save(writer, 2, 2, final=False)
        with pytest.raises(CheckpointError, match=r"(?s)step 3 could not .*rank 0.*, and start the run again \(older"):
            save(writer, 3, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        "the checkpoint of step 2 could not be written: rank 0: [Errno 27] File too large; free disk space or lower "
        "checkpoint.keep_last; training goes on without it until the next one"
    ) in caplog.text
    assert names(writer) == ["latest", "step_00000001"]
    assert damage(older) is None
    save(writer, 4, 4)
    assert names(writer) == ["latest", "step_00000001", "step_00000004"]


def test_three_checkpoints_in_a_row_that_cannot_be_written_stop_the_run_and_name_the_newest(writer, monkeypatch):
    original = checkpoint_writer.write_part

    def over_quota(path, *arguments):
        if not path.parent.name.startswith((".step_00000001.", ".step_00000004.")):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return original(path, *arguments)

    monkeypatch.setattr(checkpoint_writer, "write_part", over_quota)
    for step in range(1, 8):  # 2 and 3 fail, and 5, 6 and 7
        save(writer, step, final=False)
    with pytest.raises(CheckpointError, match=r"last 3 .*step 7 .*quota.*free disk.*goes on from .*/step_00000004$"):
        save(writer, 8, final=False)
    assert names(writer) == ["latest", "step_00000001", "step_00000004"]


def test_training_waits_for_no_long_retry(writer, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "_RETRY_SECONDS", (100.0,))
    broken = Mock(side_effect=OSError(5, "Input/output error"))
    monkeypatch.setattr(checkpoint_writer, "write_part", broken)
    started = time.monotonic()
    save(writer, 1, final=False)
    while not broken.called:
        time.sleep(0.001)
    with pytest.raises(CheckpointError, match="step 2 could not"):
        save(writer, 2)
    assert broken.call_count == 7  # in the pause of step 1, then after 0.01 s each
    assert time.monotonic() - started < 50
    save(writer, 3, final=False)
    writer.leave()
    assert time.monotonic() - started < 50


def test_a_checkpoint_that_nobody_waits_for_is_tried_for_three_minutes():
    assert sum(checkpoint_writer._RETRY_SECONDS) > 180
    assert sum(checkpoint_writer._WAITED_FOR_SECONDS) < 10  # of the 30 s that a launcher gives


def test_a_folder_that_cannot_be_written_is_named(writer):
    save(writer, 1)
    writer._folder.chmod(0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # permissions do not stop the superuser
    try:
        with pytest.raises(CheckpointError, match=r"Permission denied: .*/checkpoints/.*; check run_dir, and start"):
            save(writer, 2)
    finally:
        os.seteuid(user)
        writer._folder.chmod(0o700)
    assert names(writer) == ["latest", "step_00000001"]


def test_a_name_that_cannot_be_made_last_keeps_older_checkpoints(writer, monkeypatch, caplog):
    monkeypatch.setattr(writer, "_config", tiny_config(writer._folder, checkpoint__keep_last=1))
    save(writer, 1)
    (writer._folder / "latest").unlink()
    (writer._folder / "latest").mkdir()
    save(writer, 2)
    assert "step_00000002 is complete, but older checkpoints stay" in caplog.text
    assert {"step_00000001", "step_00000002"} < set(names(writer))


def test_ranks_that_are_not_heard_of_are_named(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_ranks", Ranks(0, 4))
    monkeypatch.setattr(writer, "_patience", 0.1)
    for rank in (0, 2):
        (tmp_path / f"part_{rank:05d}.json").write_text('{"size": 1, "xxh3": "0"}')
    with pytest.raises(CheckpointError, match=r"ranks 1, 3 have written nothing for 0 s; look for processes that hang"):
        writer._await_parts(tmp_path)


def test_a_rank_whose_part_grows_is_waited_for(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_patience", 0.4)
    part = tmp_path / "part_00000.safetensors"

    def grow():
        for _ in range(8):
            with part.open("ab") as file:
                file.write(b"more")
            time.sleep(0.1)
        checkpoint_writer._leave_word(part, {"size": 32, "xxh3": "0"})

    threading.Thread(target=grow).start()
    assert writer._await_parts(tmp_path) == {part.name: {"size": 32, "xxh3": "0"}}


def test_what_a_dead_run_left_of_the_same_step_is_neither_taken_nor_kept(writer):
    leftover = writer._folder / ".step_00000002.0badf00d.tmp"
    leftover.mkdir(parents=True)
    (leftover / "part_00000.safetensors").write_bytes(b"old")
    (leftover / "part_00000.json").write_text(json.dumps({"size": 3, "xxh3": "0"}))
    assert damage(save(writer, 2)) is None
    assert names(writer) == ["latest", "step_00000002"]


def test_a_part_whose_folder_is_gone_is_not_written_again(writer, gate, caplog):
    save(writer, 1, final=False)
    while not (folders := list(writer._folder.glob(".step_*.tmp"))):
        time.sleep(0.001)
    folders[0].rmdir()  # as rank 0 does, when another rank could not write
    gate.set()
    writer.leave()
    assert "the checkpoint of step 1 could not be written: rank 0: [Errno 2] No such file" in caplog.text
    assert "trying again" not in caplog.text
    assert names(writer) == []


def test_a_step_that_is_written_again_replaces_the_old_one(writer):
    save(writer, 2, 1)
    assert CheckpointReader(save(writer, 2, 5)).weights()["a"][0] == 5
    assert names(writer) == ["latest", "step_00000002"]


def break_rename(monkeypatch, error):
    """No temporary folder becomes a checkpoint."""
    original = Path.rename

    def rename(self, target):
        if self.suffix == ".tmp":
            raise error
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)


class Killed(BaseException):
    """As SIGKILL: nobody cleans up."""


def test_a_kill_while_a_step_is_replaced_keeps_the_old_one(writer, monkeypatch):
    path = save(writer, 2, 1)
    with monkeypatch.context() as patch:
        break_rename(patch, Killed())
        with pytest.raises(Killed):
            save(writer, 2, 5)
        writer._part = writer._commit = None
    assert not path.exists()
    assert set_aside(writer._folder) == (path, [])
    assert CheckpointReader(path).weights()["a"][0] == 1
    assert names(writer) == ["latest", "step_00000002"]


def test_a_replacement_that_cannot_get_its_name_leaves_the_old_one(writer, monkeypatch):
    path = save(writer, 2, 1)
    with monkeypatch.context() as patch:
        break_rename(patch, OSError(5, "Input/output error"))
        with pytest.raises(CheckpointError, match="Input/output error"):
            save(writer, 2, 5)
    assert CheckpointReader(path).weights()["a"][0] == 1
    assert names(writer) == ["latest", "step_00000002"]


def test_a_bug_in_the_thread_is_not_swallowed_on_the_way_out(writer, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint_writer, "write_part", lambda *_: 1 / 0)
    caplog.set_level(logging.ERROR)
    save(writer, 1, final=False)
    monkeypatch.setattr(checkpoint_writer, "_LEAVING_SECONDS", 0.1)
    writer.leave()
    assert "ZeroDivisionError" in caplog.text
