from __future__ import annotations

import pytest
import torch

from evaclip.data.batch import Batch, PackedText

CAPTIONS = [[1, 7, 7, 2], [1, 2], [1, 8, 2], [1, 9, 9, 2], [1, 3]]


def test_captions_lie_behind_one_another_shortest_first_and_stable() -> None:
    text = PackedText.pack(CAPTIONS)
    assert text.ids.tolist() == [1, 2, 1, 3, 1, 8, 2, 1, 7, 7, 2, 1, 9, 9, 2]
    assert text.positions.tolist() == [0, 1, 0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3]
    assert text.cu_seqlens.tolist() == [0, 2, 4, 7, 11, 15]
    assert text.groups == ((2, 2), (3, 1), (4, 2))
    assert (text.ids.dtype, text.positions.dtype, text.cu_seqlens.dtype) == (torch.int64, torch.int64, torch.int32)
    assert (text.num_captions, text.max_length, text.padding) == (5, 4, 0)


def test_restore_brings_back_the_callers_order() -> None:
    text = PackedText.pack(CAPTIONS)
    starts, ends = text.cu_seqlens[:-1], text.cu_seqlens[1:]
    packed = [text.ids[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
    assert [packed[place] for place in text.restore] == CAPTIONS
    assert text.captions() == PackedText.pack(CAPTIONS, 8).captions() == CAPTIONS


@pytest.mark.parametrize("multiple_of", [2, 5, 8, 64])
def test_padding_is_one_segment_behind_the_captions(multiple_of: int) -> None:
    plain, filled = PackedText.pack(CAPTIONS), PackedText.pack(CAPTIONS, multiple_of)
    tokens = len(plain.ids)
    assert len(filled.ids) % multiple_of == 0
    assert 1 <= len(filled.ids) - tokens <= multiple_of
    assert filled.padding == len(filled.ids) - tokens
    assert filled.ids[:tokens].tolist() == plain.ids.tolist()
    assert not filled.ids[tokens:].any()
    assert not filled.positions[tokens:].any()
    assert filled.cu_seqlens.tolist() == [*plain.cu_seqlens.tolist(), len(filled.ids)]
    assert (filled.num_captions, filled.max_length, filled.groups) == (5, 4, plain.groups)
    assert torch.equal(filled.restore, plain.restore)


def test_shapes_and_bounds_repeat_for_captions_of_nearby_lengths() -> None:
    packs = [
        PackedText.pack([[1] * length for length in lengths], 64) for lengths in ([3, 9, 20], [30, 3, 4], [7, 7, 7])
    ]
    assert {(len(text.ids), len(text.cu_seqlens), text.segment_bound) for text in packs} == {(64, 5, 128)}


@pytest.mark.parametrize(("lengths", "multiple_of", "bound"), [([5], 1, 128), ([129], 1, 256), ([5], 300, 384)])
def test_no_segment_is_longer_than_the_bound(lengths: list[int], multiple_of: int, bound: int) -> None:
    text = PackedText.pack([[1] * length for length in lengths], multiple_of)
    assert text.segment_bound == bound
    assert text.cu_seqlens.diff().max() <= bound


def test_captions_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no caption to pack"):
        PackedText.pack([])
    with pytest.raises(ValueError, match="caption 1 has no tokens; even an empty text has a start and an end"):
        PackedText.pack([[1, 2], [], [1, 2]])


def test_a_batch_moves_as_a_whole() -> None:
    batch = Batch(torch.zeros(5, 3, 4, 4, dtype=torch.uint8), PackedText.pack(CAPTIONS, 8), torch.arange(5))
    moved = batch.to("meta")
    tensors = [
        moved.images,
        moved.seeds,
        moved.text.ids,
        moved.text.positions,
        moved.text.cu_seqlens,
        moved.text.restore,
    ]
    assert all(tensor.is_meta for tensor in tensors)
    assert moved.text.groups == batch.text.groups
    assert moved.text.segment_bound == batch.text.segment_bound
    same = batch.to("cpu", non_blocking=True)
    assert torch.equal(same.text.ids, batch.text.ids)
    assert torch.equal(same.seeds, batch.seeds)
