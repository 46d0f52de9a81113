"""``evaclip status``: what it says of real runs, of made-up ones, and of folders that something went wrong with."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from tiny import merged, tiny_tree

from evaclip import cli
from evaclip.errors import ConfigError
from evaclip.history import load_history
from evaclip.lock import Holder
from evaclip.status import facts as kinds
from evaclip.status.command import status
from evaclip.status.files import RunFiles, read_run
from evaclip.status.finding import find_facts, find_ranks
from evaclip.status.lines import duration, fitting, fraction, render

REPOSITORY = Path(__file__).parents[1]
NOW = 1_800_000_000.0
WITHOUT_TORCH = """
import sys
for name in ("torch", "deepspeed", "wandb", "numpy", "safetensors", "matplotlib"):
    sys.modules[name] = None  # importing it fails
from evaclip.cli import main
main(sys.argv[1:])
"""


def command(*arguments, **options):
    """``evaclip`` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "evaclip", *map(str, arguments)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, cwd=REPOSITORY, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, colour_shards):
    """A run of 12 steps, in a process that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    held = {"held": {"task": "loss", "path": str(colour_shards / "00000.tar")}}
    tree = merged(
        tiny_tree(folder / "run", {"shards": str(colour_shards / "{00000..00002}.tar")}),
        train__steps=12,
        log__every_steps=2,
        eval__datasets=held,
        eval__batch=10,
        eval__every_steps=8,
        checkpoint__every_steps=3,
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    done = command("train", folder / "config.yaml")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be broken."""
    return shutil.copytree(finished, tmp_path / "run")


def shown(directory, now=None):
    return "\n".join(render(find_facts(read_run(directory), now or time.time())))


# ------------------------------------------------------------------------------------------------------------ real runs


def test_a_finished_run_is_told_as_its_files_have_it(finished):
    rows = load_history(finished / "metrics.jsonl")
    found = find_facts(read_run(finished), time.time())
    assert (found.state.name, found.state.because) == ("ended", "all steps are done")
    assert found.state.holder.startswith("process ")
    assert found.progress == kinds.Progress(12, 12, 1.0, 192, 0.0)
    assert found.row == rows[-1]
    assert found.evaluation.step == 12
    assert found.evaluation.results == {"eval/held/loss": rows[-1]["eval/held/loss"]}
    assert found.checkpoints.newest_step == 12
    assert found.checkpoints.steps == [9, 12]
    assert 0 <= found.checkpoints.newest_age_seconds < 600
    source = found.data.sources["tiny"]
    assert (source.delivered, source.skipped, source.skipped_fraction) == (192, 0, 0.0)
    assert source.passes == pytest.approx(192 / 70)
    assert found.data.max_bad_fraction == 0.05
    speeds = [row["speed/samples_per_second"] for row in rows if "train/loss" in row]
    assert found.speed.samples_per_second == pytest.approx(len(speeds) / sum(1 / speed for speed in speeds))
    assert found.speed.rows == len(speeds) == 6
    assert min(speeds) <= found.speed.samples_per_second <= max(speeds)
    assert found.state.row_seconds == pytest.approx(2 * 16 / found.speed.samples_per_second)
    assert (found.launcher, found.log, found.unreadable) == (None, [], {})
    assert (found.ranks.step, found.ranks.ranks, found.ranks.slow) == (12, 1, [])
    assert found.skipped_steps == kinds.SkippedSteps(0, True, None, None, 0)


def test_it_needs_neither_torch_nor_anything_else_that_is_heavy(finished):
    arguments = [sys.executable, "-c", WITHOUT_TORCH, "status", str(finished)]
    people, machines = (
        subprocess.run([*arguments, *more], capture_output=True, text=True, check=True).stdout
        for more in ([], ["--json"])
    )
    assert "progress     step 12 of 12, 100.0 %, 192 samples" in people.splitlines()
    assert re.search(r"^evaluation   step 12: held loss \d\.\d{4}$", people, re.MULTILINE)
    assert json.loads(machines)["progress"] == {
        "step": 12, "steps": 12, "fraction": 1.0, "samples": 192, "seconds_left": 0.0
    }  # fmt: skip


def keys(kind):
    """Names of a dataclass's fields and of those of the dataclasses in it."""
    hints = get_type_hints(kind, vars(kinds))
    for field in fields(kind):
        yield field.name
        for part in [hints[field.name], *get_args(hints[field.name])]:
            if is_dataclass(part):
                yield from keys(part)


def test_the_keys_of_json_are_those_that_the_document_names(finished):
    (printed,) = status(finished, watch=None, as_json=True)
    assert list(json.loads(printed)) == [field.name for field in fields(kinds.Facts)]
    page = (REPOSITORY / "docs/watching.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(\w+)`", page[page.index("## JSON") :]))
    assert set(keys(kinds.Facts)) <= documented


def test_one_that_was_asked_to_stop_has_ended_with_its_last_words(run, tmp_path):
    with (run / "log.txt").open("a") as file:
        file.write("2030-01-01 00:00:00 ERROR evaclip: stopped by SIGTERM after step 10, which is saved\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(merged(config, train__steps=100)))
    found = find_facts(read_run(run), time.time())
    assert (found.state.name, found.state.because) == ("ended", "stopped by SIGTERM after step 10, which is saved")
    assert found.progress.fraction == 0.12
    assert found.log == ["2030-01-01 00:00:00 ERROR: stopped by SIGTERM after step 10, which is saved"]
    with (run / "log.txt").open("a") as file:
        file.write("2030-01-01 00:01:00 INFO evaclip.run: continuing at step 10\n")
    assert find_facts(read_run(run), time.time()).state.because != found.state.because


HOLDER = """
import pathlib, sys, time
from evaclip.lock import lock
lock(pathlib.Path(sys.argv[1]))
print(flush=True)
time.sleep(60)
"""


def test_a_process_that_lives_is_running_and_one_that_was_killed_has_ended(run):
    lengthened = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(merged(lengthened, train__steps=100)))
    with subprocess.Popen([sys.executable, "-c", HOLDER, run], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        alive = find_facts(read_run(run), time.time()).state
        hanging = shown(run, now=time.time() + 720)
        process.kill()
    assert (alive.name, alive.because) == ("running", "its process holds the lock")
    assert f"process {process.pid} on " in alive.holder
    assert "running: its process holds the lock; no sign of life for 12 min" in hanging
    dead = find_facts(read_run(run), time.time()).state
    assert (dead.name, dead.because) == ("ended", "its process is gone without a word")


def test_a_silent_run_whose_process_cannot_be_asked_is_unknown(run):
    (run / ".lock").unlink()
    (run / "config.yaml").write_text("train: {steps: 100, global_batch: 16}\nlog: {every_steps: 2}\n")
    written = time.time()
    assert "state        running: it writes; last sign of life" in shown(run)
    text = shown(run, now=written + 720)
    usual = re.escape(duration(find_facts(read_run(run), written).state.row_seconds))
    assert re.search(rf"unknown: it may hang.*; no sign of life for 12 min \(a row usually comes every {usual}\)", text)


def test_a_checkpoint_that_is_being_written_is_a_sign_of_life(run):
    for path in [*run.iterdir(), *(run / "checkpoints").iterdir()]:
        os.utime(path, (NOW - 1000, NOW - 1000))
    assert read_run(run).last_write == NOW - 1000
    part = run / "checkpoints/.step_00000013.0badf00d.tmp/part_00001.safetensors"
    part.parent.mkdir()
    part.touch()
    os.utime(part, (NOW - 3, NOW - 3))
    os.utime(part.parent.parent, (NOW - 500, NOW - 500))
    assert read_run(run).last_write == NOW - 3


# --------------------------------------------------------------------------------------------- the launcher and made-up


def made_up(**changes):
    """Files of a run that has trained 500 of 1000 steps and wrote a second ago."""
    row = {"step": 500, "samples": 8000, "train/loss": 2.0, "speed/samples_per_second": 32.0}
    empty = {field.name: [] for field in fields(RunFiles) if str(field.type).startswith("list")}
    nothing = {field.name: {} for field in fields(RunFiles) if str(field.type).startswith("dict")}
    whole = {field.name: True for field in fields(RunFiles) if field.name.endswith("_whole")}
    files = RunFiles(
        **{**empty, **nothing, **whole, "directory": Path("run"), "rows": [row], "last_write": NOW - 1, "holder": None}
    )
    config = {"train": {"steps": 1000, "global_batch": 16}, "log": {"every_steps": 10}}
    return replace(files, **{"config": config, **changes})


def state(**changes):
    found = find_facts(made_up(**changes), NOW).state
    return found.name, found.because


def ended(action, ago, **more):
    return {"time": NOW - ago, "cause": "a rank died", "action": action, **more}


def test_time_left_and_the_usual_time_of_a_row_follow_from_the_newest_speeds():
    speeds = [(10, 1.0, 0.9), *((20 + n, 64.0, 0.0) for n in range(5)), *((30 + n, 16.0, 0.5) for n in range(5))]
    rows = [
        {"step": step, "samples": 16 * step, "speed/samples_per_second": speed, "speed/data_wait_fraction": wait}
        for step, speed, wait in speeds
    ]
    found = find_facts(made_up(rows=rows), NOW)
    # of ten rows of equally many samples, five take four times as long; the first of eleven is too old
    assert found.speed == kinds.Speed(pytest.approx(25.6), pytest.approx(0.4), 10)
    assert found.progress.seconds_left == pytest.approx((1000 - 34) * 16 / 25.6)
    assert found.state.row_seconds == pytest.approx(160 / 25.6)


def test_a_checkpoint_newer_than_the_newest_row_counts_as_progress():
    found = find_facts(made_up(checkpoints=[(400, NOW - 90), (507, NOW - 30)], damaged=[450]), NOW)
    assert (found.progress.step, found.progress.samples) == (507, 8112)
    assert found.checkpoints == kinds.Checkpoints(507, 30.0, [400, 507], [450])
    text = "\n".join(render(found))
    assert "checkpoints  step 507, 30 s old; 2 kept; damaged and set aside: step 450" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("running", "it writes")),
        ({"rows": [], "last_write": None}, ("unknown", "it has written nothing yet")),
        ({"last_write": NOW - 119}, ("running", "it writes")),
        ({"last_write": NOW - 121}, ("unknown", "it may hang, or its process is gone")),
        ({"last_write": NOW + 900}, ("running", "it writes")),  # clocks differ
        ({"last_write": NOW - 9000, "holder": Holder("p", alive=True)}, ("running", "its process holds the lock")),
        ({"holder": Holder("p", alive=False)}, ("ended", "its process is gone without a word")),
        ({"last_write": NOW - 121, "holder": Holder("p", None)}, ("unknown", "it may hang, or its process is gone")),
        ({"cluster": {"time": NOW - 2, "state": "preflight"}}, ("waiting", "the launcher looks at its nodes")),
        ({"cluster": {"time": NOW - 2, "state": "waiting"}}, ("waiting", "the launcher waits")),
        ({"cluster": {"time": NOW - 2, "state": "running"}}, ("running", "the launcher says so")),
        ({"cluster": {"time": NOW - 2, "state": "ended"}}, ("ended", "the launcher says so")),
        ({"cluster": {"time": NOW - 900, "state": "ended"}}, ("running", "it writes")),  # started again by hand
        ({"cluster": {"time": NOW - 900, "state": "waiting"}}, ("running", "it writes")),
        ({"cluster": {"time": NOW - 2, "state": ["x"]}}, ("running", "it writes")),
        ({"restarts": [ended("stop", 900), ended("requeue", 0)]}, ("waiting", "in the queue again: a rank died")),
        ({"restarts": [ended("restart", 0)]}, ("waiting", "to be restarted: a rank died")),
        ({"restarts": [ended("stop", 0)]}, ("ended", "stopped: a rank died")),
        ({"restarts": [ended("done", 0, cause=None)]}, ("ended", "done: no cause is given")),
        ({"restarts": [ended("requeue", 900)]}, ("running", "it writes")),
        ({"restarts": [ended("requeue", 99)], "last_write": NOW - 99}, ("waiting", "in the queue again: a rank died")),
        ({"restarts": [ended({"a": 1}, 0)]}, ("running", "it writes")),
        (
            {"restarts": [ended("requeue", 3)], "cluster": {"time": NOW - 2, "state": "ended"}, "last_write": NOW - 4},
            ("waiting", "in the queue again: a rank died"),
        ),
        ({"config": {"train": {"steps": 500}}}, ("ended", "all steps are done")),
    ],
)  # fmt: skip
def test_the_state_follows_from_lock_launcher_and_silence(changes, expected):
    assert state(**changes) == expected


def test_a_run_of_long_steps_may_be_silent_for_longer():
    rows = [{"step": 500, "samples": 8000, "train/loss": 2.0, "speed/samples_per_second": 1.0}]  # a row in 160 s
    assert state(rows=rows, last_write=NOW - 799)[0] == "running"
    assert state(rows=rows, last_write=NOW - 801)[0] == "unknown"


def test_restarts_are_counted_and_the_last_ones_told():
    rows = [ended("restart", 5000 - n, step=n, attempt=n, detail=f"rank {n} on n1 ended at step {n}") for n in range(7)]
    found = find_facts(made_up(restarts=[*rows, ended("stop", 100)]), NOW)
    assert (found.restarts.count, found.restarts.complete) == (7, True)
    assert [row.attempt for row in found.restarts.last] == [3, 4, 5, 6, None]
    text = "\n".join(render(found))
    assert "restarts     7; last of the attempts that ended:" in text
    assert re.search(
        r"^ {15}20\d\d-\S+ \S+ a rank died at step 6 -> restart: rank 6 on n1 ended at step 6$", text, re.MULTILINE
    )
    assert find_facts(made_up(restarts=rows, restarts_whole=False), NOW).restarts.complete is False


def test_the_launcher_names_the_rank_that_it_heard_of_longest_ago():
    nodes = {
        "n1": [{"rank": 0, "pid": 1, "step": 57, "phase": "forward", "age_seconds": 0.4}],
        "n2": [{"rank": 1, "pid": 2, "step": 56, "phase": "backward", "age_seconds": 130.0}, {"rank": 2}],
    }
    found = find_facts(
        made_up(cluster={"time": NOW - 1, "job": "12", "attempt": 2, "state": "running", "nodes": nodes}), NOW
    )
    oldest = kinds.LauncherRank(1, "n2", 56, "backward", 130.0)
    assert found.launcher == kinds.Launcher("running", 1.0, "12", 2, 2, 3, 56, oldest)
    line = "job 12, attempt 2, 3 ranks on 2 nodes, the rearmost at step 56, rank 1 on n2 last heard of 2 min ago"
    assert line in "\n".join(render(found))


def ranks(*own, data=0.0, slow=()):
    names = ("rank", "node", "step_seconds", "data_seconds", "own_seconds", "slow")
    rows = [(n, f"n{n // 2}", 2.0, data * n, seconds, n in slow) for n, seconds in enumerate(own)]
    return {"step": 120, "time": NOW, "ranks": [dict(zip(names, row, strict=True)) for row in rows]}


def test_slow_ranks_are_named_and_the_others_are_a_spread():
    slow = ranks(1.0, 1.0, 1.51, 1.0, 1.5, 2.0, slow=(2, 5))
    found = find_ranks(slow)
    assert [(rank.rank, rank.node, rank.times_median) for rank in found.slow] == [(5, "n2", 2.0), (2, "n1", 1.51)]
    text = "\n".join(render(find_facts(made_up(ranks=slow), NOW)))
    assert "ranks        slow: rank 5 on n2 2 s (2.0 x), rank 2 on n1 1.51 s (1.5 x); median 1 s" in text
    text = "\n".join(render(find_facts(made_up(ranks=ranks(1.0, 1.2, 1.4, data=0.1)), NOW)))
    assert "3, none slow: 1 / 1.2 / 1.4 s of own work per step" in text
    assert "longest wait for data 0.2 s (rank 2)" in text


def test_books_of_the_data_give_fractions_and_reasons(tmp_path):
    row = {"step": 5, "train/loss": 1.0, "data/delivered/web": 97.0, "data/skipped/web": 3.0, "data/passes/web": 0.5}
    row["data/filtered/web"] = 1100.0
    bad = [{"reason": reason} for reason in ("checksum", "no_image", "checksum", ["x"])]
    config = {"data": {"max_bad_fraction": 0.05}}
    found = find_facts(made_up(rows=[row], bad_records=bad, config=config), NOW)
    assert found.data == kinds.Data(
        {"web": kinds.Source(97, 3, 0.03, 1100, 0.5)}, 0.05, {"checksum": 2, "no_image": 1}, True
    )
    text = "\n".join(render(found))
    assert "data         web: 97 delivered, 3 skipped (3 %, limit 5 %), 1,100 filtered, 0.5 passes" in text
    assert "             skipped for: 2 checksum, 1 no_image" in text
    assert "lately skipped for: " in "\n".join(
        render(find_facts(made_up(bad_records=bad, bad_records_whole=False), NOW))
    )


def test_skipped_steps_are_counted_with_the_last_one_and_those_in_a_row():
    skipped = [{"step": 3, "cause": "feature"}, {"step": 9, "cause": "gradient"}]
    row = {"step": 10, "samples": 160, "train/loss": None, "train/consecutive_skips": 1.0}
    text = "\n".join(render(find_facts(made_up(rows=[row], skipped_steps=skipped), NOW)))
    assert "bad steps    2 skipped, the last was 9 (gradient), 1 in a row up to now" in text
    assert "training     step 10: loss not finite" in text


@pytest.mark.parametrize(("step", "expected"), [(300, (300, 0.5)), (400, (400, 0.75)), (501, (300, 0.5))])
def test_results_from_outside_count_where_they_are_newer_and_the_run_is_not_behind_them(step, expected):
    own, followed = {"step": 300, "eval/x/top1": 0.5}, {"step": step, "checkpoint": "f00d", "eval/x/top1": 0.75}
    found = find_facts(made_up(evaluated=own, followed=followed), NOW).evaluation
    assert (found.step, found.results) == (expected[0], {"eval/x/top1": expected[1]})


def test_results_too_far_back_are_those_of_evaluation_json():
    evaluation = {"digits": {"task": "zero_shot", "metrics": {"top1": 0.5, "top5": None}, "num_records": 4}, "x": 3}
    found = find_facts(made_up(evaluation=evaluation), NOW).evaluation
    assert found == kinds.Evaluation(None, {"eval/digits/top1": 0.5, "eval/digits/top5": None})
    text = "\n".join(render(find_facts(made_up(evaluation=evaluation), NOW)))
    assert "evaluation   digits top1 0.5000, top5 not finite" in text


def test_recalls_stand_together():
    row = {"step": 7, **{f"eval/coco/image_to_text_recall@{k}": k / 10 for k in (1, 5, 10)}}
    text = "\n".join(render(find_facts(made_up(evaluated=row), NOW)))
    assert "step 7: coco image_to_text_recall@1/5/10 0.1000/0.5000/1.0000" in text


def test_even_the_most_eventful_run_fits_on_a_screen():
    row = {"step": 5, "samples": 80, "train/loss": 1.0, "speed/samples_per_second": 9.0}
    for n in range(9):
        row |= {f"data/delivered/source{n}": 10.0, f"data/skipped/source{n}": float(n), f"data/passes/source{n}": 1.0}
    results = {"step": 5, **{f"eval/set{n}/top1": 0.5 for n in range(9)}}
    log = [f"2030-01-01 00:00:0{n} WARNING evaclip.train: odd {n}" for n in range(9)]
    found = made_up(
        rows=[row], evaluated=results, log=log, checkpoints=[(5, NOW)], damaged=[1, 2, 3, 4],
        restarts=[ended("restart", n, detail="x") for n in range(9)],
        ranks=ranks(*([1.0] * 9), *([3.0] * 6), slow=range(9, 15)),
        cluster={"time": NOW, "state": "running", "nodes": {}}, skipped_steps=[{"step": 3}],
        bad_records=[{"reason": f"r{n}"} for n in range(9)], unreadable={"a": "b"},
    )  # fmt: skip
    lines = render(find_facts(found, NOW))
    assert len(lines) <= 25
    assert {line[11:13] for line in lines} == {"  "}, "aligned"
    assert "and 6 more with less skipped" in "\n".join(lines)
    assert "rank 11 on n5 3 s (3.0 x) and 3 more" in "\n".join(lines)


def test_long_lines_are_broken_between_words_and_none_is_cut_off():
    lines = ["state        running: it writes; last sign of life 3 s ago", "               a restart", "x" * 90]
    broken = fitting(lines, 50)
    assert max(map(len, broken)) <= 50
    assert broken[:3] == ["state        running: it writes; last sign of life", " " * 15 + "3 s ago", lines[1]]
    assert "".join(broken[3:]).count("x") == 90


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (12.3, "12 s"), (119, "119 s"), (720, "12 min"), (7300, "2 h"), (9e5, "10 days")],
)
def test_times_are_said_as_people_do(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 %"), (0.00002, "0.002 %"), (0.031, "3.1 %"), (0.5, "50.0 %")])
def test_small_shares_are_seen(value, text):
    assert fraction(value) == text


# -------------------------------------------------------------------------------------------------- what may go wrong


FILES = (
    *("config.yaml", "metrics.jsonl", "log.txt", "evaluation.json", "ranks.json", "cluster.json", "restarts.jsonl"),
    *("skipped_steps.jsonl", "bad_records.jsonl", ".lock", "checkpoints"),
)


def harm(path, how):
    whole = (
        path.read_bytes() if path.is_file() else b'{"step": 1, "time": 1e400, "ranks": [1, {"own_seconds": "x"}]}\n' * 3
    )
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    match how:
        case "empty":
            path.touch()
        case "half":
            path.write_bytes(whole[: len(whole) // 2])
        case "noise":
            path.write_bytes(bytes(range(256)) * 40 + b"\n\x1b[2J\n" + whole)
        case "deep":
            path.write_bytes(b"[" * 3000 + b"\n" + b'{"a":' * 3000)
        case "wrong kinds":
            value = {
                "step": "x",
                "samples": [1],
                "time": 1e99,
                "nodes": [3],
                "ranks": {"a": 1},
                "state": {},
                "action": [],
            }
            value |= {
                "train/loss": {},
                "speed/samples_per_second": 1e-320,
                "eval/\ud800/\x1b": "y",
                "data/delivered/s": [],
            }
            value |= {
                "train": [],
                "data": {"max_bad_fraction": "z"},
                "log": {"every_steps": None},
                "reason": 7,
                "cause": "\x07",
            }
            path.write_text((json.dumps(value) + "\n") * 2)
        case "huge numbers":
            value = {"step": 10**400, "samples": 1e308, "time": 1e308, "train/loss": 1e308, "attempt": -(10**30)}
            value |= {"speed/samples_per_second": 1e-308, "train": {"steps": 1e308, "global_batch": 1e308}}
            value |= {
                "ranks": [{"own_seconds": 1e-320}, {"own_seconds": 5e-324}, {"own_seconds": 1e300, "slow": True}],
                "action": "restart",
            }
            path.write_text((json.dumps(value) + "\n") * (1 if path.suffix == ".json" else 2))
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
        case "pipe":
            os.mkfifo(path)


HARMS = ("missing", "empty", "half", "noise", "deep", "wrong kinds", "huge numbers", "folder", "loop", "pipe")


@pytest.mark.parametrize("how", HARMS)
def test_no_file_in_whatever_condition_leads_to_a_stack_trace(run, how, capsys):
    for name in FILES:
        if not (how == "pipe" and name == ".lock"):
            broken = shutil.copytree(run, run.parent / "broken")
            harm(broken / name, how)
            for arguments in (["status", str(broken)], ["status", str(broken), "--json"]):
                cli.main(arguments)
                printed = capsys.readouterr().out
                assert "\x1b" not in printed
                assert "\x07" not in printed
            json.loads(printed, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
            shutil.rmtree(broken)
    for name in FILES[:-2]:
        harm(run / name, how)
    cli.main(["status", str(run)])


@pytest.mark.parametrize(("how", "why"), [("loop", "Too many levels of symbolic links"), ("folder", "not a file")])
def test_what_cannot_be_read_is_named(run, how, why):
    harm(run / "metrics.jsonl", how)
    found = find_facts(read_run(run), time.time())
    assert found.unreadable == {"metrics.jsonl": why}
    assert found.row is None
    assert found.progress.step == 12, "as the checkpoint says"
    assert f"unreadable   metrics.jsonl: {why}" in "\n".join(render(found))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_of_others_are_named(run):
    (run / "log.txt").chmod(0)
    assert read_run(run).unreadable == {"log.txt": "Permission denied"}
    run.chmod(0)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied; ask its owner for the permission"):
        read_run(run)
    run.chmod(0o700)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="loop cannot be read: Too many levels of symbolic links; ask its owner"):
        read_run(tmp_path / "loop")


def test_a_file_that_is_rewritten_in_place_is_read_again(run, monkeypatch):
    whole = json.dumps({"time": time.time(), "state": "running", "attempt": 4, "nodes": {}})
    (run / "cluster.json").write_text(whole[:20])
    monkeypatch.setattr(time, "sleep", lambda seconds: (run / "cluster.json").write_text(whole))
    found = read_run(run)
    assert found.cluster["attempt"] == 4
    assert found.unreadable == {}


def test_a_torn_row_is_not_shown_and_the_one_before_it_is(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "samples": 224, "train/loss": 1.2')
    assert read_run(run).rows[-1]["step"] == 12


def test_a_million_rows_take_less_than_a_second(run):
    with (run / "metrics.jsonl").open("w") as file:
        row = '{{"step": {0}, "samples": {0}, "train/loss": 1.5, "speed/samples_per_second": 100.0}}\n'
        file.writelines(row.format(step) for step in range(1_000_000))
    with (run / "bad_records.jsonl").open("w") as file:
        file.writelines(f'{{"step": {n}, "source": "tiny", "reason": "checksum"}}\n' for n in range(300_000))
    with (run / "log.txt").open("a") as file:
        file.write("x" * 30_000_000 + "\n2030-01-01 00:00:00 WARNING evaclip.run: odd\n")
    started = time.process_time()
    found = find_facts(read_run(run), time.time())
    assert time.process_time() - started < 1
    assert found.progress.step == 999_999
    assert found.data.reasons.keys() == {"checksum"}
    assert not found.data.reasons_complete
    assert found.log == ["2030-01-01 00:00:00 WARNING: odd"]


def test_results_are_found_behind_many_rows(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(f'{{"step": {step}, "samples": {step}, "train/loss": 1.5}}\n' for step in range(13, 5000))
    assert find_facts(read_run(run), time.time()).evaluation.step == 12


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "nowhere does not exist; give a run directory"),
        ("file", "file is a file; give a run directory"),
        ("empty", "empty is no run directory: it holds none of metrics.jsonl, log.txt, checkpoints"),
        ("run/checkpoints/step_00000012", "step_00000012 is no run directory: it holds none of"),
    ],
)
def test_what_is_no_run_is_refused(run, path, message, capsys):
    (run.parent / "file").touch()
    (run.parent / "empty").mkdir()
    with pytest.raises(SystemExit, match="78"):
        cli.main(["status", str(run.parent / path)])
    assert message in capsys.readouterr().err


def test_a_terminal_that_knows_few_letters_is_no_reason_to_fail(run):
    odd = run.rename(run.parent / "ünï")
    line = [sys.executable, "-m", "evaclip", "status", str(odd)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    assert "/?n?" in done.stdout


# -------------------------------------------------------------------------------------------------------------- watch


def test_watching_a_run_that_has_ended_shows_it_once(finished, capsys):
    cli.main(["status", str(finished), "--watch"])
    assert capsys.readouterr().out.count("progress ") == 1


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_watching_goes_on_until_ctrl_c_which_ends_it_quietly_with_0(run, form):
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(merged(config, train__steps=100)))
    (run / ".lock").unlink()
    (run / "log.txt").touch()
    line = [sys.executable, "-m", "evaclip", "status", str(run), *form, "--watch", "0.05"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        seen = [process.stdout.readline() for _ in range(40 if not form else 3)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    if form:
        assert all(json.loads(text)["state"]["name"] == "running" for text in (first, *seen))
    else:
        assert sum(text.startswith("progress ") for text in seen) >= 2


def test_watching_ends_by_itself_when_the_run_does(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(merged(config, train__steps=100)))
    (run / ".lock").unlink()
    (run / "log.txt").touch()
    seen = status(run, watch=0.01, as_json=True)
    assert json.loads(next(seen))["state"]["name"] == "running"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert [json.loads(text)["state"]["name"] for text in seen] == ["ended"]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "runs/demo"])
def test_a_watch_without_seconds_is_refused(seconds, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["status", "x", f"--watch={seconds}"])
    assert f"{seconds} is not a number of seconds above 0; --watch stands behind RUN_DIR" in capsys.readouterr().err
