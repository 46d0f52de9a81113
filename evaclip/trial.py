"""Steps on made-up samples before the first real one: how large a micro-batch fits, found by measuring.

A trial goes through the engine as every step does, on all ranks alike, and ends in an update that is skipped: weights,
moments and counts stay as they were.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from evaclip.accumulation import forward_backward
from evaclip.data.batch import Batch, PackedText
from evaclip.errors import ConfigError
from evaclip.memory import activation_bytes, advice

if TYPE_CHECKING:
    from evaclip.config import ModelConfig, RunConfig
    from evaclip.distributed import Ranks
    from evaclip.engine.protocol import Engine
    from evaclip.loss import ContrastiveLoss

log = logging.getLogger(__name__)

_GIB = 2**30
_SAFE = 0.9  # share of the memory that is planned with; fragmentation and what no estimate knows take the rest


def largest_that_fits(engine: Engine, loss: ContrastiveLoss, config: RunConfig, ranks: Ranks) -> int:
    """The largest micro-batch for which every rank has memory, equal on all ranks.

    Raises:
        ConfigError: Not even one sample fits.
    """

    def over_ranks(number: float) -> float:
        return float(ranks.max(torch.tensor(number, dtype=torch.float64, device=ranks.device)))

    on_gpu = ranks.device.type == "cuda"
    share = config.train.global_batch // ranks.world_size
    room = available_bytes(ranks.device, ranks.local_world_size) - _beside_the_towers(config, share)
    budget = -over_ranks(-room)
    per_sample = activation_bytes(config.model, config.train, frozen=config.optim.frozen, on_gpu=on_gpu)
    found = largest_micro_batch(
        share,
        lambda samples: over_ranks(trial_step(engine, loss, config.model, samples, ranks)),
        budget,
        growth=2 * per_sample,  # twice: it is an estimate
        remedies=lambda: advice(config, ranks.world_size, on_gpu=on_gpu),
    )
    reset_peak(ranks.device)
    log.info("train.micro_batch auto: %d, of %.1f GiB that may be used", found, budget / _GIB)
    return found


def _beside_the_towers(config: RunConfig, share: int) -> float:
    """Bytes of what grows with the batch, not with the micro-batch: images, features, gradients, gathered text."""
    side, dim = config.model.image.image_size, config.model.embed_dim
    return share * (3 * side**2 + 16 * dim) + 8 * config.train.global_batch * dim


def try_a_step(engine: Engine, loss: ContrastiveLoss, config: RunConfig, pieces: int, ranks: Ranks) -> None:
    """Take a step as every one will be, before there is data: too little memory and what cannot compile show now.

    Args:
        engine: That will train.
        loss: That will train.
        config: Of the run.
        pieces: Micro-batches of a step.
        ranks: All take part.
    """
    samples = -(-config.train.global_batch // (ranks.world_size * pieces))
    began = time.perf_counter()
    peak = trial_step(engine, loss, config.model, samples, ranks, pieces=min(pieces, 2))
    reset_peak(ranks.device)
    log.info("trial step: %.1f s, %.1f GiB at its peak", time.perf_counter() - began, peak / _GIB)


def trial_step(
    engine: Engine, loss: ContrastiveLoss, model: ModelConfig, samples: int, ranks: Ranks, *, pieces: int = 2
) -> float:
    """Peak bytes of a step of some micro-batches of so many samples, with captions as long as they can be."""
    reset_peak(ranks.device)
    side = model.image.image_size
    batch = Batch(
        images=torch.randint(0, 256, (samples, 3, side, side), dtype=torch.uint8),
        text=PackedText.pack([[0] * model.text.context_length] * samples),
        seeds=torch.arange(samples),
    ).to(ranks.device)
    optimizer = engine.optimizer
    grad_scale = optimizer.grad_scale.clone()
    output = forward_backward(engine, loss, [batch] * pieces, ranks)
    engine.step(0.0, torch.full_like(output.loss, math.nan))
    optimizer.consecutive_skips.zero_()
    optimizer.grad_scale.copy_(grad_scale)
    return peak_bytes(ranks.device)


def largest_micro_batch(
    share: int,
    measure: Callable[[int], float],
    budget: float,
    *,
    growth: float,
    remedies: Callable[[], Sequence[str]],
) -> int:
    """Samples of a micro-batch such that the share is taken in the fewest equal pieces that fit.

    Sizes 1, 2, 4, ... are measured, each only if the line through the two before says that it fits: nothing but the
    first can run out of memory. All ranks must be given equal budgets and measurements: the smallest, the largest.

    Args:
        share: Samples of this rank in a step.
        measure: Samples -> peak bytes of a forward and backward.
        budget: Bytes that may be used.
        growth: Bytes that the second sample takes at most, by an estimate; without one as many as the first with all
            weights, so that nothing more is tried where these fill half of the budget.
        remedies: What to do if not even one sample fits, for the message.

    Raises:
        ConfigError: Not one sample fits.
    """
    first = measure(1)
    if first > budget:
        sizes = f"one sample at a time takes {first / _GIB:.2f} GiB, and {budget / _GIB:.2f} GiB may be used"
        raise ConfigError("\n  ".join([f"{sizes}; change one of these:", *remedies()]))
    points = [(0, max(0.0, first - growth)), (1, first)]

    def forecast(samples: int) -> float:
        (before, less), (last, most) = points[-2:]
        return most + (most - less) / (last - before) * (samples - last)

    straight = True
    while straight and (size := 2 * points[-1][0]) <= share and forecast(size) <= budget:
        points.append((size, measure(size)))
        straight = points[-1][1] <= budget
    if not straight:  # more than the line said
        points.pop()
    pieces = 1
    while (size := -(-share // pieces)) > points[-1][0] and not (straight and forecast(size) <= budget):
        pieces += 1
    return size


def reset_peak(device: torch.device) -> None:
    """Start ``peak_bytes`` anew; on a GPU, torch's own peak statistics."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): VmHWM begins at VmRSS


def peak_bytes(device: torch.device) -> float:
    """The most that this process held since ``reset_peak``: allocated by torch on a GPU, resident on a CPU.

    Where the system does not reset its high-water mark, that since the process began: larger, never smaller.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    since_start = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _table(Path("/proc/self/status")).get("VmHWM", since_start)


def available_bytes(device: torch.device, processes_on_this_machine: int = 1, root: Path = Path("/")) -> float:
    """What this process may hold, on the scale of ``peak_bytes``: nine tenths of what it has and what is free to it.

    A GPU is taken to be this process's alone; ranks on CPUs share what the host or its control group has free.
    """
    if device.type == "cuda":
        return _SAFE * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    free = min([_table(root / "proc/meminfo")["MemAvailable"], *_control_group_room(root)])
    return _SAFE * (_table(root / "proc/self/status")["VmRSS"] + free / processes_on_this_machine)


def _table(path: Path) -> dict[str, float]:
    """Bytes by name, of the lines that count kilobytes."""
    rows = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {row[0].rstrip(":"): 1024.0 * int(row[1]) for row in rows if row[2:] == ["kB"]}


def _control_group_room(root: Path) -> Iterator[float]:
    """Bytes up to the limit of each control group of this process; file cache gives way and is not counted."""
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        names, mount = ("max", "current", "inactive_file"), root / "sys/fs/cgroup"
        if controllers:  # version 1, where a group of another controller has no such files
            names, mount = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), mount / controllers
        group = Path(path.strip("/"))
        for folder in (mount / place for place in (group, *group.parents)):
            with suppress(OSError, ValueError):  # not there, or "max"
                most, used = (int((folder / f"memory.{name}").read_text(encoding="ascii")) for name in names[:2])
                stat = dict(row.split() for row in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
                yield most - used + int(stat.get(names[2], 0))
