"""What tests of documents share: a folder in which the commands of a page work, and running them there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def furnish(folder: Path) -> Path:
    """Give a folder the repository's tools and configurations, and the commands ``python`` and ``evaclip``."""
    for name in ("tools", "configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "bin").mkdir()
    for name, command in (("python", sys.executable), ("evaclip", f"{sys.executable} -m evaclip")):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    return folder


def run(commands: str, folder: Path) -> str:
    """Run commands of a page in such a folder, one after the other; what they print."""
    environment = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
