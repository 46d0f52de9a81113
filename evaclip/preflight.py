"""Checks of the nodes before a run starts: each node's own facts, and how fast ranks reach one another.

Ranks run it as they run a training (``cluster``). The first rank of each node tells its facts, and looks whether it
sees in ``run_dir/preflight`` what rank 0 has written; rank 0 makes one table of all and ends with an error that names
the nodes where something is wrong. Nodes that do not come so far are named by the launcher.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch.cuda import nccl

from evaclip.checkpoint_names import complete
from evaclip.config import DeepSpeedEngineConfig, RunConfig, ShardSource
from evaclip.data.tar import expand_names
from evaclip.distributed import Ranks, started
from evaclip.errors import EvaclipError
from evaclip.heartbeat import beat
from evaclip.models.clip import CLIP

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "deepspeed", "numpy", "pillow", "simplejpeg", "webdataset", "safetensors", "triton", "flash-attn")
_CLOCK_SECONDS = 2.0
"""That two nodes' clocks may be apart; times in logs and names of files depend on them, no step does."""
_IDLE_SHARE = 0.05  # of a GPU's memory that may be in use before we come
_STATE_BYTES = 12  # a parameter's weight and two moments in a checkpoint
_DRIVER = Path("/proc/driver/nvidia/version")
_REDUCED_MIB = {"cuda": 256, "cpu": 16}


class Facts(NamedTuple):
    """What one node knows of itself."""

    node: str
    versions: dict[str, str]
    gpus: str
    problems: list[str]
    free_gib: float
    seconds: float
    """Its clock, just after all ranks met."""


def preflight(config: RunConfig) -> None:
    """Check all nodes and print one table.

    Raises:
        EvaclipError: Something is wrong; the message names the nodes and what to do. It may be gone at the next start.
    """
    beat("start")
    with started(need_group=isinstance(config.engine, DeepSpeedEngineConfig)) as ranks:
        token = ranks.from_main(f"{time.time()} {os.getpid()}")
        folder = Path(config.run_dir) / "preflight"
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "shared.txt").write_text(token, encoding="utf-8")
        ranks.barrier()
        leads = int(os.environ.get("LOCAL_RANK", "0")) == 0
        now = time.time()
        facts = _facts(config, folder, token, now, ranks) if leads else None
        gathered = [found for found in ranks.gather_objects(facts) if found]
        beat("end")  # imports are done: the launcher readies the next ranks now
        speed = _all_reduce(ranks)
        problems: list[str] = []
        if ranks.is_main:
            problems = [f"{fact.node}: {problem}" for fact in gathered for problem in fact.problems]
            problems += list(_differences(gathered))
            print(_table(gathered, speed, ranks), flush=True)  # noqa: T201  for the job's output
        problems = ranks.from_main(problems)
    if problems:
        error = EvaclipError("\n  ".join(["preflight found what would stop the run:", *problems]))
        error.on_all_ranks = True
        raise error


def _facts(config: RunConfig, folder: Path, token: str, now: float, ranks: Ranks) -> Facts:
    node = os.environ.get("EVACLIP_NODE", platform.node())
    needed = _checkpoint_bytes(config)
    problems = [*_shared(folder, token), *_unreadable(config), *_busy(ranks)]
    free = shutil.disk_usage(Path(config.run_dir)).free
    if free < needed:
        problems.append(
            f"{free / 2**30:.1f} GiB are free for checkpoints in {config.run_dir}, {needed / 2**30:.1f} are needed; "
            f"free some space or lower checkpoint.keep_last"
        )
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "-"
    gpus = f"{torch.cuda.device_count()} x {name}" if torch.cuda.is_available() else "none"
    return Facts(node, _versions(), gpus, problems, free / 2**30, now)


def _versions() -> dict[str, str]:
    """What has to be equal everywhere; a rank with another kernel or another NCCL computes or waits differently."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "is missing"
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, nccl.version()))
        with suppress(OSError, IndexError):
            found["driver"] = _DRIVER.read_text(encoding="utf-8").splitlines()[0]
    return found


def _shared(folder: Path, token: str) -> Iterator[str]:
    """Whether this node sees what rank 0 wrote; network file systems may take a few seconds."""
    for _ in range(20):
        try:
            if (folder / "shared.txt").read_text(encoding="utf-8") == token:
                return
        except OSError:
            pass
        time.sleep(0.5)
    yield f"run_dir {folder.parent.absolute()} is not the folder that the first node sees; put it on shared storage"


def _unreadable(config: RunConfig) -> Iterator[str]:
    """Shards that cannot be read here, of the first and the last of each source; others are looked at by training."""
    for name, source in config.data.sources.items():
        if not isinstance(source, ShardSource):
            continue
        paths = [path for pattern in source.shards for path in expand_names(pattern)]
        for path in dict.fromkeys((paths[0], paths[-1])):
            if "://" in path:
                continue
            try:
                with Path(path).open("rb") as file:
                    file.read(512)
            except OSError as error:
                yield f"shard {path} of source {name} cannot be read: {error.strerror}"


def _busy(ranks: Ranks) -> Iterator[str]:
    """GPUs that somebody else computes on, or fewer than ranks."""
    if ranks.device.type != "cuda":
        if shutil.which("nvidia-smi") and "/dev/nvidia0" in subprocess.getoutput("ls /dev/nvidia0"):  # noqa: S605, S607
            yield "the machine has GPUs that torch does not see; look at the driver, torch.version.cuda and the job"
        return
    if torch.cuda.device_count() > ranks.local_world_size:
        yield (
            f"{torch.cuda.device_count()} GPUs, but {ranks.local_world_size} ranks; set EVACLIP_RANKS_PER_NODE, or ask "
            f"for fewer GPUs"
        )
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        own = torch.cuda.memory_reserved(number)
        if 1 - (free + own) / total > _IDLE_SHARE + 0.05:  # and what CUDA itself takes per process
            yield f"GPU {number} has only {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; end what runs there"


def _checkpoint_bytes(config: RunConfig) -> float:
    """Room for the checkpoints that are not there yet, and the one that is being written."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in CLIP(config.model).parameters())
    kept = config.checkpoint.keep_last + bool(config.checkpoint.keep_best)
    missing = max(0, kept - len(complete(Path(config.run_dir) / "checkpoints"))) + 1
    return missing * _STATE_BYTES * parameters


def _differences(facts: Sequence[Facts]) -> Iterator[str]:
    """Nodes that are not as most of them are."""
    for package in dict.fromkeys(name for fact in facts for name in fact.versions):
        found = [fact.versions.get(package, "unknown") for fact in facts]
        usual = max(set(found), key=found.count)
        for fact, own in zip(facts, found, strict=True):
            if own != usual:
                yield f"{fact.node}: {package} {own}, elsewhere {usual}; install the same everywhere"
    kinds = [fact.gpus for fact in facts]
    usual = max(set(kinds), key=kinds.count)
    yield from (f"{fact.node}: GPUs {fact.gpus}, elsewhere {usual}" for fact in facts if fact.gpus != usual)
    middle = sorted(fact.seconds for fact in facts)[len(facts) // 2]
    for fact in facts:
        if abs(fact.seconds - middle) > _CLOCK_SECONDS:
            log.warning("%s: the clock is %+.1f s off; logs will not fit together", fact.node, fact.seconds - middle)


def _all_reduce(ranks: Ranks) -> float:
    """GB/s of an all-reduce, as bytes that cross a rank's link: 2 (W - 1) / W of the tensor; checks its sum."""
    if ranks.world_size == 1:
        return float("nan")
    values = torch.ones(_REDUCED_MIB[ranks.device.type] << 18, device=ranks.device)
    ranks.sum(values)
    if float(values[0]) != ranks.world_size or float(values[-1]) != ranks.world_size:
        raise EvaclipError(f"rank {ranks.rank}: an all-reduce of ones over {ranks.world_size} ranks is {values[0]}")
    times: list[float] = []
    for _ in range(3):
        ranks.barrier()
        begin = time.perf_counter()
        ranks.sum(values)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * (ranks.world_size - 1) / ranks.world_size * values.nbytes / min(times) / 1e9


def _table(facts: Sequence[Facts], speed: float, ranks: Ranks) -> str:
    first = min(fact.seconds for fact in facts)
    lines = [f"{'node':16} {'GPUs':28} {'torch':12} {'free disk':>11} {'clock':>8}  problems"]
    lines += [
        f"{fact.node:16} {fact.gpus:28} {fact.versions['torch']:12} {fact.free_gib:7.0f} GiB "
        f"{fact.seconds - first:+6.2f} s  {len(fact.problems) or 'none'}"
        for fact in facts
    ]
    return "\n".join([*lines, f"all-reduce over {ranks.world_size} ranks: {speed:.2f} GB/s per rank"])
