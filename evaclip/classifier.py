"""An image tower whose outputs are classes: a linear head stands where the projection into the common space was.

So the result is a classifier as timm has them. This module knows neither how a head learns nor what is measured.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from evaclip.distributed import Ranks, agreed
from evaclip.errors import DataError, WeightsError
from evaclip.evaluation.datasets import label_of
from evaclip.evaluation.encoding import Bench
from evaclip.evaluation.zero_shot import classifier_of
from evaclip.labelled import Sets
from evaclip.models.clip import CLIP
from evaclip.models.vision import ImageTower
from evaclip.weights.load import load_tower

_SCALED_ON = 256
"""Images whose features give prompts their scale."""


def with_head(clip: CLIP, source: str, num_classes: int, drop_path: float, ranks: Ranks) -> CLIP:
    """The image tower with a head of zeros, which keeps all its patches in training, and a text tower without memory.

    Args:
        clip: With weights; stays as it is.
        source: Where they come from, for messages.
        num_classes: Outputs of the head. It has a bias where the projection has one.
        drop_path: Of the tower in training.
        ranks: All of them call this.

    Raises:
        WeightsError: A backbone of timm has another classifier than one linear layer, or builds it on other weights.
    """
    update: dict[str, Any] = {"drop_path": drop_path, "token_drop": 0.0}
    update |= {} if isinstance(clip.image, ImageTower) else {"projection": "head"}
    image = clip.config.image.model_copy(update=update)
    with torch.device("meta"):
        tuned = CLIP(clip.config.model_copy(update={"name": None, "embed_dim": num_classes, "image": image}))
    tuned.text.requires_grad_(requires_grad=False)
    tuned.image.to_empty(device=ranks.device)
    if not isinstance(tuned.image, ImageTower):
        tuned.image.initialise(0)  # whose tables come with its weights
    weights = {f"image.{name}": parameter.detach() for name, parameter in clip.image.named_parameters()}
    with agreed(ranks), torch.no_grad():
        load_tower(tuned.image, "image", weights, source, "evaclip", alone=True)
        for parameter in last_layer(tuned, f"the classifier of {source}'s image tower").parameters():
            parameter.zero_()
    return tuned


def last_layer(clip: CLIP, what: str) -> nn.Linear:
    """The linear layer that an image tower ends in.

    Raises:
        WeightsError: It ends in another one, or in several.
    """
    named = clip.image.named_modules()
    ends = [layer for name, layer in named if f"{name}.".startswith(clip.image.outlets)]
    found = [layer for layer in ends if [*layer.parameters(recurse=False)]]
    if len(found) == 1 and isinstance(found[0], nn.Linear):
        return found[0]
    kinds = ", ".join(type(layer).__name__ for layer in found) or "nothing"
    raise WeightsError(f"{what} has to be one linear layer to become a head, and is {kinds}")


@torch.no_grad()
def prompts(bench: Bench, scale: float, sets: Sets) -> Float[Tensor, "classes dim"]:
    """Rows whose products with features are close to the zero-shot logits.

    A linear head cannot normalise features. The mean of their lengths stands for each of them, so that logits are too
    large or too small by a factor per image, and the order of the classes is that of the zero-shot classifier.

    Args:
        bench: Both towers.
        scale: Multiplier of cosines.
        sets: Class names, templates, and the images whose features are measured.

    Raises:
        DataError: An image or a label cannot be used.
    """
    numbers = [range(min(_SCALED_ON, len(sets.train)))]
    images, labels = next(bench.batches(sets.train, partial(label_of, num_classes=len(sets.names)), numbers))
    with agreed(bench.ranks):
        for label in labels:
            if isinstance(label, DataError):
                raise label
    parts = images[:, 0].to(bench.ranks.device).split(bench.batch)
    features = torch.cat([bench.encoder.encode_image(part, normalize=False) for part in parts])
    length = bench.ranks.from_main(float(features.norm(dim=1).mean()))
    return scale / length * classifier_of(bench, sets.names, sets.templates, alone=False).ensemble


@torch.no_grad()
def set_head(tuned: CLIP, projection: nn.Linear, rows: Float[Tensor, "classes dim"]) -> None:
    """Make the head compute the products of ``rows`` with what ``projection`` gives in its place."""
    head = last_layer(tuned, "the head")
    head.weight.copy_(rows @ projection.weight)
    if head.bias is not None and projection.bias is not None:
        head.bias.copy_(rows @ projection.bias)
