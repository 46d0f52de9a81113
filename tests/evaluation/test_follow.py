"""``evaclip evaluate --follow``: real trainings, their checkpoints, and followers that are killed or come too late."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from tiny import merged, tiny_tree
from wandb_server import KEY, environment, offline_files, read_back, serving

from evaclip import cli
from evaclip.checkpoint import digest
from evaclip.evaluation import follow as module
from evaclip.followed import read_results, valid
from evaclip.history import load_history
from evaclip.plot import read_runs
from evaclip.status.files import read_run
from evaclip.status.finding import find_facts

FOLLOWER = """
import sys
from evaclip import cli
from evaclip.evaluation import follow
follow._POLL_SECONDS = 0.1
cli.main(["evaluate", "--follow", *sys.argv[1:]])
"""

TRAINING = """
import sys, time
from pathlib import Path
from evaclip import cli, followed
from evaclip.train import Report

run_dir, checkpoint = Path(sys.argv[2].removeprefix("run_dir=")), Report.checkpoint
def checkpoint_and_wait(self, run, *, final):
    checkpoint(self, run, final=final)
    while not final and run.step not in [row["step"] for row in followed.read_results(run_dir)]:
        time.sleep(0.05)
Report.checkpoint = checkpoint_and_wait
cli.main(["train", *sys.argv[1:]])
"""


@pytest.fixture
def config(tmp_path, colour_shards):
    """Writes a configuration that evaluates one set, at the last step alone."""

    def write(**changes):
        held = {"held": {"task": "loss", "path": str(colour_shards / "00000.tar")}}
        changes = {
            "eval__datasets": held,
            "eval__batch": 10,
            "eval__at_start": False,
            "checkpoint__keep_last": 9,
        } | changes
        source = {"shards": str(colour_shards / "{00000..00002}.tar")}
        tree = merged(tiny_tree(tmp_path / "run", source), **changes)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        return str(tmp_path / "config.yaml")

    return write


@pytest.fixture
def run(tmp_path, config, monkeypatch):
    """A run of four steps with two checkpoints; nobody waits long for another."""
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    cli.main(["train", config()])
    return tmp_path / "run"


def follow(run_dir, *options):
    cli.main(["evaluate", "--follow", str(run_dir), *options])


@pytest.fixture
def impatient(monkeypatch):
    """Whoever follows gives up instead of waiting."""

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", interrupt)


def steps_of(run_dir):
    return [row["step"] for row in read_results(run_dir)]


def left_in(run_dir):
    return sorted(path.name for path in (run_dir / "followed").iterdir())


def wait_for(what, process):
    deadline = time.monotonic() + 100
    while not what():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --------------------------------------------------------------------------------------------------- beside a training


def test_a_follower_that_is_killed_measures_each_checkpoint_of_a_running_job_once_and_wandb_has_all(tmp_path, config):
    run_dir = tmp_path / "run"
    path = config(train__steps=12, checkpoint__keep_last=1, log__wandb={"mode": "online"})
    with serving() as server:
        env = environment(WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY, OMP_NUM_THREADS="1", HOME=str(tmp_path))
        start = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        follower = subprocess.Popen([sys.executable, "-c", FOLLOWER, str(run_dir)], **start)
        training = subprocess.Popen([sys.executable, "-c", TRAINING, path, f"run_dir={run_dir}"], **start)
        try:
            for enough in (1, 3):
                wait_for(lambda: len(steps_of(run_dir)) >= enough, follower)  # noqa: B023  called here alone
                follower.send_signal(signal.SIGKILL)
                follower.communicate()
                follower = subprocess.Popen([sys.executable, "-c", FOLLOWER, str(run_dir)], **start)
            said, _ = follower.communicate(timeout=150)
            trained, _ = training.communicate(timeout=30)
        finally:
            for process in (follower, training):
                process.kill()
                process.wait()
        assert (follower.returncode, training.returncode) == (0, 0), said + trained
        (history,) = map(server.history, server.lines)
    results, rows = read_results(run_dir), load_history(run_dir / "metrics.jsonl")
    assert steps_of(run_dir) == [2, 4, 6, 8, 10, 12]
    assert results[-1]["checkpoint"] == digest(run_dir / "checkpoints/step_00000012")
    assert results[-1]["samples"] == 12 * 16
    own = rows[-1]["eval/held/loss"]
    assert results[-1]["eval/held/loss"] == pytest.approx(own, rel=1e-6)  # the same function of the same fp32 weights
    assert len({row["eval/held/loss"] for row in results}) == 6
    assert [row for row in map(plain, history) if "train/loss" in row] == rows
    told = [(row["step"], row["eval/held/loss"]) for row in history if "train/loss" not in row]
    assert told == [(row["step"], row["eval/held/loss"]) for row in results]
    assert [row["step"] for row in history[:7]] == [1, 2, 2, 3, 4, 4, 5], "while the run is trained"
    assert left_in(run_dir) == [".lock", "request.json", "results.jsonl"]
    assert "is complete, and its last checkpoint is measured" in said


def plain(row):
    return {name: value for name, value in row.items() if not name.startswith("_")}


def test_results_of_a_run_that_was_offline_go_into_its_run_file(tmp_path, config, no_wandb_account):
    path, run_dir = config(log__wandb={"mode": "offline"}), tmp_path / "run"
    env = environment(HOME=str(tmp_path / "home"), OMP_NUM_THREADS="1")
    subprocess.run([sys.executable, "-m", "evaclip", "train", path], env=env, check=True, timeout=120)
    before = (run_dir / "metrics.jsonl").read_bytes()
    subprocess.run([sys.executable, "-c", FOLLOWER, str(run_dir)], env=env, check=True, timeout=120)
    (file,) = offline_files(run_dir)
    history = [record["history"]["item"] for record in read_back(file) if record["type"] == "history"]
    assert [row["step"] for row in history] == [1, 2, 3, 4, 2, 4]
    assert (run_dir / "metrics.jsonl").read_bytes() == before

    run_id = (run_dir / "wandb_run_id").read_text()
    (run_dir / "wandb" / f"{run_id.strip()}.online").touch()  # from a node that had a key
    command = [sys.executable, "-c", FOLLOWER, str(run_dir)]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=120)
    assert "results are not told to W&B: log.wandb.mode is online, but there is no W&B API key; " in done.stderr
    assert (run_dir / "wandb_run_id").read_text() == run_id


# ------------------------------------------------------------------------------------------------------ a finished run


def test_a_complete_run_is_measured_oldest_first_and_a_second_follower_measures_nothing(run, capsys):
    follow(run)
    first = read_results(run)
    assert [row["step"] for row in first] == [2, 4]
    assert str(run / "checkpoints/step_00000002") in capsys.readouterr().out
    follow(run)
    assert read_results(run) == first
    assert str(run / "checkpoints/step_00000002") not in capsys.readouterr().out


def test_a_checkpoint_that_retention_deletes_while_it_is_measured_is_measured_to_its_end(run, monkeypatch):
    expected = {}
    for step in (2, 4):
        cli.main(["evaluate", str(run / f"checkpoints/step_{step:08d}"), "--output", str(run / "out")])
        expected[step] = json.loads((run / "out/evaluation.json").read_text())["held"]["metrics"]["loss"]
    measure = module.measure_model

    def measure_without(files, request, ranks, name):
        if name.name == "step_00000002":
            shutil.rmtree(name)
        return measure(files, request, ranks, name)

    monkeypatch.setattr(module, "measure_model", measure_without)
    follow(run)
    assert {row["step"]: row["eval/held/loss"] for row in read_results(run)} == expected
    assert left_in(run) == [".lock", "request.json", "results.jsonl"]


def test_a_checkpoint_that_goes_before_it_is_held_is_told_and_the_next_one_measured(run, monkeypatch, capsys):
    link = module._link

    def link_while_it_goes(file, target):
        link(file, target)
        if file.parent.name == "step_00000002":
            shutil.rmtree(file.parent)

    monkeypatch.setattr(module, "_link", link_while_it_goes)
    follow(run)
    assert steps_of(run) == [4]
    assert (
        f"{run}/checkpoints/step_00000002 is passed over: it was deleted before it could be measured"
        in capsys.readouterr().out
    )


def test_a_damaged_checkpoint_is_passed_over_with_the_reason(run, capsys):
    part = run / "checkpoints/step_00000002/part_00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    follow(run)
    assert steps_of(run) == [4]
    said = capsys.readouterr().out
    assert f"{run}/checkpoints/step_00000002 is passed over: " in said
    assert "bytes instead of" in said


def test_where_the_file_system_has_no_hard_links_files_are_copied(run, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module.os, "link", refuse)
    follow(run)
    assert steps_of(run) == [2, 4]


def test_a_run_that_went_back_is_measured_again_and_what_it_left_is_void(run, config, tmp_path):
    follow(run)
    before = read_results(run)
    shutil.rmtree(run / "checkpoints/step_00000004")
    cli.main(["train", config(), "optim.lr=5e-3", "train.steps=6"])
    follow(run)
    rows = read_results(run)
    assert rows[:2] == before
    assert [row["step"] for row in rows] == [2, 4, 4, 6]
    assert rows[2]["eval/held/loss"] != before[1]["eval/held/loss"]
    assert rows[2]["checkpoint"] == digest(run / "checkpoints/step_00000004") != before[1]["checkpoint"]
    assert valid(rows) == [rows[0], *rows[2:]]


def test_names_say_which_weights_and_which_part_of_a_set_they_are_of(config, tmp_path):
    cli.main(["train", config(optim__ema_decay=0.9)])
    follow(tmp_path / "run", "--limit", "20", "--ema")
    (row, _) = read_results(tmp_path / "run")
    assert [name for name in row if name.startswith("eval/")] == ["eval/held.first20.ema/loss"]


def test_a_suite_is_followed_with_a_folder_for_each_checkpoint(run, tmp_path, colour_shards):
    suite = {"root": str(colour_shards), "datasets": {"pairs": {"task": "retrieval", "path": "00001.tar"}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    follow(run, "--suite", str(tmp_path / "suite.yaml"), "--output", str(tmp_path / "out"), "--limit", "10")
    for row in read_results(run):
        about = json.loads((tmp_path / f"out/step_{row['step']:08d}/suite.json").read_text())
        assert about["checkpoint"] == str(run / f"checkpoints/step_{row['step']:08d}")
        recalls = {r["metric"]: r["value"] for r in about["rows"] if r["metric"] != "mean_recall"}
        assert {f"eval/pairs.first10/{name}": value for name, value in recalls.items()}.items() <= row.items()
    assert steps_of(run) == [2, 4]


def test_on_two_ranks_it_finds_what_one_finds(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    follow(run)
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "evaclip"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", *command, "evaluate", "--follow", str(other)], env=env, check=True, timeout=150
    )
    for one, two in zip(read_results(run), read_results(other), strict=True):
        assert one["checkpoint"] == two["checkpoint"]
        assert one["eval/held/loss"] == pytest.approx(two["eval/held/loss"], rel=1e-5)  # batches of other sizes


def test_status_and_plot_show_what_was_found(run, config, colour_shards):
    cli.main(["train", config(), "train.steps=6", "eval.datasets={}"])
    follow(run, "--dataset", str(colour_shards / "00000.tar"), "--task", "loss")
    *_, last = rows = read_results(run)
    evaluation = find_facts(read_run(run), time.time()).evaluation
    assert (evaluation.step, evaluation.results) == (6, {"eval/00000/loss": last["eval/00000/loss"]})
    (curves,) = read_runs([run], None)
    found = zip(*curves.curve("eval/00000/loss", "samples"), strict=True)
    assert list(found) == [(row["samples"], row["eval/00000/loss"]) for row in rows]
    assert list(curves.curve("train/loss", "step")[0]) == [1, 2, 3, 4, 5, 6]


# --------------------------------------------------------------------------------------------------- waiting, refusing


def test_where_nothing_is_yet_it_waits_and_says_so_once(tmp_path, impatient, capsys):
    with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
        follow(tmp_path / "run")
    assert (
        capsys.readouterr().out == f"waiting for checkpoints: {tmp_path / 'run'} does not exist; give a run directory\n"
    )


def test_a_run_that_stopped_before_its_end_is_waited_for(run, tmp_path, impatient, capsys):
    run = shutil.copytree(run, tmp_path / "other")  # this process holds the lock of the run itself
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["train"]["steps"] = 8
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    with (run / "log.txt").open("a") as file:
        file.write("2030-01-01 00:00:00 ERROR evaclip: stopped by SIGTERM after step 4, which is saved\n")
    with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
        follow(run)
    assert steps_of(run) == [2, 4]
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"waiting for a checkpoint behind step 4 of {run} (ended: stopped by SIGTERM after step 4, which is saved)"
    )


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        follow(*arguments)
    return stopped.value.code, capsys.readouterr().err


def test_another_request_is_refused_with_what_differs(run, capsys):
    follow(run, "--limit", "10")
    code, said = refused(capsys, run, "--limit", "20", "--precision", "bf16")
    assert code == os.EX_CONFIG
    assert f"{run}/followed holds results of another request (limit 10, now 20, precision None, now bf16); " in said
    assert "ask for the same, or move that folder away" in said


def test_other_sets_are_refused(run, capsys, colour_shards):
    follow(run)
    _, said = refused(capsys, run, "--dataset", str(colour_shards / "00001.tar"), "--task", "loss")
    assert "holds results of another request (other sets); " in said


def test_a_single_checkpoint_is_refused(run, capsys):
    path = run / "checkpoints/step_00000002"
    assert (
        f"--follow takes a run directory, and {path} is a single model; leave --follow out" in refused(capsys, path)[1]
    )


HOLDER = """
import sys
from pathlib import Path
from evaclip.lock import lock
lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_follower_is_refused_and_the_first_one_named(run, capsys):
    (run / "followed").mkdir()
    command = [sys.executable, "-c", HOLDER, str(run / "followed")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        _, said = refused(capsys, run)
        assert f"{run} is followed already (process {process.pid} on " in said
        process.stdin.close()
