import json
import logging

import pytest

from evaclip.errors import EvaclipError
from evaclip.history import History, load_history, read_history, training_time


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def filled(path, steps):
    history = History(path)
    for step in steps:
        history.write(step, step * 8, {"train/loss": step / 3})
    return history


def steps_of(path):
    return [row["step"] for row in load_history(path)]


def test_rows_come_back_as_they_were_written(path):
    history = History(path)
    history.write(0, 0, {"eval/digits/top1": 0.1})
    history.write(10, 80, {"train/loss": 1 / 3, "train/skipped_steps": 0})
    expected = [
        {"step": 0, "samples": 0, "eval/digits/top1": 0.1},
        {"step": 10, "samples": 80, "train/loss": 1 / 3, "train/skipped_steps": 0.0},
    ]
    assert list(history.rows()) == expected == load_history(path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected
    history.close()


def test_a_row_is_readable_as_soon_as_it_is_written(path):
    history = filled(path, [1])
    assert steps_of(path) == [1]
    history.close()


def test_a_step_has_one_row_however_often_it_is_written(path):
    history = filled(path, [1, 2])
    row = history.write(2, 16, {"eval/digits/top1": 0.5})
    history.write(2, 16, {"eval/digits/top5": 0.9})
    assert row == {"step": 2, "samples": 16, "train/loss": 2 / 3, "eval/digits/top1": 0.5}
    assert steps_of(path) == [1, 2]
    assert load_history(path)[1] == {**row, "eval/digits/top5": 0.9}
    history.close()


def test_values_that_are_not_finite_are_null_and_keep_their_name(path):
    history = History(path)
    row = history.write(1, 8, {"train/loss": float("nan"), "train/grad_norm": float("-inf"), "lr/image": 0.0})
    assert row == {"step": 1, "samples": 8, "train/loss": None, "train/grad_norm": None, "lr/image": 0.0}
    assert (
        path.read_text() == '{"step": 1, "samples": 8, "train/loss": null, "train/grad_norm": null, "lr/image": 0.0}\n'
    )
    history.close()


def test_an_undeclared_name_raises_and_writes_nothing(path):
    history = filled(path, [1])
    with pytest.raises(ValueError, match="metric 'train/grad_nrom' is not declared"):
        history.write(2, 16, {"train/loss": 1.0, "train/grad_nrom": 1.0})
    assert steps_of(path) == [1]
    history.close()


@pytest.mark.parametrize(
    ("restored", "kept"), [(-1, []), (0, []), (10, [10]), (15, [10]), (20, [10, 20]), (99, [10, 20, 30])]
)
def test_truncation_keeps_the_rows_up_to_the_restored_step(path, restored, kept):
    history = filled(path, [10, 20, 30])
    history.truncate(restored)
    assert steps_of(path) == kept
    assert history.last_step == (kept[-1] if kept else -1)
    history.write(100, 800, {"train/loss": 1.0})
    assert steps_of(path) == [*kept, 100]
    history.close()


@pytest.mark.parametrize(
    "tail", [b'{"step": 30, "sam', b'{"step": 30, "samples": 1}', b"\x00" * 500, b"\xff\n", b'{"step": 3}\n', b"7\n"]
)
def test_a_torn_end_is_cut_when_the_file_is_opened(path, tail, caplog):
    filled(path, [10, 20]).close()
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert steps_of(path) == [10, 20]
    with caplog.at_level(logging.WARNING):
        history = History(path)
    assert path.read_bytes() == whole
    assert f"cut {len(tail)} bytes that are no row" in caplog.text
    history.write(30, 240, {"train/loss": 1.0})
    assert steps_of(path) == [10, 20, 30]
    history.close()


def test_a_kill_while_a_line_is_extended_leaves_the_old_row_or_none(path):
    history = filled(path, [10, 20])
    before = path.read_bytes()
    history.write(20, 160, {"eval/digits/top1": 0.5})
    after = path.read_bytes()
    history.close()
    old_rows = [json.loads(line) for line in before.splitlines()]
    for written in range(before.index(b'{"step": 20'), len(after)):  # bytes of the new line that made it to the file
        path.write_bytes(after[:written] + before[written:])
        assert load_history(path) in (old_rows, old_rows[:1])


def test_an_opened_file_goes_on_where_it_ended(path):
    filled(path, [10, 20]).close()
    history = History(path)
    assert history.last_step == 20
    history.truncate(10)
    history.write(20, 160, {"train/loss": 5.0})
    assert [row["train/loss"] for row in history.rows()] == [10 / 3, 5.0]
    history.close()


def test_rows_since_a_step(path):
    history = filled(path, [10, 20, 30])
    assert [row["step"] for row in history.rows(since=11)] == [20, 30]
    assert [row["step"] for row in history.rows(since=30)] == [30]
    assert list(history.rows(since=31)) == []
    history.close()


def test_sealed_rows_are_final(path):
    history = filled(path, [10, 20])
    history.seal(25)
    with pytest.raises(AssertionError, match="up to step 25 are final, step 20 comes too late"):
        history.write(20, 160, {"eval/digits/top1": 0.5})
    with pytest.raises(AssertionError, match="step 25 comes too late"):
        history.write(25, 200, {"eval/digits/top1": 0.5})
    history.write(26, 208, {"train/loss": 1.0})
    history.close()


def test_restored_rows_are_final(path):
    history = filled(path, [10, 20])
    history.truncate(10)
    with pytest.raises(AssertionError, match="step 10 comes too late"):
        history.write(10, 80, {"eval/digits/top1": 0.5})
    history.close()


def test_steps_do_not_go_back_and_a_metric_is_published_once_per_step(path):
    history = filled(path, [10])
    with pytest.raises(AssertionError, match="step 9 after step 10"):
        history.write(9, 72, {"train/loss": 1.0})
    with pytest.raises(AssertionError, match="train/loss published twice for step 10"):
        history.write(10, 80, {"train/loss": 1.0})
    history.close()


def test_a_full_disk_is_one_clear_error(path):
    history = filled(path, [10])
    history._file.close()
    history._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115, PTH123  every write fails with ENOSPC
    with pytest.raises(
        EvaclipError, match=r"cannot write to .*metrics\.jsonl: No space left on device; free some space"
    ):
        history.write(20, 160, {"train/loss": 1.0})
    history.close()
    assert steps_of(path) == [10]


def test_rows_behind_a_damaged_one_and_rows_without_a_checkpoint_are_kept_aside(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    for step in (1, 2, 3):
        history.write(step, step, {"train/loss": 1.0})
    history.close()
    whole = path.read_bytes()
    damaged = whole.replace(b'{"step": 2', b'{"step"')
    path.write_bytes(damaged)
    History(path).close()
    assert (tmp_path / "metrics.jsonl.old").read_bytes() == damaged
    assert "no row and what follows; the file as it was is metrics.jsonl.old" in caplog.text
    path.write_bytes(whole)
    history = History(path)
    history.truncate(-1)
    history.close()
    assert path.read_bytes() == b""
    assert (tmp_path / "metrics.jsonl.old").read_bytes() == whole
    assert "cut 3 rows after step 0; the file as it was is metrics.jsonl.old" in caplog.text


def test_rows_are_yielded_one_by_one_up_to_a_torn_line(path):
    filled(path, [10, 20]).close()
    path.write_bytes(path.read_bytes() + b'{"step": 30, "samp')
    rows = read_history(path)
    assert next(rows)["step"] == 10
    assert [row["step"] for row in rows] == [20]


def test_training_time_is_samples_over_speed_and_rows_without_a_speed_add_none():
    speed = "speed/samples_per_second"
    rows = [
        {"step": 0, "samples": 0, "eval/digits/top1": 0.1},
        {"step": 10, "samples": 100, speed: 50.0},
        {"step": 15, "samples": 150, "eval/digits/top1": 0.2},
        {"step": 20, "samples": 200, speed: 25.0},
        {"step": 30, "samples": 300, speed: None},
    ]
    assert training_time(rows) == [(0.0, 0.0), (100, 2.0), (200, 6.0)]
