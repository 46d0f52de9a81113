"""What all sections of the configuration stand on: their base class and the types of their values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, PositiveFloat

URL_SCHEMES = ("http", "https", "s3", "gs")
"""Of remote shards."""

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)

Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
Colour = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Level = tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat]


def _expand(value: object) -> object:
    """Expand ``~`` and ``${NAME}``; a name that is not set is an error."""
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if _SECRET.search(match[1]):
            raise ValueError(
                f"{match[1]} sounds like a secret, and would be written into config.yaml, checkpoints and W&B; storage "
                f"takes credentials from its own files and variables"
            )
        if match[1] not in os.environ:
            raise ValueError(f"environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return os.path.expanduser(re.sub(r"\$\{(\w+)\}", replace, value))  # noqa: PTH111  a pattern, not only a path


def path_in(section: object, key: str) -> str | None:
    """A path out of a section that is not validated yet, expanded; None where its field has nothing or a mistake."""
    try:
        path = _expand(cast("Mapping[str, object]", section).get(key) if isinstance(section, Mapping) else None)
    except ValueError:
        return None
    return path if isinstance(path, str) else None


def _readable(value: str) -> str:
    scheme, separator, _ = value.partition("://")
    if value.startswith("pipe:") or (separator and scheme not in URL_SCHEMES):
        raise ValueError(f"only paths and {', '.join(URL_SCHEMES)} URLs are read; copy or mount the shards first")
    if separator and re.match(r"[^/]*@", value.partition("://")[2]):
        raise ValueError(
            "a name or password in a URL would be written into config.yaml, checkpoints and W&B; give the "
            "storage its credentials in its own files and variables"
        )
    if re.search(r"[*?]", value):
        raise ValueError("wildcards are not expanded; name the shards with braces, as in {00000..00041}.tar")
    return value


def _listed(value: object) -> object:
    """One pattern stands for a list of one."""
    return (value,) if isinstance(value, str) else value


FilePath = Annotated[str, BeforeValidator(_expand)]
ShardPattern = Annotated[str, BeforeValidator(_expand), AfterValidator(_readable)]
ShardPatterns = Annotated[tuple[ShardPattern, ...], BeforeValidator(_listed)]


class Section(BaseModel):
    """A part of the configuration: immutable, closed to unknown keys, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def tagged(field: str, default: str) -> BeforeValidator:
    """Give a section of several kinds its default kind when the tag is left out."""

    def fill(value: object) -> object:
        if not isinstance(value, Mapping) or field in value:
            return cast("object", value)
        return {field: default, **cast("Mapping[str, object]", value)}

    return BeforeValidator(fill)
