"""What the machines under a run do: processors, memory, GPUs, disk and network, once per node and row.

Each node is measured by the first of its ranks. What a machine does not tell is left out. A look at the counters takes
a millisecond, and none of the GPU figures waits for the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from evaclip.metrics import METRICS

if TYPE_CHECKING:
    from evaclip.distributed import Ranks

_PREFIX = "system/NODE/"
_FIGURES = [name.removeprefix(_PREFIX) for name in METRICS if name.startswith(_PREFIX)]


class Counters(NamedTuple):
    """What a node has read and received since it was started."""

    seconds: float
    disk_read: float
    """Bytes; NaN where the system does not tell."""
    network_received: float
    """Bytes through all interfaces but the loopback; what bypasses the system (InfiniBand) is not seen."""

    @classmethod
    def now(cls) -> Counters:
        """The counters of this machine."""
        disk = psutil.disk_io_counters()
        received = sum(nic.bytes_recv for name, nic in psutil.net_io_counters(pernic=True).items() if name != "lo")
        return cls(time.monotonic(), math.nan if disk is None else disk.read_bytes, received)

    def rates(self, before: Counters) -> dict[str, float]:
        """MB per second since ``before``."""
        megabytes = 1e6 * max(self.seconds - before.seconds, 1e-9)
        return {
            "disk_read_mb_per_second": (self.disk_read - before.disk_read) / megabytes,
            "network_received_mb_per_second": (self.network_received - before.network_received) / megabytes,
        }


class NodeMeter:
    """Measures this rank's node, if it is the first rank there; every rank has one.

    Communicates eight numbers per rank at each publication.

    Args:
        ranks: The peers.
        nodes: Name of each rank's machine.
    """

    def __init__(self, ranks: Ranks, nodes: Sequence[str]) -> None:
        self._ranks = ranks
        self._leaders = {nodes.index(node): node for node in dict.fromkeys(nodes)}  # rank -> node
        self._before = Counters.now()
        psutil.cpu_percent()  # the next call tells of the time since this one

    def publish(self) -> dict[str, float]:
        """The ``system/`` metrics of all nodes since the last call, on every rank."""
        own = self._measure() if self._ranks.rank in self._leaders else {}
        row = [own.get(name, math.nan) for name in _FIGURES]
        table = self._ranks.gather_rows(torch.tensor([row], dtype=torch.float64, device=self._ranks.device)).tolist()
        return {
            f"system/{node}/{name}": value
            for rank, node in self._leaders.items()
            for name, value in zip(_FIGURES, table[rank], strict=True)
            if not math.isnan(value)
        }

    def _measure(self) -> dict[str, float]:
        now = Counters.now()
        rates, self._before = now.rates(self._before), now
        processors = {"cpu_fraction": psutil.cpu_percent() / 100}
        memory = psutil.virtual_memory()
        return {**processors, "memory_fraction": 1 - memory.available / memory.total, **rates, **_gpus()}


def _gpus() -> dict[str, float]:
    """Means over the GPUs that this process sees; nothing without NVIDIA's management library."""
    if not torch.cuda.is_available() or find_spec("pynvml") is None:
        return {}
    failure = import_module("pynvml").NVMLError
    figures: dict[str, Callable[[int], float]] = {
        "gpu_fraction": lambda gpu: torch.cuda.utilization(gpu) / 100,
        "gpu_memory_fraction": _memory_fraction,
        "gpu_celsius": torch.cuda.temperature,
        "gpu_watts": lambda gpu: torch.cuda.power_draw(gpu) / 1000,
    }
    found: dict[str, float] = {}
    for name, figure in figures.items():
        try:
            values = [figure(gpu) for gpu in range(torch.cuda.device_count())]
        except failure:  # not every GPU tells everything
            continue
        found[name] = sum(values) / len(values)
    return found


def _memory_fraction(gpu: int) -> float:
    return torch.cuda.device_memory_used(gpu) / torch.cuda.get_device_properties(gpu).total_memory
