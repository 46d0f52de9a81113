"""Runs of which a part is frozen; the functions run on the ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from distributed.cases import CONSTANT, ENGINES, OFFLOADED, interrupted, tiny_config
from distributed.spawn import Case
from evaclip.accumulation import forward_backward
from evaclip.checkpoint import CheckpointReader, find_checkpoint
from evaclip.distributed import Ranks
from evaclip.history import load_history
from evaclip.run import Run, open_run
from evaclip.train import train_on

PARTS = {"lit": ("all", 1), "lower": (1, "all")}
"""How much of the image tower and of the text tower does not learn."""
RUNS = {
    1: [*((engine, "fp32", "lit") for engine in ENGINES), ("torch", "fp32", "lower")],
    2: [
        *((engine, "fp32", "lit") for engine in ENGINES),
        *(("zero2_offload", "bf16_weights", "lower"), ("zero3_offload", "fp32", "lower")),
    ],
}
"""By number of ranks: engine, precision and what is frozen."""
RESUMED = ("zero3", "bf16_weights", "lit")
HANDED_OVER = ("zero3", "torch")
STEPS = 4


def options_of(engine: str, precision: str, part: str, origin: Path, world: int) -> dict[str, Any]:
    """For the configuration; two micro-batches, so that a whole frozen tower keeps its features."""
    image, text = PARTS[part]
    frozen = {"optim__image__freeze": image, "optim__text__freeze": text, "init__model": str(origin)}
    taken = {"train__precision": precision, "train__micro_batch": 8 // world, "optim__name": "lamb", "optim__lr": 3e-3}
    return {**CONSTANT, **(ENGINES | OFFLOADED)[engine], **frozen, **taken}


def stored(run: Run) -> dict[str, torch.Tensor]:
    """What the forward uses: this rank's slice under ZeRO-3, the whole parameter elsewhere."""
    named = run.engine.towers.clip.named_parameters()
    return {name: getattr(p, "ds_tensor", p).detach().clone() for name, p in named}


def trained(
    ranks: Ranks, folder: Path, *, source: dict[str, Any], options: dict[str, Any]
) -> tuple[list[float], dict[str, set[str]]]:
    """The losses of a few steps, and the names of all parameters that are not as they should be afterwards."""
    run = open_run(tiny_config(folder, source, **options, train__steps=STEPS), ranks)
    before, losses = stored(run), []
    for delivery in run.stream():
        output = forward_backward(run.engine, run.loss, delivery.micro_batches, ranks)
        run.engine.step(1.0, output.loss)
        run.step, run.slot_states = run.step + 1, delivery.states
        losses.append(float(output.loss))
    run.save({}, {}, final=True)
    start, end = (CheckpointReader(find_checkpoint(path)) for path in (options["init__model"], folder))
    towers = dict(run.engine.towers.clip.named_parameters())
    frozen = {name for name, p in towers.items() if not p.requires_grad}
    learning = start.state.shapes.keys() - frozen
    here = {name for name, value in stored(run).items() if not torch.equal(value, before[name])}
    changed = set().union(*ranks.gather_objects(here))
    first, last = start.weights(), end.weights()
    saved = {name for name in first if not torch.equal(first[name], last[name])}
    wrong = {
        "frozen and changed in use": frozen & changed,
        "frozen and saved otherwise": frozen & saved,
        "frozen with a gradient": {name for name in frozen if towers[name].grad is not None},
        "learning and saved as before": learning - saved,
        "with moments and frozen, or without and learning": {n for kind, n in end._runs if kind != "weight"} ^ learning,
    }
    if options["train__precision"] == "fp32":  # a step may be less than 16 bits tell apart
        wrong["learning and unchanged in use"] = learning & towers.keys() - changed
    return losses, wrong


def handed_over(ranks: Ranks, folder: Path, *, source: dict[str, Any], origin: Path) -> list[float]:
    """Half of the steps under ZeRO-3, the other half by torch from its checkpoint."""
    for number, engine in enumerate(HANDED_OVER, 1):
        options = options_of(engine, "fp32", "lit", origin, ranks.world_size)
        train_on(ranks, tiny_config(folder, source, **options, train__steps=STEPS * number // len(HANDED_OVER)))
    return [row["train/loss"] for row in load_history(folder / "metrics.jsonl")]


def cases(world: int, source: dict[str, Any], origin: Path) -> dict[str, Case]:
    """By name, for a number of ranks."""
    found: dict[str, Case] = {}
    for run in RUNS[world]:
        found["frozen_" + "_".join(run)] = partial(trained, source=source, options=options_of(*run, origin, world))
    if world > 1:
        options = {**options_of(*RESUMED, origin, world), "train__steps": 2, "checkpoint__every_steps": 1}
        found["frozen_resumed"] = partial(interrupted, source=source, options=options)
        found["frozen_handed_over"] = partial(handed_over, source=source, origin=origin)
    return found
