"""Where ranks can be started: one interface, and the machine that this process is on. SLURM's jobs are in ``slurm``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from evaclip.errors import ConfigError


class Machines(Protocol):
    """Nodes that a supervisor has been given."""

    job: str
    """Name in files and messages."""
    num_nodes: int
    """That were asked for."""
    num_left: int
    """That the job still has, whether they answer or not, as of the last call of ``nodes``."""
    ranks_per_node: int
    in_a_queue: bool
    """There is a scheduler that a node can ask to start the job anew."""
    was_requeued: bool
    """This is not the job's first start."""

    @property
    def may_requeue(self) -> bool:
        """The scheduler takes the job back."""
        ...

    @property
    def seconds_left(self) -> float:
        """Until the job's time is over."""
        ...

    def nodes(self) -> list[str] | None:
        """Those that can be used now, in the job's order; None where nobody says."""
        ...

    def address(self, node: str) -> str:
        """Under which the others reach a node."""
        ...

    def start_command(self, nodes: Sequence[str], command: Sequence[str]) -> list[str]:
        """Starts one process on each of the nodes, its stdin that of this command, for all of them."""
        ...

    def answers(self, node: str) -> bool:
        """Whether a node starts processes now."""
        ...

    def is_ending(self) -> bool:
        """Whether somebody has ended the job, so that nothing may bring it back."""
        ...

    def requeue(self) -> None:
        """Put the job back into the queue."""
        ...


class ThisMachine:
    """Some ranks on the machine that this process is on."""

    job = "local"
    num_nodes = num_left = 1
    in_a_queue = False
    may_requeue = False
    was_requeued = False
    seconds_left = math.inf

    def __init__(self, ranks: int) -> None:
        self.ranks_per_node = ranks

    def nodes(self) -> list[str]:
        """Itself."""
        return ["localhost"]

    def address(self, node: str) -> str:
        """Of the loopback."""
        return "127.0.0.1"

    def start_command(self, nodes: Sequence[str], command: Sequence[str]) -> list[str]:
        """The command."""
        return [*command, *nodes]

    def answers(self, node: str) -> bool:
        """It does."""
        return True

    def is_ending(self) -> bool:
        """Nobody but its user could."""
        return False

    def requeue(self) -> None:
        """Refuse: there is no queue."""
        raise ConfigError("a run on this machine has no queue; start it again")
