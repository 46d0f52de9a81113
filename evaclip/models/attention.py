"""The one place that chooses an attention kernel.

On CUDA in half precision flash-attn runs if it is installed; otherwise torch's fused attention does, with packed text
through ``varlen_attn`` where this torch has it. Everywhere else packed captions attend in groups of equal length, so
causality needs no mask. This module knows shapes, dtypes and devices; it does not know what the tokens mean.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from evaclip.data.batch import PackedText

Kernel = Literal["auto", "flash", "sdpa", "reference"]

_CUDA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Fastest first; each one that does not take the dtype or the shape is passed over."""


def _optional(name: str) -> ModuleType | None:
    """A module that need not exist. One that exists and cannot be imported is an error: a broken build is loud."""
    try:
        return import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name != name:
            raise
        return None


_FLASH_ATTN: Any = _optional("flash_attn")
_VARLEN: Any = _optional("torch.nn.attention.varlen")  # torch 2.10 and newer


def _causal_option(varlen_attn: Callable[..., Any]) -> dict[str, Any]:
    """How this torch's ``varlen_attn`` is asked to be causal: torch 2.11 turned a flag into a window."""
    windowed = "window_size" in inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if windowed else {"is_causal": True}


_VARLEN_CAUSAL = _causal_option(_VARLEN.varlen_attn) if _VARLEN else {}


class _Seam:
    """What tests force; everything else leaves it at ``auto``."""

    kernel: Kernel = "auto"


_seam = _Seam()


@contextmanager
def use_kernel(kernel: Kernel) -> Iterator[None]:
    """Force a kernel inside the block; for tests and comparisons.

    Raises:
        RuntimeError: ``flash`` is asked for and flash-attn is not installed.
    """
    if kernel == "flash" and _FLASH_ATTN is None:
        raise RuntimeError("the kernel 'flash' needs the package flash-attn: pip install evaclip[flash]")
    before, _seam.kernel = _seam.kernel, kernel
    try:
        yield
    finally:
        _seam.kernel = before


def _dense_kernel(device: torch.device, dtype: torch.dtype) -> str:
    if _seam.kernel != "auto":
        return _seam.kernel
    half = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "flash" if half and _FLASH_ATTN is not None else "sdpa"


def _packed_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    kernel = _dense_kernel(device, dtype)
    if kernel != "sdpa":
        return kernel
    half = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "varlen" if half and _VARLEN is not None and head_dim % 8 == 0 else "grouped"


def kernel_name(
    device: torch.device | str, dtype: torch.dtype, text_head_dim: int = 64, *, own_images: bool = True
) -> str:
    """What computes attention there, for the run log.

    Args:
        device: Where the towers run.
        dtype: That of queries, keys and values: autocast's, or that of the weights.
        text_head_dim: Channels of a text head; varlen attention takes multiples of 8.
        own_images: Whether the image tower is ours; others do not come here for their attention.
    """
    device = torch.device(device)
    order = ", ".join(backend.name.removesuffix("_ATTENTION").lower() for backend in _CUDA_ORDER)
    fused = f"torch SDPA ({order})" if device.type == "cuda" else "torch SDPA"
    names = {
        "flash": f"flash-attn {getattr(_FLASH_ATTN, '__version__', '')}",
        "sdpa": fused,
        "varlen": "torch varlen_attn (flash)",
        "grouped": f"{fused}, captions grouped by length",
        "reference": "plain reference",
    }
    image, text = _dense_kernel(device, dtype), _packed_kernel(device, dtype, text_head_dim)
    return f"image attention: {names[image] if own_images else 'as in timm'}; text attention: {names[text]}"


# ------------------------------------------------------------------------------------------------------------ images


def attention(
    q: Float[Tensor, "batch tokens heads head_dim"],
    k: Float[Tensor, "batch tokens heads head_dim"],
    v: Float[Tensor, "batch tokens heads head_dim"],
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """Softmax attention of every token to every token of its sample, scaled by head_dim ** -0.5."""
    kernel = _dense_kernel(q.device, q.dtype)
    if kernel == "flash":
        return _FLASH_ATTN.flash_attn_func(q, k, v)
    if kernel == "reference":
        everything = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device)
        return reference_attention(q, k, v, everything)
    return _fused(q, k, v, causal=False)


def _fused(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Fused attention of torch on [batch, tokens, heads, head_dim]; it wants [batch, heads, tokens, head_dim]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cuda":
        with sdpa_kernel(_CUDA_ORDER, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2)


# -------------------------------------------------------------------------------------------------------------- text


def packed_causal_attention(
    q: Float[Tensor, "tokens heads head_dim"],
    k: Float[Tensor, "tokens heads head_dim"],
    v: Float[Tensor, "tokens heads head_dim"],
    text: PackedText,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Softmax attention of every token to itself and those before it in its segment, scaled by head_dim ** -0.5."""
    kernel = _packed_kernel(q.device, q.dtype, q.shape[-1])
    bound, boundaries = text.segment_bound, text.cu_seqlens
    if kernel == "flash":
        return _FLASH_ATTN.flash_attn_varlen_func(q, k, v, boundaries, boundaries, bound, bound, causal=True)
    if kernel == "varlen":
        # Newer versions of torch would try cuDNN first; one kernel on all of them keeps runs comparable.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return _VARLEN.varlen_attn(q, k, v, boundaries, boundaries, bound, bound, **_VARLEN_CAUSAL)
    if kernel == "reference":
        tokens = torch.arange(q.shape[0], device=q.device)
        segments = torch.bucketize(tokens, boundaries[1:], right=True)
        allowed = (segments[:, None] == segments) & (tokens[:, None] >= tokens)
        return reference_attention(q[None], k[None], v[None], allowed)[0]
    return _grouped(q, k, v, text)  # pyright: ignore[reportCallIssue]  torch leaves its decorator untyped


@torch.compiler.disable  # every batch has other groups, and each would be compiled anew
def _grouped(q: Tensor, k: Tensor, v: Tensor, text: PackedText) -> Tensor:
    """Captions of one length at a time: in a packed batch they are neighbours, so a group is a plain view."""
    groups = [*text.groups, (text.padding, 1)] if text.padding else text.groups
    sizes = [length * count for length, count in groups]
    out = []
    # One split, not a slice per group: its backward joins the gradients once instead of padding each with zeros.
    for (length, _), *qkv in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        # (count * length, heads, head_dim) -> (count, length, heads, head_dim) and back
        attended = _fused(*(part.unflatten(0, (-1, length)) for part in qkv), causal=True)
        out.append(attended.flatten(0, 1))
    return torch.cat(out)


# --------------------------------------------------------------------------------------------------------- reference


def reference_attention(
    q: Float[Tensor, "batch tokens heads head_dim"],
    k: Float[Tensor, "batch tokens heads head_dim"],
    v: Float[Tensor, "batch tokens heads head_dim"],
    allowed: Tensor,
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """Attention as the formula says it, in the inputs' dtype: what the fast kernels are compared with.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        allowed: bool[tokens, tokens], which key (column) a query (row) may see.
    """
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)
