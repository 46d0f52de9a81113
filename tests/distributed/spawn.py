"""Real gloo ranks inside pytest: one spawn per world size runs all cases, because importing DeepSpeed takes seconds."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from evaclip.distributed import Ranks

Case = Callable[[Ranks, Path], Any]


def run_on_ranks(world_size: int, cases: Mapping[str, Case], folder: Path) -> dict[str, list[Any]]:
    """Run every case on all ranks; returns case -> the ranks' results, an exception where one was raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(
        _rank, (world_size, port, dict(cases), folder), nprocs=world_size, start_method="spawn"
    )
    per_rank = [pickle.loads((folder / f"results_{rank}").read_bytes()) for rank in range(world_size)]
    return {name: [results[name] for results in per_rank] for name in cases}


def _rank(rank: int, world_size: int, port: int, cases: dict[str, Case], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.multiprocessing.set_start_method("fork", force=True)  # as under torchrun; a spawned process hands "spawn" on
    warnings.simplefilter("ignore")  # of DeepSpeed and gloo; the default suite's filter guards our own process
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))  # a case that fails on one rank ends the others
    ranks = Ranks(rank, world_size)
    results: dict[str, Any] = {}
    for name, case in cases.items():
        own = folder / name
        own.mkdir(exist_ok=True)
        try:
            results[name] = case(ranks, own)
        except Exception as error:  # noqa: BLE001  reported by the test that asks for this case
            results[name] = RuntimeError(f"rank {rank}: {error}\n{traceback.format_exc()}")
        ranks.barrier()
    (folder / f"results_{rank}").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()
