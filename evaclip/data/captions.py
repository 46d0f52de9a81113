"""Which of a record's texts is its caption for one sample.

This module decides between named texts by probability, and what a missing and what an undecodable caption is. It does
not know tokens, nor how bad records are counted.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

from evaclip.data.order import uniform

BadCaptionReason = Literal["no_caption", "undecodable_caption"]

_CAPTION = 0x74657874
"""What a sample's random number is drawn for (ASCII "text")."""


class BadCaptionError(ValueError):
    """A record without a usable caption; the fault is a function of its bytes.

    Attributes:
        reason: Its kind, under which bad records are counted.
        detail: What exactly is wrong.
    """

    def __init__(self, reason: BadCaptionReason, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that the error can be pickled
        self.reason: BadCaptionReason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def choose_caption(members: Mapping[str, bytes], captions: Mapping[str, float], seed: int) -> str:
    """Draw one of a record's captions; if it is missing or empty, take the first of the others that is not.

    Args:
        members: The record: extension -> content.
        captions: Key -> probability, relative to their sum. A key is an extension (``txt``), or a field of the json
            member (``json.recaption``, ``json.texts.short``); a field that is null counts as missing.
        seed: The sample's seed; the choice is a function of it and of the probabilities.

    Returns:
        The caption without white space around it, never empty.

    Raises:
        BadCaptionError: ``no_caption``: every key is missing or empty. ``undecodable_caption``: a key that had to be
            looked at is not UTF-8, lies in something that is no JSON object, or is no string; nothing else is tried
            then, so that damage is counted and not papered over.
    """
    keys, shares = list(captions), list(accumulate(captions.values()))
    chosen = keys[bisect_right(shares[:-1], uniform(seed, _CAPTION) * shares[-1])]
    for key in [chosen, *(key for key in keys if key != chosen)]:
        text = _read(members, key)
        if text:
            return text
    raise BadCaptionError("no_caption", f"{', '.join(keys)} are missing or empty; there are {', '.join(members)}")


def _read(members: Mapping[str, bytes], key: str) -> str:
    """A key's text, stripped; empty where it is missing."""
    member, *path = key.split(".") if key.startswith("json.") else [key]
    if member not in members:
        return ""
    try:
        content = members[member].decode("utf-8-sig")
        value = json_field(json.loads(content), path) if path else content
        if value is None:
            return ""
        if not isinstance(value, str):
            raise TypeError(f"{type(value).__name__}, not a string")
        value.encode()  # json can spell half a surrogate pair
    except (ValueError, TypeError, RecursionError) as error:
        raise BadCaptionError("undecodable_caption", f"{key}: {error}") from error
    return value.strip()


def json_field(value: Any, path: Sequence[str]) -> Any:
    """The value under nested names, None where a name is missing; raises ``TypeError`` inside what is no object."""
    for name in path:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise TypeError(f"{name} lies in a {type(value).__name__}, not in an object")
        value = value.get(name)
    return value
