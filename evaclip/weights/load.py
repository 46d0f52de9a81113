"""Filling towers from a checkpoint with every key accounted for.

Either all parameters of a tower are found, but for those that such checkpoints are declared to lack, and all tensors
of the checkpoint are used, but for those that have no place in our towers, or nothing is loaded at all.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from evaclip.config import InitConfig, WeightFormat
from evaclip.errors import WeightsError
from evaclip.loss import ContrastiveLoss
from evaclip.models.clip import CLIP
from evaclip.weights.files import read_weights
from evaclip.weights.names import Layout, Rule, TowerName, rules

_SHOWN = 5
"""Names that a message lists."""

_Place = tuple[str, Layout]
_PLACES: dict[WeightFormat, dict[TowerName, list[_Place]]] = {
    "eva": {"image": [("visual.", "eva"), ("", "eva")], "text": [("text.", "openai")]},
    "open_clip": {
        "image": [("visual.trunk.", "timm"), ("visual.", "openai")],
        "text": [("text.", "openai"), ("", "openai")],
    },
    "openai": {"image": [("visual.", "openai"), ("", "openai")], "text": [("", "openai")]},
    "timm": {"image": [("", "timm")], "text": []},
    "hf": {"image": [("", "hf")], "text": [("", "hf")]},
    "evaclip": {"image": [("image.", "ours")], "text": [("text.", "ours")]},
}
"""Format -> where each tower may lie: prefix and layout."""

_NO_PLACE = re.compile(
    r"(^|\.)rope\.freqs(_cos|_sin)?$"  # tables, computed here
    r"|^mask_token$|^lm_head\."  # of masked image modelling
    r"|(^|\.)position_ids$|^attn_mask$"
    r"|^(input_resolution|context_length|vocab_size)$"
    r"|^logit_(scale|bias)$"  # the loss's
)
"""Tensors that a checkpoint may hold beside a tower's."""
_NO_PLACE_IF_ZERO = re.compile(r"(^|\.)k_bias$|(^|\.)k_proj\.bias$|^head\.bias$")
"""The same, where they change nothing."""
_MAY_LACK: dict[TowerName, re.Pattern[str]] = {
    "image": re.compile(r"^head\.|^blocks\.\d+\.attn\.norm\."),
    "text": re.compile(r"^projection$"),
}
"""Parameters that the checkpoint of a single tower may lack: MIM has no head, and EVA-02's has no inner norm."""

_SECTIONS = {"image": "vision", "text": "text"}
"""Our towers in the configuration of transformers."""


@dataclass
class Report:
    """What became of every key."""

    tower: str
    source: str
    layout: Layout
    loaded: int = 0
    renamed: int = 0
    resized: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    """Ours that the checkpoint does not hold."""
    unused: list[str] = field(default_factory=list)
    """Theirs that have no place here."""
    keys: list[str] = field(default_factory=list)
    """All of theirs that were looked at, as the checkpoint has them."""

    def lines(self) -> list[str]:
        """For the log."""
        total = self.loaded + len(self.initialised)
        lines = [
            f"{self.tower}: {self.loaded} of {total} parameters from {self.source}, {self.renamed} under other names "
            f"(as of {self.layout})"
        ]
        for what, names in (
            ("resized", self.resized),
            ("newly initialised", self.initialised),
            ("not used", self.unused),
        ):
            if names:
                lines.append(f"{self.tower}: {what}: {_some(names)}")
        return lines


def initialise_from(config: InitConfig, clip: CLIP, loss: ContrastiveLoss, max_scale: float) -> list[Report]:
    """Fill a model from what ``init`` names; without it nothing happens.

    Args:
        config: Files and formats.
        clip: Both towers, with random weights that stay where a checkpoint has none.
        loss: Its scalars are filled where a whole model is given, unless they are fixed.
        max_scale: Upper bound of the logits' multiplier.

    Raises:
        WeightsError: A file cannot be read, or does not hold what the model needs.
    """
    reports: list[Report] = []
    if config.image:
        tensors, wanted = read_weights(config.image), config.image_format
        reports.append(load_tower(clip.image, "image", tensors, config.image, wanted, alone=True))
    if config.text:
        tensors, wanted = read_weights(config.text), config.text_format
        reports.append(load_tower(clip.text, "text", tensors, config.text, wanted, alone=True))
    if config.model:
        tensors, wanted = read_weights(config.model), config.model_format
        _require_activation(Path(config.model), clip)
        reports.append(load_tower(clip.image, "image", tensors, config.model, wanted, alone=False))
        reports.append(load_tower(clip.text, "text", tensors, config.model, wanted, alone=False))
        reports.append(_load_scalars(loss, max_scale, tensors, config.model))
        seen = set(chain.from_iterable(report.keys for report in reports))
        left = [key for key in tensors if key not in seen and not _NO_PLACE.search(key)]
        if left:
            raise WeightsError(f"{config.model} holds {len(left)} tensors that belong to no tower: {_some(left)}")
    return reports


def load_tower(
    module: nn.Module,
    tower: TowerName,
    tensors: Mapping[str, Tensor],
    source: str,
    wanted: WeightFormat | None = None,
    *,
    alone: bool,
) -> Report:
    """Fill a tower's parameters, all or none.

    Args:
        module: The tower.
        tower: Which it is.
        tensors: The checkpoint's, by name.
        source: Where they come from, for messages.
        wanted: Their format; None: the one that fits most keys.
        alone: The checkpoint need not hold the way into the common space (head, projection) nor EVA-02's inner norms.

    Raises:
        WeightsError: Some parameters are missing, some tensors are left, or shapes differ; names the first of each.
    """
    parameters = dict(module.named_parameters())
    prefix, layout, table = _place(tower, parameters, tensors, source, wanted)
    own = _tensors_of(tower, prefix, layout, tensors)
    report = Report(tower, source, layout, keys=[prefix + key for key in own])
    values: dict[str, Tensor] = {}
    missing: list[str] = []
    wrong: list[str] = []
    used: set[str] = set()
    for rule in table:
        keys = next((keys for keys in rule.theirs if all(key in own for key in keys)), None)
        if keys is None:
            missing.extend(rule.ours)
            continue
        used.update(keys)
        report.renamed += sum(ours not in keys for ours in rule.ours)
        joined = _joined([rule.to_ours(own[key]) for key in keys])
        for name, value in zip(rule.ours, _split(joined, [parameters[name] for name in rule.ours]), strict=True):
            fitted = _fitted(tower, name, value, parameters[name])
            if fitted is None and alone and name.startswith(("head.", "projection")):
                report.unused.extend(keys)  # the way into another space
                missing.append(name)
            elif fitted is None:
                found = " + ".join(f"{key} {list(own[key].shape)}" for key in keys)
                wrong.append(f"{found} where {name} needs {list(parameters[name].shape)}")
            else:
                values[name] = fitted
                if fitted is not value:
                    report.resized.append(f"{name} from {list(value.shape)}")
    report.loaded = len(values)
    report.initialised = [name for name in missing if alone and _MAY_LACK[tower].match(name)]
    missing = [name for name in missing if name not in report.initialised]
    others = {key: value for key, value in own.items() if key not in used and key not in report.unused}
    other_head = alone and "head.weight" not in values
    left = [key for key, value in others.items() if not _may_stay(key, value, other_head=other_head)]
    report.unused += [key for key in others if key not in left]
    norms = [name for name in report.initialised if ".attn.norm." in name]
    if 0 < len(norms) < sum(".attn.norm." in name for name in parameters):
        missing += norms
    _require_all(report, prefix, missing, left, wrong)
    _require_finite(values, source)
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    return report


def _place(
    tower: TowerName,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    source: str,
    wanted: WeightFormat | None,
) -> tuple[str, Layout, list[Rule]]:
    """Prefix and layout under which most of a tower's parameters are found."""
    formats: list[WeightFormat] = [wanted] if wanted else list(_PLACES)
    places = dict.fromkeys(chain.from_iterable(_PLACES[name][tower] for name in formats))
    best: tuple[int, str, Layout, list[Rule]] | None = None
    for prefix, layout in places:
        table = rules(tower, layout, parameters)
        found = sum(any(all(prefix + key in tensors for key in keys) for keys in rule.theirs) for rule in table)
        if best is None or found > best[0]:
            best = found, prefix, layout, table
    if best is None or best[0] < len(best[3]) / 2:
        as_format = f" in format {wanted}" if wanted else ""
        wanted_keys = [best[1] + key for rule in best[3] for key in chain(*rule.theirs[:1])] if best else []
        example = next((key for key in wanted_keys if key not in tensors), "of another kind")
        raise WeightsError(
            f"{source} does not hold this {tower} tower{as_format}: {best[0] if best else 0} of {len(parameters)} "
            f"parameters have their names there; it begins with {_some(list(tensors))}, not there is {example}"
        )
    return best[1], best[2], best[3]


def _tensors_of(tower: TowerName, prefix: str, layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint holds of a tower, without the prefix."""
    if prefix:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    other = {
        ("image", "hf"): ("text_model.", "text_projection.", "logit_"),
        ("text", "hf"): ("vision_model.", "visual_projection.", "logit_"),
        ("text", "openai"): ("visual.", "logit_"),
    }.get((tower, layout), ())
    return {key: value for key, value in tensors.items() if not key.startswith(other)} if other else dict(tensors)


def _joined(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1 or len({tensor.shape[1:] for tensor in tensors}) > 1:
        return tensors[0]  # of shapes that do not fit one another: refused as too short
    return torch.cat(tensors)


def _split(joined: Tensor, parameters: list[Tensor]) -> Iterable[Tensor]:
    """Pieces for parameters that lie behind one another; whole for a single one, whatever its shape."""
    if len(parameters) == 1 or joined.ndim == 0 or len(joined) % len(parameters):
        return [joined] * len(parameters)
    return joined.chunk(len(parameters))


def _fitted(tower: TowerName, name: str, value: Tensor, parameter: Tensor) -> Tensor | None:
    """A tensor in a parameter's shape: as it is, resampled as timm does for another grid or patch size, or None."""
    if value.shape == parameter.shape:
        return value
    if tower != "image" or value.ndim != 2 or parameter.ndim != 2:
        return None
    if name == "position_embedding" and value.shape[1] == parameter.shape[1]:
        old, new = (_side(len(tensor) - 1) for tensor in (value, parameter))
        return resample_abs_pos_embed(value[None].float(), [new, new], [old, old])[0] if old and new else None
    if name == "patch_embed.weight" and len(value) == len(parameter):
        old, new = (_side(tensor.shape[1] / 3) for tensor in (value, parameter))
        if not old or not new:
            return None
        return resample_patch_embed(value.float().unflatten(1, (3, old, old)), [new, new]).flatten(1)
    return None


def _side(area: float) -> int | None:
    """Of a square of so many cells; None if there is none."""
    side = math.isqrt(int(area)) if area > 0 else 0
    return side if side and side**2 == area else None


def _may_stay(key: str, value: Tensor, *, other_head: bool) -> bool:
    """Whether a tensor without a place changes nothing, or belongs to another task."""
    if _NO_PLACE.search(key) or (other_head and key.startswith("head.")):
        return True
    return bool(_NO_PLACE_IF_ZERO.search(key)) and not value.any()


def _require_all(report: Report, prefix: str, missing: list[str], left: list[str], wrong: list[str]) -> None:
    lines = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (
            ("shapes differ", wrong),
            ("parameters are not there", missing),
            ("tensors have no place in the model", left),
        )
        if names
    ]
    if lines:
        where = f"under {prefix}, " if prefix else ""
        raise WeightsError(
            "\n  ".join(
                [
                    f"{report.source} ({where}names of {report.layout}) is not this {report.tower} tower; "
                    f"check model.name and the file:",
                    *lines,
                ]
            )
        )


def _require_finite(values: Mapping[str, Tensor], source: str) -> None:
    for name, value in values.items():
        if not value.isfinite().all():
            raise WeightsError(f"{source}: {name} holds infinities or NaN; the file is damaged")


def _load_scalars(loss: ContrastiveLoss, max_scale: float, tensors: Mapping[str, Tensor], source: str) -> Report:
    """Fill the loss's scalars; those that the configuration fixes keep its value, and only a bias may be missing."""
    report = Report("loss", source, "ours", keys=["logit_scale", "logit_bias"])
    for name, parameter in loss.named_parameters():
        value = tensors.get(name)
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
    return report


def _require_activation(path: Path, clip: CLIP) -> None:
    """Refuse a model of transformers that was trained with another activation, which its tensors do not show."""
    try:
        saved = json.loads((path / "config.json").read_text(encoding="utf-8"))
        wanted = {
            name: saved[f"{section}_config"].get("hidden_act", "quick_gelu") for name, section in _SECTIONS.items()
        }
    except (OSError, ValueError, KeyError, AttributeError):
        return  # no folder of transformers
    for name, activation in wanted.items():
        ours = getattr(clip.config, name).mlp
        if activation != ours:
            raise WeightsError(
                f"{path} was trained with {activation} in its {name} tower, this model has {ours}; "
                f"set model.{name}.mlp={activation} (models that end in -quickgelu have it)"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
