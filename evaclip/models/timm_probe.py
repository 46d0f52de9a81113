"""A forward on tensors without storage, to learn what a foreign module does before anything relies on it.

What it draws at random is found whichever function draws it: every operation of torch passes through ``_Watch``.
"""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from evaclip.config import TimmTowerConfig
from evaclip.errors import ConfigError
from evaclip.models.timm_parts import Draw, Drawing, SeededDropPath, SeededPatchDrop


class Seen(NamedTuple):
    """What happened in a forward."""

    output: Any
    random: dict[str, str]
    """Module -> the first operation of its own that draws random numbers."""
    calls: Counter[str]
    """Module -> how often it was called."""


class _Watch(TorchDispatchMode):
    """Takes down every operation of torch that draws random numbers, whichever function or module calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.random: dict[str, str] = {}
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and _probability(func, args, kwargs) != 0:
            self.random.setdefault(self.inside[-1], func.overloadpacket.__name__)
        return func(*args, **kwargs)

    def enter(self, name: str, _module: nn.Module, _args: Any) -> None:
        """Note a call that begins."""
        self.inside.append(name)
        self.calls[name] += 1

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Note a call that ends."""
        self.inside.pop()


def _probability(func: Any, args: Any, kwargs: Any) -> Any:
    """Of what an operation drops; None where it has no such argument."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    return next(((defaults | given)[name] for name in ("dropout_p", "p") if name in names), None)


def watch(module: nn.Module, images: Tensor) -> Seen:
    """Run a module in the mode that it is in, without gradients.

    Args:
        module: One that may be changed by it: hooks stay on it, and so does what it remembers of its inputs.
        images: Without storage, as the module's parameters.
    """
    seen = _Watch()
    for name, part in module.named_modules():
        part.register_forward_pre_hook(partial(seen.enter, name))
        part.register_forward_hook(seen.leave)
    with torch.no_grad(), seen:
        output = module(images)
    return Seen(output, seen.random, seen.calls)


def require_usable(trunk: nn.Module, head: nn.Module, drawing: Drawing, config: TimmTowerConfig, embed_dim: int) -> int:
    """Refuse a trunk that we cannot answer for; it has no storage, and ours in place of its random modules.

    Returns:
        Patches of an image, if some are dropped; else 0.

    Raises:
        ConfigError: It draws random numbers, holds what no checkpoint would, drops nothing where it should, drops
            several branches by one draw, does not take such images, or ends in something else than one feature each.
    """
    _require_parameters(trunk, config)
    _require_whole_patches(trunk, config)
    trial = copy.deepcopy(trunk, {id(drawing): drawing}).train()
    paths = [name for name, part in trial.named_modules() if isinstance(part, SeededDropPath)]
    drops = [part for part in trial.modules() if isinstance(part, SeededPatchDrop)]
    patches: list[int] = []
    for drop in drops:
        drop.register_forward_pre_hook(lambda part, given: patches.append(given[0].shape[1] - part.prefix))
    if config.drop_path and not paths:
        raise lacks(config, "drop_path_rate")
    if config.token_drop and not drops:
        raise lacks(config, "patch_drop_rate")
    try:
        with drawing.of(Draw(torch.zeros(2, dtype=torch.int64), torch.ones(len(paths), 2))):
            seen = watch(trial, torch.zeros(2, 3, config.image_size, config.image_size))
        output = head(seen.output)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        size, reason = config.image_size, str(error) or "it does not say why"
        raise ConfigError(
            f"model.image: timm's {config.model} does not take {size} x {size} images like this: {reason}"
        ) from error
    if config.token_drop and not patches:
        raise lacks(config, "patch_drop_rate")
    _require_no_chance(config, seen, paths)
    shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if shape != [2, embed_dim]:
        raise ConfigError(
            f"model.image: timm's {config.model} makes {shape} of 2 images, not [2, {embed_dim}]; look at "
            f"model.image.pool ({config.pool}), model.image.projection ({config.projection}) and model.embed_dim"
        )
    return sum(patches)


def _require_parameters(trunk: nn.Module, config: TimmTowerConfig) -> None:
    """Refuse a trunk with numbers of its own that checkpoints, which hold parameters, would not have."""
    names = set(dict(trunk.named_parameters(remove_duplicate=False)))
    held = [name for name, value in trunk.state_dict().items() if name not in names and value.is_floating_point()]
    if held:
        raise ConfigError(
            f"model.image.model {config.model}: {held[0]} is no parameter, so checkpoints would not hold it; "
            f"choose another model"
        )


def _require_whole_patches(trunk: Any, config: TimmTowerConfig) -> None:
    """Refuse images beyond whose last patch pixels are left, but where timm's model is made for such, as SigLIP's."""
    embed, own = getattr(trunk, "patch_embed", None), (trunk.pretrained_cfg.get("input_size") or (0,))[-1]
    side: Any = embed.patch_size[0] if isinstance(embed, PatchEmbed) and not embed.dynamic_img_pad else 1
    if config.image_size % side and config.image_size != own:
        raise ConfigError(
            f"model.image.image_size {config.image_size} is not a multiple of {side}, the patch size of timm's "
            f"{config.model}; use {config.image_size // side * side or side}"
        )


def _require_no_chance(config: TimmTowerConfig, seen: Seen, paths: list[str]) -> None:
    """Refuse what no seed decides, and drop paths that would skip several branches by one draw."""
    if seen.random:
        (name, operation), *more = seen.random.items()
        others = f" and {len(more)} other modules" if more else ""
        raise ConfigError(
            f"model.image.model {config.model}: {name or 'the model itself'}{others} would draw random numbers in "
            f"training ({operation}), which no sample's seed decides; choose a model that does not"
        )
    several = [name for name in paths if seen.calls[name] > 1]
    if several:
        raise ConfigError(
            f"model.image.drop_path {config.drop_path}: {several[0]} of timm's {config.model} serves "
            f"{seen.calls[several[0]]} branches, which would be skipped together; set it to 0"
        )


LACKS = {
    "drop_path_rate": ("drop_path", "no branches that a sample could skip"),
    "patch_drop_rate": ("token_drop", "no place where patches could be left out"),
}
"""Argument of timm -> our key, and what a model has not that does not take it."""


def lacks(config: TimmTowerConfig, argument: str) -> ConfigError:
    """What to say of a model that has no use for an argument of timm, which we give by one of our keys."""
    key, lack = LACKS[argument]
    return ConfigError(f"model.image.{key} {getattr(config, key)}: timm's {config.model} has {lack}; set it to 0")
