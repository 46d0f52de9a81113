"""What a tracked run leaves at W&B beside its rows: checkpoints, exports, group and tags; and no secret."""

import json
import subprocess
import sys

import pytest
import yaml
from tiny import SYNTHETIC, merged, tiny_tree
from wandb_server import KEY, as_in_the_file, environment, offline_files, read_back, serving, sync

from evaclip import cli
from evaclip.history import load_history

SECRETS = {"AWS_SECRET_ACCESS_KEY": "canary-aws-4711", "HF_TOKEN": "canary-hf-4711", "MY_PASSWORD": "canary-mine-4711"}


def configuration(folder, shards, mode):
    """Two checkpoints are kept: step 2, whose loss is the largest, and step 6, the last one."""
    wandb = {"mode": mode, "project": "clip", "group": "sweep", "tags": ["a", "b"], "artifacts": True}
    changes = {"eval__datasets": {"held": {"task": "loss", "path": shards}}, "eval__batch": 10, "eval__every_steps": 2}
    changes |= {"checkpoint__keep_best": "eval/held/loss", "checkpoint__keep_last": 1, "eval__at_start": False}
    tree = merged(tiny_tree(folder / "run", {"shards": shards}), train__steps=6, log__wandb=wandb, **changes)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**tree, "optim": {"name": "adamw", "lr": 3e-3}}))
    return str(path)


def evaclip(*arguments, env):
    """A command of evaclip in a process of its own; all that it says."""
    command = [sys.executable, "-m", "evaclip", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout + done.stderr


def homeless(folder, **extra):
    (folder / "home").mkdir()
    (folder / "tmp").mkdir()
    places = {"HOME": str(folder / "home"), "NETRC": str(folder / "home/.netrc"), "TMPDIR": str(folder / "tmp")}
    return environment(**places, **SECRETS, OMP_NUM_THREADS="1", **extra)


@pytest.fixture(scope="module")
def online(tmp_path_factory, colour_shards):
    """A run that was online and its export, the server, and what was said."""
    folder = tmp_path_factory.mktemp("online")
    with serving() as server:
        env = homeless(folder, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        path = configuration(folder, str(colour_shards / "00000.tar"), "auto")
        said = evaclip("train", path, env=env)
        said += evaclip(
            "export", str(folder / "run"), str(folder / "out"), "--format", "safetensors", "--wandb", env=env
        )
        yield folder, server, said


@pytest.fixture(scope="module")
def offline(tmp_path_factory, colour_shards):
    """The same offline, continued after the export, and then synced."""
    folder = tmp_path_factory.mktemp("offline")
    env = homeless(folder)
    path = configuration(folder, str(colour_shards / "00000.tar"), "auto")
    said = evaclip("train", path, env=env)
    run = folder / "run"
    said += evaclip("export", str(run), str(folder / "out"), "--format", "safetensors", "--wandb", env=env)
    said += evaclip("train", path, "train.steps=8", env=env)
    with serving() as server:
        files = offline_files(run)
        sync(files, server, run)
        yield folder, server, said, files


def run_id(folder):
    return (folder / "run/wandb_run_id").read_text().strip()


def logged(server):
    """Artifacts by type, name and aliases."""
    for number, created in server.artifacts.items():
        assert created["committed"]
        aliases = sorted(alias["alias"] for alias in created["aliases"])
        yield number, (created["artifactTypeName"], created["artifactCollectionName"], aliases)


def assert_uploaded(server, number, folder):
    for file in folder.iterdir():
        assert server.uploads[f"/artifact/{number}/{file.name}"] == file.read_bytes()


def test_the_final_and_the_best_checkpoint_are_uploaded(online):
    folder, server, _ = online
    found = dict(logged(server))
    name = f"{run_id(folder)}-checkpoint"
    assert found["A0"] == ("checkpoint", name, ["best", "latest", "step-2"])
    assert found["A1"] == ("checkpoint", name, ["latest", "step-6"]), "the latest is what came last"
    assert_uploaded(server, "A0", folder / "run/checkpoints/step_00000002")
    assert_uploaded(server, "A1", folder / "run/checkpoints/step_00000006")


def test_an_export_is_uploaded_to_the_run_it_comes_from(online):
    folder, server, said = online
    found = dict(logged(server))
    name = f"{run_id(folder)}-safetensors"
    assert found["A2"] == ("model", name, ["latest", "step-6"])
    assert_uploaded(server, "A2", folder / "out")
    assert f"artifact {name} of W&B run {run_id(folder)}; uploaded" in said
    assert list(server.lines) == [run_id(folder)], "no other run"
    assert len(found) == 3


def test_rows_with_what_the_nodes_do_arrive_as_they_are_in_the_file(online):
    folder, server, _ = online
    rows = load_history(folder / "run/metrics.jsonl")
    assert [as_in_the_file(row) for row in server.history(run_id(folder))] == rows
    assert any(name.startswith("system/") and name.endswith("/memory_fraction") for name in rows[-1])


def test_group_and_tags_arrive(online, offline):
    for folder, server, *_ in (online, offline):
        upsert = server.upserts[run_id(folder)]
        assert (upsert["project"], upsert["groupName"], upsert["tags"]) == ("clip", "sweep", ["a", "b"])


def test_no_secret_is_written_said_or_sent(online, offline):
    secrets = [secret.encode() for secret in (KEY, *SECRETS.values())]
    for folder, server, said, *_ in (online, offline):
        files = [file for file in folder.rglob("*") if file.is_file()]
        assert any(file.suffix == ".wandb" for file in files)
        content = [file.read_bytes() for file in files] + [said.encode()] + server.bodies
        for secret in secrets:
            assert not [text for text in content if secret in text]


def test_offline_artifacts_and_rows_arrive_when_the_run_is_synced(offline):
    folder, server, said, files = offline
    assert len(files) == 2, "the run's, and the export's, which the start behind it left alone"
    assert f"upload it with: wandb sync {files[0].parent}" in said
    name = run_id(folder)
    assert sorted(entry for _, entry in logged(server)) == [
        ("checkpoint", f"{name}-checkpoint", ["best", "latest", "step-2"]),
        ("checkpoint", f"{name}-checkpoint", ["latest", "step-8"]),
        ("model", f"{name}-safetensors", ["latest", "step-6"]),
    ]
    (export,) = [number for number, entry in logged(server) if entry[0] == "model"]
    assert_uploaded(server, export, folder / "out")
    rows = [as_in_the_file(row) for row in server.history(name)]
    assert rows == load_history(folder / "run/metrics.jsonl")
    assert list(server.lines) == [name]


def test_wandbs_own_system_metrics_are_off(offline):
    *_, files = offline
    assert not [record for file in files for record in read_back(file) if record["type"] == "stats"]
    assert json.dumps(read_back(files[1])).count("memory_fraction") > 0


def test_an_export_of_a_run_without_wandb_is_refused_before_it_is_written(tmp_path, capsys):
    tree = merged(tiny_tree(tmp_path / "run", SYNTHETIC), train__steps=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    cli.main(["train", str(tmp_path / "config.yaml")])
    checkpoint = str(tmp_path / "run/checkpoints/step_00000002")
    for source in (str(tmp_path / "run"), checkpoint):
        with pytest.raises(SystemExit, match="78"):
            cli.main(["export", source, str(tmp_path / "out"), "--wandb"])
        assert f"and {source} has none; give a run directory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_with_a_server_out_of_reach_stays_and_says_so(online, tmp_path):
    folder, _, _ = online
    env = environment(HOME=str(tmp_path), WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY)
    script = "import sys; from evaclip import cli, tracking; tracking._INIT_SECONDS = 1.0; cli.main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "export", str(folder / "run"), str(tmp_path / "out"), "--wandb"]
    command += ["--format", "safetensors"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert f"error: {tmp_path / 'out'} is written, but W&B could not take it: " in done.stderr
    assert (tmp_path / "out/evaclip.json").is_file()


REFUSED = """
import sys
from pathlib import Path
from evaclip.config import CheckpointConfig, WandbConfig
from evaclip.history import History
from evaclip.tracking import Tracker

run_dir = Path(sys.argv[1])
tracker = Tracker(run_dir, WandbConfig(artifacts=True), {}, History(run_dir / "metrics.jsonl"))
tracker.log_checkpoints(run_dir / "checkpoints", CheckpointConfig())
tracker.finish()
print("ended")
"""


def test_a_server_that_takes_no_artifact_is_told_and_ends_no_run_with_an_error(tmp_path):
    (tmp_path / "checkpoints/step_00000006").mkdir(parents=True)
    (tmp_path / "checkpoints/step_00000006/meta.json").write_text("{}")
    with serving() as server:
        server.takes_artifacts = False
        env = environment(HOME=str(tmp_path), WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        command = [sys.executable, "-c", REFUSED, str(tmp_path)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "ended\n"
    assert "W&B stopped recording (" in done.stderr
    assert server.artifacts == {}
