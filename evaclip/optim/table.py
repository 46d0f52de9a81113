"""One row per trained parameter: everything the optimizer treats differently from one to the next.

A table instead of optimizer groups, because DeepSpeed steps and reduces once per group. The table is a total function
of the parameters' names: a name that no rule covers is an error. No process group, no tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evaclip.config import LambConfig, LossConfig, ModelConfig, OptimConfig, TimmTowerConfig, TowerOptimConfig
from evaclip.errors import ConfigError

_UNDECAYED = ("class_token", "position_embedding")
_GAIN = re.compile(r"(norm\d?\.weight|scale\d)$")


@dataclass(frozen=True)
class Row:
    """How one parameter is updated."""

    name: str
    shape: tuple[int, ...]
    lr: float
    """Peak learning rate."""
    weight_decay: float
    adapts: bool
    """Whether LAMB scales its update by a trust ratio."""
    upper_bound: float = math.inf
    """Values are clamped to this after an update."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Layers(NamedTuple):
    """How the parameters of a tower that is not ours are treated; of ours their names tell."""

    of: Mapping[str, int] | None
    """Name -> layer; None where nobody knows."""
    last: int
    """The layer of what follows everything else."""
    undecayed: frozenset[str]
    """Names without weight decay, beside those of vectors."""


def parameter_table(
    shapes: Mapping[str, tuple[int, ...]],
    optim: OptimConfig,
    model: ModelConfig,
    loss: LossConfig,
    image: Layers | None = None,
) -> tuple[Row, ...]:
    """Rows for named parameters, in their order.

    Args:
        shapes: What learns, by name.
        optim: Rates, decays and what adapts.
        model: Depths of our towers.
        loss: Bounds of its scalars.
        image: Of an image tower that is not ours.

    Raises:
        ValueError: A name belongs to no tower and is none of the loss's scalars.
        ConfigError: Layers are to learn at different rates, and nobody knows the layers of the image tower.
    """
    require_layers(optim, image)
    return tuple(_row(name, shape, optim, model, loss, image) for name, shape in shapes.items())


def _row(
    name: str, shape: tuple[int, ...], optim: OptimConfig, model: ModelConfig, loss: LossConfig, image: Layers | None
) -> Row:
    if name in ("logit_scale", "logit_bias"):
        bound = math.log(loss.max_logit_scale) if name == "logit_scale" else math.inf
        return Row(name, shape, optim.lr, 0.0, adapts=False, upper_bound=bound)
    place = _place(name, optim, model, image)
    tower = place.tower
    if place.foreign:
        undecayed, gain = place.name in place.foreign.undecayed, len(shape) == 1 and not name.endswith("bias")
    else:
        undecayed, gain = name.endswith(_UNDECAYED), bool(_GAIN.search(name))
    lr = (tower.lr or optim.lr) * tower.layer_decay ** (place.last - place.layer)
    decay = optim.weight_decay if tower.weight_decay is None else tower.weight_decay
    weight_decay = decay if len(shape) > 1 and not undecayed else 0.0
    adapts = isinstance(optim, LambConfig) and (weight_decay > 0 if optim.trust_ratio == "decayed" else not gain)
    return Row(name, shape, lr, weight_decay, adapts)


class _Place(NamedTuple):
    """Where a parameter of a tower stands."""

    tower: TowerOptimConfig
    name: str
    """In its tower."""
    layer: int
    last: int
    foreign: Layers | None
    """The tower's, if it is not ours."""


def _place(name: str, optim: OptimConfig, model: ModelConfig, image: Layers | None) -> _Place:
    tower, _, rest = name.partition(".")
    if tower == "image" and image is not None:
        return _Place(optim.image, rest, image.of[rest] if image.of else image.last, image.last, image)
    if tower == "image":
        assert not isinstance(model.image, TimmTowerConfig), "of a tower of timm its layers are needed"
        return _Place(optim.image, rest, layer_of(rest, model.image.depth), model.image.depth + 1, None)
    if tower == "text":
        return _Place(optim.text, rest, layer_of(rest, model.text.depth), model.text.depth + 1, None)
    raise ValueError(f"parameter {name} belongs to no tower; name its rule in optim/table.py")


def is_frozen(name: str, optim: OptimConfig, model: ModelConfig, image: Layers | None = None) -> bool:
    """Whether a tower's parameter does not learn; arguments as of ``parameter_table``.

    Raises:
        ValueError: The name belongs to no tower.
    """
    place = _place(name, optim, model, image)
    return place.tower.freeze == "all" or 0 < place.tower.freeze >= place.layer


def require_layers(optim: OptimConfig, image: Layers | None) -> None:
    """Refuse to treat layers of an image tower that is not ours differently where there are none, or too few.

    Raises:
        ConfigError: With the key.
    """
    freeze = 0 if optim.image.freeze == "all" else optim.image.freeze
    if image is not None and image.of is None and (freeze or optim.image.layer_decay != 1):
        key = f"freeze {freeze}" if freeze else f"layer_decay {optim.image.layer_decay}"
        remedy = "freeze all, or 0" if freeze else "set it to 1"
        raise ConfigError(
            f"optim.image.{key}: timm does not say in which layers the parameters of this image tower are; {remedy}"
        )
    if image is not None and freeze >= max(1, image.last):
        raise ConfigError(
            f"optim.image.freeze {freeze} is more than the {image.last - 1} blocks of the image tower; "
            f"give at most {image.last - 1}, or all"
        )


def layer_of(name: str, depth: int) -> int:
    """A tower parameter's layer: 0 for embeddings, then one per block, ``depth + 1`` for what follows them."""
    if match := re.match(r"blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    if name.startswith(("patch_embed.", "embed_norm.", "token_embedding.")) or name in _UNDECAYED:
        return 0
    if name.startswith(("norm.", "head.")) or name == "projection":
        return depth + 1
    raise ValueError(f"parameter {name} is in no layer; name its rule in optim/table.py")


def summary(rows: Iterable[Row], frozen: Mapping[str, Sequence[int]]) -> list[str]:
    """The table as lines for the log: rows that are treated alike share one, and so does what is frozen of a tower.

    Args:
        rows: What learns.
        frozen: Shapes of what does not, by name.
    """
    kinds: dict[tuple[str, float, float, bool], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.name.partition(".")[0], row.lr, row.weight_decay, row.adapts), []).append(row)
    still: dict[str, list[int]] = {}
    for name, shape in frozen.items():
        still.setdefault(name.partition(".")[0], []).append(math.prod(shape))
    return [
        f"{tower:12s} lr {lr:.2e}  weight decay {decay:<6g} {'trust ratio' if adapts else '-':12s}"
        f"{len(group):4d} tensors {sum(row.numel for row in group):13,d} parameters"
        for (tower, lr, decay, adapts), group in kinds.items()
    ] + [
        f"{tower:12s} {'frozen':45s}{len(sizes):4d} tensors {sum(sizes):13,d} parameters"
        for tower, sizes in still.items()
    ]
