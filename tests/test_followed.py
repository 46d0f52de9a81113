"""Results from outside and the W&B run: each row and each result once, in an order that survives kills."""

import signal
import subprocess
import sys

import pytest
from wandb_server import KEY, environment, offline_files, read_back, serving

from evaclip.followed import RESULTS, sent, valid
from evaclip.history import load_history

SESSION = """
import os, signal, sys
from pathlib import Path
from evaclip import followed, tracking
from evaclip.config import WandbConfig
from evaclip.history import History, append_rows

run_dir, mode, end = Path(sys.argv[1]), sys.argv[2], sys.argv[5]
restored, last = map(int, sys.argv[3:5])
tracking._INIT_SECONDS = 1.0
(run_dir / "followed").mkdir(exist_ok=True)
if end == "kill between":
    add = followed.Places.add
    def add_and_die(self, upto_step):
        add(self, upto_step)
        if upto_step == last:
            os.kill(os.getpid(), signal.SIGKILL)
    followed.Places.add = add_and_die
history = History(run_dir / "metrics.jsonl")
history.truncate(restored)
tracker = tracking.Tracker(run_dir, WandbConfig(mode=mode), {"seed": 1}, history)
for step in range(restored + 1, last + 1):
    history.write(step, step * 8, {"train/loss": step / 3})
    if step % 3 == 0:  # a checkpoint, which is measured while the next steps are trained
        history.seal(step)
        tracker.commit(history, step)
        if end != "nobody measures":
            written = len(followed.read_results(run_dir))
            row = {"step": step, "samples": step * 8, "checkpoint": f"{restored} {step}", "measured": "m"}
            row |= {"written": written, "eval/x/top1": step + restored / 100}
            append_rows(run_dir / followed.RESULTS, [row])
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
tracker.finish()
"""

pytestmark = pytest.mark.usefixtures("no_wandb_account")


def session(run_dir, mode, *, restored, last, end="finish", **kwargs):
    """Train from a checkpoint to a step in a process of its own, while somebody measures every third step."""
    command = [sys.executable, "-c", SESSION, str(run_dir), mode, str(restored), str(last), end]
    return subprocess.run(command, timeout=120, check=False, **{"env": environment(), **kwargs})


def result(step, written, name="x"):
    return {"step": step, "samples": step * 8, "checkpoint": name, "measured": "m", "written": written}


def split(history):
    """Rows of the file and steps with their results; W&B's steps ascend."""
    assert [row["_step"] for row in history] == sorted({row["_step"] for row in history})
    rows = [{name: v for name, v in row.items() if not name.startswith("_")} for row in history]
    return [r for r in rows if "train/loss" in r], [
        (r["step"], r["eval/x/top1"]) for r in rows if "train/loss" not in r
    ]


# ----------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize(
    ("steps", "behind", "expected"),
    [
        ([10, 20, 30], [], [10, 20, 30]),
        ([10, 20, 30], [10, 10, 30], [10, 11, 12, 20, 30, 31]),
        ([1, 2, 3, 4, 9], [2, 2, 4], [1, 2, 3, 4, 5, 6, 7, 9]),  # steps that are taken shift what follows
        ([], [0], [0]),
    ],
)
def test_a_result_stands_behind_the_rows_that_were_sent_before_it(steps, behind, expected):
    order = sorted([(step, False) for step in steps] + [(step, True) for step in behind])
    for lacking in range(40):
        there = [number for number in expected if number < lacking]
        found = sent(steps, behind, lacking)
        assert found.wandb_step == max(there, default=-1)
        assert found.results == sum(is_result for _, is_result in order[: len(there)])
        rows = [step for step, is_result in order[: len(there)] if not is_result]
        assert found.next_step == max(rows, default=-1) + 1


def test_a_checkpoint_that_was_written_later_voids_results_of_its_step_and_of_later_ones():
    rows = [result(2, 1.0), result(4, 2.0), result(6, 3.0), result(4, 5.0), result(8, 9.0), result(3, 1.5)]
    assert [(row["step"], row["written"]) for row in valid(rows)] == [(2, 1.0), (3, 1.5), (4, 5.0), (8, 9.0)]
    assert valid([]) == []


# ----------------------------------------------------------------------------------------------------------------- W&B


@pytest.mark.parametrize("end", ["finish", "kill", "kill between"])
def test_online_every_row_and_every_result_arrives_once(run_dir, end):
    with serving() as server:
        env = environment(WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        killed = session(run_dir, "auto", restored=-1, last=9, end=end, env=env)
        assert killed.returncode == (0 if end == "finish" else -signal.SIGKILL)
        assert session(run_dir, "auto", restored=9, last=14, end="finish", env=env).returncode == 0
        assert list(server.lines) == [(run_dir / "wandb_run_id").read_text().strip()], "one W&B run"
        (history,) = map(server.history, server.lines)
    rows, results = split(history)
    assert [row["step"] for row in history[:10]] == [0, 1, 2, 3, 0, 4, 5, 6, 3, 7], "with the next checkpoint"
    assert rows == load_history(run_dir / "metrics.jsonl")[: len(rows)]
    assert [row["step"] for row in rows] == list(range(13)), "up to the last checkpoint"
    # the result of step 9 is there, unless the first session was killed before it was found; that of 12 comes later
    assert results == [(step, step - 0.01) for step in ((0, 3, 6) if end == "kill between" else (0, 3, 6, 9))]


def test_offline_each_start_records_rows_and_results_in_their_order(run_dir):
    for restored, last in ((-1, 7), (6, 11), (9, 12)):
        assert session(run_dir, "offline", restored=restored, last=last, end="kill").returncode == -signal.SIGKILL
    assert session(run_dir, "offline", restored=12, last=12).returncode == 0
    (file,) = offline_files(run_dir)
    records = [record for record in read_back(file) if record["type"] == "history"]
    rows, results = split([record["history"]["item"] for record in records])
    assert rows == load_history(run_dir / "metrics.jsonl")
    assert results == [(0, -0.01), (3, 2.99), (6, 5.99), (9, 9.06), (12, 12.09)]


def test_a_run_that_goes_back_goes_on_as_a_new_one_without_results_of_what_it_trains_again(run_dir):
    with serving() as server:
        env = environment(WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        session(run_dir, "auto", restored=-1, last=10, env=env)  # 0, 3 and 6 were sent, 9 was found
        old = (run_dir / "wandb_run_id").read_text().strip()
        again = {"restored": 3, "last": 10, "end": "nobody measures"}
        done = session(run_dir, "auto", **again, env=env, capture_output=True, text=True)
        assert f"W&B run {old} reaches step 12, metrics.jsonl only 3" in done.stderr
        session(run_dir, "auto", restored=9, last=12, env=env)
        session(run_dir, "auto", restored=12, last=12, env=env)
        new = (run_dir / "wandb_run_id").read_text().strip()
        assert set(server.lines) == {old, new}
        rows, results = split(server.history(new))
    assert rows == load_history(run_dir / "metrics.jsonl")
    assert results == [(0, -0.01), (3, 2.99), (12, 12.09)], "6 and 9 were trained again, and nobody measured them"


def test_results_that_cannot_be_read_wait_and_training_goes_on(run_dir):
    (run_dir / RESULTS).mkdir(parents=True)
    done = session(run_dir, "offline", restored=-1, last=4, end="nobody measures", capture_output=True, text=True)
    assert done.returncode == 0
    assert f"{run_dir / RESULTS} cannot be read, its results wait: " in done.stderr
    assert "W&B stopped recording" not in done.stderr
    (file,) = offline_files(run_dir)
    assert len([record for record in read_back(file) if record["type"] == "history"]) == 4, "steps 0 to 3"
