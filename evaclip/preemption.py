"""Being asked to stop: a signal becomes a decision that all ranks share, one step later.

Every rank puts its flag into a small all-reduce each step and reads the answer at the next one, so no step waits for
it: four bytes, on the CPU, beside the training. On one rank the flag itself is the answer.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from evaclip.cluster.protocol import ONE_REQUEST_SECONDS
from evaclip.errors import InterruptedEvaluationError, TrainingStoppedError

if TYPE_CHECKING:
    from evaclip.distributed import Ranks

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether the run is to save and end."""

    def __init__(self, ranks: Ranks) -> None:
        self._alone = ranks.world_size == 1
        self._signal = 0
        self._received = 0.0
        self._agreed = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def agreed(self) -> int:
        """The signal that some rank had received at the last call, the same on every rank; 0 for none.

        Every rank calls it once per step.
        """
        if self._alone:
            return self._signal
        if self._pending is not None:
            self._pending.wait()
        answer = int(self._agreed)
        self._agreed = torch.tensor([max(self._signal, answer)], dtype=torch.int32)
        self._pending = dist.all_reduce(self._agreed, dist.ReduceOp.MAX, async_op=True)
        return answer

    def give_way(self) -> None:
        """Called where something longer than a step may end early; the next steps then ``agree``.

        Raises:
            InterruptedEvaluationError: This rank has received a signal.
        """
        if self._signal:
            raise InterruptedEvaluationError

    def finish(self) -> None:
        """Wait for the last exchange."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if not self._signal:
            self._signal, self._received = number, time.monotonic()
        elif number == signal.SIGINT or time.monotonic() - self._received > ONE_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)  # does not wait for the checkpoint; those that are complete stay
            signal.raise_signal(number)


@contextmanager
def listening(ranks: Ranks) -> Generator[StopRequest]:
    """Take SIGTERM, SIGUSR1 and Ctrl-C as requests; a second one ends the process at once."""
    request = StopRequest(ranks)
    before = {number: signal.signal(number, request._receive) for number in _SIGNALS}
    try:
        yield request
    except TrainingStoppedError:
        request.finish()
        ranks.barrier()  # leave together: a launcher ends the others when the first one is gone
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
