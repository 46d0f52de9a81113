"""What people meet: commands, and one clear message with an exit code where something is wrong."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import SYNTHETIC, colour_records, merged, tiny_tree

from evaclip import cli
from evaclip.checkpoint import find_checkpoint
from evaclip.data.shards import write_shards

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path):
    """Path of a tiny configuration; keyword arguments change it."""

    def write(source=SYNTHETIC, **changes):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(merged(tiny_tree(tmp_path / "run", source), **changes)))
        return str(path)

    return write


@pytest.fixture
def fails(capsys):
    """Run a command that has to fail; its message."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        message = capsys.readouterr().err
        assert stopped.value.code in (1, os.EX_CONFIG)
        assert message.count("error: ") == 1
        assert "Traceback" not in message
        return message[message.index("error: ") :]

    return run


def test_wrong_shard_path_is_named(config, fails):
    assert "/nowhere/0.tar does not exist (2 of 2 shards" in fails("train", config({"shards": "/nowhere/{0..1}.tar"}))


def test_empty_shard_list_is_refused(config, fails):
    assert "the list of shards is empty" in fails("train", config({"shards": []}))


def test_shards_without_captions_are_refused_with_what_they_hold(config, fails, tmp_path):
    write_shards(tmp_path / "s", ((key, {"jpg": m["jpg"]}) for key, m in colour_records(20)), 20)
    message = fails("train", config({"shards": str(tmp_path / "s/00000.tar")}))
    assert "the shards of source tiny hold no captions: wanted members txt, found jpg" in message


def test_shard_that_is_no_tar_is_refused(config, fails, tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    assert "x.tar: a damaged header at byte 0; restore the shards" in fails(
        "train", config({"shards": str(tmp_path / "x.tar")})
    )


def test_records_that_are_all_bad_stop_the_run(config, fails, tmp_path):
    write_shards(tmp_path / "s", ((f"{n}", {"jpg": b"no image", "txt": b"x"}) for n in range(30)), 30)
    message = fails("train", config({"shards": str(tmp_path / "s/00000.tar")}))
    assert "records in a row cannot be used" in message
    assert "00000.tar" in message
    assert "not_an_image" in message


def test_too_many_bad_records_stop_the_run(config, fails, tmp_path):
    records = [(key, {**m, "jpg": b"bad"} if int(key) % 3 == 0 else m) for key, m in colour_records(60)]
    write_shards(tmp_path / "s", records, 60)
    message = fails("train", config({"shards": str(tmp_path / "s/00000.tar")}, train__steps=10))
    assert "more than data.max_bad_fraction 0.05; the worst shard is " in message


def test_unreadable_configuration_is_refused(fails, tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in fails("train", str(tmp_path / "c.yaml"))
    assert "cannot be read" in fails("train", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "/nowhere does not exist; give a run directory or one of its checkpoints"),
        (["{run}"], "names no datasets; give one with --dataset PATH"),
        (["{run}", "--dataset", "/nowhere"], "/nowhere"),
        (["{run}", "--dataset", "ftp://x/y"], "only paths and http, https, s3, gs URLs are read"),
    ],
)
def test_evaluate_refuses_what_it_cannot_measure(config, fails, tmp_path, arguments, message):
    cli.main(["train", config()])
    assert message in fails("evaluate", *(argument.format(run=tmp_path / "run") for argument in arguments))


def test_evaluate_measures_a_dataset_and_writes_results(config, capsys, tmp_path):
    cli.main(["train", config()])
    write_shards(tmp_path / "s", ((key, {"jpg": m["jpg"], "cls": b"1"}) for key, m in colour_records(12)), 20)
    for name, lines in (("names", "red\ngreen\n"), ("templates", "a {c} square\n")):
        (tmp_path / name).write_text(lines)
    arguments = ["--dataset", str(tmp_path / "s/00000.tar"), "--class-names", str(tmp_path / "names")]
    arguments += ["--templates", str(tmp_path / "templates"), "--output", str(tmp_path / "out")]
    cli.main(["evaluate", str(tmp_path / "run"), *arguments])
    assert "top1" in capsys.readouterr().out
    assert (tmp_path / "out/evaluation.json").is_file()


FULL_DISK = """
mount -t tmpfs -o size=30m none "$1" && mkdir "$1/run" || exit 99
"$2" -m evaclip train "$3" run_dir="$1/run"
echo "exit $?" $(ls "$1/run/checkpoints")
mount -o remount,size=100m "$1"
"$2" -m evaclip train "$3" run_dir="$1/run"
echo "exit $?" $(ls "$1/run/checkpoints")
"""


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_intact_and_space_lets_it_go_on(config, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # a checkpoint has 19 MB: the second one does not fit
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh", disk, sys.executable]
    done = subprocess.run([*command, config()], env=environment(), capture_output=True, text=True, check=False)
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    assert done.stdout.splitlines() == ["exit 1 latest step_00000002", "exit 0 latest step_00000002 step_00000004"]
    assert "the checkpoint of step 4 could not be written: rank 0: [Errno 28] No space left on device" in done.stderr
    assert "free disk space" in done.stderr
    assert "at step 2" in done.stderr
    assert "Traceback" not in done.stderr


def environment():
    return {**{k: v for k, v in os.environ.items() if not k.startswith("WANDB")}, "OMP_NUM_THREADS": "1"}


def test_ctrl_c_saves_and_exits_with_75(config, tmp_path):
    path = config(train__steps=100_000, checkpoint__every_steps=100_000, data__workers=2)
    process = subprocess.Popen(
        [sys.executable, "-m", "evaclip", "train", path],
        env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.stat().st_size < 2000:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, message = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped by SIGINT after step" in message
    assert "Traceback" not in message
    assert find_checkpoint(tmp_path / "run").name > "step_00000001"


def test_local_launch_trains_on_two_processes(config, tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["launch/local.sh", "2", config(), "train.steps=3"]
    subprocess.run(command, env={**environment(), "PATH": path}, check=True, cwd=REPOSITORY, capture_output=True)
    assert find_checkpoint(tmp_path / "run").name == "step_00000003"
    assert "2 ranks" in (tmp_path / "run/log.txt").read_text()
    assert [file.name for file in (tmp_path / "run/logs").iterdir()] == ["rank_00001.txt"]
    assert re.search(r"rank 1 is process \d+ on \S+, cpu\n", (tmp_path / "run/logs/rank_00001.txt").read_text())


def test_local_launch_says_how_it_is_used():
    done = subprocess.run(["launch/local.sh"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: launch/local.sh NPROC CONFIG.yaml" in done.stderr


def test_local_launch_says_mistakes_once_and_before_it_starts(config, tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = {"env": {**environment(), "PATH": path}, "cwd": REPOSITORY, "capture_output": True, "text": True}
    misspelt = subprocess.run(["launch/local.sh", "2", config(), "train.stps=3"], check=False, **options)
    assert misspelt.returncode == os.EX_CONFIG
    assert misspelt.stderr.count("did you mean train.steps") == 1
    assert "Traceback" not in misspelt.stderr
    for processes in ("two", "0", "-1"):
        done = subprocess.run(["launch/local.sh", processes, config()], check=False, **options)
        assert (done.returncode, done.stderr.startswith("usage: launch/local.sh")) == (2, True)


def test_the_error_that_ends_a_run_stands_in_its_log(config, fails, tmp_path):
    message = fails("train", config({"shards": "/nowhere/{0..1}.tar"}))
    assert message.strip().removeprefix("error: ") in (tmp_path / "run/log.txt").read_text()


def test_options_of_a_dataset_need_a_dataset(config, fails, capsys, tmp_path, colour_shards):
    held = {"held": {"task": "loss", "path": str(colour_shards / "00000.tar")}}
    cli.main(["train", config(eval__datasets=held, eval__batch=10)])
    capsys.readouterr()
    run = str(tmp_path / "run")
    assert "describe a --dataset, which is missing" in fails("evaluate", run, "--task", "loss")
    assert "are for --task zero_shot" in fails(
        "evaluate", run, "--dataset", "x", "--task", "retrieval", "--class-names", "names"
    )
    shots = ["--shots", "2"]
    assert "are for --task zero_shot, not for linear_probe" in fails(
        "evaluate", run, "--dataset", "x", "--task", "linear_probe", "--templates", "t", *shots
    )
    assert "--shots is for --task linear_probe, not for zero_shot" in fails("evaluate", run, "--dataset", "x", *shots)
    assert "describe a --dataset, which is missing" in fails("evaluate", run, *shots)
    assert "nowhere does not exist" in fails("evaluate", run, "--dataset", "nowhere")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["evaluate", run, "--limit", "0"])
    assert "0 is not an integer above 0" in capsys.readouterr().err
    cli.main(["evaluate", run, "--limit", "20"])
    assert re.search(r"^held +20 +loss", capsys.readouterr().out, re.MULTILINE)


def test_models_are_listed_with_size_and_cost(capsys):
    cli.main(["models", "--ranks", "4"])
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split() for line in lines if line.startswith(("EVA", "ViT"))}
    assert cells["EVA-CLIP-18B"][1:5] == ["17630.5", "695.0", "224", "257"]
    assert cells["EVA02-CLIP-L-14-336"][4] == "577"
    torch_gib, *zero = map(float, cells["EVA02-CLIP-bigE-14"][7:])
    # fp32 weights, their copies, gradients, moments: 4 + 2 + 4 + 8 bytes
    assert torch_gib == pytest.approx(18 * 4_704_589_568 / 2**30, abs=0.1)
    assert torch_gib > zero[0] > zero[1] > zero[2]
    assert not any(name.startswith("tiny") for name in cells)


def test_one_model_is_listed_under_any_of_its_names(capsys):
    cli.main(["models", "eva02_large_patch14_clip_224", "--token-drop", "0"])
    lines = capsys.readouterr().out.splitlines()
    row = lines[1].split()
    assert row[0] == "EVA02-CLIP-L-14"
    assert row[5] == row[6], "nothing is dropped"
    parts = {line.split()[0]: [float(cell) for cell in line.split()[1:]] for line in lines[4:8]}
    assert [sum(parts[stage]) for stage in ("torch", "ZeRO-1", "ZeRO-2", "ZeRO-3")] == [
        pytest.approx(float(cell), abs=0.16) for cell in row[7:]
    ], "weights, gradients and optimizer make up the whole"
    with pytest.raises(SystemExit):
        cli.main(["models", "nothing"])
    assert "no model is named 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["train", "--help"], ["config", "{config}"], ["status", "{run}"]])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(config, tmp_path, arguments):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.txt").touch()
    filled = [argument.format(config=config(), run=tmp_path / "run") for argument in arguments]
    ours, theirs = os.pipe()
    os.close(ours)  # as head does
    command = [sys.executable, "-m", "evaclip", *filled]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, check=False, env=environment())
    os.close(theirs)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE or arguments[1] == "--help", "which argparse takes for printed"


def test_a_pipe_that_breaks_elsewhere_is_not_hushed_up(monkeypatch, tmp_path):
    def broken(*_arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("evaclip.cli.config_file.load", broken)
    monkeypatch.setattr(sys, "stdout", (tmp_path / "out").open("w"))
    with sys.stdout, pytest.raises(BrokenPipeError):
        cli.main(["config", "x"])
