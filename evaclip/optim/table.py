"""One row per trained parameter: everything the optimizer treats differently from one to the next.

A table instead of optimizer groups, because DeepSpeed steps and reduces once per group. The table is a total function
of the parameters' names: a name that no rule covers is an error. No process group, no tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from evaclip.config import LambConfig, LossConfig, ModelConfig, OptimConfig

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


def parameter_table(
    shapes: Mapping[str, tuple[int, ...]], optim: OptimConfig, model: ModelConfig, loss: LossConfig
) -> tuple[Row, ...]:
    """Rows for named parameters, in their order.

    Raises:
        ValueError: A name belongs to no tower and is none of the loss's scalars.
    """
    return tuple(_row(name, shape, optim, model, loss) for name, shape in shapes.items())


def _row(name: str, shape: tuple[int, ...], optim: OptimConfig, model: ModelConfig, loss: LossConfig) -> Row:
    if name in ("logit_scale", "logit_bias"):
        bound = math.log(loss.max_logit_scale) if name == "logit_scale" else math.inf
        return Row(name, shape, optim.lr, 0.0, adapts=False, upper_bound=bound)
    towers = {"image": (optim.image, model.image.depth), "text": (optim.text, model.text.depth)}
    tower_name, _, rest = name.partition(".")
    if tower_name not in towers:
        raise ValueError(f"parameter {name} belongs to no tower; name its rule in optim/table.py")
    tower, depth = towers[tower_name]
    lr = (tower.lr or optim.lr) * tower.layer_decay ** (depth + 1 - layer_of(rest, depth))
    decays = len(shape) > 1 and not rest.endswith(_UNDECAYED)
    decay = optim.weight_decay if tower.weight_decay is None else tower.weight_decay
    weight_decay = decay if decays else 0.0
    adapts = isinstance(optim, LambConfig) and (
        weight_decay > 0 if optim.trust_ratio == "decayed" else not _GAIN.search(rest)
    )
    return Row(name, shape, lr, weight_decay, adapts)


def layer_of(name: str, depth: int) -> int:
    """A tower parameter's layer: 0 for embeddings, then one per block, ``depth + 1`` for what follows them."""
    if match := re.match(r"blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    if name.startswith(("patch_embed.", "embed_norm.", "token_embedding.")) or name in _UNDECAYED:
        return 0
    if name.startswith(("norm.", "head.")) or name == "projection":
        return depth + 1
    raise ValueError(f"parameter {name} is in no layer; name its rule in optim/table.py")


def summary(rows: Iterable[Row]) -> list[str]:
    """The table as lines for the log: rows that are treated alike share one."""
    kinds: dict[tuple[str, float, float, bool], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.name.partition(".")[0], row.lr, row.weight_decay, row.adapts), []).append(row)
    return [
        f"{tower:12s} lr {lr:.2e}  weight decay {decay:<6g} {'trust ratio' if adapts else '-':12s}"
        f"{len(group):4d} tensors {sum(row.numel for row in group):13,d} parameters"
        for (tower, lr, decay, adapts), group in kinds.items()
    ]
