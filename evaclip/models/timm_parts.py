"""What stands in the place of timm's random modules and of its batch norms.

Dropped patches and branches are functions of the samples' seeds, batch norms use statistics that training leaves as
they are. Names of parameters stay timm's.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evaclip.config import TimmTowerConfig
from evaclip.errors import ConfigError
from evaclip.models.constant import Constant
from evaclip.models.token_drop import kept_patches


class Draw(NamedTuple):
    """What the samples of one forward leave out."""

    seeds: Tensor
    """int64 [batch]."""
    scales: Tensor
    """fp32 [drop paths, batch]: each sample's factor on each branch."""


class Drawing:
    """Where modules find the draw of the forward that they are part of; it is there while that runs, and no longer."""

    current: Draw | None = None

    @contextmanager
    def of(self, draw: Draw | None) -> Generator[None]:
        """Make a draw the current one inside the block; None drops nothing."""
        before, self.current = self.current, draw
        try:
            yield
        finally:
            self.current = before


class SeededDropPath(nn.Module):
    """Skips a branch for some samples of a batch (stochastic depth, arXiv:1603.09382).

    Args:
        drawing: Shared by all modules of a tower.
        number: Which row of the draw's scales is this branch's.
    """

    def __init__(self, drawing: Drawing, number: int) -> None:
        super().__init__()
        self._drawing = drawing
        self.number = Constant(torch.tensor([number], device="cpu"))  # an int would be compiled in, block by block

    def forward(self, x: Tensor) -> Tensor:
        """The branch of the samples that take it, scaled, and zeros for the others; dimension 0 is the sample.

        Raises:
            ConfigError: The branch is of something else than samples.
        """
        draw = self._drawing.current
        if draw is None:
            return x
        if x.shape[0] != draw.scales.shape[1]:
            raise ConfigError(
                f"model.image.drop_path: a branch of this timm model has {x.shape[0]} rows for "
                f"{draw.scales.shape[1]} samples, so that they cannot skip it; set it to 0"
            )
        scales = draw.scales[self.number.value].to(x.dtype)
        return x * scales.view(-1, *[1] * (x.ndim - 1))


class SeededPatchDrop(nn.Module):
    """Leaves out patches of each sample, behind their embedding; the tokens before them stay.

    Args:
        drawing: Shared by all modules of a tower.
        config: How many patches stay.
        prefix: Tokens before the patches (class token, registers).
        with_indices: Whether the trunk asks which patches stayed, as those with rotary positions do.
    """

    def __init__(self, drawing: Drawing, config: TimmTowerConfig, prefix: int, *, with_indices: bool) -> None:
        super().__init__()
        self._drawing = drawing
        self._config = config
        self.prefix = prefix
        self._with_indices = with_indices

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Tokens [batch, prefix + kept, width], with the kept patches [batch, kept] where the trunk asks for them.

        Raises:
            ConfigError: The patches still lie in rows and columns.
        """
        if x.ndim != 3:
            raise ConfigError(
                "model.image.token_drop: this timm model needs its patches in full rows and columns; set it to 0"
            )
        kept, patches = None, x.shape[1] - self.prefix
        if self._drawing.current is not None and self._config.kept_of(patches) < patches:
            kept = kept_patches(self._drawing.current.seeds, patches, self._config.kept_of(patches))
            tokens = x[:, self.prefix :].gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
            x = torch.cat([x[:, : self.prefix], tokens], dim=1)
        return (x, kept) if self._with_indices else x


class FrozenBatchNorm(nn.Module):
    """A batch norm by fixed statistics; gain and bias learn.

    What a batch norm does in training is no function of one sample: it would depend on how a global batch is cut into
    ranks and micro-batches. The statistics are parameters without gradient, so that checkpoints hold them.

    Args:
        norm: Whose parameters, statistics and activation it takes over.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.num_features = norm.num_features
        self.eps = norm.eps
        self.weight = norm.weight
        self.bias = norm.bias
        self.running_mean = nn.Parameter(norm.running_mean, requires_grad=False)
        self.running_var = nn.Parameter(norm.running_var, requires_grad=False)
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel (dimension 1), then what follows in timm's module."""
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps)
        return self.act(self.drop(x))


def replace_parts(trunk: nn.Module, drawing: Drawing, config: TimmTowerConfig) -> list[float]:
    """Put ours in the place of timm's random modules and batch norms.

    Returns:
        The probability of each drop path, in the order of their numbers.

    Raises:
        ConfigError: A batch norm of another kind than torch's and timm's plain ones.
    """
    probabilities: list[float] = []
    for name, module in list(trunk.named_modules()):
        if type(module) is DropPath and module.drop_prob and module.scale_by_keep:
            ours: nn.Module = SeededDropPath(drawing, len(probabilities))
            probabilities.append(module.drop_prob)
        elif isinstance(module, PatchDropout | PatchDropoutWithIndices):
            with_indices = isinstance(module, PatchDropoutWithIndices)
            ours = SeededPatchDrop(drawing, config, module.num_prefix_tokens, with_indices=with_indices)
        elif isinstance(module, _BatchNorm):
            plain = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)
            if not plain or module.running_mean is None:
                raise ConfigError(
                    f"model.image.model {config.model}: {name} is a {type(module).__name__}, whose statistics cannot "
                    f"be frozen; choose a model with other norms"
                )
            ours = FrozenBatchNorm(module)
        else:
            continue
        trunk.set_submodule(name, ours)
    return probabilities
