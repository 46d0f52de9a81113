"""Where the time of a few steps goes, and where the memory of a GPU was when it ran out.

A trace is taken on rank 0 alone: all ranks do the same and wait for each other, and a trace has megabytes per step.
Which rank is slow is told by ``ranks.json``. A window of steps that a continued run has behind it is not repeated; one
that it enters in the middle is traced from there on; steps that are repeated after a kill are traced again.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from torch.autograd.profiler_util import EventList

    from evaclip.config import ProfileConfig
    from evaclip.distributed import Ranks

log = logging.getLogger(__name__)

_OPERATIONS = 15
_HISTORY = 100_000  # allocations and frees that are remembered, some kilobytes each


class Profiler:
    """Traces the steps of ``profile.start_step``; on other ranks than rank 0 it does nothing.

    Args:
        config: ``profile``.
        run_dir: Traces go to ``run_dir/profile``.
        last_step: Of the run.
        ranks: The peers.
    """

    def __init__(self, config: ProfileConfig, run_dir: Path, last_step: int, ranks: Ranks) -> None:
        first = config.start_step if ranks.is_main else None
        self._steps = range(first, min(first + config.num_steps, last_step + 1)) if first else range(0)
        self._folder = run_dir / "profile"
        self._on_gpu = ranks.device.type == "cuda"
        self._running: tuple[int, profile] | None = None

    def begin(self, step: int) -> None:
        """A step is about to be taken, its data still to come."""
        if self._running is None and step in self._steps:
            devices = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
            self._running = step, profile(activities=devices, acc_events=True)
            self._running[1].start()

    def end(self, step: int) -> None:
        """A step was taken; behind the last one of the window, wait for the device, write the trace and tell of it."""
        if self._running is None or step + 1 in self._steps:
            return
        first, trace = self._running
        self._running = None
        trace.stop()
        path = self._folder / f"step_{first:08d}_rank_0.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            temporary = path.with_name(f".{path.name}")
            trace.export_chrome_trace(str(temporary))
            temporary.replace(path)
            where = str(path)
        except OSError as error:  # a full disk costs the trace, not the run
            where = f"not written: {error}"
        table = format_operations(trace.key_averages(), on_gpu=self._on_gpu)
        log.info("operations of steps %d to %d by their own time; trace: %s\n%s", first, step, where, table)

    def close(self) -> None:
        """Drop a trace that is not complete."""
        if self._running:
            self._running[1].stop()
            self._running = None


def format_operations(events: EventList, *, on_gpu: bool) -> str:
    """The operations with the most time of their own, as a table; by the GPU's time if there is one."""
    rows = [event for event in events if event.device_type.name == "CPU"]  # kernels count for what launched them
    times = [(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event) for event in rows]
    total = sum(time for time, _ in times) or 1.0
    lines = [f"{'operation':44} {'calls':>8} {'CPU ms':>11}" + f" {'GPU ms':>11}" * on_gpu + f" {'share':>7}"]
    for time, event in sorted(times, key=lambda pair: pair[0], reverse=True)[:_OPERATIONS]:
        gpu = f" {event.self_device_time_total / 1000:11,.2f}" if on_gpu else ""
        cpu = f"{event.self_cpu_time_total / 1000:11,.2f}"
        lines.append(f"{event.key[:44]:44} {event.count:8,d} {cpu}{gpu} {time / total:7.1%}")
    return "\n".join(lines)


def record_memory(config: ProfileConfig, device: torch.device) -> None:
    """Keep the history of a GPU's memory for ``dump_memory``, if it is asked for."""
    if config.memory_history and device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=_HISTORY, stacks="python")


def dump_memory(run_dir: Path, ranks: Ranks) -> Path | None:
    """Write what lies in the GPU's memory; None where it cannot be written, for the error behind it matters more."""
    path = run_dir / "profile" / f"out_of_memory_rank_{ranks.rank}.pickle"
    with suppress(OSError, RuntimeError, MemoryError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        torch.cuda.memory._dump_snapshot(str(temporary))
        return temporary.replace(path)
    return None
