"""docs/tuning.md: its commands work, in their order, and its schedules are valid."""

import json
import re

import pages
import pytest
import yaml
from tiny import COLOURS, colour_records, tiny_tree
from wandb_server import KEY, as_in_the_file, environment, serving

from evaclip import config_file
from evaclip.checkpoint import CheckpointReader, find_checkpoint
from evaclip.config import ScheduleConfig
from evaclip.data.shards import write_shards
from evaclip.history import load_history
from evaclip.metrics import EVAL_METRICS

PAGE = (pages.REPOSITORY / "docs/tuning.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"```(bash|yaml)\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "pairs", colour_records(64), 64)
    tree = tiny_tree(tmp_path / "unused", {"shards": "pairs/00000.tar"})
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(tree))
    for number, (_, members) in enumerate(colour_records(96)):
        path = tmp_path / "colours" / ("train" if number < 64 else "test") / f"colour_{number % 4}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(members["jpg"])
    (tmp_path / "colours/classnames.txt").write_text("".join(f"{name}\n" for name in COLOURS))
    (tmp_path / "colours/zeroshot_classification_templates.txt").write_text("a {c} square\n")
    return pages.furnish(tmp_path)


def test_every_command_of_the_page_works(folder):
    assert len(BLOCKS) == PAGE.count("```") / 2 > 4
    with serving() as server:
        server.trials = {"trial1": {"optim.lr": 2e-05, "optim.weight_decay": 0.05}, "trial2": {"optim.lr": 0.25}}
        known = environment(WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY, HOME=str(folder))
        for _, text in (block for block in BLOCKS if block[0] == "bash"):
            pages.run(text, folder, known)
    assert_trained(server, folder / "runs/sweep")
    long, short = (load_history(folder / f"runs/{name}/metrics.jsonl") for name in ("long", "short"))
    assert len({row["lr/text"] for row in long}) == 1
    peak, rates = long[0]["lr/text"], [row["lr/text"] for row in short]
    assert [row["step"] for row in short] == [11, 12, 13, 14, 15], "it went on from the checkpoint"
    assert rates == pytest.approx([0.8 * peak, 0.6 * peak, 0.4 * peak, 0.2 * peak, 0])
    tuned = {name: json.loads((folder / f"tuned/{name}/result.json").read_text()) for name in ("zero", "prompts")}
    assert tuned["zero"]["metrics"]["top1"] > 0.5, "four classes"
    assert [row["step"] for row in tuned["prompts"]["epochs"]] == [0, 2, 4]
    assert (folder / "lr_range.png").read_bytes().startswith(b"\x89PNG")


def assert_trained(server, runs):
    """The agent's trials are runs of the sweep with the agent's ids, each in a folder of its own with its options."""
    assert set(server.lines) == set(server.trials) == {path.name for path in runs.iterdir()}
    for trial, options in server.trials.items():
        assert (runs / trial / "wandb_run_id").read_text() == f"{trial}\n"
        assert server.upserts[trial]["sweep"] == "sweep1"
        assert [as_in_the_file(row) for row in server.history(trial)] == load_history(runs / trial / "metrics.jsonl")
        config = config_file.flatten(CheckpointReader(find_checkpoint(runs / trial)).config)
        assert options.items() <= config.items()


@pytest.mark.parametrize("line", [line for kind, text in BLOCKS if kind == "yaml" for line in text.splitlines()])
def test_each_schedule_of_the_page_is_valid(line):
    config_file.validate(yaml.safe_load(line)["schedule"], "page", ScheduleConfig)


def test_the_sweeps_options_metric_and_command_are_those_of_its_configuration(monkeypatch):
    sweep = yaml.safe_load((pages.REPOSITORY / "configs/sweep.yaml").read_text(encoding="utf-8"))
    program, command, path, *overrides, arguments = sweep["command"]
    assert (program, command, arguments) == ("${program}", "train", "${args_no_hyphens}")
    assert sweep["program"] == "evaclip"
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    for end in ("min", "max"):
        chosen = {name: values.get(end) or values["values"][0] for name, values in sweep["parameters"].items()}
        config = config_file.load(pages.REPOSITORY / path, [*overrides, *(f"{name}={v}" for name, v in chosen.items())])
        assert chosen.items() <= config_file.flatten(config).items()
        assert (config.run_dir, config.log.wandb.project) == ("runs/sweep/trial7", sweep["project"])
    _, dataset, metric = sweep["metric"]["name"].split("/")
    assert metric in EVAL_METRICS[config.eval.datasets[dataset].task]
