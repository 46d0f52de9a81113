"""What lies beside weights and says how they were trained: options that their names and shapes do not show.

Known are our runs and exports, with everything, and folders of transformers and open_clip, with the activation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evaclip.checkpoint import CheckpointReader, file_checksum, find_checkpoint
from evaclip.config import ModelConfig
from evaclip.config.tokenizer_file import TOKENIZER
from evaclip.config_file import load
from evaclip.errors import WeightsError
from evaclip.weights.names import TowerName

ABOUT = "evaclip.json"
"""What we keep beside exported weights: which model they are, and where they come from."""
ABOUT_FORMAT = 1

_FREE = {
    *("image_size", "patch_size", "token_drop", "drop_path", "resize", "layer_scale", "vocab_size", "context_length"),
    "tokenizer",  # a place, whose content the digest tells
}
"""Options that may differ, or whose difference names and shapes show."""


def is_run(path: Path) -> bool:
    """Whether a folder is a run or a checkpoint of ours."""
    return (path / "meta.json").exists() or (path / "checkpoints").is_dir()


def read_about(path: Path) -> dict[str, Any]:
    """``evaclip.json`` of an export, its model section validated.

    Raises:
        WeightsError: It is damaged, or of another format.
    """
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        known, model = about["format"], ModelConfig.model_validate(about["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise WeightsError(f"{path / ABOUT} cannot be read ({reason}); export the model again") from None
    if known != ABOUT_FORMAT:
        raise WeightsError(f"{path} has format {known}, this version reads {ABOUT_FORMAT}; export the model again")
    return {**about, "model": model.with_tokenizer(path / TOKENIZER)}


def require_intact(path: Path) -> None:
    """Refuse an export whose weights are not those that were written.

    Raises:
        WeightsError: They differ from their checksum.
    """
    weights = read_about(path).get("weights", {})
    if weights and file_checksum(path / weights["file"]) != weights["xxh3"]:
        raise WeightsError(f"{path / weights['file']} differs from its checksum; copy it again")


def differences(path: str, tower: TowerName, ours: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Options of a tower that were otherwise when these weights were trained: name -> (then, here)."""
    section = getattr(ours, tower)
    trained = _trained_as(Path(path)).get(tower, {})
    here = {key: getattr(section, key, None) for key in trained}
    return {key: (trained[key], here[key]) for key in trained if trained[key] != here[key]}


def _trained_as(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """Options by tower, as far as they are known."""
    if (path / "config.yaml").is_file() and is_run(path):  # of a model that no later start could change
        return _sections(load(path / "config.yaml").model)
    if is_run(path):  # reads every byte
        return _sections(CheckpointReader(find_checkpoint(path)).config.model)
    if (path / ABOUT).is_file():
        return _sections(read_about(path)["model"])
    for name, read in (("config.json", _of_transformers), ("open_clip_config.json", _of_open_clip)):
        try:
            return read(json.loads((path / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # no such folder
    return {}


def _sections(model: ModelConfig) -> Mapping[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for tower in ("image", "text"):
        section = getattr(model, tower)
        found[tower] = {key: getattr(section, key) for key in type(section).model_fields if key not in _FREE}
    return found


def _of_transformers(saved: Any) -> Mapping[str, Mapping[str, Any]]:
    sections = {"image": "vision_config", "text": "text_config"}
    return {tower: {"mlp": saved[name].get("hidden_act", "quick_gelu")} for tower, name in sections.items()}


def _of_open_clip(saved: Any) -> Mapping[str, Mapping[str, Any]]:
    model = saved["model_cfg"]
    activation = {"mlp": "quick_gelu" if model.get("quick_gelu") else "gelu"}
    of_timm = "timm_model_name" in model["vision_cfg"]  # which has its own
    return {"text": activation} if of_timm else {"text": activation, "image": activation}
