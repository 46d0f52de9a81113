"""What the towers are fed: captions packed without padding, and the samples of one step.

This module decides how captions lie behind one another; it does not know how they were read or tokenized.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

_KERNEL_TILE = 128
"""Rows that attention kernels take at once: a bound in these steps costs them nothing and changes rarely."""


@dataclass(frozen=True)
class PackedText:
    """Captions behind one another, shortest first, so that no padding is computed.

    A segment of padding may follow the last caption. It attends to itself only and gives no feature.
    """

    ids: Int[Tensor, " tokens"]
    """Token ids, int64."""
    positions: Int[Tensor, " tokens"]
    """Place of each token in its caption, int64."""
    cu_seqlens: Int[Tensor, " boundaries"]
    """Where segments start, and the end of the last one; int32."""
    restore: Int[Tensor, " captions"]
    """``features[restore]`` brings features of the packed captions back to the caller's order; int64."""
    groups: tuple[tuple[int, int], ...]
    """(length, captions of that length), ascending; known to the host, so that it can attend group by group."""
    segment_bound: int
    """No segment is longer, padding included; in coarse steps, so that compiled code is used again."""

    @classmethod
    def pack(cls, captions: Sequence[Sequence[int]], multiple_of: int = 1) -> PackedText:
        """Sort captions by length and lay them behind one another.

        Args:
            captions: Token ids of each caption, start and end token included.
            multiple_of: If above 1, padding brings the token count to the next multiple. It is at least one token
                and has a segment of its own, so neither count depends on the captions alone.

        Raises:
            ValueError: There is no caption, or one without tokens.
        """
        if not captions:
            raise ValueError("there is no caption to pack")
        lengths = [len(caption) for caption in captions]
        if 0 in lengths:
            raise ValueError(f"caption {lengths.index(0)} has no tokens; even an empty text has a start and an end")
        order = sorted(range(len(captions)), key=lengths.__getitem__)
        total = sum(lengths)
        padding = multiple_of - total % multiple_of if multiple_of > 1 else 0
        segments = [lengths[index] for index in order] + [padding] * bool(padding)

        ids = torch.zeros(total + padding, dtype=torch.int64)
        ids[:total] = torch.tensor(list(chain.from_iterable(captions[index] for index in order)), dtype=torch.int64)
        sizes = torch.tensor(segments)
        ends = sizes.cumsum(0)
        positions = torch.arange(total + padding) - (ends - sizes).repeat_interleave(sizes)
        positions[total:] = 0
        restore = torch.empty(len(captions), dtype=torch.int64)
        restore[torch.tensor(order)] = torch.arange(len(captions))
        return cls(
            ids=ids,
            positions=positions,
            cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32),
            restore=restore,
            groups=tuple(sorted(Counter(lengths).items())),
            segment_bound=-(-max(segments) // _KERNEL_TILE) * _KERNEL_TILE,
        )

    def captions(self) -> list[list[int]]:
        """Token ids of each caption, in the caller's order: what was packed."""
        ids, bounds = self.ids.tolist(), self.cu_seqlens.tolist()
        return [ids[bounds[place] : bounds[place + 1]] for place in self.restore.tolist()]

    @property
    def num_captions(self) -> int:
        """Captions, without the segment of padding."""
        return self.restore.shape[0]

    @property
    def max_length(self) -> int:
        """Tokens of the longest caption."""
        return self.groups[-1][0]

    @property
    def tokens_per_caption(self) -> float:
        """Mean length of the captions."""
        return sum(length * count for length, count in self.groups) / self.num_captions

    @property
    def padding(self) -> int:
        """Tokens behind the last caption."""
        return self.ids.shape[0] - sum(length * count for length, count in self.groups)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedText:
        """The same captions on another device."""
        return dataclasses.replace(
            self,
            ids=self.ids.to(device, non_blocking=non_blocking),
            positions=self.positions.to(device, non_blocking=non_blocking),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            restore=self.restore.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> PackedText:
        """The same captions in page-locked memory, from which copies to a GPU need not wait."""
        return dataclasses.replace(
            self,
            ids=self.ids.pin_memory(),
            positions=self.positions.pin_memory(),
            cu_seqlens=self.cu_seqlens.pin_memory(),
            restore=self.restore.pin_memory(),
        )


class Place(NamedTuple):
    """Where a sample lies; numbers as in the run's plan."""

    source: int
    shard: int
    record: int


@dataclass(frozen=True)
class Batch:
    """Samples of one step, or a rank's part of them: image, caption and seed of each, in one order."""

    images: UInt8[Tensor, "batch 3 height width"]
    """Pixels in 0..255."""
    text: PackedText
    """As many captions as images."""
    seeds: Int[Tensor, " batch"]
    """63 bits each, int64, from which the towers draw what they drop."""
    places: tuple[Place, ...] = ()
    """Where each sample comes from, on the host; empty for a batch that was made by hand."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same samples on another device."""
        return Batch(
            images=self.images.to(device, non_blocking=non_blocking),
            text=self.text.to(device, non_blocking=non_blocking),
            seeds=self.seeds.to(device, non_blocking=non_blocking),
            places=self.places,
        )

    def pin_memory(self) -> Batch:
        """The same samples in page-locked memory."""
        return Batch(self.images.pin_memory(), self.text.pin_memory(), self.seeds.pin_memory(), self.places)
