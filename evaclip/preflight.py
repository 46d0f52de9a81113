"""Checks of the nodes before a run starts: each node's own facts, and how fast ranks reach one another.

Ranks run it as they run a training (``cluster``). The first rank of each node writes its facts into
``run_dir/preflight/START``, where rank 0 reads them: no network is needed to say what is wrong, and a node whose facts
do not come is named. Only where nothing is wrong do the ranks meet, for an all-reduce. Nodes on which not even Python
starts are named by the launcher.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.cuda import nccl

from evaclip.checkpoint_names import complete
from evaclip.config import DeepSpeedEngineConfig, RunConfig, ShardSource
from evaclip.data.tar import expand_names
from evaclip.distributed import Ranks, started
from evaclip.errors import EvaclipError, writing
from evaclip.files import write_json
from evaclip.heartbeat import beat
from evaclip.models.clip import CLIP
from evaclip.trial import available_bytes

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "deepspeed", "numpy", "pillow", "simplejpeg", "webdataset", "safetensors", "triton", "flash-attn")
_CLOCK_SECONDS = 2.0
"""That a node's clock may be from the others'; times in logs and names of files depend on them, no step does."""
_IDLE_SHARE = 0.1  # of a GPU's memory that may be in use: what the driver and CUDA take for themselves
_MEET_SECONDS = 240.0  # for all nodes to import torch and look at themselves, perhaps from a cold network disk
_GROUP_SECONDS = 300.0  # for all ranks to meet
_STATE_BYTES = 12  # a parameter's weight and two moments in a checkpoint
_DRIVER = Path("/proc/driver/nvidia/version")
_REDUCED_MIB = {"cuda": 256, "cpu": 16}


class Facts(NamedTuple):
    """What one node knows of itself."""

    node: str
    versions: dict[str, str]
    gpus: str
    cores: int
    """That this process may use."""
    memory_gib: float
    free_gib: float
    problems: list[str]


def preflight(config: RunConfig) -> None:
    """Check all nodes, print one table, and let the ranks meet.

    Raises:
        EvaclipError: Something is wrong; the message names the nodes and what to do. It may be gone at the next start.
    """
    beat("start")
    rank, local_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_nodes = int(os.environ.get("WORLD_SIZE", "1")) // local_ranks
    folder = Path(config.run_dir) / "preflight" / _start_name()
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        with writing(f"run_dir {config.run_dir}"):
            folder.mkdir(parents=True, exist_ok=True)
        _write(folder, _facts(config, local_ranks))
    if rank == 0:
        facts, problems = _gather(folder, num_nodes)
        print(_table(facts), flush=True)  # noqa: T201  for the job's output
        shutil.rmtree(folder, ignore_errors=True)
        if problems:
            first, *others = problems  # launchers tell the first line alone
            raise EvaclipError("\n  ".join([f"preflight found {len(problems)} problems: {first}", *others]))
    with started(need_group=isinstance(config.engine, DeepSpeedEngineConfig), timeout_seconds=_GROUP_SECONDS) as ranks:
        beat("end")  # imports are done: the launcher readies the next ranks now
        ranks.barrier()
        clocks = dict(ranks.gather_objects((os.environ.get("EVACLIP_NODE", platform.node()), time.time())))
        speed = _all_reduce(ranks)
        if ranks.is_main:
            apart = max(clocks.values()) - min(clocks.values())
            reduced = f"all-reduce over {ranks.world_size} ranks: {speed:.2f} GB/s per rank"
            reduced = reduced if ranks.world_size > 1 else "one rank: no all-reduce"
            print(f"{reduced}; clocks within {apart:.2f} s", flush=True)  # noqa: T201  as above
            for node, seconds in _wrong_clocks(clocks):
                log.warning("%s: its clock is %+.1f s from the others'; logs will not fit together", node, seconds)


def _wrong_clocks(clocks: Mapping[str, float]) -> list[tuple[str, float]]:
    """Nodes whose clocks, read at one moment, are far from the middle one, and by how many seconds."""
    middle = median(clocks.values())
    return [(node, clock - middle) for node, clock in clocks.items() if abs(clock - middle) > _CLOCK_SECONDS]


def _start_name() -> str:
    """The same on all ranks of this start, and of no other."""
    alone = os.environ.get("MASTER_PORT", str(os.getpid()))
    return os.environ.get("EVACLIP_START") or os.environ.get("TORCHELASTIC_RUN_ID", "none") + f"-{alone}"


def _write(folder: Path, facts: Facts) -> None:
    """Leave a node's facts for rank 0."""
    with writing(str(folder)):
        write_json(folder / f"{facts.node}.json", facts._asdict())


def _gather(folder: Path, num_nodes: int) -> tuple[list[Facts], list[str]]:
    """All nodes' facts, and what is wrong: with a node, between nodes, or that one says nothing."""
    deadline = time.monotonic() + _MEET_SECONDS
    while len(found := sorted(folder.glob("*.json"))) < num_nodes and time.monotonic() < deadline:
        beat("start")
        time.sleep(0.2)
    facts = [Facts(**json.loads(path.read_text(encoding="utf-8"))) for path in found]
    expected = os.environ.get("EVACLIP_NODES", "").split(",")
    missing = [node for node in expected if node and node not in {fact.node for fact in facts}]
    if not missing and len(facts) < num_nodes:
        missing = [f"{num_nodes - len(facts)} of {num_nodes} nodes"]
    problems = [
        f"{node}: no word in {folder.parent} for {_MEET_SECONDS:.0f} s: it does not see this run_dir, which has to be "
        f"on shared storage, or its ranks do not come so far (logs/console_*.txt)"
        for node in missing
    ]
    problems += [f"{fact.node}: {problem}" for fact in facts for problem in fact.problems]
    return facts, [*problems, *_differences(facts)]


def _facts(config: RunConfig, local_ranks: int) -> Facts:
    cores, memory = len(os.sched_getaffinity(0)), available_bytes(torch.device("cpu")) / 2**30
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "-"
    gpus = f"{torch.cuda.device_count()} x {name}" if torch.cuda.is_available() else "none"
    free = shutil.disk_usage(config.run_dir).free
    problems = [*_unreadable(config), *_gpu_problems(local_ranks, cores), *_disk_problems(config, free)]
    wanted = local_ranks * (1 + config.data.workers)
    if cores < wanted:
        log.warning("%d cores for %d ranks and data workers: loading may be slow; lower data.workers", cores, wanted)
    node = os.environ.get("EVACLIP_NODE", platform.node())
    return Facts(node, _versions(), gpus, cores, memory, free / 2**30, problems)


def _disk_problems(config: RunConfig, free: float) -> Iterator[str]:
    needed = _checkpoint_bytes(config)
    if free < needed:
        yield (
            f"{free / 2**30:.1f} GiB are free for checkpoints in {config.run_dir}, {needed / 2**30:.1f} are needed; "
            f"free some space or lower checkpoint.keep_last"
        )


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


def _gpu_problems(local_ranks: int, cores: int) -> Iterator[str]:
    """GPUs that torch does not see, that somebody else computes on, too few or too many, or with too few cores."""
    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists():
            yield "the machine has GPUs that torch does not see; look at the driver, torch.version.cuda and the job"
        return
    if cores < local_ranks:
        yield f"{cores} cores for {local_ranks} ranks; ask for whole nodes (--exclusive) or --cpus-per-task"
    count = torch.cuda.device_count()
    if count != local_ranks:
        yield (
            f"{count} GPUs, but {local_ranks} ranks; set EVACLIP_RANKS_PER_NODE, or ask for as many GPUs as are wanted"
        )
    for number in range(count):
        try:
            free, total = torch.cuda.mem_get_info(number)
        except RuntimeError as error:  # an ECC error, say, or somebody has it for himself alone
            yield f"GPU {number} cannot be used: {str(error).splitlines()[0]}; look at it with nvidia-smi"
            continue
        own = torch.cuda.memory_reserved(number)
        if 1 - (free + own) / total > _IDLE_SHARE:
            yield f"GPU {number} has only {free / 2**30:.1f} of {total / 2**30:.1f} GiB free; end what runs there"


def _checkpoint_bytes(config: RunConfig) -> float:
    """Room for the checkpoints that are not there yet, and the one that is being written."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in CLIP(config.model).parameters())
    kept = config.checkpoint.keep_last + bool(config.checkpoint.keep_best)
    missing = max(0, kept - len(complete(Path(config.run_dir) / "checkpoints"))) + 1
    return missing * (_STATE_BYTES + 4 * bool(config.optim.ema_decay)) * parameters


def _differences(facts: Sequence[Facts]) -> Iterator[str]:
    """Nodes that are not as most of them are."""
    if not facts:
        return
    for package in dict.fromkeys(name for fact in facts for name in fact.versions):
        found = [fact.versions.get(package, "unknown") for fact in facts]
        usual = max(found, key=found.count)
        for fact, own in zip(facts, found, strict=True):
            if own != usual:
                yield f"{fact.node}: {package} {own}, elsewhere {usual}; install the same everywhere"
    kinds = [fact.gpus for fact in facts]
    usual = max(kinds, key=kinds.count)
    yield from (f"{fact.node}: GPUs {fact.gpus}, elsewhere {usual}" for fact in facts if fact.gpus != usual)


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


def _table(facts: Sequence[Facts]) -> str:
    lines = [f"{'node':16} {'GPUs':28} {'torch':12} {'cores':>5} {'memory':>9} {'free disk':>11}  problems"]
    lines += [
        f"{fact.node:16} {fact.gpus:28} {fact.versions['torch']:12} {fact.cores:5} {fact.memory_gib:5.0f} GiB "
        f"{fact.free_gib:7.0f} GiB  {len(fact.problems) or 'none'}"
        for fact in facts
    ]
    return "\n".join(lines)
