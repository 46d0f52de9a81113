"""What exact accumulation costs: one step in k micro-batches against plain steps on the same micro-batches.

    python tools/benchmark_accumulation.py --threads 2

Both are forward and backward through the torch engine, without an update. The model has EVA02-CLIP-B-16's widths and
fewer blocks, and leaves out half of the patches; samples are random. In each round k plain steps take one micro-batch
each, then one step takes them all, so that the ratio of times is that of times per sample. Figures are medians, the
ratio is the median of each round's ratio; processor time is given beside wall time, which other work on the machine
changes. With a backward that costs two forwards the ratio is 4/3.

The script fails if the gradient of the k micro-batches is not that of the whole batch, in fp32. Memory is measured in a
process for each k, above weights, gradients and the uint8 images, after a step on two samples; freed memory goes back
to the system there.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from benchmark_loss import extra_memory, own_process, timed

from evaclip.accumulation import forward_backward
from evaclip.config import RunConfig
from evaclip.data.batch import Batch, PackedText
from evaclip.distributed import Ranks
from evaclip.engine import create_engine
from evaclip.loss import ContrastiveLoss
from evaclip.models.clip import create_model

AGREEMENT = 1e-5
"""Most distance of the two gradients, of their norm: fp32 sums in another order."""


class Settings(NamedTuple):
    """What all processes agree on."""

    blocks: int
    micro_batch: int
    precision: str
    threads: int


class Steps:
    """Towers, loss and engine, and steps without an update."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self.ranks = Ranks(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        towers = {"image": {"depth": settings.blocks, "token_drop": 0.5}, "text": {"depth": settings.blocks}}
        config = RunConfig.model_validate(
            {
                "run_dir": "unused",
                "model": {"name": "EVA02-CLIP-B-16", **towers},
                "data": {"sources": {"random": {"kind": "synthetic"}}},
                "train": {"steps": 1, "global_batch": 2, "precision": settings.precision},
                "schedule": {"warmup_steps": 0},
            }
        )
        self.clip = create_model(config.model, device=self.ranks.device)
        self.loss = ContrastiveLoss(config.loss, self.ranks.device)
        self.engine = create_engine(config, self.clip, self.loss, self.ranks)

    def run(self, micro_batches: Sequence[Batch]) -> None:
        """Add the gradient of one global batch."""
        forward_backward(self.engine, self.loss, micro_batches, self.ranks)

    def run_each(self, micro_batches: Sequence[Batch]) -> None:
        """Add the gradients of as many global batches."""
        for batch in micro_batches:
            self.run([batch])

    def gradient(self, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
        """The gradient of one global batch by each parameter."""
        parameters = [*self.clip.parameters(), *self.loss.parameters()]
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        self.run(micro_batches)
        return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]

    def batches(self, samples: int, pieces: int) -> list[Batch]:
        """Random samples, the same in any number of pieces."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (samples, 3, 224, 224), dtype=torch.uint8, generator=generator)
        lengths = torch.randint(6, 30, (samples,), generator=generator).tolist()
        captions = [torch.randint(0, 49408, (length,), generator=generator).tolist() for length in lengths]
        seeds = torch.randint(0, 1 << 62, (samples,), generator=generator)
        bounds = [number * samples // pieces for number in range(pieces + 1)]
        parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
        return [Batch(images[p], PackedText.pack(captions[p]), seeds[p]).to(self.ranks.device) for p in parts]


def _memory(settings: Settings, pieces: int) -> float:
    """In a process of its own: bytes that a step in so many micro-batches takes."""
    steps = Steps(settings)
    steps.run(steps.batches(2, 1))
    micro_batches = steps.batches(pieces * settings.micro_batch, pieces)
    return extra_memory(lambda: steps.run(micro_batches), steps.ranks.device)[0]


def _difference(settings: Settings, pieces: int) -> float:
    """Distance between the gradients of the pieces and of the whole batch, of its norm; in fp32."""
    steps, samples = Steps(settings._replace(precision="fp32")), pieces * settings.micro_batch
    whole = steps.gradient(steps.batches(samples, 1))
    parts = steps.gradient(steps.batches(samples, pieces))
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(parts, whole, strict=True))
    return (apart / sum(float(a.double().square().sum()) for a in whole)) ** 0.5


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=4, help="micro-batches, k (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=32, help="samples of one (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=2, help="of each tower (default: %(default)s)")
    parser.add_argument("--precision", default=precision, help="of what is measured (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--memory-of", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="k (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    settings = Settings(arguments.blocks, arguments.micro_batch, arguments.precision, arguments.threads)
    pieces = arguments.pieces

    difference = _difference(settings, pieces)
    print(f"gradient of {pieces} micro-batches off that of the whole batch, of its norm: {difference:.1e}")
    if not difference <= AGREEMENT:
        print(f"error: that is more than {AGREEMENT}: the two do not do the same work", file=sys.stderr)
        return 1
    _print_times(settings, pieces, arguments.rounds)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # else glibc keeps pieces of captions' tensors, which differ in size
    extra: list[float] = []
    for number in arguments.memory_of:
        with own_process() as process:
            extra.append(process.submit(_memory, settings, number).result())
        print(f"{number:3d} micro-batches: {extra[-1] / 2**20:8.1f} MiB")
    if extra:
        print(f"largest / smallest: {max(extra) / min(extra):.2f}")
    return 0


def _print_times(settings: Settings, pieces: int, rounds: int) -> None:
    steps, samples = Steps(settings), pieces * settings.micro_batch
    micro_batches = steps.batches(samples, pieces)
    steps.run(micro_batches)
    taken: list[tuple[float, ...]] = []
    for _ in range(rounds):
        plain = timed(lambda: steps.run_each(micro_batches), steps.ranks.device)
        taken.append((*plain, *timed(lambda: steps.run(micro_batches), steps.ranks.device)))
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu with {settings.threads} threads"
    print(
        f"{pieces} micro-batches of {settings.micro_batch} in {settings.precision}, {place}, torch {torch.__version__}"
    )
    wall, busy, wall_accumulated, busy_accumulated = (statistics.median(column) for column in zip(*taken, strict=True))
    for name, seconds, processor in (("plain", wall, busy), ("accumulated", wall_accumulated, busy_accumulated)):
        print(f"{name:11s} {seconds / samples * 1e3:9.2f} ms a sample {processor / samples * 1e3:9.2f} ms busy")
    ratios = [statistics.median(row[at + 2] / row[at] for row in taken) for at in (0, 1)]
    print(f"accumulated / plain: time {ratios[0]:.3f}, busy {ratios[1]:.3f}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
