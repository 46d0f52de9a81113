"""How far a run is, for people: a bar on a terminal, log lines everywhere else. Rank 0 only; decides nothing."""

from __future__ import annotations

import logging
import sys
from datetime import timedelta

from tqdm import tqdm

from evaclip.history import Row

_log = logging.getLogger(__name__)

_FIELDS = (
    ("loss", "train/loss", "{:.4f}"),
    ("i2t", "train/accuracy_image_to_text", "{:.3f}"),
    ("t2i", "train/accuracy_text_to_image", "{:.3f}"),
    ("scale", "train/logit_scale", "{:.2f}"),
    ("grad", "train/grad_norm", "{:.3g}"),
    ("lr", "lr/image", "{:.3g}"),
    ("lr", "lr/text", "{:.3g}"),  # where the image tower is frozen and has none
    ("samples/s", "speed/samples_per_second", "{:,.0f}"),
    ("wait", "speed/data_wait_fraction", "{:.0%}"),
    ("mfu", "speed/mfu", "{:.1%}"),
    ("GiB", "memory/peak_gib", "{:.1f}"),
)


def summary(row: Row) -> str:
    """Return what a person follows of a row, as ``loss 2.3146, samples/s 1,234``; metrics it lacks are left out."""
    parts: dict[str, str] = {}
    for label, name, form in _FIELDS:
        if name in row:
            parts.setdefault(label, _number(row[name], form))
    parts |= {name: _number(value, "{:.4f}") for name, value in row.items() if name.startswith("eval/")}
    return ", ".join(f"{label} {number}" for label, number in parts.items())


def postfix(row: Row) -> str:
    """Return the part of ``summary`` that stands beside a progress bar: loss and speed."""
    return summary({name: row[name] for name in ("train/loss", "speed/samples_per_second") if name in row})


def seconds_left(row: Row, *, steps: int) -> float | None:
    """Return how long the rest takes at the row's speed; None where the row has no speed."""
    step, samples, per_second = row["step"], row["samples"], row.get("speed/samples_per_second")
    if not (step and samples and per_second):
        return None
    return (steps - step) * (samples / step) / per_second


def time_left(row: Row, *, steps: int) -> str | None:
    """Return the same as ``1:02:03``."""
    seconds = seconds_left(row, steps=steps)
    return None if seconds is None else str(timedelta(seconds=round(seconds)))


class Progress:
    """Shows a run's steps as a bar if stderr is a terminal, and its rows as log lines otherwise.

    Args:
        steps: Steps of the whole run.
        step: Steps done before.
    """

    def __init__(self, *, steps: int, step: int) -> None:
        self._steps = steps
        self._step = step
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True) if terminal else None

    def advance(self, step: int) -> None:
        """Move on to ``step``, the number of steps done."""
        if self._bar is not None:
            self._bar.update(step - self._step)
        self._step = step

    def publish(self, row: Row) -> None:
        """Show a row of metrics."""
        if self._bar is not None:
            self._bar.set_postfix_str(postfix(row))
            return
        left = time_left(row, steps=self._steps)
        _log.info("step %d of %d: %s%s", row["step"], self._steps, summary(row), f", {left} left" if left else "")

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else form.format(value)
