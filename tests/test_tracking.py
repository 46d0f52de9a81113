import math
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from wandb_server import KEY, as_in_the_file, environment, offline_files, read_back, serving, sync

from evaclip.config import WandbConfig
from evaclip.errors import ConfigError
from evaclip.history import History, load_history
from evaclip.tracking import Tracker
from evaclip.wandb_id import require_own_folder

SESSION = """
import os, signal, sys
from pathlib import Path
from evaclip import tracking
from evaclip.config import WandbConfig
from evaclip.history import History

run_dir, mode, end = Path(sys.argv[1]), sys.argv[2], sys.argv[7]
attempt, restored, last, committed = map(int, sys.argv[3:7])
tracking._INIT_SECONDS = 1.0
history = History(run_dir / "metrics.jsonl")
history.truncate(restored)
tracker = tracking.Tracker(run_dir, WandbConfig(mode=mode), {"seed": 1}, history)
for step in range(restored + 1, last + 1):
    history.write(step, step * 8, {"train/loss": attempt + step / 3})
    if step == committed:
        history.seal(step)
        tracker.commit(history, step)
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
tracker.finish()
"""


pytestmark = pytest.mark.usefixtures("no_wandb_account")


def session(run_dir, mode, *, attempt, restored, last, committed, end="finish", **kwargs):
    """Run a training session in a process of its own; returns it, ended."""
    command = [sys.executable, "-c", SESSION, str(run_dir), mode, *map(str, (attempt, restored, last, committed)), end]
    return subprocess.run(
        command, timeout=120, check=False, **{"stdin": subprocess.DEVNULL, "env": environment(), **kwargs}
    )


def offline_history(run_dir):
    (file,) = offline_files(run_dir)
    return [as_in_the_file(r["history"]["item"]) for r in read_back(file) if r["type"] == "history"]


def tracked(run_dir, history, **config):
    return Tracker(
        run_dir, WandbConfig(mode="offline", **config), {"seed": 1, "data": {"captions": {"json.x": 0.5}}}, history
    )


# ----------------------------------------------------------------------------------------------------------- offline


def test_an_offline_run_file_holds_the_rows_of_the_history(run_dir):
    history = History(run_dir / "metrics.jsonl")
    tracker = tracked(run_dir, history, name="smoke", project="clip", group="sweep", tags=("a", "b"))
    history.write(0, 0, {"eval/digits/top1": 0.1})
    history.write(10, 2560, {"train/loss": 1 / 3, "train/skipped_steps": 0, "lr/image": 1e-17 / 3})
    history.write(20, 10**12, {"train/loss": math.nan, "train/grad_norm": math.inf})
    history.write(20, 10**12, {"eval/digits/top1": 0.5})
    history.seal(20)
    tracker.commit(history, 20)
    tracker.finish()
    history.close()

    (file,) = offline_files(run_dir)
    records = read_back(file)
    rows = load_history(run_dir / "metrics.jsonl")
    assert [as_in_the_file(r["history"]["item"]) for r in records if r["type"] == "history"] == rows
    assert len(rows) == 3
    (run,) = [r["run"] for r in records if r["type"] == "run"]
    assert run["run_id"] == (run_dir / "wandb_run_id").read_text().strip()
    assert (run["display_name"], run["project"], run["run_group"]) == ("smoke", "clip", "sweep")
    assert run["tags"] == ["a", "b"]
    assert {name: v for name, v in run["config"]["update"].items() if name != "_wandb"} == {
        "seed": 1,
        "data": {"captions": {"json.x": 0.5}},
    }


def test_rows_wait_for_a_checkpoint(run_dir):
    history = History(run_dir / "metrics.jsonl")
    tracker = tracked(run_dir, history)
    for step in (10, 20, 30, 40):
        history.write(step, step, {"train/loss": float(step)})
    tracker.commit(history, 25)
    tracker.commit(history, 30)
    tracker.finish()
    history.close()
    assert [row["step"] for row in offline_history(run_dir)] == [10, 20, 30]


def test_after_a_kill_the_newest_offline_run_equals_the_file(run_dir):
    killed = session(run_dir, "auto", attempt=1, restored=-1, last=7, committed=4, end="kill")
    assert killed.returncode == -signal.SIGKILL
    first_id = (run_dir / "wandb_run_id").read_text()
    assert [row["step"] for row in load_history(run_dir / "metrics.jsonl")] == list(range(8))

    assert session(run_dir, "auto", attempt=2, restored=4, last=9, committed=9).returncode == 0
    rows = load_history(run_dir / "metrics.jsonl")
    assert [(row["step"], row["train/loss"]) for row in rows] == [
        (step, (1 if step <= 4 else 2) + step / 3) for step in range(10)
    ]
    assert offline_history(run_dir) == rows
    assert (run_dir / "wandb_run_id").read_text() == first_id
    assert first_id.strip() in offline_files(run_dir)[0].name


def test_without_a_key_nothing_is_asked_even_on_a_terminal(run_dir):
    master, terminal = pty.openpty()
    try:
        done = session(
            run_dir,
            "auto",
            attempt=1,
            restored=-1,
            last=2,
            committed=2,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
        os.set_blocking(master, False)
        try:
            said = os.read(master, 100_000).decode()
        except BlockingIOError:
            said = ""
    finally:
        os.close(master)
        os.close(terminal)
    assert done.returncode == 0
    assert said == ""
    assert len(offline_history(run_dir)) == 3


def test_online_without_a_key_is_refused_with_the_remedy(run_dir):
    history = History(run_dir / "metrics.jsonl")
    with pytest.raises(
        ConfigError, match=r"mode is online, but there is no W&B API key; set WANDB_API_KEY, run `wandb"
    ):
        Tracker(run_dir, WandbConfig(mode="online"), {}, history)
    history.close()


def test_online_with_a_key_that_cannot_be_one_is_refused_with_the_reason(run_dir, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    history = History(run_dir / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"the W&B credentials cannot be used: .*WANDB_API_KEY"):
        Tracker(run_dir, WandbConfig(mode="online"), {}, history)
    history.close()


def test_a_project_name_that_wandb_refuses_is_a_configuration_error(run_dir):
    history = History(run_dir / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"log\.wandb: Invalid project name 'a/b'"):
        tracked(run_dir, history, project="a/b")
    history.close()


def test_mode_off_imports_and_leaves_nothing(run_dir):
    check = SESSION + "\nassert not [name for name in sys.modules if name.startswith('wandb')]"
    command = [sys.executable, "-c", check, str(run_dir), "off", "1", "-1", "3", "3", "finish"]
    subprocess.run(command, check=True, timeout=60, env=environment())
    assert [path.name for path in run_dir.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("damage", ["", "../elsewhere\n", "\x00\x00"])
def test_a_damaged_run_id_is_replaced(run_dir, damage):
    (run_dir / "wandb_run_id").write_text(damage)
    history = History(run_dir / "metrics.jsonl")
    tracked(run_dir, history).finish()
    history.close()
    assert re.fullmatch(r"[0-9a-f]{12}\n", (run_dir / "wandb_run_id").read_text())


BEREFT = """
import os, signal, sys, time
from pathlib import Path
from evaclip.alerts import Alert
from evaclip.config import CheckpointConfig, WandbConfig
from evaclip.history import History
from evaclip.tracking import Tracker

run_dir = Path(sys.argv[1])
history = History(run_dir / "metrics.jsonl")
tracker = Tracker(run_dir, WandbConfig(mode="offline", artifacts=True), {"seed": 1}, history)
children = {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}
services = [int(pid) for pid in children if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
assert services
for pid in services:
    os.kill(pid, signal.SIGKILL)
for step in range(100):
    history.write(step, step * 8, {"train/loss": 1.0})
    tracker.commit(history, step)
    tracker.alert(Alert("a title", "a text"))
    tracker.alert_restarts()
    time.sleep(0.01)
tracker.log_checkpoints(run_dir / "checkpoints", CheckpointConfig())
tracker.finish()
print("trained to the end")
history.truncate(99)
tracker = Tracker(run_dir, WandbConfig(mode="offline"), {"seed": 1}, history)  # the next start, even in this process
tracker.finish()
"""


def test_training_goes_on_when_the_service_dies_and_the_next_start_sends_all(run_dir):
    command = [sys.executable, "-W", "error", "-c", BEREFT, str(run_dir)]
    done = subprocess.run(command, timeout=60, check=True, capture_output=True, text=True, env=environment())
    assert done.stdout == "trained to the end\n"
    (warning, *noise) = done.stderr.splitlines()
    assert re.fullmatch(
        r"W&B stopped recording \(.+\); metrics\.jsonl goes on, and the next start sends the rest", warning
    )
    assert not [line for line in noise if "Error" in line]
    assert [row["step"] for row in offline_history(run_dir)] == list(range(100))


# ------------------------------------------------------------------------------------------------------------ online


def test_online_every_row_arrives_exactly_once_whatever_was_killed(run_dir):
    with serving() as server:
        env = environment(WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        # rows 5 and 6 are in metrics.jsonl, and in no checkpoint
        session(run_dir, "auto", attempt=1, restored=-1, last=6, committed=4, env=env)
        run_id = (run_dir / "wandb_run_id").read_text().strip()
        assert [row["step"] for row in server.history(run_id)] == [0, 1, 2, 3, 4]
        # killed before the upload: the rows up to 8 are in a checkpoint, and may or may not have reached the server
        session(run_dir, "auto", attempt=2, restored=4, last=9, committed=8, end="kill", env=env)
        away = {**env, "WANDB_BASE_URL": "http://127.0.0.1:9"}
        done = session(run_dir, "auto", attempt=3, restored=8, last=9, committed=9, env=away, capture_output=True)
        assert done.returncode == 0
        assert b"metrics.jsonl goes on, and the next start sends the rest" in done.stderr
        assert session(run_dir, "auto", attempt=4, restored=9, last=11, committed=11, env=env).returncode == 0

        rows = load_history(run_dir / "metrics.jsonl")
        assert [row["train/loss"] for row in rows] == [
            attempt + step / 3 for step, attempt in enumerate([1] * 5 + [2] * 4 + [3] + [4] * 2)
        ]
        assert [as_in_the_file(row) for row in server.history(run_id)] == rows
        assert list(server.lines) == [run_id]
        assert server.finished == {run_id}
        assert not [body for body in server.bodies if KEY.encode() in body]
        assert not [file for file in run_dir.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
        assert offline_files(run_dir) == []


def test_a_server_ahead_of_the_restored_step_gets_a_new_run(run_dir):
    with serving() as server:
        env = environment(WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        session(run_dir, "auto", attempt=1, restored=-1, last=8, committed=8, env=env)
        old = (run_dir / "wandb_run_id").read_text().strip()
        done = session(
            run_dir, "auto", attempt=2, restored=3, last=5, committed=5, env=env, capture_output=True, text=True
        )
        new = (run_dir / "wandb_run_id").read_text().strip()
        assert f"W&B run {old} reaches step 8, metrics.jsonl only 3" in done.stderr
        assert new != old
        assert [as_in_the_file(row) for row in server.history(new)] == load_history(run_dir / "metrics.jsonl")
        assert len(server.history(old)) == 9


def test_a_synced_run_that_continues_offline_gets_a_new_id(run_dir):
    with serving() as server:

        def synced():
            sync(offline_files(run_dir)[:1], server, run_dir)
            return (run_dir / "wandb_run_id").read_text().strip()

        session(run_dir, "offline", attempt=1, restored=-1, last=3, committed=3)
        old = synced()
        done = session(run_dir, "offline", attempt=2, restored=3, last=5, committed=5, capture_output=True, text=True)
        assert f"W&B run {old} is on the server" in done.stderr
        new = synced()
        assert [as_in_the_file(row) for row in server.history(new)] == load_history(run_dir / "metrics.jsonl")
        assert len(server.history(old)) == 4


def test_a_server_out_of_reach_means_an_offline_session_and_the_next_one_catches_up(run_dir):
    env = environment(WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY)
    done = session(
        run_dir, "auto", attempt=1, restored=-1, last=3, committed=3, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "W&B's server cannot be reached, this session is recorded offline" in done.stderr
    assert offline_history(run_dir) == load_history(run_dir / "metrics.jsonl")
    with serving() as server:
        env["WANDB_BASE_URL"] = server.url
        session(run_dir, "auto", attempt=2, restored=3, last=4, committed=4, env=env)
        history = server.history((run_dir / "wandb_run_id").read_text().strip())
    assert [as_in_the_file(row) for row in history] == load_history(run_dir / "metrics.jsonl")
    assert offline_files(run_dir) == []


# ------------------------------------------------------------------------------------------------------------ a sweep


def test_a_trial_of_a_sweep_takes_the_agents_id_and_goes_on_with_it(run_dir):
    with serving() as server:
        env = environment(WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        trial = {**env, "WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "trial1", "WANDB_PROJECT": "theirs"}
        session(run_dir, "auto", attempt=1, restored=-1, last=4, committed=4, env=trial)
        session(run_dir, "auto", attempt=2, restored=4, last=7, committed=7, env=env)  # by hand
        assert list(server.lines) == ["trial1"]
        assert [as_in_the_file(row) for row in server.history("trial1")] == load_history(run_dir / "metrics.jsonl")
        assert (server.upserts["trial1"]["sweep"], server.upserts["trial1"]["project"]) == ("sweep1", "theirs")


def test_a_trial_that_needs_a_new_run_leaves_the_sweep(run_dir):
    with serving() as server:
        env = environment(WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        env |= {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "trial1"}
        session(run_dir, "auto", attempt=1, restored=-1, last=8, committed=8, env=env)
        for restored, last in ((3, 5), (5, 6)):  # the server is ahead, then the agent's id is another than the run's
            session(run_dir, "auto", attempt=2, restored=restored, last=last, committed=last, env=env)
        new = (run_dir / "wandb_run_id").read_text().strip()
        assert set(server.lines) == {"trial1", new}
        assert [as_in_the_file(row) for row in server.history(new)] == load_history(run_dir / "metrics.jsonl")
        assert len(server.history("trial1")) == 9
        assert not server.upserts[new].get("sweep")


def test_a_folder_that_holds_another_trial_is_refused_and_that_of_a_trial_that_left_is_not(run_dir, monkeypatch):
    (run_dir / "wandb_run_id").write_text("trial1\n")
    require_own_folder(run_dir)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "trial1")
    require_own_folder(run_dir)
    monkeypatch.setenv("WANDB_RUN_ID", "trial2")
    with pytest.raises(
        ConfigError,
        match=rf"^run_dir {run_dir} holds W&B run trial1, and the agent of W&B sweep sweep1 asks for run trial2, .*"
        r"give each trial a run_dir of its own, such as run_dir=runs/sweep/\$\{WANDB_RUN_ID\}$",
    ):
        require_own_folder(run_dir)
    (run_dir / "wandb").mkdir()
    (run_dir / "wandb/trial2.online").touch()
    require_own_folder(run_dir)
