"""Sums on the device: what the training step computes becomes a row of metrics without the step waiting for it.

Launching the additions needs no synchronisation; publishing is the one transfer from device to host of a window. What
the names mean, and whether a metric is averaged, added up or taken last, is declared in ``metrics``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from evaclip.metrics import find_metric


class Meter:
    """Running sums of device scalars; reading them is one transfer, adding to them is none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: dict[str, Float[Tensor, ""]] = {}  # float64: a sum over many steps keeps the digits of each
        self._counts: dict[str, int] = {}

    @torch.no_grad()
    def update(self, scalars: Mapping[str, Float[Tensor, ""] | Int[Tensor, ""]]) -> None:
        """Add the scalars of one step, by the kind of each metric; launches kernels and waits for none.

        Args:
            scalars: Declared name -> one number on the meter's device; its dtype is free.

        Raises:
            ValueError: A name is not declared.
        """
        for name, scalar in scalars.items():
            assert scalar.numel() == 1, f"{name} has shape {tuple(scalar.shape)}"
            assert scalar.device.type == self._device.type, f"{name} is on {scalar.device}, not on {self._device}"
            value = scalar.detach().reshape(()).to(torch.float64, copy=True)
            if name in self._values and find_metric(name).kind != "last":
                value += self._values[name]
            elif name not in self._values:
                find_metric(name)
            self._values[name] = value
            self._counts[name] = self._counts.get(name, 0) + 1

    def publish(self) -> dict[str, float]:
        """Return name -> mean, sum or last value since the previous publication, and start anew.

        A mean over steps of which one was not finite is not finite: such steps are not hidden.
        """
        published = {
            name: value / count if find_metric(name).kind == "mean" else value
            for name, (value, count) in self.state().items()
        }
        self._values.clear()
        self._counts.clear()
        return published

    def state(self) -> dict[str, tuple[float, int]]:
        """Return name -> (sum or last value, number of updates): what a checkpoint between two rows has to keep."""
        if not self._values:
            return {}
        totals = torch.stack(list(self._values.values())).tolist()  # the one transfer
        return {name: (total, self._counts[name]) for name, total in zip(self._values, totals, strict=True)}

    def restore(self, state: Mapping[str, tuple[float, int]]) -> None:
        """Continue from what ``state`` returned."""
        self._values = {
            name: torch.tensor(value, dtype=torch.float64, device=self._device) for name, (value, _) in state.items()
        }
        self._counts = {name: count for name, (_, count) in state.items()}


def peak_memory_gib(device: torch.device) -> dict[str, float]:
    """Return ``memory/peak_gib`` since the previous call; empty for anything but a GPU."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return {"memory/peak_gib": peak}
