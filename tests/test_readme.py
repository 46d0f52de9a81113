"""README, "What people do with it": the commands work on the demo, and print what is shown, but for the numbers."""

import re

import pages
import pytest

SECTION = (
    (pages.REPOSITORY / "README.md").read_text(encoding="utf-8").split("## What people do with it")[1].split("\n## ")[0]
)
SHOWN = [
    (command.replace("\\\n", " "), [line for line in output.splitlines() if line not in ("", "...")])
    for command, output in re.findall(r"^\$ (.*?[^\\])\n(.*?)(?=^\$ |^```)", SECTION, re.MULTILINE | re.DOTALL)
]


def without_numbers(line: str) -> str:
    """The line's words: the demo that is trained here has seen little."""
    return " ".join(re.sub(r"[-+]?\d[\d.,:%]*(e-?\d+)?", "#", line).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The repository's folders beside a demo that was trained for two steps."""
    folder = pages.furnish(tmp_path_factory.mktemp("readme"))
    options = "train.steps=2 schedule.warmup_steps=1 eval.datasets={} eval.every_steps=null log.wandb.mode=off"
    pages.run("python tools/make_demo_data.py data/demo", folder)
    pages.run(f"evaclip train configs/demo.yaml {options}", folder)
    return folder


def test_all_commands_are_found():
    assert len(SHOWN) == SECTION.count("\n$ ") == 7


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[" ".join(command.split()[:2]) for command, _ in SHOWN])
def test_a_command_prints_what_is_shown(folder, command, output):
    printed = pages.run(command, folder)
    words = {without_numbers(line) for line in printed.splitlines()}
    assert output
    assert [line for line in output if without_numbers(line) not in words] == [], printed
