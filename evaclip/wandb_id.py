"""Which W&B run a run directory is: its id, kept in ``wandb_run_id``, and whether the server has it; no wandb."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path


def stored_id(run_dir: Path) -> str:
    """Return the run's id, made at the first start."""
    path = run_dir / "wandb_run_id"
    if path.exists() and re.fullmatch(r"\w+", stored := path.read_text(encoding="utf-8").strip()):
        return stored
    return new_id(run_dir)


def new_id(run_dir: Path) -> str:
    """Make an id and store it before W&B hears of it."""
    run_id = secrets.token_hex(6)
    path = run_dir / "wandb_run_id"
    temporary = path.with_name("wandb_run_id.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(f"{run_id}\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return run_id


def online_mark(run_dir: Path, run_id: str) -> Path:
    """A file that is there once a session of this id was online."""
    return run_dir / "wandb" / f"{run_id}.online"


def is_on_server(run_dir: Path, run_id: str) -> bool:
    """Whether a session of this id was online, or its offline file was uploaded by ``wandb sync``."""
    synced = (run_dir / "wandb").glob(f"offline-run-*-{run_id}*/*.synced")
    return online_mark(run_dir, run_id).exists() or any(synced)
