"""An image tower around a backbone of timm.

Everything about the backbone is timm's: architecture, names of parameters, initialisation. What depends on chance or on
the batch is not: dropped patches and branches are functions of ``seeds`` here, batch norms are frozen, and a backbone
that is random in any other way is refused by name. So the tower, like ours, does not know whether it is being trained.
``trunk`` and ``head`` are laid out as in open_clip's ``TimmModel``, so that its weights and ours have the same names.
"""

from __future__ import annotations

import difflib
import re
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatch
from itertools import chain
from typing import Any

import timm
import torch
from jaxtyping import Float, Int, Shaped
from timm.layers.mlp import Mlp
from timm.models import group_parameters
from torch import Tensor, nn

from evaclip.config import TimmTowerConfig
from evaclip.errors import ConfigError
from evaclip.models.constant import Constant
from evaclip.models.pixels import pixel_normalisation, require_images
from evaclip.models.timm_parts import Draw, Drawing, replace_parts
from evaclip.models.timm_probe import LACKS, lacks, require_usable
from evaclip.models.token_drop import drop_path_scales
from evaclip.optim.table import Layers

_BLOCKS = re.compile(r"blocks|stages|layers|layer\d")
"""Under which names timm's backbones keep what they repeat."""


class TimmTower(nn.Module):
    """A timm model, and what brings its features into the common space.

    It is built without storage, whatever the device; ``to_empty`` and ``initialise`` give it weights.

    Args:
        config: Which model, and how it is used.
        embed_dim: Channels of the feature.

    Attributes:
        trunk: timm's model.
        head: What follows it; empty where timm's own classifier ends in the common space.
        patches: Of an image, where some of them are dropped; else 0.

    Raises:
        ConfigError: timm has no such model, or it cannot be used like this; says why.
    """

    def __init__(self, config: TimmTowerConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = embed_dim
        self.pixels = Constant(pixel_normalisation(config))
        self.drawing = Drawing()
        with torch.device("meta"):
            self.trunk, self.head = _build(config, embed_dim)
            rates = replace_parts(self.trunk, self.drawing, config)
            self.drop_path = Constant(torch.tensor(rates, dtype=torch.float64, device="cpu")) if rates else None
            self.patches = require_usable(self.trunk, self.head, self.drawing, config, embed_dim)
        self.train()

    def train(self, mode: bool = True) -> TimmTower:
        """The trunk always computes as in evaluation: what is random, it is given."""
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(
        self,
        images: Shaped[Tensor, "batch 3 height width"],
        seeds: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch embed_dim"]:
        """Features, not normalised.

        Args:
            images: uint8 pixels, which are normalised here, or floats that already are.
            seeds: One per sample, int64: draws the patches and branches to drop. None computes everything.

        Raises:
            ValueError: Images of another size or dtype than the tower takes.
        """
        require_images(images, self.config.image_size)
        draw = None
        if seeds is not None:
            paths = (
                seeds.new_empty(0) if self.drop_path is None else drop_path_scales(seeds, self.drop_path.value)[:, 0]
            )
            draw = Draw(seeds, paths)
        with self.drawing.of(draw):
            features = self.trunk(self.normalised(images))
        return self.head(features)

    def normalised(self, images: Shaped[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """Images as the trunk takes them: normalised where they are pixels, in the dtype of its weights."""
        if images.dtype == torch.uint8:
            gain, shift = self.pixels.value
            images = torch.addcmul(shift, images.float(), gain)
        return images.to(next(self.trunk.parameters()).dtype)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill parameters and tables as timm does, a function of the seed; drawn on the CPU in fp32.

        The trunk's own classifier starts as the heads of our towers do: some of timm's start at a thousandth of that,
        and LAMB, which moves a tensor in proportion to its norm, would need thousands of steps to grow them.
        """
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            trunk, head = _build(self.config, self.embed_dim)
            classifier = dict(trunk.named_modules()).get(trunk.pretrained_cfg.get("classifier"))
            if self.config.projection == "head" and isinstance(classifier, nn.Linear):
                classifier.weight.normal_(0, classifier.in_features**-0.5)
            replace_parts(trunk, self.drawing, self.config)
        for own, drawn in ((self.trunk, trunk), (self.head, head)):
            values = dict(chain(drawn.named_parameters(), drawn.named_buffers()))
            for name, tensor in chain(own.named_parameters(), own.named_buffers()):
                tensor.copy_(values[name])

    @property
    def outlets(self) -> tuple[str, ...]:
        """How the names of the parameters that lead into the common space begin."""
        names = self.trunk.pretrained_cfg.get("classifier") or ()
        return "head.", *(f"trunk.{name}." for name in ([names] if isinstance(names, str) else names))

    @property
    def description(self) -> str:
        """For the log: what it is, what it drops, and the colours that timm's weights of it expect, if others."""
        config = self.config
        text = f"is {config.model} of timm"
        if self.patches:
            text += f", keeps {config.kept_of(self.patches)} of {self.patches} patches in training"
        mean, std = (tuple(self.trunk.pretrained_cfg[key]) for key in ("mean", "std"))
        if (mean, std) != (config.mean, config.std):
            text += f"; with timm's weights model.image.mean would be {list(mean)} and model.image.std {list(std)}"
        return text

    @property
    def blocks(self) -> list[nn.Module]:
        """What the trunk repeats, in order: what can be computed again, or compiled, one by one. Not all have such."""
        found: list[nn.Module] = []
        for name, part in self.trunk.named_children():
            if _BLOCKS.fullmatch(name) and isinstance(part, nn.Sequential | nn.ModuleList):
                for stage in part:
                    inner = getattr(stage, "blocks", stage)
                    found.extend(inner if isinstance(inner, nn.Sequential | nn.ModuleList) else [stage])
        return found

    def recomputation(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a checkpointed block's forward and of its second one, which sees the same draw."""
        return nullcontext(), self.drawing.of(self.drawing.current)

    def layers(self) -> Layers:
        """Where the parameters stand by timm's own grouping, and which of them timm does not decay."""
        names = [name for name, _ in self.trunk.named_parameters()]
        kept = getattr(self.trunk, "no_weight_decay", set)()
        undecayed = frozenset(f"trunk.{name}" for name in names if any(fnmatch(name, pattern) for pattern in kept))
        if not hasattr(self.trunk, "group_matcher"):
            return Layers(None, 0, undecayed)
        groups: Any = group_parameters(self.trunk, self.trunk.group_matcher(coarse=False), reverse=True)
        last = max(groups.values()) + (len(self.head) > 0)
        own = {f"head.{name}": last for name, _ in self.head.named_parameters()}
        return Layers({f"trunk.{name}": groups[name] for name in names} | own, last, undecayed)


# ------------------------------------------------------------------------------------------------------------ building


def _build(config: TimmTowerConfig, embed_dim: int) -> tuple[Any, nn.Sequential]:
    """Trunk and head as open_clip's ``TimmModel`` makes them, on the current device."""
    if not timm.is_model(config.model):
        close = difflib.get_close_matches(config.model.partition(".")[0], timm.list_models(), n=3)
        near = f"near it are {', '.join(close)}" if close else "timm.list_models() has all"
        raise ConfigError(f"model.image.model: timm {timm.__version__} has no model {config.model!r}; {near}")
    pool = {} if config.pool is None else {"global_pool": config.pool}
    options: dict[str, Any] = {"drop_path_rate": config.drop_path}
    if config.token_drop:
        options["patch_drop_rate"] = config.token_drop
    try:
        defaults = timm.get_pretrained_cfg(config.model)
        if defaults is not None and defaults.fixed_input_size:
            options["img_size"] = config.image_size
        if config.projection in ("head", "none"):
            classes = embed_dim if config.projection == "head" else 0
            return _create(config, {**options, **pool, "num_classes": classes}), nn.Sequential()
        trunk = _create(config, options)
        if not hasattr(trunk, "reset_classifier"):
            raise ValueError("it ends in tokens or maps, not in features")
        trunk.reset_classifier(0, **pool)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        given = f"image_size {config.image_size} and pool {config.pool}"
        reason = str(error) or "it does not say why"
        raise ConfigError(f"model.image: timm cannot build {config.model} with {given}: {reason}") from error
    if config.projection == "linear":
        return trunk, nn.Sequential(OrderedDict(proj=nn.Linear(trunk.num_features, embed_dim, bias=False)))
    mlp = Mlp(trunk.num_features, 2 * embed_dim, embed_dim, bias=(True, False))
    return trunk, nn.Sequential(OrderedDict(mlp=mlp))


def _create(config: TimmTowerConfig, options: dict[str, Any]) -> Any:
    """A timm model; what it does not take and is 0 is left out."""
    try:
        return timm.create_model(config.model, pretrained=False, **options)
    except TypeError as error:
        unknown = [name for name in LACKS if name in options and name in str(error)]
        for name in unknown:
            if options[name] != 0:
                raise lacks(config, name) from error
        if not unknown:
            raise
        return _create(config, {name: value for name, value in options.items() if name not in unknown})
