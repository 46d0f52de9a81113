"""Runs that go on with other ranks, engines, workers and micro-batches; the functions run on the ranks."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from distributed.cases import CONSTANT, ENGINES, tiny_config
from distributed.spawn import Case

from evaclip import train as loop
from evaclip.distributed import Ranks
from evaclip.history import load_history
from evaclip.run import open_run

LAMB = {**CONSTANT, "optim__name": "lamb"}  # a constant learning rate: the schedule follows train.steps
WORLDS = (4, 2, 1, 4)
"""Ranks of the stretches."""
STEPS = 6
"""Of one stretch."""


class Stretch(NamedTuple):
    """How a run is trained between two stops."""

    engine: str
    workers: int
    micro_batch: int | None

    @property
    def options(self) -> dict[str, Any]:
        """For the configuration."""
        own = {"data__workers": self.workers, "train__micro_batch": self.micro_batch}
        return {**LAMB, **ENGINES[self.engine], **own}


CHAINS = {
    "torch throughout": [
        Stretch("torch", 2, None), Stretch("torch", 0, 3), Stretch("torch", 3, 5), Stretch("torch", 1, 2),
    ],
    "torch, ZeRO-1, ZeRO-3, torch": [
        Stretch("torch", 0, 1), Stretch("zero1", 1, None), Stretch("zero3", 0, 4), Stretch("torch", 2, 3),
    ],
    "ZeRO-1, ZeRO-3, ZeRO-2, ZeRO-1": [
        Stretch("zero1", 1, 2), Stretch("zero3", 2, 5), Stretch("zero2", 0, None), Stretch("zero1", 0, 3),
    ],
    "ZeRO-3, torch, ZeRO-2, ZeRO-3": [
        Stretch("zero3", 0, None), Stretch("torch", 3, 8), Stretch("zero2", 2, 7), Stretch("zero3", 1, 1),
    ],
}  # fmt: skip


def train(ranks: Ranks, folder: Path, *, run_dir: Path, source: dict[str, Any], options: dict[str, Any]) -> list[Any]:
    """Train, or go on; the seeds of this rank's samples, step by step, which name record, pass and crop."""
    seeds: list[list[int]] = []
    original = loop.forward_backward

    def recording(engine: Any, loss: Any, micro_batches: Any, ranks: Ranks) -> Any:
        seeds.append([seed for batch in micro_batches for seed in batch.seeds.tolist()])
        return original(engine, loss, micro_batches, ranks)

    loop.forward_backward = recording
    try:
        loop.train_on(ranks, tiny_config(run_dir, source, **options))
    finally:
        loop.forward_backward = original
    return seeds


def resaved(ranks: Ranks, folder: Path, *, origin: Path, source: dict[str, Any], options: dict[str, Any]) -> Path:
    """Open another layout's run and save it again without a step in between: the folder of ``before`` and ``after``."""
    if ranks.is_main:
        for name in ("before", "after"):
            shutil.copytree(origin, folder / name)
    ranks.barrier()
    open_run(tiny_config(folder / "after", source, **options), ranks).save({}, {}, final=True)
    return folder


def losses(run_dir: Path) -> list[float | None]:
    """Of every step."""
    return [row["train/loss"] for row in load_history(run_dir / "metrics.jsonl")]


def cases(number: int, runs: Path, source: dict[str, Any]) -> dict[str, Case]:
    """What all chains do in a stretch: save what they find again in the new layout, and go on."""
    found: dict[str, Case] = {}
    for place, stretches in enumerate(CHAINS.values()):
        options = {**stretches[number].options, "train__steps": STEPS * (number + 1)}
        run = {"run_dir": runs / str(place), "source": source, "options": options}
        if number:
            found[f"resaved{place}"] = partial(resaved, origin=runs / str(place), source=source, options=options)
        found[f"trained{place}"] = partial(train, **run)
    return found
