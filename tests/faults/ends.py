"""What a run ended with: every bit that another one can be compared by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from evaclip.checkpoint import CheckpointReader, Entry, find_checkpoint
from evaclip.history import Row, load_history
from evaclip.metrics import OF_THE_MACHINE


def tensors(run_dir: Path) -> dict[tuple[str, str], Tensor]:
    """All weights and moments of the newest checkpoint, as integers."""
    reader = CheckpointReader(find_checkpoint(run_dir))
    found: dict[tuple[str, str], Tensor] = {}
    for name, shape in reader.state.shapes.items():
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            values = torch.empty(torch.Size(shape).numel())
            reader.fill(Entry(kind, name, 0, values))
            found[kind, name] = values.view(torch.int32)
    return found


def rows(run_dir: Path) -> list[Row]:
    """The history without times and rates."""
    history = load_history(run_dir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(OF_THE_MACHINE)} for row in history]


def different(one: dict[tuple[str, str], Tensor], other: dict[tuple[str, str], Tensor]) -> list[tuple[str, str]]:
    """Tensors that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def assert_same_end(run_dir: Path, reference: Path) -> None:
    """Weights, moments, state and history of two runs are equal bit for bit."""
    assert different(tensors(run_dir), tensors(reference)) == []
    assert rows(run_dir) == rows(reference)
    states = [CheckpointReader(find_checkpoint(folder)).state for folder in (run_dir, reference)]
    assert replace(states[0], versions={}) == replace(states[1], versions={})


def assert_carried_over(folder: Path, ranks: int) -> None:
    """What ``elastic.resaved`` left: the same bits, written by so many ranks."""
    before, after = tensors(folder / "before"), tensors(folder / "after")
    assert CheckpointReader(find_checkpoint(folder / "after")).state.versions["ranks"] == str(ranks)
    assert all(values.any() for (kind, _), values in before.items() if kind != "weight"), (
        "no moments to be carried over"
    )
    assert different(before, after) == []
