"""What tests of the towers share."""

from __future__ import annotations

import inspect
import sys

import pytest


@pytest.fixture
def unchecked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take jaxtyping's checks off the towers, if they are on: dynamo cannot trace them."""

    def is_checked(value: object) -> bool:
        return inspect.isfunction(value) and "jaxtyping" in value.__code__.co_filename

    for module in [module for name, module in sys.modules.items() if name.startswith("evaclip.models.")]:
        for owner in [module, *(value for value in vars(module).values() if inspect.isclass(value))]:
            for name, value in list(vars(owner).items()):
                if is_checked(value):
                    monkeypatch.setattr(owner, name, inspect.unwrap(value, stop=lambda f: not is_checked(f)))
