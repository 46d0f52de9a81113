"""Which W&B run a run directory is: its id, kept in ``wandb_run_id``, and whether the server has it; no wandb.

A new run makes its own id. In a sweep W&B's agent has chosen one (``WANDB_RUN_ID`` beside ``WANDB_SWEEP_ID``), by which
it knows its trial, so a new run takes that; a run directory that holds another one is refused.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from evaclip.errors import ConfigError
from evaclip.files import write_text


def stored_id(run_dir: Path) -> str:
    """Return the run's id, made at the first start."""
    path = run_dir / "wandb_run_id"
    if path.exists() and re.fullmatch(r"\w+", stored := path.read_text(encoding="utf-8").strip()):
        return stored
    return new_id(run_dir, agents_id())


def agents_id() -> str | None:
    """The id that the agent of a W&B sweep gives to its trial; None outside of a sweep."""
    given = os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""
    return given if re.fullmatch(r"\w+", given) else None


def require_own_folder(run_dir: Path) -> None:
    """Refuse to continue one trial of a sweep as another one, before anything of it is touched.

    Raises:
        ConfigError: The message names both.
    """
    agents = agents_id()
    if agents is None or not (run_dir / "wandb_run_id").exists():
        return
    stored = stored_id(run_dir)
    if stored == agents or is_on_server(run_dir, agents):  # the latter had to go on under a new id
        return
    raise ConfigError(
        f"run_dir {run_dir} holds W&B run {stored}, and the agent of W&B sweep {os.environ['WANDB_SWEEP_ID']} asks for "
        f"run {agents}, which would go on where the other one is; give each trial a run_dir of its own, such as "
        f"run_dir=runs/sweep/${{WANDB_RUN_ID}}"
    )


def new_id(run_dir: Path, run_id: str | None = None) -> str:
    """Make an id, unless there is one, and store it before W&B hears of it."""
    run_id = run_id or secrets.token_hex(6)
    path = run_dir / "wandb_run_id"
    write_text(path, f"{run_id}\n")
    return run_id


def online_mark(run_dir: Path, run_id: str) -> Path:
    """A file that is there once a session of this id was online."""
    return run_dir / "wandb" / f"{run_id}.online"


def is_on_server(run_dir: Path, run_id: str) -> bool:
    """Whether a session of this id was online, or its offline file was uploaded by ``wandb sync``."""
    synced = (run_dir / "wandb").glob(f"offline-run-*-{run_id}*/*.synced")
    return online_mark(run_dir, run_id).exists() or any(synced)
