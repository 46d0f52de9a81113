"""A job runs what it began with, whatever happens to the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evaclip
from evaclip.cluster import snapshot

PACKAGE = Path(evaclip.__file__).parent


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one uncommitted change."""
    root = tmp_path / "repository"
    shutil.copytree(PACKAGE, root / "evaclip", ignore=shutil.ignore_patterns("__pycache__"))
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    with (root / "evaclip/errors.py").open("a") as file:
        file.write("# changed\n")
    monkeypatch.setattr(evaclip, "__file__", str(root / "evaclip/__init__.py"))
    return root


def test_code_changes_versions_and_configuration_are_kept(repository: Path, tmp_path: Path) -> None:
    taken = snapshot.take(tmp_path / "run", "17", "seed: 1\n", renew=True)
    assert taken.folder == tmp_path / "run/jobs/17"
    assert taken.config.read_text() == "seed: 1\n"
    assert "+# changed" in (taken.folder / "changes.diff").read_text()
    assert (taken.code / "commit.txt").read_text().strip().endswith("-dirty")
    assert "pydantic==" in (taken.folder / "versions.txt").read_text()
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import evaclip; print(evaclip.__file__)"],
        env={**os.environ, "PYTHONPATH": str(taken.code)}, cwd=repository, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert where.strip() == str(taken.code / "evaclip/__init__.py")


def test_later_edits_reach_a_job_only_when_asked(repository: Path, tmp_path: Path) -> None:
    first = snapshot.take(tmp_path / "run", "17", "seed: 1\n", renew=True)
    with (repository / "evaclip/errors.py").open("a") as file:
        file.write("# edited later\n")
    again = snapshot.take(tmp_path / "run", "17", "seed: 2\n", renew=False)
    assert again == first
    assert "edited later" not in (first.code / "evaclip/errors.py").read_text()
    assert again.config.read_text() == "seed: 1\n"
    renewed = snapshot.take(tmp_path / "run", "17", "seed: 2\n", renew=True)
    assert "edited later" in (renewed.code / "evaclip/errors.py").read_text()
    assert renewed.config.read_text() == "seed: 2\n"
    other = snapshot.take(tmp_path / "run", "18", "seed: 3\n", renew=False)
    assert "edited later" in (other.code / "evaclip/errors.py").read_text()
