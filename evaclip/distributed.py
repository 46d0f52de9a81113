"""The ranks of a run and what they say to each other.

One object carries every collective of the project; on a single rank each is the identity, so nothing else asks how
many ranks there are. A rank's device is its local GPU, or the CPU where there is none.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from evaclip.errors import EvaclipError

_TIMEOUT_SECONDS = 1800.0
"""How long a collective may take before the run fails, where nobody says otherwise."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  an immutable value
    local_world_size: int = 1
    """Ranks on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Largest over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather_rows(self, tensor: Tensor) -> Tensor:
        """All ranks' rows, in rank order; every rank gives the same number."""
        if self.world_size == 1:
            return tensor
        rows = tensor.new_empty(self.world_size * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(rows, tensor.contiguous())
        return rows

    def sum_own_rows(self, tensor: Tensor) -> Tensor:
        """Add up over ranks and keep this rank's rows: the transpose of ``gather_rows``."""
        if self.world_size == 1:
            return tensor
        own = tensor.new_empty(len(tensor) // self.world_size, *tensor.shape[1:])
        dist.reduce_scatter_tensor(own, tensor.contiguous())
        return own

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in rank order; small pickled objects of our own."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """Rank 0's value."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def agreed(ranks: Ranks) -> Generator[None]:
    """An ``EvaclipError`` of one rank in the body becomes one on all ranks, before they diverge.

    Every rank must come this way. Communicates one number, and the errors if there is one.

    Raises:
        EvaclipError: The body raised one on some rank; kind and message are those of the first such rank.
    """
    if ranks.world_size == 1:  # nothing to agree on, and no reason to wait for the device
        yield
        return
    own: EvaclipError | None = None
    try:
        yield
    except EvaclipError as error:
        own = error
    if int(ranks.sum(torch.tensor(int(own is not None), device=ranks.device))):
        first = next(error for error in ranks.gather_objects(own) if error is not None)
        shared = type(first)(str(first))
        shared.on_all_ranks = True
        raise shared from own


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(*, need_group: bool, timeout_seconds: float = _TIMEOUT_SECONDS) -> Generator[Ranks]:
    """Join the process group that torchrun describes in the environment; leave it at the end.

    Args:
        need_group: Make a group even on one rank (DeepSpeed wants one).
        timeout_seconds: How long ranks may wait for one another.

    Raises:
        EvaclipError: There are more processes than GPUs.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise EvaclipError(  # not of the configuration: a GPU may have been lost, and another start may have all
                f"process {local} of this machine finds no GPU of its own, there are {torch.cuda.device_count()}; "
                f"start at most one process per GPU"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world_size == 1 and not need_group:
        yield Ranks(device=device)
        return
    if "RANK" not in os.environ:  # not under torchrun: this process is its own rendezvous
        alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update({**alone, "LOCAL_RANK": "0"})
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        yield Ranks(rank, world_size, device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except BaseException as error:
        if world_size == 1 or (isinstance(error, EvaclipError) and error.on_all_ranks):
            dist.destroy_process_group()
        raise  # else the others are in the middle of something, and NCCL would wait for them; they end when we do
    dist.destroy_process_group()
