"""What tests of documents share: a folder in which the commands of a page work, and running them there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def furnish(folder: Path) -> Path:
    """Give a folder our tools and configurations, and the commands ``python``, ``evaclip`` and ``wandb``."""
    for name in ("tools", "configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "bin").mkdir()
    commands = {name: f"{sys.executable} -m {name}" for name in ("evaclip", "wandb")}
    for name, command in {"python": sys.executable, **commands}.items():
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    return folder


def run(commands: str, folder: Path, known: Mapping[str, str] = os.environ) -> str:
    """Run commands of a page in such a folder, one after the other; what they print."""
    environment = {**known, "PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
