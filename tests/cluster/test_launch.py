"""Runs under the launcher on this machine: ranks that die, hang or fail are named and started again, or not."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from cluster.launched import (
    assert_equal,
    assert_no_secrets,
    config_file,
    launched,
    restarts,
    signs,
    training,
    wait_for,
)

from evaclip.checkpoint import damage
from evaclip.checkpoint_names import complete
from evaclip.data.shards import write_shards

LONG = {"train__steps": 150, "checkpoint__every_steps": 20}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks to compare with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with launched(config_file(folder, **LONG), 2) as process:
        assert process.wait(120) == 0
    return folder / "run"


def test_killed_and_stopped_ranks_are_named_and_the_run_ends_with_the_same_bits(
    undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with launched(config_file(tmp_path, **LONG, cluster__step_timeout_seconds=8), 2) as process:
        first = wait_for(lambda: training(run, 2, beyond=25))
        os.kill(first[1].pid, signal.SIGKILL)
        second = wait_for(lambda: [s for s in training(run, 2, beyond=60) if s.pid not in {f.pid for f in first}])
        os.kill(second[0].pid, signal.SIGSTOP)
        stopped = time.time()
        third = wait_for(lambda: [s for s in training(run, 2, beyond=80) if s.pid not in {f.pid for f in second}])
        psutil.Process(psutil.Process(third[0].pid).ppid()).kill()  # the node's launcher, and its ranks with it
        wait_for(lambda: not any(psutil.pid_exists(sign.pid) for sign in third))
        assert process.wait(120) == 0
    died, hung, gone, complete = restarts(run)
    assert (died["cause"], died["action"]) == ("a rank died", "restart")
    assert died["detail"].startswith("rank 1 on localhost (in ")
    assert died["detail"].endswith(f"process {first[1].pid}) was ended by SIGKILL")
    assert (hung["cause"], hung["action"]) == ("a rank hangs", "restart")
    assert hung["detail"].startswith("rank 0 on localhost (in ")
    assert f"process {second[0].pid}, stopped by a signal): no sign of life for " in hung["detail"]
    assert (gone["cause"], gone["detail"]) == ("a node is gone", "localhost gives no sign of life")
    seen = float(hung["detail"].rpartition(" for ")[2].removesuffix(" s"))
    assert 8 <= seen < 10  # the time-out and at most 2 s
    assert hung["time"] - stopped < 10 + 12  # and the time that py-spy may take for the stacks
    stacks = {path.name: path.read_text() for path in (run / "logs").glob("stack_*.txt")}
    assert "forward_backward" in stacks["stack_00001.txt"] or "evaclip/train.py" in stacks["stack_00001.txt"]
    assert (complete["cause"], complete["step"]) == ("complete", 150)
    assert_equal(run, undisturbed)
    assert_no_secrets(tmp_path)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(run) in " ".join(p.info["cmdline"] or ())]


def test_asked_to_stop_it_saves_and_the_same_command_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = config_file(tmp_path, **LONG)
    with launched(config, 2) as process:
        wait_for(lambda: training(run, 2, beyond=5))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == os.EX_TEMPFAIL
    (row,) = restarts(run)
    assert (row["cause"], row["action"]) == ("asked to stop", "stop")
    with launched(config, 2) as process:
        assert process.wait(120) == 0
    assert_equal(run, undisturbed)


def test_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with launched(config_file(tmp_path, train__steps=10**6, checkpoint__every_steps=10), 1) as process:
        (sign,) = wait_for(lambda: training(run, 1, beyond=15))
        os.kill(sign.pid, signal.SIGSTOP)  # it cannot save
        process.send_signal(signal.SIGTERM)
        time.sleep(3.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == os.EX_TEMPFAIL
    assert restarts(run)[-1]["detail"] == "stopped at once by a second signal"
    # What was being written has not got its name, and what has is whole.
    saved = complete(run / "checkpoints")
    assert saved
    assert [damage(path) for path in saved] == [None] * len(saved)


def test_crash_that_repeats_at_one_step_ends_the_run_with_the_evidence(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path / "shards", ((f"{n:06d}", {"jpg": b"no", "txt": b"a"}) for n in range(600)), 600)
    options = {"data__sources": {"tiny": {"shards": str(shard)}}, "data__max_bad_fraction": 0.99}
    with launched(config_file(tmp_path, **options, cluster__max_same_step=2), 1) as process:
        assert process.wait(120) == 1
    first, second = restarts(tmp_path / "run")
    assert (first["action"], second["action"]) == ("restart", "stop")
    assert second["detail"].startswith("rank 0 on localhost (in its start, process ")
    assert "ended with code 1: error: source tiny: 500 records in a row cannot be used" in second["detail"]
    assert "stopped: the last 2 attempts failed at step 0: rank 0 on" in (tmp_path / "launcher.txt").read_text()


def test_what_would_fail_again_is_not_tried_again(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with launched(config_file(tmp_path, train__steps=2), 1) as process:
        assert process.wait(60) == 0
    with launched(config_file(tmp_path, seed=1, train__steps=4), 1) as process:
        assert process.wait(60) == 1
    row = restarts(run)[-1]
    assert (row["cause"], row["action"]) == ("refused", "stop")
    assert "was made by another model, data order or freezing" in row["detail"]
    assert not signs(run)
