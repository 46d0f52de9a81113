"""A rank's last sign of life stays readable, whatever becomes of the rank."""

import os
import signal
import subprocess
import sys
import time

import pytest

from evaclip.heartbeat import FOLDER, read_beats

DYING = """
import os, signal
from evaclip.heartbeat import beat
beat("start")
beat("metrics", 7)
beat("data")
beat("forward")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_last_beat_outlives_the_process(tmp_path):
    before = time.monotonic()
    environment = {**os.environ, FOLDER: str(tmp_path), "RANK": "3"}
    done = subprocess.run([sys.executable, "-c", DYING], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    (beat,) = read_beats(tmp_path)
    assert (beat.rank, beat.step, beat.phase) == (3, 7, "forward")
    assert before < beat.seconds < time.monotonic()


@pytest.mark.parametrize(
    ("beats", "step", "phase"),
    [
        (("'start'", "'evaluation'", "'data', 0", "'checkpoint'"), 0, "start"),  # before the first update is done
        (("'data', 0", "'metrics', 1", "'checkpoint'"), 1, "checkpoint"),
        (("'metrics', 1", "'evaluation'", ""), 1, "evaluation"),  # still
        (("'start'", "'end'"), -1, "end"),
    ],
)
def test_a_beat_names_the_phase_that_counts(tmp_path, beats, step, phase):
    environment = {**os.environ, FOLDER: str(tmp_path), "RANK": "0"}
    code = "from evaclip.heartbeat import beat; " + "; ".join(f"beat({beat})" for beat in beats)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert [(beat.step, beat.phase) for beat in read_beats(tmp_path)] == [(step, phase)]


def test_without_a_launcher_nothing_is_written(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != FOLDER}
    code = "from evaclip.heartbeat import beat; beat('data', 1)"
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_does_not_stop_the_rank(tmp_path):
    environment = {**os.environ, FOLDER: str(tmp_path / "gone")}
    code = "from evaclip.heartbeat import beat; beat('data', 1)"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_file_without_a_beat_is_no_rank(tmp_path):
    (tmp_path / "rank_0").write_bytes(b"")
    (tmp_path / "rank_1").write_bytes(bytes(80))
    assert read_beats(tmp_path) == []


BEATING = """
from evaclip.heartbeat import beat
step = 0
while True:
    beat("metrics", step := step + 1)
"""


def test_whoever_reads_in_the_middle_of_a_write_sees_a_whole_beat(tmp_path):
    environment = {**os.environ, FOLDER: str(tmp_path), "RANK": "0"}
    process = subprocess.Popen([sys.executable, "-c", BEATING], env=environment)
    try:
        while not read_beats(tmp_path):
            time.sleep(0.01)
        seen = [0]
        for _ in range(20_000):
            if beats := read_beats(tmp_path):  # it may be overtaken twice within one read, and then says nothing
                (beat,) = beats
                assert (beat.pid, beat.phase) == (process.pid, "metrics")
                assert time.monotonic() - 5 < beat.seconds <= time.monotonic()
                seen.append(beat.step)
        assert seen == sorted(seen)
        assert len(seen) > 15_000
    finally:
        process.kill()
        process.wait()


def test_a_beat_that_death_broke_off_leaves_the_one_before(tmp_path):
    environment = {**os.environ, FOLDER: str(tmp_path), "RANK": "3"}
    subprocess.run([sys.executable, "-c", DYING], env=environment, check=False)
    path = tmp_path / "rank_3"
    content = bytearray(path.read_bytes())
    content[40:60] = bytes(20)  # the fourth of four beats stands in the second place
    path.write_bytes(content)
    assert [(beat.step, beat.phase) for beat in read_beats(tmp_path)] == [(7, "data")]


FIRST = """
from pathlib import Path
from evaclip.heartbeat import beat, read_beats
for phase in ("data", "forward", "update", "metrics", "data"):
    beat(phase, 4)
    print(read_beats(Path.cwd())[0].phase)
"""


def test_all_parts_of_the_first_step_are_the_start(tmp_path):
    environment = {**os.environ, FOLDER: str(tmp_path)}
    command = [sys.executable, "-c", FIRST]
    done = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["start", "start", "start", "metrics", "data"]
