"""A checkpoint of any model, with weights that are random in every parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models.peers import shake
from tiny import save_model

from evaclip.config import ModelConfig
from evaclip.models.clip import create_model

SIGMOID = {"name": "sigmoid"}


def stored(folder: Path, tree: dict[str, Any], loss: dict[str, Any] | None = None, *, std: float = 0.02) -> Path:
    """A checkpoint of a model whose weights are random in every parameter."""
    model = create_model(ModelConfig.model_validate(tree), seed=1)
    shake(model, std=std)
    weights = dict(model.named_parameters()) | {"logit_scale": torch.tensor([3.0])}
    if loss == SIGMOID:
        weights["logit_bias"] = torch.tensor([-7.5])
    return save_model(folder / "run", tree, weights, **({"loss": loss} if loss else {}))
