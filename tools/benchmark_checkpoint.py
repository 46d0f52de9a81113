"""How long a checkpoint keeps training waiting, and its bandwidth, against torch.save; and what checksums cost.

    python tools/benchmark_checkpoint.py --model EVA02-CLIP-B-16 --folder DIR

The state is that of LAMB or AdamW: weights and two moments of every parameter of a model, in fp32, 12 bytes each. Ours
is written as in training: ``save`` returns when the state is copied, and steps (a product of two matrices) go on until
the checkpoint is complete. Its stall is the copy and what those steps took longer than steps just before; on few cores
the writing thread takes some of theirs. torch.save is called between two steps, and its whole time is its stall, though
it flushes nothing; its bandwidth counts a flush. Rounds are interleaved, figures are medians, ratios medians of each
round's ratio. A round that is not counted warms up and allocates. Processor time (busy) is given beside wall time,
which other work on the machine changes; steps are not part of it. The script fails where the two files do not hold the
same bytes of tensors.

The checksum's cost is that of writing a file of at most 256 MB, flush included, with the checksum against without, one
after the other and in changing order, four times in a round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from evaclip.checkpoint import CheckpointReader, Entry, RunState
from evaclip.checkpoint_writer import CheckpointWriter, Staging, write_blocks, write_part
from evaclip.config import CheckpointConfig, ModelConfig
from evaclip.config_file import validate
from evaclip.distributed import Ranks
from evaclip.models.clip import CLIP

KINDS = ("weight", "exp_avg", "exp_avg_sq")


class Times(NamedTuple):
    """Seconds of one checkpoint."""

    stall: float
    """Training did nothing, or less."""
    copy: float
    """Of it, until ``save`` returned."""
    complete: float
    """Until everything was on the disk."""
    busy: float
    """Of a processor, in all threads."""


class Steps:
    """What stands for training: steps of equal work."""

    def __init__(self, device: torch.device) -> None:
        size = 4096 if device.type == "cuda" else 768
        self._a = torch.randn(size, size, device=device)
        self._device = device

    def take(self) -> float:
        """One step; its seconds."""
        start = time.perf_counter()
        _ = self._a @ self._a
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="EVA02-CLIP-B-16", help="named model (default: %(default)s)")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    with torch.device("meta"):
        model = CLIP(ModelConfig.model_validate({"name": arguments.model}))
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    generator = torch.Generator(device).manual_seed(0)
    state = {
        kind: {name: torch.randn(shape, device=device, generator=generator) for name, shape in shapes.items()}
        for kind in KINDS
    }
    size = sum(value.nbytes for values in state.values() for value in values.values())
    print(
        f"{arguments.model}, {size / 12e6:.1f} M parameters, {size / 1e6:.0f} MB, {device}, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        taken, differing = _measure(Path(folder), state, shapes, arguments.rounds, device)
        ratio = _checksum_cost(Path(folder) / "part", state, arguments.rounds, device)
    _print(taken, size)
    print(f"writing with / without checksum: {ratio:.3f}")
    if differing:
        print(f"error: {differing} differs: the two did not write the same bytes", file=sys.stderr)
    return int(bool(differing))


def _entries(state: dict[str, dict[str, Tensor]]) -> list[Entry]:
    return [Entry(kind, name, 0, value.view(-1)) for kind, values in state.items() for name, value in values.items()]


def _measure(
    folder: Path, state: dict[str, dict[str, Tensor]], shapes: dict[str, list[int]], rounds: int, device: torch.device
) -> tuple[dict[str, list[Times]], str | None]:
    """Times of all rounds by name, and the first tensor that differs between the two files."""
    tree = {"run_dir": str(folder), "train": {"steps": 1, "global_batch": 2}, "checkpoint": {"keep_last": 1}}
    config = validate({**tree, "data": {"sources": {"none": {"kind": "synthetic"}}}}, "benchmark")
    assert isinstance(config.checkpoint, CheckpointConfig)
    writer = CheckpointWriter(folder, config, Ranks(device=device))
    steps = Steps(device)
    taken: dict[str, list[Times]] = {"ours": [], "torch.save": []}
    differing = None
    for number in range(rounds + 1):
        progress = RunState(number, 0, 0, 1.0, 1, {}, {}, shapes, {}, {}, {})
        ours = _ours(writer, progress, state, steps)
        theirs = _torch_save(folder / "state.pt", state)
        if number:
            taken["ours"].append(ours)
            taken["torch.save"].append(theirs)
        else:
            differing = _first_difference(folder / f"step_{0:08d}", folder / "state.pt", shapes)
        (folder / "state.pt").unlink()
    writer.leave()
    return taken, differing


def _ours(writer: CheckpointWriter, progress: RunState, state: dict[str, dict[str, Tensor]], steps: Steps) -> Times:
    before = statistics.median(steps.take() for _ in range(9))
    start, busy = time.perf_counter(), time.process_time()
    writer.save(progress, _entries(state), final=False)
    copied, own = time.perf_counter(), time.thread_time()
    slower = 0.0
    while writer.newest != progress.step:
        slower += steps.take() - before
    complete = time.perf_counter()
    busy = time.process_time() - busy - (time.thread_time() - own)
    return Times(copied - start + max(0.0, slower), copied - start, complete - start, busy)


def _torch_save(path: Path, state: dict[str, dict[str, Tensor]]) -> Times:
    start, busy = time.perf_counter(), time.process_time()
    torch.save(state, path)
    saved = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return Times(saved - start, saved - start, time.perf_counter() - start, time.process_time() - busy)


def _first_difference(checkpoint: Path, file: Path, shapes: dict[str, list[int]]) -> str | None:
    reader = CheckpointReader(checkpoint)
    theirs = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    for kind in KINDS:
        for name in shapes:
            expected = theirs[kind][name].view(-1)
            loaded = torch.empty_like(expected)
            reader.fill(Entry(kind, name, 0, loaded))
            if not torch.equal(loaded.view(torch.int32), expected.view(torch.int32)):
                return f"{kind} of {name}"
    return None


def _checksum_cost(path: Path, state: dict[str, dict[str, Tensor]], rounds: int, device: torch.device) -> float:
    """Median over rounds of the time with checksum over the time without."""
    staging = Staging(pinned=device.type == "cuda")
    values = torch.cat([value.view(-1) for value in state["weight"].values()])[: 1 << 26]
    header = staging.fill([Entry("weight", "all", 0, values)])
    ratios: list[float] = []
    for number in range(4 * rounds + 1):
        seconds: dict[bool, float] = {}
        for with_checksum in (number % 2 == 0, number % 2 == 1):
            start = time.perf_counter()
            (write_part if with_checksum else write_blocks)(path, header, staging)
            seconds[with_checksum] = time.perf_counter() - start
            path.unlink()
        if number:  # the first one warms up
            ratios.append(seconds[True] / seconds[False])
    return statistics.median(ratios)


def _print(taken: dict[str, list[Times]], size: int) -> None:
    for name, rounds in taken.items():
        stall, copy, complete, busy = (statistics.median(column) for column in zip(*rounds, strict=True))
        rates = f"complete after {complete * 1e3:.0f} ms, {size / complete / 1e6:.0f} MB/s, {busy * 1e3:.0f} ms busy"
        print(f"{name:10s} stall {stall * 1e3:.0f} ms, {copy * 1e3:.0f} ms of it not a step; {rates}")
    pairs = list(zip(taken["torch.save"], taken["ours"], strict=True))
    stall, copy = (statistics.median(a[column] / b[column] for a, b in pairs) for column in (0, 1))
    complete = statistics.median(a.complete / b.complete for a, b in pairs)
    print(f"torch.save / ours: stall {stall:.2f}, without slower steps {copy:.2f}, complete {complete:.2f}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
