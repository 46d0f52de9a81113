"""The named models as a table: what they are, what a sample costs, and what a rank holds."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError

from evaclip.config import ModelConfig, RunConfig
from evaclip.errors import ConfigError
from evaclip.memory import state_bytes
from evaclip.models.clip import CLIP
from evaclip.models.flops import forward_flops
from evaclip.models.registry import PRESETS

_STAGES = ("torch", "ZeRO-1", "ZeRO-2", "ZeRO-3")
_CAPTION = 20.0
"""Tokens of a usual caption."""


def listing(name: str | None, *, ranks: int, token_drop: float) -> str:
    """One line per model, or for one model, with a heading.

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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    start = widths[0]
    aligned = [row[0].ljust(start) + line[start:] for row, line in zip(rows, lines, strict=True)]
    return "\n".join(
        [
            *aligned,
            "",
            f"GFLOPs: forward and backward of a sample with {_CAPTION:.0f} caption tokens, in full and with "
            f"{token_drop:.0%} of the patches dropped.",
            f"torch, ZeRO-1, -2, -3: GiB of weights, gradients and moments on each of {ranks} ranks under bf16",
            "autocast, with its 16-bit copies and DeepSpeed's buffers (1 to 6 GiB), without activations.",
        ]
    )


def _row(name: str, ranks: int, token_drop: float) -> list[str]:
    try:
        model = ModelConfig.model_validate({"name": name, "image": {"token_drop": token_drop}})
    except ValidationError as error:
        raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    with torch.device("meta"):
        towers = CLIP(model)
    image, text = (sum(p.numel() for p in tower.parameters()) for tower in (towers.image, towers.text))
    costs = [3e-9 * forward_flops(model, _CAPTION, kept=kept) for kept in (None, model.image.kept_patches)]
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
