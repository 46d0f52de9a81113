"""What LAMB and AdamW share: spans, one norm, one veto, one pass over the table.

The optimizer sees tensors and, for each, which span belongs to which row of the table. Under plain PyTorch a tensor is
one whole parameter; under ZeRO it is this rank's flat slice of all of them, cut anywhere. Rows that stand outside the
engine (the logit scale) are whole on every rank.

Communication: under ZeRO one all-reduce of a single number for the gradient norm; a subclass may add one for norms per
row. Nothing else, and nothing waits for the device: a step with a non-finite gradient or loss is carried out with
``torch.where`` choosing the old values, on every rank alike because the norm and the loss are the same on all.
"""

# torch leaves parts of its interface untyped:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from evaclip.optim.table import Row

if TYPE_CHECKING:
    from evaclip.config import OptimConfig
    from evaclip.distributed import Ranks


_CPU_CHUNK = 1 << 15  # elements that stay in the cache between operations, and that torch does not split over threads


class Span(NamedTuple):
    """A run of one parameter's elements inside a tensor."""

    row: int
    start: int
    """First element, counted within the flattened parameter."""
    size: int
    offset: int = 0
    """Where it begins in the flattened tensor."""


class Piece(NamedTuple):
    """State of a span, for checkpoints: views, to be read or written."""

    row: Row
    start: int
    weight: Tensor
    """fp32, flat."""
    exp_avg: Tensor
    exp_avg_sq: Tensor


class _Bound(NamedTuple):
    """A tensor with its moments and spans."""

    tensor: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    spans: tuple[Span, ...]


class Slice(NamedTuple):
    """A span's flat views during a step."""

    row: int
    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class TableOptimizer(torch.optim.Optimizer):
    """Steps rows of a table; see the module.

    Attributes:
        factor: Share of the peak learning rates, set before each step.
        loss: The step's loss (0-d); not finite means the step is skipped.
        grad_scale: What gradients were multiplied with (0-d).
        updates: Updates applied so far (0-d, on the device); what the bias correction counts.
        consecutive_skips: Steps skipped since the last applied one (0-d).
        grad_norm: Global L2 norm of the last gradient, before clipping (0-d).
        trust_ratios: Of the last step, one per adapting row; empty for AdamW.
    """

    def __init__(self, parameters: Sequence[Tensor], rows: Sequence[Row], config: OptimConfig, ranks: Ranks) -> None:
        super().__init__([{"params": list(parameters)}], {"lr": 1.0})
        self.rows = tuple(rows)
        self.config = config
        self.ranks = ranks
        device = ranks.device
        self.factor = 1.0
        self.loss = torch.zeros((), device=device)
        self.grad_scale = torch.ones((), device=device)
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        self.consecutive_skips = torch.zeros((), dtype=torch.int64, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.trust_ratios = torch.ones(0, device=device)
        self._bound: list[_Bound] = []
        self._whole: list[_Bound] = []
        self._sharded = False

    def bind(self, tensors: Sequence[tuple[Tensor, Sequence[Span]]], *, sharded: bool) -> None:
        """Say which fp32 tensors hold the rows of the engine, and allocate their moments.

        Args:
            tensors: Each with its spans; its ``grad`` is set before every step.
            sharded: Whether the tensors are this rank's share (ZeRO) instead of everything.
        """
        self._bound = [_with_moments(tensor, spans) for tensor, spans in tensors]
        self._sharded = sharded

    def bind_whole(self, tensors: Sequence[tuple[Tensor, Sequence[Span]]]) -> None:
        """The same for rows outside the engine, replicated on every rank."""
        self._whole = [_with_moments(tensor, spans) for tensor, spans in tensors]

    def pieces(self) -> Iterator[Piece]:
        """State that this rank is to save: its shard, or its share of what all ranks hold."""
        for row, bound, span in self._all_spans():
            whole = not self._sharded or any(bound is other for other in self._whole)
            if not whole or row % self.ranks.world_size == self.ranks.rank:
                yield self._piece(bound, span)

    def local_pieces(self) -> Iterator[Piece]:
        """All state that lives on this rank, to be filled by a load."""
        for _, bound, span in self._all_spans():
            yield self._piece(bound, span)

    def _all_spans(self) -> Iterator[tuple[int, _Bound, Span]]:
        for bound in (*self._bound, *self._whole):
            for span in bound.spans:
                yield span.row, bound, span

    def _piece(self, bound: _Bound, span: Span) -> Piece:
        part = slice(span.offset, span.offset + span.size)
        views = (tensor.detach().view(-1)[part] for tensor in (bound.tensor, bound.exp_avg, bound.exp_avg_sq))
        return Piece(self.rows[span.row], span.start, *views)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update everything that is bound, or nothing where loss or gradient is not finite."""
        assert closure is None, "the loss is computed before the step"
        slices, own = self._slices(self._bound), self._slices(self._whole)
        squared = _squared_norm(slices, self.loss.device)
        if self._sharded:
            self.ranks.sum(squared)
        squared = squared + _squared_norm(own, self.loss.device) * self.grad_scale**2
        self.grad_norm = (squared.sqrt() / self.grad_scale).float()
        finite = torch.isfinite(self.grad_norm) & torch.isfinite(self.loss)
        clip = self.config.clip_norm
        shrink = torch.ones_like(self.grad_norm) if clip is None else (clip / (self.grad_norm + 1e-6)).clamp(max=1)

        self.updates += finite
        beta1, beta2 = self.config.betas
        count = self.updates.clamp(min=1).double()
        corrections = (1 - beta1**count).float(), (1 - beta2**count).float()
        self.consecutive_skips = torch.where(finite, 0, self.consecutive_skips + 1)
        if finite.device.type == "cpu" and not finite:  # nothing to wait for there
            return
        for group, scale in ((slices, shrink / self.grad_scale), (own, shrink)):
            for s in group:
                self._moments(s, scale, finite, corrections)
        self._apply([*slices, *own], finite)

    def _slices(self, tensors: Sequence[_Bound]) -> list[Slice]:
        found: list[Slice] = []
        for bound in tensors:
            if bound.tensor.grad is None:
                raise AssertionError("the engine sets gradients before the step")
            flat = [t.view(-1) for t in (bound.tensor.detach(), bound.tensor.grad, bound.exp_avg, bound.exp_avg_sq)]
            for span in bound.spans:
                most = _CPU_CHUNK if bound.tensor.device.type == "cpu" else span.size
                for start in range(span.offset, span.offset + span.size, most):
                    part = slice(start, min(start + most, span.offset + span.size))
                    found.append(Slice(span.row, *(tensor[part] for tensor in flat)))
        return found

    def _moments(self, s: Slice, scale: Tensor, finite: Tensor, corrections: tuple[Tensor, Tensor]) -> None:
        """Advance both moments, then leave the Adam update (without learning rate) in the gradient's place."""
        beta1, beta2 = self.config.betas
        grad = s.grad * scale
        _put(s.exp_avg, torch.lerp(s.exp_avg, grad, 1 - beta1), finite)
        _put(s.exp_avg_sq, torch.lerp(s.exp_avg_sq, grad.square_(), 1 - beta2), finite)
        root = (s.exp_avg_sq / corrections[1]).sqrt_().add_(self.config.eps)
        torch.div(s.exp_avg / corrections[0], root, out=s.grad)
        if decay := self.rows[s.row].weight_decay:
            s.grad.add_(s.weight, alpha=decay)

    def _apply(self, slices: Sequence[Slice], finite: Tensor) -> None:
        """Subtract the updates that ``_moments`` left in the gradients."""
        raise NotImplementedError

    def _subtract(self, s: Slice, ratio: Tensor | float, finite: Tensor) -> None:
        row = self.rows[s.row]
        moved = s.weight - s.grad * (ratio * (row.lr * self.factor))
        if row.upper_bound != float("inf"):
            moved.clamp_(max=row.upper_bound)
        _put(s.weight, moved, finite)


def _put(target: Tensor, value: Tensor, finite: Tensor) -> None:
    """Write a value, or the old one again after a bad step; on the CPU bad steps do not come this far."""
    target.copy_(value if target.device.type == "cpu" else torch.where(finite, value, target))


def _squared_norm(slices: Sequence[Slice], device: torch.device) -> Tensor:
    """Sum of squares of the gradients, fp64: each slice's fp32 norm is exact enough, thousands of them are not."""
    if not slices:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([torch.linalg.vector_norm(s.grad) for s in slices]).double().square().sum()


def _with_moments(tensor: Tensor, spans: Sequence[Span]) -> _Bound:
    flat = tensor.detach().view(-1)
    return _Bound(tensor, torch.zeros_like(flat), torch.zeros_like(flat), tuple(spans))
