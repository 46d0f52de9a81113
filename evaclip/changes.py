"""What may differ when a run is continued: what makes the model or the data order may not, everything else is recorded.

Pure comparisons of two configurations; ``record`` appends to the run's history of changes, ``changes.jsonl``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evaclip.config import RunConfig, ShardSource
from evaclip.config_file import flatten
from evaclip.errors import ConfigError
from evaclip.optim.schedule import Schedule, learning_rates

Changes = dict[str, tuple[Any, Any]]
"""Key -> value before and now."""

_FREEZE = ("optim.image.freeze", "optim.text.freeze")
_FIXED = (
    *("seed", "model.", "data.sources.", "data.augment.", "data.block_records", "data.window_blocks"),
    *("data.max_image_pixels", "train.global_batch", "train.overfit_one_batch"),
    *("loss.name", "loss.logit_", "loss.learn_", "optim.name"),
    *_FREEZE,
)
_MOVABLE = (".shards", ".filter.keys", ".filter.drop_keys", "model.name")
"""Content is compared by digest, names by what they stand for."""


def refuse_changes(saved: RunConfig, wanted: RunConfig, origin: Path, *, slots: int) -> Changes:
    """Refuse to continue a run as another one; returns what else has changed.

    Args:
        saved: Configuration of the checkpoint.
        wanted: Configuration to go on with.
        origin: The checkpoint.
        slots: That the run has, given or chosen.

    Raises:
        ConfigError: Something that makes the model or the data order differs, or what learns, of which the checkpoint
            has the moments; the message holds the difference.
    """
    changes = differences(flatten(saved) | _orders(saved), flatten(wanted) | _orders(wanted))
    if "model.text.tokenizer_digest" not in changes:
        changes.pop("model.text.tokenizer", None)  # the same file at another place: a checkpoint names its copy
    refused = {key: pair for key, pair in changes.items() if key.startswith(_FIXED) and not key.endswith(_MOVABLE)}
    if wanted.data.slots not in (None, slots):
        refused["data.slots"] = (slots, wanted.data.slots)
    if refused:
        found = [f"{origin} was made by another model, data order or freezing; use a new run_dir", *lines(refused)]
        if not refused.keys().isdisjoint(_FREEZE):
            found.append(f"it holds the optimizer's state of what learnt; init.model={origin} takes its weights alone")
        raise ConfigError("\n  ".join(found))
    return changes


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Keys whose values differ; a key that one side lacks is ``absent`` there."""
    pairs = {key: (before.get(key, "absent"), now.get(key, "absent")) for key in sorted({*before, *now})}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def lines(changes: Changes) -> list[str]:
    """Changes for people."""
    return [f"{key}: {old} -> {new}" for key, (old, new) in changes.items()]


def changed_rates(saved: RunConfig, wanted: RunConfig, step: int) -> Changes:
    """Learning rates of the update after ``step`` that differ."""
    return differences(_rates(saved, step), _rates(wanted, step))


def record(run_dir: Path, step: int, changed: Changes, versions: Changes) -> None:
    """Append one line to ``changes.jsonl``: a run was continued at ``step`` with other options or versions."""
    row = {"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"), "changed": changed}
    with (run_dir / "changes.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "versions": versions}) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _rates(config: RunConfig, step: int) -> dict[str, float]:
    return learning_rates(config.optim, Schedule.of(config).factor(step))


def _orders(config: RunConfig) -> dict[str, list[str]]:
    """Orders of keys that decide what is read next."""
    sources = config.data.sources
    captions = {
        f"data.sources.{name}.captions in order": list(source.captions)
        for name, source in sources.items()
        if isinstance(source, ShardSource)
    }
    return {"data.sources. in order": list(sources), **captions}
