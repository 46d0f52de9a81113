"""A model with its weights, from wherever we keep one: a run, a checkpoint, or a folder that ``export`` wrote."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError

from evaclip.checkpoint import CheckpointReader, find_checkpoint
from evaclip.config import InitConfig, Loss, LossConfig
from evaclip.errors import CheckpointError, WeightsError
from evaclip.loss import ContrastiveLoss
from evaclip.models.clip import CLIP, empty_model
from evaclip.weights.load import initialise_from
from evaclip.weights.origin import ABOUT, read_about


class Stored(NamedTuple):
    """A model, its temperature, and where it comes from."""

    clip: CLIP
    loss: ContrastiveLoss
    loss_config: LossConfig
    origin: dict[str, Any]
    """Step, samples and versions of the run."""


def find_model(path: str | Path) -> Path:
    """The export at ``path``, or the checkpoint that is meant by it.

    Raises:
        CheckpointError: There is neither.
    """
    path = Path(path)
    return path if (path / ABOUT).is_file() else find_checkpoint(path)


def open_model(path: str | Path, device: torch.device | str = "cpu", *, ema: bool = False) -> Stored:
    """The model of a run directory's newest intact checkpoint, of a checkpoint, or of an export.

    Args:
        path: Where it is.
        device: Where it is to be.
        ema: Take the averaged weights of a run.

    Raises:
        CheckpointError: There is no intact checkpoint, or its weights are not those of its configuration, or it has no
            averaged ones.
        WeightsError: The export is not whole, or holds an image tower alone.
    """
    path = find_model(path)
    if (path / ABOUT).is_file():
        if ema:
            raise WeightsError(f"{path} is an export, which has one set of weights; take its run")
        return _open_export(path, device)
    checkpoint = CheckpointReader(path)
    if ema and not checkpoint.has_ema:
        raise CheckpointError(f"{checkpoint.path} has no averaged weights; its run had no optim.ema_decay")
    clip = empty_model(checkpoint.config.model, device)
    loss = ContrastiveLoss(checkpoint.config.loss, torch.device("cpu"))
    parameters = dict(chain(clip.named_parameters(), loss.named_parameters()))
    checkpoint.require_shapes({name: list(parameter.shape) for name, parameter in parameters.items()})
    for name, parameter in parameters.items():
        checkpoint.load(name, parameter, ema=ema)
    state = checkpoint.state
    origin = {"step": state.step, "samples": state.samples, "versions": state.versions}
    return Stored(clip, loss, checkpoint.config.loss, origin)


def _open_export(path: Path, device: torch.device | str) -> Stored:
    about = read_about(path)
    exported, config = about["exported_as"], about["model"]
    try:
        loss_config: LossConfig = TypeAdapter(Loss).validate_python(about["loss"])
        origin = dict(about["origin"])
    except (KeyError, TypeError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise WeightsError(f"{path / ABOUT} cannot be read ({reason}); export the model again") from None
    if exported in ("timm", "tower"):
        raise WeightsError(f"{path} holds an image tower alone; start from it with init.image={path}")
    clip = empty_model(config, device)
    loss = ContrastiveLoss(loss_config, torch.device("cpu"))
    layout = "evaclip" if exported == "safetensors" else exported
    init = InitConfig.model_validate({"model": str(path), "model_format": layout})
    initialise_from(init, clip, loss, loss_config.max_logit_scale)
    return Stored(clip, loss, loss_config, origin)
