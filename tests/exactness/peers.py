"""EVA-CLIP's LAMB and open_clip's accumulation, run as their authors do, and ours, against the same in one process."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from distributed.cases import ENGINES, tiny_config
from test_accumulation import DoubleEngine, batches
from timm.optim.lamb import Lamb
from torch import Tensor, nn

from evaclip.accumulation import forward_backward
from evaclip.config import RunConfig
from evaclip.data.batch import Batch, PackedText
from evaclip.data.pipeline import Stream, make_plan
from evaclip.distributed import Ranks
from evaclip.engine import create_engine
from evaclip.loss import ContrastiveLoss
from evaclip.models.clip import CLIP, Features, create_model
from evaclip.optim.table import layer_of, parameter_table
from evaclip.sources import open_sources
from exactness.peer_losses import naive

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside DeepSpeed's imports
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

# ------------------------------------------------------------------------------------------------------ LAMB under ZeRO

STEPS = (3, 20)
"""After which weights are compared."""
LAYER_DECAY = {"optim__image__layer_decay": 0.75, "optim__text__layer_decay": 0.75}


class EvaClipEngine:
    """DeepSpeed with timm's LAMB as EVA-CLIP sets it up (its own is of the same origin), behind our engines' interface.

    DeepSpeed flattens each parameter group and hands LAMB this rank's slice of it, which LAMB takes for one parameter.
    """

    def __init__(self, stage: int, model: CLIP, optimizer: Lamb, ranks: Ranks) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**12,
        }
        self._world_size = ranks.world_size
        self._engine: Any = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )[0]

    def forward(self, batch: Batch, *, last: bool, known: Features | None = None) -> Features:
        return self._engine(batch.images, batch.text, batch.seeds)

    def backward(self, surrogate: Tensor) -> None:
        self._engine.backward(surrogate * self._world_size)  # which DeepSpeed divides by it

    def step(self, lr_factor: float, loss: Tensor) -> None:
        self._engine.step()


def lamb(ranks: Ranks, folder: Path, *, engine: str, peer: bool, layers: bool) -> dict[str, float]:
    """Distance from timm's LAMB in one process, in double, on the very gradients that the engine had.

    Of all weights, in parts of the reference's movement. The model starts with our initial weights, whose norms differ
    enough from tensor to tensor; they were not spread further. Rank 0 has the reference and the figures.

    Args:
        ranks: The peers.
        folder: Of this case.
        engine: torch, or ZeRO's stage; stage 0 does not flatten, and shows that nothing else differs.
        peer: ``EvaClipEngine`` instead of ours.
        layers: Whether groups are what is decayed and what is not of each layer of a tower, with layer-wise decay of
            the learning rate; otherwise of the whole model, with one learning rate.
    """
    changes = {"optim__name": "lamb", "optim__lr": 3e-2, **(LAYER_DECAY if layers else {})}
    config = tiny_config(folder, **changes, **({} if peer else ENGINES[engine]))
    clip = create_model(config.model, seed=0)
    exact = {name: p.detach().double().requires_grad_() for name, p in clip.named_parameters()}
    start = {name: p.detach().clone() for name, p in exact.items()}
    reference, flattened = (_timms(config, p, layers=layers) for p in (exact, dict(clip.named_parameters())))
    loss = ContrastiveLoss(config.loss, ranks.device)
    chosen: Any = (
        EvaClipEngine(int(engine[-1]), clip, flattened, ranks) if peer else create_engine(config, clip, loss, ranks)
    )
    sources = open_sources(config, ranks)
    stream = Stream(config, make_plan(config, sources, 16), sources, ranks, steps=STEPS[-1], states={})
    found: dict[str, float] = {}
    for step, (micro_batches, *_) in enumerate(stream, 1):
        output = forward_backward(chosen, loss, micro_batches, ranks)
        for name, p in clip.named_parameters():
            gradient: Any = ranks.sum(_gradient(p).clone()) if engine == "torch" else safe_get_full_grad(p)
            if not peer and engine != "torch":  # DeepSpeed took the mean, which our optimizer undoes
                gradient = gradient * ranks.world_size
            if ranks.is_main:
                exact[name].grad = gradient.double().view_as(exact[name])
        chosen.step(1.0, output.loss)
        if ranks.is_main:
            reference.step()
        if step in STEPS:
            whole = engine in ("torch", "zero0")
            weights: Any = {n: p if whole else safe_get_full_fp32_param(p) for n, p in clip.named_parameters()}
            if ranks.is_main:
                found[f"after {step}"] = _distance(weights, exact) / _distance(start, exact)
    counted = flattened.param_groups[0]["step"] if peer else chosen.optimizer.updates
    return {**found, "updates counted": int(counted)}


def _timms(config: RunConfig, parameters: Mapping[str, Tensor], *, layers: bool) -> Lamb:
    """timm's LAMB over EVA-CLIP's parameter groups."""
    depth = {"image": config.model.image.depth, "text": config.model.text.depth}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    groups: dict[Any, dict[str, Any]] = {}
    for row in parameter_table(shapes, config.optim, config.model, config.loss):
        tower, _, rest = row.name.partition(".")
        layer = (tower, layer_of(rest, depth[tower])) if layers else ()
        group = {"params": [], "lr": row.lr, "weight_decay": row.weight_decay}
        groups.setdefault((*layer, row.weight_decay), group)["params"].append(parameters[row.name])
    optim = config.optim
    return Lamb([*groups.values()], lr=optim.lr, betas=optim.betas, eps=optim.eps, max_grad_norm=None)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    squares = [(one[name].detach().double() - other[name].detach()).square().sum() for name in one]
    return float(torch.stack(squares).sum().sqrt())


# --------------------------------------------------------------------------------------------------------- accumulation


class OpenClipModel(nn.Module):
    """Our CLIP with open_clip's interface; like its PatchDropout, it draws anew at each forward what it drops."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.clip = create_model(config.model, seed=0).double()
        # as ours, which is made in single precision
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.loss.logit_scale)).double())
        self.passes: list[tuple[Tensor, Tensor]] = []
        """Seeds and image features of each forward."""

    def forward(self, images: Tensor, text: PackedText, seeds: Tensor | None = None) -> dict[str, Tensor]:
        seeds = torch.randint(1 << 62, (len(images),)) if seeds is None else seeds
        features = self.clip(images, text, seeds)
        self.passes.append((seeds, features.image.detach()))
        return {
            "image_features": features.image,
            "text_features": features.text,
            "logit_scale": self.logit_scale.exp(),
        }


class Loader(list[tuple[Tensor, PackedText]]):
    """As much of a data loader as open_clip's loop asks for."""

    @property
    def num_batches(self) -> int:
        return len(self)

    @property
    def num_samples(self) -> int:
        return sum(len(images) for images, _ in self)


def accumulation(ranks: Ranks, folder: Path, *, pieces: int, token_drop: float) -> dict[str, float]:
    """open_clip's training loop over one update of several micro-batches, and ours on the same weights and data.

    Each against the naive loss of the whole batch with the patches dropped that its last forward dropped; in double.
    """
    from open_clip import ClipLoss  # noqa: PLC0415  seconds, and for one case
    from open_clip_train.train import train_one_epoch  # noqa: PLC0415

    config = tiny_config(folder, model__image__token_drop=token_drop)
    micro_batches = _coloured(pieces)
    torch.manual_seed(0)
    model = OpenClipModel(config)
    arguments = SimpleNamespace(
        device="cpu", precision="fp32", accum_freq=pieces, batch_size=len(micro_batches[0].images), distill=False,
        skip_scheduler=True, grad_clip_norm=None, rank=0, local_rank=0, world_size=1, log_local=False,
        log_every_n_steps=1, wandb=False,
    )  # fmt: skip
    loader = Loader((batch.images, batch.text) for batch in micro_batches)
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=loader)}
    still = torch.optim.SGD(model.parameters(), lr=0.0)  # leaves weights and gradients as they are
    train_one_epoch(model, data, ClipLoss(), 0, still, None, None, None, arguments)
    cached, last = model.passes[:pieces], model.passes[pieces:]
    before, after = (torch.cat([image for _, image in passes]) for passes in (cached, last))
    theirs = _gradients(model)
    expected = _of_whole_batch(config, torch.cat([seeds for seeds, _ in last]))

    engine: Any = DoubleEngine(create_model(config.model, seed=0))
    loss = ContrastiveLoss(config.loss, ranks.device).double()
    forward_backward(engine, loss, micro_batches, ranks)
    ours = _gradients(engine.clip, "clip.") | _gradients(loss)
    wanted = _of_whole_batch(config, torch.cat([batch.seeds for batch in micro_batches]))
    return {
        "open_clip, towers": _relative(theirs, expected, "clip."),
        "open_clip, logit_scale ratio": float(theirs["logit_scale"] / expected["logit_scale"]),
        "open_clip, cosine of its passes": float(F.cosine_similarity(before, after).mean()),
        "evaclip, towers": _relative(ours, wanted, "clip."),
        "evaclip, logit_scale ratio": float(ours["logit_scale"] / wanted["logit_scale"]),
    }


def _coloured(pieces: int) -> list[Batch]:
    """Each image one colour with noise, as in our other tests: it matters little which patches are seen."""

    def faded(images: Tensor) -> Tensor:
        return (0.85 * images[:, :, :1, :1] + 0.15 * images).byte()

    return [dataclasses.replace(batch, images=faded(batch.images)) for batch in batches(pieces)]


def _of_whole_batch(config: RunConfig, seeds: Tensor) -> dict[str, Tensor]:
    """Gradients of the naive loss."""
    (batch,) = _coloured(1)
    model = OpenClipModel(config)
    naive(model(batch.images, batch.text, seeds)).backward()
    return _gradients(model)


def _gradients(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: _gradient(p) for name, p in module.named_parameters()}


def _relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], prefix: str) -> float:
    """Norm of the difference over the norm, of the gradients of this prefix."""
    wanted = {name: gradient for name, gradient in expected.items() if name.startswith(prefix)}
    return _distance(wanted, found) / _distance(wanted, dict.fromkeys(wanted, torch.zeros(())))
