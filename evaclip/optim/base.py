"""What LAMB and AdamW share: spans, one norm, one veto, one pass over the table.

The optimizer sees tensors and, for each, which span belongs to which row of the table. Under plain PyTorch a tensor is
one whole parameter; under ZeRO it is this rank's flat slice of all of them, cut anywhere. Rows that stand outside the
engine (the logit scale) are whole on every rank.

Communication: under ZeRO one all-reduce of a single number for the gradient norm and one of two numbers per row, the
squared norms of weight and update. Nothing else, and nothing waits for the device: a step with a non-finite gradient or
loss is carried out and changes nothing, on every rank alike because the norm and the loss are the same on all.

Memory: two moments per element, with ``ema_decay`` an averaged weight too, and a buffer of ``_BUFFER`` elements in
which torch's fused Adam leaves the update of some slices at a time: on the CPU it stays in the cache.
"""

# torch leaves parts of its interface untyped, and its fused Adam without a public name:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from evaclip.optim.table import Row

if TYPE_CHECKING:
    from evaclip.config import OptimConfig
    from evaclip.distributed import Ranks


_BUFFER = {"cpu": 1 << 17, "cuda": 1 << 26}
"""Elements by device; on the CPU so few that torch does not split an operation over threads."""

_SKIPS_EARLY = True
"""On the CPU, where nothing has to be waited for, a bad step ends before the work; tests take the GPUs' way there."""


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
    tensors: dict[str, Tensor]
    """``weight``, ``exp_avg``, ``exp_avg_sq`` and, where weights are averaged, ``ema``; fp32, flat."""

    @property
    def weight(self) -> Tensor:
        """The weight's."""
        return self.tensors["weight"]


class _Bound(NamedTuple):
    """A tensor with its moments and spans, on one device."""

    tensor: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor | None
    spans: tuple[Span, ...]


class Slice(NamedTuple):
    """A span's flat views during a step."""

    row: int
    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor | None


class TableOptimizer(torch.optim.Optimizer, ABC):
    """Steps rows of a table; see the module.

    Attributes:
        factor: Share of the peak learning rates, set before each step.
        loss: The step's loss (0-d); not finite means the step is skipped.
        grad_scale: What gradients were multiplied with (0-d).
        averaged_over: How many ranks' gradients were averaged instead of added up.
        updates: Updates applied so far (0-d, on the device); what the bias correction counts.
        consecutive_skips: Steps skipped since the last applied one (0-d).
        grad_norm: Global L2 norm of the last gradient, before clipping (0-d).
        update_rms: Of the last applied step, one per row: root mean square of the update before the learning rate.
        trust_ratios: Of the last applied step, one per adapting row; empty for AdamW.
    """

    _bias_correction = True

    def __init__(self, parameters: Sequence[Tensor], rows: Sequence[Row], config: OptimConfig, ranks: Ranks) -> None:
        super().__init__([{"params": list(parameters)}], {"lr": 1.0})
        self.rows = tuple(rows)
        self.config = config
        self.ranks = ranks
        device = ranks.device
        self.factor = 1.0
        self.loss = torch.zeros((), device=device)
        self.grad_scale = torch.ones((), device=device)
        self.averaged_over = 1
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        self.consecutive_skips = torch.zeros((), dtype=torch.int64, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.update_rms = torch.zeros(len(self.rows), device=device)
        adapting = [number for number, row in enumerate(self.rows) if row.adapts]
        self._adapting = torch.tensor(adapting, dtype=torch.int64, device=device)
        self.trust_ratios = torch.ones(len(adapting), device=device)
        self._peak_rates = torch.tensor([row.lr for row in self.rows], device=device)
        self._numels = torch.tensor([row.numel for row in self.rows], device=device)
        self._bound: list[_Bound] = []
        self._whole: list[_Bound] = []
        self._sharded = False
        self._buffers: dict[str, Tensor] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def bind(self, tensors: Sequence[tuple[Tensor, Sequence[Span]]], *, sharded: bool) -> None:
        """Say which fp32 tensors hold the rows of the engine, and allocate their moments.

        Args:
            tensors: Each with its spans; its ``grad`` is set before every step.
            sharded: Whether the tensors are this rank's share (ZeRO) instead of everything.
        """
        self._bound = self._with_moments(tensors)
        self._sharded = sharded

    def bind_whole(self, tensors: Sequence[tuple[Tensor, Sequence[Span]]]) -> None:
        """The same for rows outside the engine, replicated on every rank."""
        self._whole = self._with_moments(tensors)

    def _with_moments(self, tensors: Sequence[tuple[Tensor, Sequence[Span]]]) -> list[_Bound]:
        bound: list[_Bound] = []
        for tensor, spans in tensors:
            flat, device = tensor.detach().view(-1), tensor.device
            ema = flat.clone() if self.config.ema_decay else None
            bound.append(_Bound(tensor, torch.zeros_like(flat), torch.zeros_like(flat), ema, tuple(spans)))
            if device.type not in self._buffers:
                self._buffers[device.type] = torch.empty(_BUFFER[device.type], device=device)
        return bound

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
        kept = {"weight": bound.tensor, "exp_avg": bound.exp_avg, "exp_avg_sq": bound.exp_avg_sq, "ema": bound.ema}
        views = {kind: tensor.detach().view(-1)[part] for kind, tensor in kept.items() if tensor is not None}
        return Piece(self.rows[span.row], span.start, views)

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Exchange weights and averaged weights; the engine's ``refresh_weights`` has to follow."""
        for bound in (*self._bound, *self._whole):
            assert bound.ema is not None, "there is an average"
            size = _BUFFER[bound.tensor.device.type]
            for weight, ema in zip(bound.tensor.detach().view(-1).split(size), bound.ema.split(size), strict=True):
                kept = weight.clone()
                weight.copy_(ema)
                ema.copy_(kept)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update everything that is bound, or nothing where loss or gradient is not finite."""
        assert closure is None, "the loss is computed before the step"
        slices, own = self._slices(self._bound), self._slices(self._whole)
        device = self.loss.device
        squared = _squared_norm(slices, device)
        if self._sharded:
            self.ranks.sum(squared)
        scale = self.grad_scale / self.averaged_over
        squared = squared + _squared_norm(own, device) * scale**2
        self.grad_norm = (squared.sqrt() / scale).float()
        finite = torch.isfinite(self.grad_norm) & torch.isfinite(self.loss)
        clip = self.config.clip_norm
        shrink = torch.ones_like(self.grad_norm) if clip is None else (clip / (self.grad_norm + 1e-6)).clamp(max=1)

        self.updates += finite
        self.consecutive_skips = torch.where(finite, 0, self.consecutive_skips + 1)
        if device.type == "cpu" and _SKIPS_EARLY and not finite:
            return
        squares = self._adam_updates(slices, finite, scale / shrink)
        if self._sharded:
            self.ranks.sum(squares)
        weight, update = (squares + self._adam_updates(own, finite, 1 / shrink)).sqrt()
        self.update_rms = torch.where(finite, (update / self._numels.sqrt()).float(), self.update_rms)
        ratios = self._ratios(weight, update)
        self.trust_ratios = torch.where(finite, ratios[self._adapting], self.trust_ratios)
        # after a bad step 0: the update is weight decay alone then, a finite number
        rates = torch.where(finite, ratios * self._peak_rates * self.factor, 0.0)
        # 1 - min(decay, (1 + t) / (10 + t)), so that the first weights do not last
        share = torch.clamp(9 / (10 + self.updates), min=1 - (self.config.ema_decay or 0.0))
        share = torch.where(finite, share, 0.0).float()
        self._subtract(slices, rates, share)
        self._subtract(own, rates, share)

    def _slices(self, tensors: Sequence[_Bound]) -> list[Slice]:
        found: list[Slice] = []
        for bound in tensors:
            if bound.tensor.grad is None:
                raise AssertionError("the engine sets gradients before the step")
            flat = [t.view(-1) for t in (bound.tensor.detach(), bound.tensor.grad, bound.exp_avg, bound.exp_avg_sq)]
            for span in bound.spans:
                most = _BUFFER[bound.tensor.device.type]
                for start in range(span.offset, span.offset + span.size, most):
                    part = slice(start, min(start + most, span.offset + span.size))
                    ema = None if bound.ema is None else bound.ema[part]
                    weight, grad, *moments = (tensor[part] for tensor in flat)
                    found.append(Slice(span.row, weight, grad, moments[0], moments[1], ema))
        return found

    def _adam_updates(self, slices: Sequence[Slice], finite: Tensor, grad_scale: Tensor) -> Tensor:
        """Advance both moments, then leave the update (without learning rate) in the gradient's place.

        Returns:
            Squared norms of weight and update by row, fp64 [2, rows]; those of weights only where a row adapts.
        """
        squares = torch.zeros(2, len(self.rows), dtype=torch.float64, device=self.loss.device)
        if not slices:
            return squares
        beta1, beta2 = self.config.betas
        device = slices[0].weight.device
        count = self.updates.clamp(min=1).float().to(device)
        if not self._bias_correction:
            count.fill_(float("inf"))  # 1 - beta^t is 1
        grad_scale, found_inf = grad_scale.to(device), (~finite).float().to(device)
        buffer = self._buffers[device.type]
        none = torch.zeros((), device=device)
        norms: tuple[list[Tensor], list[Tensor]] = ([], [])  # squared, of weights and of updates
        for group in _groups(slices, len(buffer)):
            buffer.zero_()
            sizes = [len(s.weight) for s in group]
            updates = buffer[: sum(sizes)].split(sizes)
            torch._fused_adam_(  # torch.optim.Adam's kernel; 0 - lr u with lr = -1
                list(updates),
                [s.grad for s in group],
                [s.exp_avg for s in group],
                [s.exp_avg_sq for s in group],
                [],
                [count] * len(group),
                lr=-1.0, beta1=beta1, beta2=beta2, eps=self.config.eps, weight_decay=0.0,
                amsgrad=False, maximize=False, grad_scale=grad_scale, found_inf=found_inf,
            )  # fmt: skip
            for s, update in zip(group, updates, strict=True):
                row = self.rows[s.row]
                torch.add(update, s.weight, alpha=row.weight_decay, out=s.grad)
                norms[0].append(torch.dot(s.weight, s.weight) if row.adapts else none)
                norms[1].append(torch.dot(s.grad, s.grad))
        found = torch.stack([torch.stack(part) for part in norms]).double().to(squares.device)
        return squares.index_add_(1, self._row_index(slices), found)

    def _row_index(self, slices: Sequence[Slice]) -> Tensor:
        """Rows of slices, on the device; they are the same in every step, so nothing is sent there but once."""
        rows = tuple(s.row for s in slices)
        if rows not in self._indices:
            self._indices[rows] = torch.tensor(rows, device=self.loss.device)
        return self._indices[rows]

    def _subtract(self, slices: Sequence[Slice], rates: Tensor, share: Tensor) -> None:
        """Take a step along the updates that ``_adam_updates`` left, and a ``share`` of the result into the average."""
        if not slices:
            return
        own_rates, share = rates.to(slices[0].weight.device).unbind(), share.to(slices[0].weight.device)
        for s in slices:
            s.weight.sub_(s.grad.mul_(own_rates[s.row]))
            if self.rows[s.row].upper_bound != float("inf"):
                s.weight.clamp_(max=self.rows[s.row].upper_bound)
            if s.ema is not None:
                s.ema.lerp_(s.weight, share)

    @abstractmethod
    def _ratios(self, weight: Tensor, update: Tensor) -> Tensor:
        """Factors of the learning rates by row, from the norms of weight and update by row, fp64."""


def _groups(slices: Sequence[Slice], most: int) -> Iterator[list[Slice]]:
    """Slices in order, as many at a time as have ``most`` elements together."""
    group: list[Slice] = []
    size = 0
    for s in slices:
        if group and size + len(s.weight) > most:
            yield group
            group, size = [], 0
        group.append(s)
        size += len(s.weight)
    if group:
        yield group


def _squared_norm(slices: Sequence[Slice], device: torch.device) -> Tensor:
    """Sum of squares of the gradients, fp64: an fp32 dot product of a slice is exact enough, a sum of many is not."""
    if not slices:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([torch.dot(s.grad, s.grad) for s in slices]).double().sum().to(device)
