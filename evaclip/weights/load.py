"""Filling towers from other people's checkpoints: both of them from what ``init`` names, or one from a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaclip.config import InitConfig, ModelConfig, WeightFormat
from evaclip.config.tokenizer_file import TOKENIZER
from evaclip.errors import WeightsError
from evaclip.loss import ContrastiveLoss
from evaclip.models.clip import CLIP
from evaclip.models.text import TextTower
from evaclip.models.vision import ImageTower
from evaclip.weights.files import StoredTensor, in_memory, read_weights
from evaclip.weights.match import NO_PLACE, Report, match, some
from evaclip.weights.names import TowerName
from evaclip.weights.origin import differences

if TYPE_CHECKING:
    from evaclip.models.timm_tower import TimmTower

Values = Mapping[str, Callable[[], Tensor]]
"""Parameter of ``CLIP`` -> its tensor, read when it is asked for."""


def find_initial(
    config: InitConfig, clip: CLIP, loss: ContrastiveLoss, max_scale: float
) -> tuple[list[Report], Values]:
    """Find a model's weights in what ``init`` names, and fill the loss's scalars; without it there are none.

    Args:
        config: Files and formats.
        clip: Both towers, of which only names and shapes matter: they may be on the meta device.
        loss: Its scalars are filled where a whole model is given, unless they are fixed.
        max_scale: Upper bound of the logits' multiplier.

    Returns:
        What became of every key, and the values of the parameters that were found.

    Raises:
        WeightsError: A file cannot be read, or does not hold what the model needs.
    """
    reports: list[Report] = []
    values: dict[str, Callable[[], Tensor]] = {}

    def take(tower: TowerName, tensors: Mapping[str, StoredTensor], source: str, wanted: WeightFormat | None) -> None:
        module = clip.image if tower == "image" else clip.text
        parameters, alone = dict(module.named_parameters()), source != config.model
        found = match(parameters, tower, tensors, source, wanted, alone=alone, outlets=module.outlets)
        _require_same_options(found.report, tower, clip.config, alone=alone)
        reports.append(found.report)
        values.update({f"{tower}.{name}": value for name, value in found.values.items()})

    if config.image:
        take("image", read_weights(config.image), config.image, config.image_format)
    if config.text:
        take("text", read_weights(config.text), config.text, config.text_format)
    if config.model:
        tensors = read_weights(config.model)
        take("image", tensors, config.model, config.model_format)
        take("text", tensors, config.model, config.model_format)
        reports.append(_load_scalars(loss, max_scale, tensors, config.model))
        seen = set(chain.from_iterable(report.keys for report in reports))
        left = [key for key in tensors if key not in seen and not NO_PLACE.search(key)]
        if left:
            raise WeightsError(f"{config.model} holds {len(left)} tensors that belong to no tower: {some(left)}")
    return reports, values


@torch.no_grad()
def initialise_from(config: InitConfig, clip: CLIP, loss: ContrastiveLoss, max_scale: float) -> list[Report]:
    """Fill a model that is in memory from what ``init`` names; arguments and errors as in ``find_initial``."""
    reports, values = find_initial(config, clip, loss, max_scale)
    for name, value in values.items():
        clip.get_parameter(name).copy_(value())
    return reports


@torch.no_grad()
def load_tower(
    module: ImageTower | TextTower | TimmTower,
    tower: TowerName,
    tensors: Mapping[str, Tensor],
    source: str,
    wanted: WeightFormat | None = None,
    *,
    alone: bool,
) -> Report:
    """Fill a tower's parameters once all of them are found; arguments and errors as in ``match``."""
    parameters = dict(module.named_parameters())
    found = match(parameters, tower, in_memory(tensors), source, wanted, alone=alone, outlets=module.outlets)
    for name, value in found.values.items():
        module.get_parameter(name).copy_(value())
    return found.report


def _load_scalars(loss: ContrastiveLoss, max_scale: float, tensors: Mapping[str, StoredTensor], source: str) -> Report:
    """Fill the loss's scalars; those that the configuration fixes keep its value, and only a bias may be missing."""
    report = Report("loss", source, "ours", keys=["logit_scale", "logit_bias"])
    for name, parameter in loss.named_parameters():
        value = tensors[name].read() if name in tensors else None
        if value is None and name == "logit_bias":
            report.initialised.append(name)
        elif value is None or value.numel() != 1 or not value.isfinite().all():
            found = "is not there" if value is None else f"is {value.tolist()}, not one finite number"
            raise WeightsError(f"{source}: {name} {found}; is it a whole CLIP model?")
        elif not parameter.requires_grad:
            report.unused.append(f"{name} (fixed by the configuration)")
        else:
            bound = math.log(max_scale) if name == "logit_scale" else math.inf
            with torch.no_grad():
                parameter.copy_(value.reshape(parameter.shape)).clamp_(max=bound)
            report.loaded += 1
    if "logit_bias" in tensors and loss.logit_bias is None:
        report.unused.append("logit_bias (this loss has none)")
    return report


def _require_same_options(report: Report, tower: TowerName, ours: ModelConfig, *, alone: bool) -> None:
    """Refuse weights that were trained with other options; a tower alone may change its activation, which is told."""
    found = differences(report.source, tower, ours)
    if alone and "mlp" in found:
        then, here = found.pop("mlp")
        report.remarks.append(f"was trained with {then} and has {here} here, as configured")
    if "tokenizer_digest" in found:
        then, here = found.pop("tokenizer_digest")
        own = f"the {TOKENIZER} beside those weights (digest {then}" if then else "null (CLIP's own"
        raise WeightsError(
            f"{report.source} was trained with another tokenizer, so that its tokens stand for other words; set "
            f"model.text.tokenizer to {own}, now {here})"
        )
    if found:
        pairs = [f"model.{tower}.{key}={then} (now {here})" for key, (then, here) in found.items()]
        raise WeightsError(f"{report.source} was trained with other options; set {', '.join(pairs)}")
