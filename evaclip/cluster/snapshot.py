"""What a job runs, kept in its run directory: code, uncommitted changes, versions, the resolved configuration.

All starts of a job, after failures and after requeues, run this copy: an edit of the repository reaches the next
submission, not a job that is under way.
"""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import evaclip


class Snapshot(NamedTuple):
    """Where the copy is."""

    folder: Path

    @property
    def code(self) -> Path:
        """For PYTHONPATH."""
        return self.folder / "code"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.folder / "config.yaml"


def take(run_dir: Path, job: str, config: str, *, renew: bool) -> Snapshot:
    """Copy what this job is about to run, unless it has its copy already.

    Args:
        run_dir: Of the run; ``run_dir/jobs/JOB`` is written.
        job: The scheduler's number.
        config: The resolved configuration, as YAML.
        renew: Replace the copy of an earlier start of this job.
    """
    final = Snapshot(run_dir / "jobs" / job)
    if final.config.exists() and not renew:
        return final
    package = Path(evaclip.__file__).parent
    made = Snapshot(final.folder.with_name(f".{job}.tmp"))
    shutil.rmtree(made.folder, ignore_errors=True)
    shutil.copytree(package, made.code / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    root = package.parent
    if (root / ".git").exists():
        described = _git(root, "describe", "--always", "--dirty", "--abbrev=12")
        (made.code / "commit.txt").write_text(described, encoding="utf-8")
        (made.folder / "changes.diff").write_text(_git(root, "diff", "HEAD"), encoding="utf-8")
    elif (root / "commit.txt").exists():
        shutil.copy(root / "commit.txt", made.code)
    versions = sorted({f"{item.name}=={item.version}" for item in distributions()}, key=str.lower)
    (made.folder / "versions.txt").write_text("\n".join(versions) + "\n", encoding="utf-8")
    made.config.write_text(config, encoding="utf-8")
    shutil.rmtree(final.folder, ignore_errors=True)
    made.folder.rename(final.folder)
    return final


def _git(root: Path, *arguments: str) -> str:
    """What git says; nothing where it is not installed, or not ours to ask."""
    try:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603
    except OSError:
        return ""
