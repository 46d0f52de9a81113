import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from tiny import SYNTHETIC, colour_records, merged, tiny_config, tiny_tree
from wandb_server import KEY, environment, offline_files, read_back, serving

from evaclip.alerts import Alarms, ending, restarts
from evaclip.data.accounts import SourceAccount
from evaclip.data.shards import write_shards
from evaclip.errors import DataError, TrainingStoppedError
from evaclip.history import whole_rows

GONE = {"time": 1.0, "attempt": 1, "cause": "a node is gone", "detail": "n2 is not heard of since step 57"}

# ------------------------------------------------------------------------------------------------------------- deciding


def watch(tmp_path, *, continued=False, **changes):
    return Alarms(tiny_config(tmp_path, **changes), continued=continued)


def titles(alerts):
    return [alert.title for alert in alerts]


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, 10),
        ({"train__max_consecutive_skipped_steps": 8}, 4),
        ({"train__max_consecutive_skipped_steps": 1}, 1),
        ({"train__precision": "fp16"}, 50),  # it skips while it looks for its loss scale
    ],
)
def test_a_streak_of_skipped_updates_is_told_when_it_is_long(tmp_path, changes, first):
    rows = watch(tmp_path, **changes)
    assert rows.row(1, first - 1, {}) == []
    (alert,) = rows.row(2, first, {})
    assert alert.title == f"{first} updates in a row were skipped"
    assert "up to step 2 loss or gradient was not finite" in alert.text


def test_a_streak_is_told_once_and_the_next_one_again(tmp_path):
    rows = watch(tmp_path)
    found = [len(rows.row(step, skips, {})) for step, skips in enumerate([0, 10, 20, 0, 5, 15, 25])]
    assert found == [0, 1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("skipped", "delivered", "told"),
    [
        (10, 10, False),  # few are no sign
        (11, 340, True),  # 3.1 % of 351, half of 5 % is 2.5 %
        (11, 500, False),
    ],
)
def test_records_above_half_of_what_stops_the_run_are_told(tmp_path, skipped, delivered, told):
    accounts = {"web": SourceAccount(0.1, delivered, {"undecodable": skipped}), "clean": SourceAccount(0.1, 900, {})}
    rows = watch(tmp_path)
    alerts = rows.row(7, 0, accounts)
    assert titles(alerts) == ["many unusable records"] * told
    for alert in alerts:
        assert f"up to step 7 {skipped} of {skipped + delivered} records of source web could not be used" in alert.text
        assert f"({skipped} undecodable); at 0.05 of them the run stops" in alert.text
    assert rows.row(8, 0, accounts) == [], "once per source"


def test_a_continued_run_does_not_tell_again_what_its_first_row_says(tmp_path):
    accounts = {"web": SourceAccount(0.1, 300, {"undecodable": 20})}
    rows = watch(tmp_path, continued=True)
    assert rows.row(7, 0, accounts) == []
    accounts["other"] = SourceAccount(0.1, 300, {"undecodable": 20})
    assert len(rows.row(8, 0, accounts)) == 1


def test_the_end_of_a_run_says_whether_it_was_asked_for():
    stopped = TrainingStoppedError("stopped by SIGTERM after step 3", can_continue=True)
    assert ending(stopped) == ("the run was asked to stop", "stopped by SIGTERM after step 3")
    assert ending(TrainingStoppedError("too many")) == ("the run has stopped", "too many")
    assert ending(DataError("gone")) == ("the run has stopped", "gone")


def test_restarts_are_told_with_cause_and_detail():
    rows = [{**GONE, "action": action} for action in ("restart", "requeue", "stop", "done")]
    assert restarts(rows) == [("restarted: a node is gone", "n2 is not heard of since step 57")] * 2


def test_half_a_row_of_the_launcher_is_left_for_later(tmp_path):
    path = tmp_path / "restarts.jsonl"
    assert whole_rows(path) == []
    path.write_text('{"attempt": 1}\n{"attempt": 2')
    assert whole_rows(path) == [{"attempt": 1}]
    path.write_text('{"attempt": 1}\n{"attempt": 2}\n')
    assert whole_rows(path) == [{"attempt": 1}, {"attempt": 2}]
    path.write_text('{"attempt": 1}\n{"atte{"attempt": 3}\n{"attempt": 4}\n')
    assert [row.get("attempt") for row in whole_rows(path)] == [1, None, 4], "places stay, so that none is told twice"


# -------------------------------------------------------------------------------------------------------------- sending

TRAIN = """
import sys
from evaclip import config_file
from evaclip.errors import EvaclipError
from evaclip.train import train

for path in sys.argv[1:]:
    try:
        train(config_file.load(path))
    except EvaclipError as error:
        print(error, file=sys.stderr)
"""


def written(tmp_path, name, source=SYNTHETIC, **changes):
    """A configuration on disk that tracks to whatever server there is."""
    path = tmp_path / f"{name}.yaml"
    changes = {"log__wandb": {"mode": "auto"}, **changes}
    path.write_text(yaml.safe_dump(merged(tiny_tree(tmp_path / name, source), **changes)))
    return str(path)


@pytest.fixture
def server(no_wandb_account):
    with serving() as server:
        yield server


def told(server, run_dir):
    run_id = (run_dir / "wandb_run_id").read_text().strip()
    return [(alert["title"], alert["text"]) for alert in server.alerts if alert["runName"] == run_id]


def test_runs_that_go_wrong_tell_what_and_that_they_stop(server, tmp_path):
    records = [(key, {**m, "jpg": b"bad"} if int(key) % 3 == 0 else m) for key, m in colour_records(60)]
    write_shards(tmp_path / "shards", records, 60)
    paths = [
        # weights of 1e30 after the first update: everything behind it overflows
        written(tmp_path, "wild", optim__lr=1e30, train__steps=20, train__max_consecutive_skipped_steps=6),
        written(tmp_path, "bad", {"shards": str(tmp_path / "shards/00000.tar")}, train__steps=10),
        written(tmp_path, "quiet", log__wandb={"mode": "auto", "alerts": False}, optim__lr=1e30, train__steps=20,
                train__max_consecutive_skipped_steps=6),
    ]  # fmt: skip
    env = environment(WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    subprocess.run([sys.executable, "-c", TRAIN, *paths], check=True, timeout=150, env=env)
    first, second = told(server, tmp_path / "wild")
    assert first[0] == "3 updates in a row were skipped"
    assert second[0] == "the run has stopped"
    assert "the last 6 updates were skipped" in second[1]
    first, second = told(server, tmp_path / "bad")
    assert first[0] == "many unusable records"
    assert second[0] == "the run has stopped"
    assert "more than data.max_bad_fraction 0.05" in second[1]
    assert told(server, tmp_path / "quiet") == []
    assert {alert["severity"] for alert in server.alerts} == {"WARN"}


def test_being_asked_to_stop_is_told(server, tmp_path):
    path = written(tmp_path, "run", train__steps=100_000, checkpoint__every_steps=100_000)
    env = environment(WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    process = subprocess.Popen([sys.executable, "-m", "evaclip", "train", path], env=env, stderr=subprocess.PIPE)
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.stat().st_size < 2000:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    ((title, text),) = told(server, tmp_path / "run")
    assert title == "the run was asked to stop"
    assert re.match(r"stopped by SIGTERM after step \d+, which is saved", text)


RESTARTED = """
import os, signal, sys
from pathlib import Path
from evaclip.config import WandbConfig
from evaclip.history import History
from evaclip.tracking import Tracker

run_dir, end = Path(sys.argv[1]), sys.argv[2]
tracker = Tracker(run_dir, WandbConfig(mode=sys.argv[3]), {}, History(run_dir / "metrics.jsonl"))
tracker.alert_restarts()
tracker.alert_restarts()
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
tracker.finish()
"""


def restarted(run_dir, cause, end, mode="auto", **env):
    """A session behind one more restart."""
    with (run_dir / "restarts.jsonl").open("a") as file:
        file.write(json.dumps({**GONE, "cause": cause, "action": "restart"}) + "\n")
    command = [sys.executable, "-c", RESTARTED, str(run_dir), end, mode]
    subprocess.run(command, check=end != "kill", timeout=60, env=environment(**env))


def test_each_restart_is_told_once_whatever_is_killed(server, tmp_path):
    env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    restarted(tmp_path, "first", "finish", **env)
    restarted(tmp_path, "second", "kill", **env)
    restarted(tmp_path, "third", "finish", **env)
    titles = [title for title, _ in told(server, tmp_path)]
    assert titles.count("restarted: first") == titles.count("restarted: third") == 1
    assert titles.count("restarted: second") <= 1, "the kill may have come before it was sent"
    assert len(server.lines) == 1


def test_the_offline_file_that_will_be_synced_tells_each_restart_once(no_wandb_account, tmp_path):
    restarted(tmp_path, "first", "kill", "offline")
    restarted(tmp_path, "second", "finish", "offline")
    (file,) = offline_files(tmp_path)
    found = [record["alert"]["title"] for record in read_back(file) if record["type"] == "alert"]
    assert found == ["restarted: first", "restarted: second"]


def test_a_note_of_what_was_told_that_cannot_be_read_stops_nothing(no_wandb_account, tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/restarts_told").write_text("many")
    (tmp_path / "restarts.jsonl").write_text(json.dumps({**GONE, "action": "restart"}) + "\n")
    command = [sys.executable, "-c", RESTARTED, str(tmp_path), "finish", "offline"]
    done = subprocess.run(command, check=True, timeout=60, env=environment(), capture_output=True, text=True)
    assert "restarts are not told to W&B: invalid literal" in done.stderr
    assert os.path.getsize(offline_files(tmp_path)[0]) > 0  # noqa: PTH202  there is a run file
