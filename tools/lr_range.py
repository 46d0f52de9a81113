"""Learning-rate range test (arXiv:1506.01186): train with a rate that grows at each step, and draw the loss over it.

    python tools/lr_range.py configs/demo.yaml --lowest 1e-4 --highest 1 --steps 100 --output lr_range.png

The configuration's model, data, batch and optimizer are used as they are, and nothing is written but the picture; the
towers' own rates keep their relation to ``optim.lr``. Under torchrun it runs on all ranks. The loss is that of the
batch before the update, smoothed; the test ends when it is far above its lowest value.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from evaclip import config_file
from evaclip.accumulation import forward_backward
from evaclip.config import DeepSpeedEngineConfig, RunConfig
from evaclip.distributed import Ranks, started
from evaclip.errors import ConfigError, EvaclipError
from evaclip.picture import require_png
from evaclip.plot import INSTALL, save
from evaclip.run import open_run

_SMOOTHING = 0.9  # weight of what was before
_FAR = 1.5  # times the lowest loss


class Point(NamedTuple):
    """One step."""

    lr: float
    loss: float
    smoothed: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a run")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="as for evaclip train")
    parser.add_argument("--lowest", type=float, default=1e-6, help="optim.lr of the first step (default: %(default)s)")
    parser.add_argument("--highest", type=float, default=1.0, help="optim.lr of the last step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps in between (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", type=Path, default=Path("lr_range.png"), help="PNG to be written")
    options = parser.parse_intermixed_args(arguments)
    try:
        require_png(options.output)
        if find_spec("matplotlib") is None:
            raise ConfigError(INSTALL)
        config = ranged(config_file.load(options.config, options.overrides), options.highest, options.steps)
        if not 0 < options.lowest < options.highest:
            raise ConfigError(f"--lowest {options.lowest:g} has to be above 0 and below --highest {options.highest:g}")
        need_group = isinstance(config.engine, DeepSpeedEngineConfig)
        with tempfile.TemporaryDirectory(prefix="lr_range_") as folder, started(need_group=need_group) as ranks:
            points = list(measure(config, options.lowest, Path(folder), ranks))
            ranks.barrier()  # the folder of the main rank, which all use, goes with it
            if ranks.is_main:
                report(points, options.output)
    except EvaclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def ranged(config: RunConfig, highest: float, steps: int) -> RunConfig:
    """The run whose peak is the highest rate, without what a short test does not need.

    Raises:
        ConfigError: There are fewer than ten steps, which show nothing.
    """
    if steps < 10:
        raise ConfigError(f"--steps {steps} show nothing; give at least 10, better 100")
    tree = config.model_dump(mode="json")
    for tower in ("image", "text"):
        if own := tree["optim"][tower]["lr"]:
            tree["optim"][tower]["lr"] = own * highest / tree["optim"]["lr"]
    tree["optim"]["lr"] = highest
    tree["train"] |= {"steps": steps, "samples": None}
    tree |= {"schedule": {}, "eval": {}, "profile": {}, "checkpoint": {}}
    return config_file.validate(tree, "the range test")


def measure(config: RunConfig, lowest: float, folder: Path, ranks: Ranks) -> Iterator[Point]:
    """Train, rate by rate, until the loss has gone far up; the same on every rank."""
    run = open_run(config.model_copy(update={"run_dir": ranks.from_main(str(folder / "run"))}), ranks)
    steps, highest = config.train.steps, config.optim.lr
    mean, best = 0.0, math.inf
    for step, delivery in enumerate(run.stream()):
        micro_batches = [batch.to(ranks.device, non_blocking=True) for batch in delivery.micro_batches]
        factor = (lowest / highest) ** (1 - step / (steps - 1))
        output = forward_backward(run.engine, run.loss, micro_batches, ranks)
        run.engine.step(factor, output.loss)
        loss = float(output.loss)
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        smoothed = mean / (1 - _SMOOTHING ** (step + 1))
        yield Point(highest * factor, loss, smoothed)
        best = min(best, smoothed)
        if not smoothed < _FAR * best:  # or not finite
            return


def notable(points: Sequence[Point]) -> tuple[Point, Point]:
    """Where the smoothed loss fell fastest per power of ten of the rate, and where it was lowest."""
    finite = [point for point in points if math.isfinite(point.smoothed)]
    begin = min(len(finite) - 2, round(1 / (1 - _SMOOTHING)))  # before that, smoothing has little to go by
    falls = [
        ((now.smoothed - before.smoothed) / (math.log(now.lr) - math.log(before.lr)), now)
        for before, now in pairwise(finite[max(0, begin) :])
    ]
    return min(falls)[1], min(finite, key=lambda point: point.smoothed)


def report(points: Sequence[Point], output: Path) -> None:
    """Print what is notable, and draw the curve.

    Raises:
        ConfigError: The loss was never finite twice.
        EvaclipError: The picture cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  an optional dependency, and slow

    if sum(math.isfinite(point.smoothed) for point in points) < 3:
        raise ConfigError("the loss was not finite after two steps; lower --lowest")
    fastest, lowest = notable(points)
    print(f"{len(points)} steps from {points[0].lr:.3g} to {points[-1].lr:.3g}")
    print(f"the loss fell fastest at {fastest.lr:.3g} ({fastest.smoothed:.4g})")
    print(f"and was lowest at {lowest.lr:.3g} ({lowest.smoothed:.4g}); above that it does not learn any more")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    rates = [point.lr for point in points]
    axes.plot(rates, [point.loss for point in points], color="#0072b2", alpha=0.3, label="loss of a batch")
    axes.plot(rates, [point.smoothed for point in points], color="#0072b2", label="smoothed")
    for point, text in ((fastest, "falls fastest"), (lowest, "lowest")):
        axes.axvline(point.lr, color="#d55e00", linestyle=":")
        axes.annotate(
            f"{text}\n{point.lr:.2g}", (point.lr, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8
        )
    axes.set(xscale="log", xlabel="learning rate (optim.lr)", ylabel="training loss")
    axes.set_ylim(top=max(point.smoothed for point in points if math.isfinite(point.smoothed)) * 1.1)
    axes.legend(frameon=False, loc="lower left")
    save(figure, output)
    print(output)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
