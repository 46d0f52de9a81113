"""The named models as a table: what they are, what a sample costs, and what a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError

from evaclip.config import ImageTowerConfig, ModelConfig, RunConfig
from evaclip.errors import ConfigError
from evaclip.memory import state_bytes
from evaclip.models.clip import CLIP
from evaclip.models.flops import forward_flops
from evaclip.models.registry import PRESETS

_STAGES = ("torch", "ZeRO-1", "ZeRO-2", "ZeRO-3")
_CAPTION = 20.0
"""Tokens of a usual caption."""


def listing(name: str | None, *, ranks: int, token_drop: float) -> str:
    """One line per model, with a heading; of one model also what its memory goes to.

    Args:
        name: Of ours, open_clip or timm; None: all but the tiny ones.
        ranks: Over which ZeRO shards.
        token_drop: Share of patches that a training sample drops.

    Raises:
        ConfigError: No model has this name.
    """
    names = [name] if name is not None else [preset for preset in PRESETS if not preset.startswith("tiny")]
    heading = ["model", "image M", "text M", "pixels", "tokens", "GFLOPs", f"-{token_drop:.0%}", *_STAGES]
    rows = [heading, *(_row(each, ranks, token_drop) for each in names)]
    parts = ["", *_aligned(_parts(name, ranks))] if name is not None else []
    return "\n".join(
        [
            *_aligned(rows),
            *parts,
            "",
            f"GFLOPs: forward and backward of a sample with {_CAPTION:.0f} caption tokens, in full and with "
            f"{token_drop:.0%} of the patches dropped.",
            f"torch, ZeRO-1, -2, -3: GiB of weights, gradients and moments on each of {ranks} ranks under bf16",
            "autocast, with its 16-bit copies and DeepSpeed's buffers (1 to 6 GiB), without activations.",
        ]
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _model(name: str, token_drop: float = 0.0) -> tuple[ModelConfig, tuple[int, int]]:
    """A named model and the parameters of its towers."""
    try:
        model = ModelConfig.model_validate({"name": name, "image": {"token_drop": token_drop}})
    except ValidationError as error:
        raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    with torch.device("meta"):
        towers = CLIP(model)
    image, text = (sum(p.numel() for p in tower.parameters()) for tower in (towers.image, towers.text))
    return model, (image, text)


def _parts(name: str, ranks: int) -> list[list[str]]:
    """What each ZeRO stage takes for weights, gradients and the optimizer."""
    model, counts = _model(name)
    rows = [["GiB", "weights", "gradients", "optimizer"]]
    for stage, called in enumerate(_STAGES):
        sizes = state_bytes(sum(counts), _run(model, stage), ranks)
        rows.append([called, *(f"{size / 2**30:.1f}" for size in sizes)])
    return rows


def _row(name: str, ranks: int, token_drop: float) -> list[str]:
    model, (image, text) = _model(name, token_drop)
    assert isinstance(model.image, ImageTowerConfig), "named models are of our towers"
    costs = [3e-9 * forward_flops(model, _CAPTION, training=training) for training in (False, True)]
    states = [sum(state_bytes(image + text, _run(model, stage), ranks)) / 2**30 for stage in range(4)]
    return [
        str(model.name),
        *(f"{count / 1e6:.1f}" for count in (image, text)),
        *(str(count) for count in (model.image.image_size, 1 + model.image.grid**2)),
        *(f"{cost:.0f}" for cost in costs),
        *(f"{size:.1f}" for size in states),
    ]


def _run(model: ModelConfig, stage: int) -> RunConfig:
    engine: dict[str, Any] = {"name": "deepspeed", "zero_stage": stage} if stage else {"name": "torch"}
    return RunConfig.model_validate(
        {
            "run_dir": "none",
            "model": model,
            "data": {"sources": {"none": {"kind": "synthetic"}}},
            "train": {"steps": 1, "global_batch": 2, "precision": "bf16"},
            "engine": engine,
        }
    )
