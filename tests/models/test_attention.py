from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peers import captions, noise
from torch import Tensor

from evaclip.data.batch import PackedText
from evaclip.models import attention as seam

LENGTHS = [6, 1, 3, 6, 17, 3, 3]


def dense_inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    fused = noise(2, 19, 3, 4, 8, dtype=dtype)
    return [part.requires_grad_() for part in fused.unbind(2)]


def packed_inputs(text: PackedText, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    fused = noise(len(text.ids), 3, 4, 8, dtype=dtype)
    return [part.requires_grad_() for part in fused.unbind(1)]


def plain(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """[tokens, heads, head_dim] of one caption, row by row."""
    rows = []
    for i in range(len(q)):
        seen = i + 1 if causal else len(q)
        weights = torch.softmax((q[i] * k[:seen]).sum(-1) / q.shape[-1] ** 0.5, dim=0)
        rows.append((weights[..., None] * v[:seen]).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "reference"])
def test_dense_kernels_equal_the_formula(kernel: seam.Kernel) -> None:
    q, k, v = dense_inputs()
    with seam.use_kernel(kernel):
        out = seam.attention(q, k, v)
    for sample in range(2):
        expected = plain(q[sample], k[sample], v[sample], causal=False)
        assert torch.allclose(out[sample], expected, atol=1e-12)  # fp64


@pytest.mark.parametrize("multiple_of", [1, 16])
@pytest.mark.parametrize("kernel", ["auto", "sdpa", "reference"])
def test_packed_kernels_equal_the_formula_on_each_caption(kernel: seam.Kernel, multiple_of: int) -> None:
    text = PackedText.pack(captions(LENGTHS), multiple_of)
    q, k, v = packed_inputs(text)
    with seam.use_kernel(kernel):
        out = seam.packed_causal_attention(q, k, v, text)
    assert out.shape == q.shape
    boundaries = text.cu_seqlens.tolist()
    for start, end in pairwise(boundaries):
        expected = plain(q[start:end], k[start:end], v[start:end], causal=True)
        assert torch.allclose(out[start:end], expected, atol=1e-12)  # fp64


def test_gradients_of_the_kernels_agree() -> None:
    text = PackedText.pack(captions(LENGTHS), 16)
    found = []
    for kernel in ("sdpa", "reference"):
        dense, packed = dense_inputs(), packed_inputs(text)
        with seam.use_kernel(kernel):
            (seam.attention(*dense).square().sum() + seam.packed_causal_attention(*packed, text).sin().sum()).backward()
        found.append([part.grad for part in (*dense, *packed)])
    for fused, reference in zip(*found, strict=True):
        assert torch.allclose(fused, reference, atol=1e-12)  # fp64


def test_the_forced_kernel_ends_with_its_block_even_on_an_error() -> None:
    def fail() -> None:
        assert "plain reference" in seam.kernel_name("cpu", torch.float32)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), seam.use_kernel("reference"):
        fail()
    assert "plain reference" not in seam.kernel_name("cpu", torch.float32)


def test_kernel_name_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        __version__ = "2.8.3"

    monkeypatch.setattr(seam, "_FLASH_ATTN", None)
    monkeypatch.setattr(seam, "_VARLEN", Installed)
    grouped = "captions grouped by length"
    order = "torch SDPA (cudnn, flash, efficient, math)"
    assert (
        seam.kernel_name("cpu", torch.float32) == f"image attention: torch SDPA; text attention: torch SDPA, {grouped}"
    )
    assert seam.kernel_name("cuda", torch.float32) == f"image attention: {order}; text attention: {order}, {grouped}"
    foreign = seam.kernel_name("cuda", torch.float32, own_images=False)
    assert foreign == f"image attention: as in timm; text attention: {order}, {grouped}"
    varlen = seam.kernel_name("cuda", torch.bfloat16)
    assert varlen == f"image attention: {order}; text attention: torch varlen_attn (flash)"
    assert seam.kernel_name("cuda", torch.bfloat16, text_head_dim=20).endswith(grouped)
    monkeypatch.setattr(seam, "_VARLEN", None)
    assert seam.kernel_name("cuda", torch.float16).endswith(grouped)
    monkeypatch.setattr(seam, "_FLASH_ATTN", Installed)
    both = "image attention: flash-attn 2.8.3; text attention: flash-attn 2.8.3"
    assert seam.kernel_name("cuda", torch.float16) == both
    assert seam.kernel_name("cuda", torch.float32).startswith("image attention: torch SDPA")


def test_asking_for_flash_attn_without_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "_FLASH_ATTN", None)
    message = r"needs the package flash-attn: pip install evaclip\[flash\]"
    with pytest.raises(RuntimeError, match=message), seam.use_kernel("flash"):
        pass


def test_a_missing_package_is_a_fallback_and_a_broken_one_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "built_wrongly.py").write_text("import a_library_that_is_not_there")
    (tmp_path / "linked_wrongly.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert seam._optional("not_installed_anywhere") is None
    assert seam._optional("sys") is sys
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        seam._optional("built_wrongly")
    with pytest.raises(ImportError, match="undefined symbol"):
        seam._optional("linked_wrongly")


def test_causality_is_asked_for_as_each_torch_wants_it() -> None:
    def torch_2_10(query: Tensor, max_k: int, is_causal: bool = False, return_aux: object = None) -> None: ...

    def torch_2_11(query: Tensor, max_k: int, *, window_size: tuple[int, int] = (-1, -1)) -> None: ...

    assert seam._causal_option(torch_2_10) == {"is_causal": True}
    assert seam._causal_option(torch_2_11) == {"window_size": (-1, 0)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 88])
def test_gpu_kernels_agree_with_the_reference_in_fp64(dtype: torch.dtype, head_dim: int) -> None:
    text = PackedText.pack(captions([77, 12, 30, 12, 5]), 128).to("cuda")
    dense = noise(2, 99, 3, 4, head_dim).to("cuda", dtype)
    packed = noise(len(text.ids), 3, 4, head_dim).to("cuda", dtype)
    results = []
    for kernel, cast in (("auto", dtype), ("reference", torch.float64)):
        inputs = [part.to(cast).requires_grad_() for part in (dense, packed)]
        with seam.use_kernel(kernel):
            out = seam.attention(*inputs[0].unbind(2)), seam.packed_causal_attention(*inputs[1].unbind(1), text)
        sum(part.double().square().sum() for part in out).backward()
        results.append([part.double() for part in (*out, *(part.grad for part in inputs))])
    # The rounding unit of the dtype, times a few for the softmax, on values around one.
    tolerance = 8 * torch.finfo(dtype).eps
    for fast, reference in zip(*results, strict=True):
        assert (fast - reference).norm() < tolerance * reference.norm()
