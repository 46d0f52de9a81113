"""What tests share: a configuration small enough to train in seconds, and real JPEGs."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path

import numpy as np
import simplejpeg

from evaclip import checkpoint, config_file
from evaclip.checkpoint_writer import CheckpointWriter
from evaclip.distributed import Ranks

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}


def tiny_tree(run_dir, source) -> dict:
    """A configuration as plain data: two small towers, AdamW, fp32, no W&B."""
    image = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "heads": 2, "mlp": "swiglu", "mlp_width": 48}
    return {
        "run_dir": str(run_dir),
        "model": {
            "embed_dim": 16,
            "image": {**image, "sub_norm": True, "rope": True, "token_drop": 0.5},
            "text": {"context_length": 16, "width": 32, "depth": 2, "heads": 2, "mlp_width": 64},
        },
        "data": {"workers": 0, "sources": {"tiny": source}},
        "train": {"steps": 4, "global_batch": 16, "precision": "fp32"},
        "optim": {"name": "adamw", "lr": 1e-3},
        "log": {"every_steps": 1, "wandb": {"mode": "off"}},
        "checkpoint": {"every_steps": 2},
    }


SYNTHETIC = {"kind": "synthetic", "num_records": 200}


def merged(tree: dict, **changes) -> dict:
    """The tree with ``section__key=value`` changes."""
    tree = copy.deepcopy(tree)
    for dotted, value in changes.items():
        *parents, leaf = dotted.split("__")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return tree


def tiny_config(run_dir, source=SYNTHETIC, **changes):
    """A valid tiny configuration; ``section__key=value`` overrides."""
    return config_file.validate(merged(tiny_tree(run_dir, source), **changes), "test")


def save_model(folder, model, weights, **changes):
    """A checkpoint of a model section and its weights by name, as a run writes it, without moments."""
    tree = {**tiny_tree(folder, SYNTHETIC), "model": model}
    nothing = {field.name: {} for field in fields(checkpoint.RunState)}
    shapes = {name: list(value.shape) for name, value in weights.items()}
    progress = checkpoint.RunState(**{**nothing, "step": 7, "shapes": shapes})
    entries = [checkpoint.Entry("weight", name, 0, value.detach().flatten()) for name, value in weights.items()]
    writer = CheckpointWriter(
        Path(folder) / "checkpoints", config_file.validate(merged(tree, **changes), "test"), Ranks()
    )
    return writer.save(progress, entries, final=True)


def jpeg(colour, size=24, seed=0) -> bytes:
    """A noisy JPEG of one colour."""
    noise = np.random.default_rng(seed).integers(-20, 20, (size, size, 3))
    return simplejpeg.encode_jpeg(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8), colorspace="RGB")


def colour_records(count):
    """Records of coloured squares with their captions."""
    for number in range(count):
        name = list(COLOURS)[number % len(COLOURS)]
        members = {"jpg": jpeg(COLOURS[name], seed=number), "txt": f"a {name} square".encode()}
        yield f"{number:06d}", members
