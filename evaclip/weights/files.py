"""Opening weight files without executing anything in them: names and tensors, mapped from the disk where possible.

A file is what ``torch.save`` or safetensors wrote, or a folder in which such files lie under their usual names.
Wrappers and prefixes that training tools leave around a state dict are taken off here; what the keys mean is decided
elsewhere.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from evaclip.checkpoint import CheckpointReader, find_checkpoint
from evaclip.errors import WeightsError
from evaclip.weights.origin import ABOUT, is_run, require_intact

_WRAPPERS = ("model", "module", "state_dict", "model_ema", "state_dict_ema")
"""Keys under which tools keep the state dict; EVA's, DeepSpeed's, open_clip's and timm's. Averages come last."""
_PREFIXES = ("module.", "_orig_mod.")
"""Of data-parallel wrappers and of compiled modules."""
_NAMES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    *("model.safetensors", "pytorch_model.bin", "eva_clip.pt"),
)
"""Of weights in a folder, the first that is there."""
SAFE_COPY = (
    "import torch; c = torch.load('{}', weights_only=False, map_location='cpu'); "
    "c = c.state_dict() if hasattr(c, 'state_dict') else c; "
    "c = next((c[k] for k in ('model', 'module', 'state_dict') if k in c), c); "
    "torch.save({{k: v for k, v in c.items() if torch.is_tensor(v)}}, 'safe.pt')"
)
"""What takes the tensors out of a file whose code one trusts."""
_TIMM = "timm:"
"""Before the name of a model whose weights timm has."""
_UNREADABLE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError, struct.error),
    *(RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
)
"""What torch, pickle and safetensors raise where bytes are damaged."""


class StoredTensor(NamedTuple):
    """A tensor that is read when it is asked for."""

    meta: Tensor
    """Its shape and dtype, without memory."""
    read: Callable[[], Tensor]


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """Tensors that need not be read, or that are mapped."""
    return {name: StoredTensor(tensor.to("meta"), partial(_itself, tensor)) for name, tensor in tensors.items()}


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def read_weights(path: str | Path) -> dict[str, StoredTensor]:
    """All tensors of a file or folder by name, without wrappers and ``module.``.

    A run directory or a checkpoint of ours is read too, after its checksums; ``timm:NAME`` is what timm has of a model,
    out of its cache or from its hub.

    Raises:
        WeightsError: There is no such file, it cannot be read safely, or it holds no state dict.
    """
    if is_of_timm(path):
        return _of_timm(str(path).removeprefix(_TIMM))
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist")
    if path.is_dir():
        if is_run(path):
            return _of_run(path)
        if (path / ABOUT).is_file():
            require_intact(path)
        found = _read_folder(path)
    elif path.stat().st_size == 0:
        raise WeightsError(f"{path} is empty; copy it again")
    else:
        found = _read_file(path)
    return in_memory(_without_prefix(_tensors(found, path), path))


def is_of_timm(path: str | Path) -> bool:
    """Whether this names a model of timm instead of a file."""
    return str(path).startswith(_TIMM)


def require_timm_name(path: str) -> None:
    """Refuse a model that timm does not know.

    Raises:
        WeightsError: With its name.
    """
    import timm  # noqa: PLC0415  seconds, and rarely needed

    name = path.removeprefix(_TIMM)
    if ":" not in name and not timm.is_model(name):  # hf-hub:... is looked up when it is read
        raise WeightsError(f"init: timm {timm.__version__} has no model {name}; timm.list_pretrained() has all")


def _of_timm(name: str) -> dict[str, StoredTensor]:
    """What timm loads into a model of its own, without what its files lack and it would draw."""
    import timm  # noqa: PLC0415  seconds, and rarely needed
    from timm.models import _builder as builder  # noqa: PLC0415  as above

    load = builder.load_pretrained

    def load_into_nothing(model: torch.nn.Module, *arguments: Any, **options: Any) -> None:
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
        load(model, *arguments, **options)

    try:
        with patch.object(builder, "load_pretrained", load_into_nothing):  # timm does not say what it left as it was
            model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise WeightsError(
            f"{_TIMM}{name}: timm {timm.__version__} has no such weights here ({reason}); check the name "
            f"(timm.list_pretrained()), or download them where there is a network and name the file"
        ) from None
    return in_memory({key: value for key, value in model.state_dict().items() if not value.isnan().any()})


def _of_run(path: Path) -> dict[str, StoredTensor]:
    reader = CheckpointReader(find_checkpoint(path))
    shapes = {name: torch.empty(shape, device="meta") for name, shape in reader.state.shapes.items()}
    return {name: StoredTensor(meta, partial(reader.weight, name)) for name, meta in shapes.items()}


def _read_folder(path: Path) -> Mapping[str, Any]:
    for name in _NAMES:
        if (path / name).exists():
            return _read_file(path / name)
        index = path / f"{name}.index.json"
        if index.exists():
            try:
                parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise WeightsError(f"{index} does not list the parts of the weights; copy it again") from None
            found: dict[str, Any] = {}
            for part in parts:
                found |= _read_file(path / Path(part).name)
            return found
    raise WeightsError(f"{path} holds none of {', '.join(_NAMES)}, and is no run; name the file itself")


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[:2] == b"PK":
            return _read_zip(path)
        if start[8:9] == b"{":
            return load_file(path)
        if start[:1] == b"\x80":
            return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        text = str(error) or type(error).__name__
        if "weights_only" in text or "Unsupported" in text:
            raise WeightsError(
                f"{path} holds more than tensors, and loading that could run its code; where you trust it, make a safe "
                f'one: python -c "{SAFE_COPY.format(path.name)}"'
            ) from None
        raise WeightsError(f"{path} cannot be read ({text.splitlines()[0]}); is it whole? copy it again") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror})") from None
    raise WeightsError(f"{path} is neither safetensors nor what torch.save writes: it begins with {start!r}")


def _read_zip(path: Path) -> Mapping[str, Any]:
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise WeightsError(
                f"{path} is a TorchScript archive, whose loading runs code; where you trust it, take out the weights: "
                f"python -c \"import torch; torch.save(torch.jit.load('{path.name}', map_location='cpu').state_dict(), "
                f"'weights.pt')\""
            )
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _tensors(found: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds."""
    while isinstance(found, Mapping):
        inner = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = cast("object", inner)
    entries = cast("Mapping[Any, Any]", found) if isinstance(found, Mapping) else {}
    tensors = {name: value for name, value in entries.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, list(entries)[:5])) or type(found).__name__
        raise WeightsError(f"{path} holds no tensors by name; found {keys}")
    return tensors


def _without_prefix(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names without what wrappers have put before them, as often as they have."""
    while prefix := next((p for p in _PREFIXES if any(name.startswith(p) for name in tensors)), None):
        others = [name for name in tensors if not name.startswith(prefix)]
        if others:
            raise WeightsError(f"{path}: some names begin with {prefix}, others do not, such as {others[0]}")
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors
