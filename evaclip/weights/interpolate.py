"""Two models of one shape become a third between them (WiSE-FT, arXiv:2109.01903): weights and temperature alike."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch

from evaclip.changes import differences, lines
from evaclip.config_file import flatten
from evaclip.errors import WeightsError
from evaclip.weights.stored import Stored, open_model

_FREE = ("name", "image.token_drop", "image.drop_path")  # of training alone


def interpolate(first: str | Path, second: str | Path, share: float) -> Stored:
    """``(1 - share) * first + share * second``, taken in fp32; at 0 and 1 bit for bit one of the two.

    Args:
        first: A run, a checkpoint or an export, such as the model before fine-tuning.
        second: Another of the same shape, such as the model after it.
        share: Of the second one, between 0 and 1.

    Raises:
        WeightsError: The share lies outside, or the models are not of one shape; names what differs.
        EvaclipError: One of them cannot be read.
    """
    if not 0 <= share <= 1:
        raise WeightsError(f"--share {share:g} lies outside of the two models; give 0 for the first, 1 for the second")
    one, other = open_model(first), open_model(second)
    changed = differences(flatten(one.clip.config), flatten(other.clip.config))
    changed |= differences(*({"loss.name": flatten(stored.loss_config)["name"]} for stored in (one, other)))
    if refused := {key: pair for key, pair in changed.items() if key not in _FREE}:
        found = [f"{first} and {second} are not models of one kind; what differs:", *lines(refused)]
        raise WeightsError("\n  ".join(found))
    mine, theirs = (chain(stored.clip.named_parameters(), stored.loss.named_parameters()) for stored in (one, other))
    with torch.no_grad():
        for (_, weight), (_, target) in zip(mine, theirs, strict=True):
            weight.lerp_(target, share)
    origin = {"interpolated": {"share": share, "first": one.origin, "second": other.origin}}
    return one._replace(origin=origin)
