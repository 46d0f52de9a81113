"""evaclip: distributed training of CLIP encoders that start from MIM-pretrained weights."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaclip.api import create_model, load

__all__ = ["create_model", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import torch only when a model is asked for."""
    if name in __all__:
        return getattr(import_module("evaclip.api"), name)
    raise AttributeError(f"module 'evaclip' has no attribute {name!r}")
