"""What went wrong in a step: which samples made it non-finite, which tensors moved far more than they usually do.

Notes are taken on the device and cost a few small kernels; they are read when metrics are published, and only then does
anything wait. A sample with a feature that is not finite is to blame for its step. Where all features are finite, the
samples of a micro-batch are whose backward reached the towers' position embeddings, or the lowest layer that learns
where there are none or they are frozen, with a gradient that was not.

Running values begin anew when a run continues: they decide nothing but what the log says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from evaclip.models.text import TextTower
from evaclip.models.vision import ImageTower
from evaclip.optim.table import layer_of

if TYPE_CHECKING:
    from evaclip.data.batch import Batch, Place
    from evaclip.distributed import Ranks
    from evaclip.loss import LossOutput
    from evaclip.models.clip import CLIP
    from evaclip.models.text import TextTower
    from evaclip.models.vision import ImageTower
    from evaclip.optim.base import TableOptimizer

_MEMORY = 100
"""Updates over which running values average; no spike is told before as many."""
_LOSS_SPIKE = 1.5
"""Multiple of its running value at which the loss is a spike."""
_UPDATE_SPIKE = 2.0
"""Multiple of its running value at which a tensor's update RMS is one. Adam bounds it: after a gradient a thousand
times the usual, with betas 0.9 and 0.98, it is three times the usual."""
_LEAST_NUMBERS = 256
"""Update RMS of smaller tensors is not looked at: a mean over few numbers jumps by itself."""


class SkippedStep(NamedTuple):
    """A step that changed nothing because loss or gradient was not finite."""

    step: int
    loss: float
    grad_norm: float
    cause: str
    """``feature`` or ``gradient``: where a number that is not finite was seen first; ``sum`` where neither a feature
    nor the gradient of a position embedding had one."""
    places: list[Place]
    """The samples to blame, of all ranks; those of the whole micro-batch for a gradient, none for a sum."""


class _Note(NamedTuple):
    """One step of this rank, on the device but for the places."""

    step: int
    places: Sequence[Sequence[Place]]
    skipped: Tensor
    loss: Tensor
    grad_norm: Tensor
    features: Tensor
    """bool [samples]: finite."""
    gradients: list[Tensor]
    """bool [], one per backward and tower: finite."""


class Anomalies:
    """Notes since the last publication."""

    def __init__(self, clip: CLIP, optimizer: TableOptimizer) -> None:
        self._optimizer = optimizer
        self._notes: list[_Note] = []
        self._gradients: list[Tensor] = []
        for parameter in _lowest(clip):
            parameter.register_hook(lambda grad: self._gradients.append(grad.isfinite().all()))
        numbers = 1 + len(optimizer.rows)  # loss, then update RMS by row
        device = optimizer.loss.device
        self._running = torch.zeros(numbers, device=device)
        self._worst = torch.zeros(numbers, device=device)  # multiples of the running values
        limits = [_UPDATE_SPIKE if row.numel >= _LEAST_NUMBERS else math.inf for row in optimizer.rows]
        self._limits = torch.tensor([_LOSS_SPIKE, *limits], device=device)
        self._seen = torch.zeros((), device=device)

    def step(self, number: int, micro_batches: Sequence[Batch], output: LossOutput) -> None:
        """Take notes of a step that was just attempted; waits for nothing."""
        optimizer = self._optimizer
        skipped = optimizer.consecutive_skips > 0
        places = [batch.places for batch in micro_batches]
        self._notes.append(
            _Note(number, places, skipped, output.loss, optimizer.grad_norm, output.finite, self._gradients)
        )
        self._gradients = []

        values = torch.cat([output.loss.reshape(1).float(), optimizer.update_rms])
        multiples = values / self._running
        spiked = ~skipped & (self._seen >= _MEMORY) & (multiples > self._limits)
        self._worst = torch.where(spiked, torch.maximum(self._worst, multiples), self._worst)
        share = 1 / (self._seen + 1).clamp(max=_MEMORY)
        self._running = torch.where(skipped, self._running, self._running + share * (values - self._running))
        self._seen = self._seen + ~skipped

    def spikes(self) -> dict[str, float]:
        """Name of each tensor (or ``loss``) that spiked since the last call -> how many times its running value."""
        names = ("loss", *(row.name for row in self._optimizer.rows))
        found = {name: worst for name, worst in zip(names, self._worst.tolist(), strict=True) if worst > 0}
        self._worst.zero_()
        return found

    def skipped_steps(self, ranks: Ranks) -> list[SkippedStep]:
        """The skipped steps since the last call, equal on all ranks; communicates only where there are any."""
        notes, self._notes = self._notes, []
        flags = torch.stack([note.skipped for note in notes]).tolist() if notes else []
        own = [note for note, skipped in zip(notes, flags, strict=True) if skipped]
        if not own:
            return []
        gathered = ranks.gather_objects([_to_blame(note) for note in own])
        steps: list[SkippedStep] = []
        for note, *of_ranks in zip(own, *gathered, strict=True):
            by_cause = {"feature": [p for features, _ in of_ranks for p in features]}
            by_cause["gradient"] = [p for _, gradients in of_ranks for p in gradients]
            cause = next((name for name, places in by_cause.items() if places), "sum")
            numbers = float(note.loss), float(note.grad_norm)
            steps.append(SkippedStep(note.step, *numbers, cause, by_cause.get(cause, [])))
        return steps


def _lowest(clip: CLIP) -> Iterator[Tensor]:
    """Of each tower that learns, the parameter that backward reaches last."""
    for tower in (clip.image, clip.text):
        learning = {name: p for name, p in tower.named_parameters() if p.requires_grad}
        if isinstance(tower, ImageTower | TextTower):
            layers = {name: layer_of(name, len(tower.blocks)) for name in learning}
        else:
            layers = tower.layers().of or {}
        if "position_embedding" in learning:
            yield learning["position_embedding"]
        elif learning:
            yield learning[min(learning, key=lambda name, layers=layers: layers.get(name, 0))]


def _to_blame(note: _Note) -> tuple[list[Place], list[Place]]:
    """This rank's samples with a bad feature, and those of micro-batches with a bad gradient."""
    samples = [place for places in note.places for place in places]
    features = [place for place, finite in zip(samples, note.features.tolist(), strict=True) if not finite]
    per_backward = len(note.gradients) // len(note.places)
    gradients: list[Place] = []
    for number, places in enumerate(note.places):
        if not all(note.gradients[number * per_backward : (number + 1) * per_backward]):
            gradients.extend(places)
    return features, gradients
