"""Which tensor of a checkpoint belongs to which parameter of a tower, with every key accounted for.

Either all parameters of a tower are found, but for those that such checkpoints are declared to lack, and all tensors
of the checkpoint are used, but for those that have no place in our towers, or the file is refused. Only names and
shapes are looked at here; a parameter's values are brought into its shape when they are asked for, one at a time, so
that a mapped file is never in memory as a whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from evaclip.config import WeightFormat
from evaclip.errors import WeightsError
from evaclip.weights.files import StoredTensor
from evaclip.weights.names import Layout, Rule, TowerName, rules

_SHOWN = 5
"""Names that a message lists."""

_Place = tuple[str, Layout]
PLACES: dict[WeightFormat, dict[TowerName, list[_Place]]] = {
    "eva": {"image": [("visual.", "eva"), ("", "eva")], "text": [("text.", "openai")]},
    "open_clip": {
        "image": [("visual.trunk.", "timm"), ("visual.", "openai"), ("visual.", "ours")],
        "text": [("text.", "openai"), ("", "openai")],
    },
    "openai": {"image": [("visual.", "openai"), ("", "openai")], "text": [("", "openai")]},
    "timm": {"image": [("", "timm")], "text": []},
    "hf": {"image": [("", "hf")], "text": [("", "hf")]},
    "evaclip": {"image": [("image.", "ours")], "text": [("text.", "ours")]},
}
"""Format -> where each tower may lie: prefix and layout; where it is written comes first."""

NO_PLACE = re.compile(
    r"(^|\.)rope\.freqs(_cos|_sin)?$"  # tables, computed here
    r"|^mask_token$|^lm_head\."  # of masked image modelling
    r"|(^|\.)position_ids$|^attn_mask$|\.num_batches_tracked$"
    r"|\.relative_position_index$|\.attention_bias_idxs$"  # tables of integers in timm's older files
    r"|^(input_resolution|context_length|vocab_size)$"
    r"|^logit_(scale|bias)$"  # the loss's
)
"""Tensors that a checkpoint may hold beside a tower's."""
_NO_PLACE_IF_ZERO = re.compile(r"(^|\.)k_bias$|(^|\.)k_proj\.bias$|^head\.bias$")
"""The same, where they change nothing."""


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
    remarks: list[str] = field(default_factory=list)
    """What else should be known."""
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
                lines.append(f"{self.tower}: {what}: {some(names)}")
        return lines + [f"{self.tower}: {remark}" for remark in self.remarks]


@dataclass
class Match:
    """What a checkpoint says of a tower."""

    report: Report
    values: Mapping[str, Callable[[], Tensor]]
    """Parameter -> its tensor in the parameter's shape and the file's dtype; made when it is asked for.

    Raises WeightsError if it holds infinities or NaN."""


def match(
    parameters: Mapping[str, Tensor],
    tower: TowerName,
    tensors: Mapping[str, StoredTensor],
    source: str,
    wanted: WeightFormat | None = None,
    *,
    alone: bool,
    outlets: tuple[str, ...] = ("head.", "projection"),
) -> Match:
    """Find a tower's parameters in a checkpoint, all or none.

    Args:
        parameters: The tower's, by name; only their shapes matter.
        tower: Which it is.
        tensors: The checkpoint's, by name.
        source: Where they come from, for messages.
        wanted: Their format; None: the one that fits most keys.
        alone: The checkpoint need not hold the way into the common space nor EVA-02's inner norms.
        outlets: How the names of the way into the common space begin.

    Raises:
        WeightsError: Some parameters are missing, some tensors are left, or shapes differ; names the first of each.
    """
    prefix, layout, table = _place(tower, parameters, tensors, source, wanted)
    own = _tensors_of(tower, prefix, layout, tensors)
    report = Report(tower, source, layout, keys=[prefix + key for key in own])
    values: dict[str, Callable[[], Tensor]] = {}
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
        parts = [own[key] for key in keys]
        for key, part in zip(keys, parts, strict=True):
            if not part.meta.is_floating_point() or part.meta.itemsize < 2:
                raise WeightsError(
                    f"{source}: {key} is {part.meta.dtype}; quantised weights cannot be read, use the originals"
                )
        shapes = [list(parameters[name].shape) for name in rule.ours]
        found = _split(_joined([rule.to_ours(part.meta) for part in parts]), len(shapes))
        for place, (name, piece, shape) in enumerate(zip(rule.ours, found, shapes, strict=True)):
            change = _change(tower, name, list(piece.shape), shape)
            if change is None and alone and name.startswith(outlets):
                report.unused.extend(keys)  # the way into another space
                missing.append(name)
            elif change is None:
                there = " + ".join(f"{key} {list(own[key].meta.shape)}" for key in keys)
                wrong.append(f"{there} where {name} needs {shape}")
            else:
                values[name] = partial(_value, rule, parts, place, change, shape, f"{source}: {tower}.{name}")
                if change != "none":
                    report.resized.append(f"{name} from {list(piece.shape)}")
    report.loaded = len(values)
    norms = [name for name in parameters if ".attn.norm." in name]
    may_lack = {name for name in missing if name.startswith(outlets)} if alone else set[str]()
    if alone and set(norms) <= set(missing):
        may_lack.update(norms)
    report.initialised = [name for name in missing if name in may_lack]
    missing = [name for name in missing if name not in may_lack]
    others = {key: value for key, value in own.items() if key not in used and key not in report.unused}
    theirs = outlets if alone and not any(name.startswith(outlets) for name in values) else ()
    left = [key for key, value in others.items() if not _may_stay(key, value, theirs)]
    report.unused += [key for key in others if key not in left]
    _require_all(report, prefix, missing, left, wrong)
    return Match(report, values)


def _place(
    tower: TowerName,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, StoredTensor],
    source: str,
    wanted: WeightFormat | None,
) -> tuple[str, Layout, list[Rule]]:
    """Prefix and layout under which most of a tower's parameters are found."""
    formats: list[WeightFormat] = [wanted] if wanted else list(PLACES)
    places = dict.fromkeys(chain.from_iterable(PLACES[name][tower] for name in formats))
    best: tuple[int, str, Layout, list[Rule]] | None = None
    for prefix, layout in places:
        table = rules(tower, layout, parameters)
        found = sum(any(all(prefix + key in tensors for key in keys) for keys in rule.theirs) for rule in table)
        if best is None or found > best[0]:
            best = found, prefix, layout, table
    if best is None or best[0] < len(best[3]) / 2:
        as_format = f" in format {wanted}" if wanted else ""
        wanted_keys = [best[1] + key for rule in best[3] for key in chain(*rule.theirs[:1])] if best else []
        absent = [f", not there is {key}" for key in wanted_keys if key not in tensors]
        raise WeightsError(
            f"{source} does not hold this {tower} tower{as_format}: {best[0] if best else 0} of {len(parameters)} "
            f"parameters have their names there; it begins with {some(list(tensors))}{''.join(absent[:1])}"
        )
    return best[1], best[2], best[3]


def _tensors_of(
    tower: TowerName, prefix: str, layout: Layout, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
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


def _split(joined: Tensor, count: int) -> Iterable[Tensor]:
    """Pieces for parameters that lie behind one another; whole for a single one, whatever its shape."""
    if count == 1 or joined.ndim == 0 or len(joined) % count:
        return [joined] * count
    return joined.chunk(count)


_Change = Literal["none", "grid", "patch"]


def _change(tower: TowerName, name: str, old: list[int], new: list[int]) -> _Change | None:
    """How a tensor of one shape becomes a parameter of another: not at all, for another grid, for another patch size.

    None: it cannot.
    """
    if old == new:
        return "none"
    if tower != "image" or len(old) != 2 or len(new) != 2:
        return None
    if name == "position_embedding" and old[1] == new[1] and _side(old[0] - 1) and _side(new[0] - 1):
        return "grid"
    if name == "patch_embed.weight" and old[0] == new[0] and _side(old[1] / 3) and _side(new[1] / 3):
        return "patch"
    return None


def _value(rule: Rule, parts: list[StoredTensor], place: int, change: _Change, shape: list[int], what: str) -> Tensor:
    """A parameter's tensor out of those of a checkpoint, resampled as timm does for another grid or patch size."""
    value = list(_split(_joined([rule.to_ours(part.read()) for part in parts]), len(rule.ours)))[place]
    if not value.isfinite().all():
        raise WeightsError(f"{what} holds infinities or NaN; the file is damaged")
    if change == "none":
        return value
    from timm.layers.patch_embed import resample_patch_embed  # noqa: PLC0415  seconds, and not always needed
    from timm.layers.pos_embed import resample_abs_pos_embed  # noqa: PLC0415  as above

    if change == "grid":
        old, new = (_side(rows - 1) or 0 for rows in (len(value), shape[0]))
        return resample_abs_pos_embed(value[None].float(), [new, new], [old, old])[0]
    old, new = (_side(columns / 3) or 0 for columns in (value.shape[1], shape[1]))
    return resample_patch_embed(value.float().unflatten(1, (3, old, old)), [new, new]).flatten(1)


def _side(area: float) -> int | None:
    """Of a square of so many cells; None if there is none."""
    side = math.isqrt(int(area)) if area > 0 else 0
    return side if side and side**2 == area else None


def _may_stay(key: str, value: StoredTensor, outlets: tuple[str, ...]) -> bool:
    """Whether a tensor without a place changes nothing, or belongs to another task, whose outlet it is."""
    if NO_PLACE.search(key) or key.startswith(tuple(name.removeprefix("trunk.") for name in outlets)):
        return True
    return bool(_NO_PLACE_IF_ZERO.search(key)) and not value.read().any()


def _require_all(report: Report, prefix: str, missing: list[str], left: list[str], wrong: list[str]) -> None:
    lines = [
        f"{len(names)} {what}: {some(names)}"
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


def some(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
