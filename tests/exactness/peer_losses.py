"""open_clip's losses over ranks and ours, against the naive loss of the whole batch in one process.

Two small MLPs in double precision, so that what remains is not rounding. open_clip's model runs under PyTorch's
DistributedDataParallel, which averages gradients over ranks, as in its trainer.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from evaclip.config import InfoNceConfig, LossConfig, SigmoidConfig
from evaclip.distributed import Ranks
from evaclip.loss import ContrastiveLoss

PAIRS, INPUTS, DIM = 24, 20, 16
SCALE, BIAS = 20.0, -5.0


def open_clip_losses() -> ModuleType:
    """``open_clip.loss`` by its file: the package around it takes seconds to import and is not needed."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Towers(nn.Module):
    """Two MLPs and the scalars of the loss, with the outputs of an open_clip model."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(INPUTS, 32), nn.GELU(), nn.Linear(32, DIM)) for _ in "it")
        self.logit_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        self.logit_bias = nn.Parameter(torch.tensor(BIAS)) if bias else None

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        features = {"image_features": self.image(images), "text_features": self.text(texts)}
        outputs = {name: F.normalize(value, dim=1) for name, value in features.items()}
        outputs["logit_scale"] = self.logit_scale.exp()
        return outputs if self.logit_bias is None else {**outputs, "logit_bias": self.logit_bias}


def towers_and_pairs(*, bias: bool) -> tuple[Towers, Tensor, Tensor]:
    """The same on every rank; a pair has one half of its inputs in common."""
    torch.manual_seed(0)
    images = torch.randn(PAIRS, INPUTS, dtype=torch.float64)
    texts = torch.cat([images[:, : INPUTS // 2], torch.randn(PAIRS, INPUTS // 2, dtype=torch.float64)], 1)
    return Towers(bias=bias).double(), images, texts


def naive(outputs: dict[str, Tensor]) -> Tensor:
    """The loss of a whole batch, by its definition."""
    logits = outputs["logit_scale"] * outputs["image_features"] @ outputs["text_features"].T
    if "logit_bias" in outputs:
        signs = 2 * torch.eye(len(logits)) - 1
        return -F.logsigmoid(signs * (logits + outputs["logit_bias"])).sum() / len(logits)
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def compared(found: dict[str, Tensor], *, bias: bool) -> dict[str, float]:
    """Gradients by parameter against those of the whole batch."""
    model, images, texts = towers_and_pairs(bias=bias)
    naive(model(images, texts)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()

    def flat(*towers: str) -> list[Tensor]:
        names = [name for name in expected if name.startswith(towers)]
        return [torch.cat([gradients[name].flatten() for name in names]) for gradients in (found, expected)]

    got, want = flat("image.", "text.")
    return {
        "norm ratio": float(got.norm() / want.norm()),
        "cosine": float(F.cosine_similarity(got, want, dim=0)),
        "cosine, image tower": float(F.cosine_similarity(*flat("image."), dim=0)),
        "cosine, text tower": float(F.cosine_similarity(*flat("text."), dim=0)),
        "relative error": float((got - want).norm() / want.norm()),
        "logit_scale ratio": float(found["logit_scale"] / expected["logit_scale"]),
    }


def open_clips(ranks: Ranks, folder: Path, *, loss: str, options: dict[str, Any]) -> dict[str, float]:
    """``ClipLoss`` or ``SigLipLoss`` with these options."""
    bias = loss == "SigLipLoss"
    model, images, texts = towers_and_pairs(bias=bias)
    share = slice(ranks.rank * PAIRS // ranks.world_size, (ranks.rank + 1) * PAIRS // ranks.world_size)
    criterion = getattr(open_clip_losses(), loss)(rank=ranks.rank, world_size=ranks.world_size, **options)
    parallel = DistributedDataParallel(model)
    criterion(**parallel(images[share], texts[share])).backward()
    return compared({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, bias=bias)


def ours(ranks: Ranks, folder: Path, *, config: LossConfig) -> dict[str, float]:
    """``ContrastiveLoss``, its surrogate's gradients added up over ranks as the engines do."""
    bias = isinstance(config, SigmoidConfig)
    model, images, texts = towers_and_pairs(bias=bias)
    share = slice(ranks.rank * PAIRS // ranks.world_size, (ranks.rank + 1) * PAIRS // ranks.world_size)
    loss = ContrastiveLoss(config, ranks.device).double()
    loss.logit_scale.data.fill_(float(model.logit_scale))
    outputs = model(images[share], texts[share])
    image, text = outputs["image_features"], outputs["text_features"]
    loss(image, text, ranks).surrogate(image, text).backward()
    towers = {name: ranks.sum(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return compared(towers | {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}, bias=bias)


@contextmanager
def counted_bytes(world_size: int) -> Generator[list[int]]:
    """What this rank contributes to collectives in the body.

    Of a gather its own rows, of a reduce-scatter its own rows of the result, of an all-reduce the whole tensor: on a
    ring of two, each is what crosses the wire. Gloo has no reduce-scatter of lists: in the gradient of a gather torch
    does one scatter from each rank instead, of the same size together.
    """
    contribution = {
        "all_gather": lambda tensors, tensor: tensor.nbytes,
        "all_gather_into_tensor": lambda output, tensor: tensor.nbytes,
        "reduce_scatter_tensor": lambda output, tensor: output.nbytes,
        "scatter": lambda output, tensors, source: output.nbytes // world_size,
        "all_reduce": lambda tensor, op=None: tensor.nbytes,
    }
    sent: list[int] = []
    originals = {name: getattr(dist, name) for name in contribution}

    def counting(name: str) -> Any:
        def collective(*arguments: Any, **options: Any) -> Any:
            sent.append(contribution[name](*arguments))
            return originals[name](*arguments, **options)

        return collective

    for name in contribution:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def bytes_sent(ranks: Ranks, folder: Path, *, batch: int = 256, dim: int = 512) -> dict[str, float]:
    """By open_clip's ``ClipLoss`` with ``local_loss`` and ``gather_with_grad``, and by ours: forward and backward."""
    torch.manual_seed(ranks.rank)
    image, text = (F.normalize(torch.randn(batch, dim), dim=1).requires_grad_() for _ in "it")
    place = {"rank": ranks.rank, "world_size": ranks.world_size}
    peer = open_clip_losses().ClipLoss(local_loss=True, gather_with_grad=True, **place)
    with counted_bytes(ranks.world_size) as theirs:
        peer(image, text, torch.tensor(SCALE)).backward()
    loss = ContrastiveLoss(InfoNceConfig(), ranks.device)
    with counted_bytes(ranks.world_size) as own:
        loss(image, text, ranks).surrogate(image, text).backward()
    return {"open_clip": sum(theirs), "evaclip": sum(own)}
