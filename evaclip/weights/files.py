"""Opening weight files without executing anything in them: names and tensors, mapped from the disk where possible.

A file is what ``torch.save`` or safetensors wrote, or a folder in which such files lie under their usual names.
Wrappers and prefixes that training tools leave around a state dict are taken off here; what the keys mean is decided
elsewhere.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from evaclip.checkpoint import CheckpointReader, find_checkpoint
from evaclip.errors import WeightsError

_WRAPPERS = ("model", "module", "state_dict", "model_ema", "state_dict_ema")
"""Keys under which tools keep the state dict; EVA's, DeepSpeed's, open_clip's and timm's. Averages come last."""
_PREFIXES = ("module.", "_orig_mod.")
"""Of data-parallel wrappers and of compiled modules."""
_NAMES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    *("model.safetensors", "pytorch_model.bin"),
)
"""Of weights in a folder, the first that is there."""
SAFE_COPY = (
    "import torch; c = torch.load('{}', weights_only=False, map_location='cpu'); "
    "c = c.state_dict() if hasattr(c, 'state_dict') else c; "
    "c = next((c[k] for k in ('model', 'module', 'state_dict') if k in c), c); "
    "torch.save({{k: v for k, v in c.items() if torch.is_tensor(v)}}, 'safe.pt')"
)
"""What takes the tensors out of a file whose code one trusts."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All floating-point tensors of a file or folder by name, without wrappers and ``module.``.

    A run directory or a checkpoint of ours is read too, after its checksums.

    Raises:
        WeightsError: There is no such file, it cannot be read safely, or it holds no state dict.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist")
    if path.is_dir():
        found = _read_folder(path)
    elif path.stat().st_size == 0:
        raise WeightsError(f"{path} is empty; copy it again")
    else:
        found = _read_file(path)
    return _without_prefix(_tensors(found, path), path)


def _read_folder(path: Path) -> Mapping[str, Any]:
    if (path / "meta.json").exists() or (path / "checkpoints").is_dir():
        return CheckpointReader(find_checkpoint(path)).weights()
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
    except (pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        text = str(error)
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
    for name, value in tensors.items():
        if value.dtype not in _FLOATS and value.ndim > 1 and not name.endswith("position_ids"):
            raise WeightsError(f"{path}: {name} is {value.dtype}; quantised weights cannot be read, use the originals")
    return tensors


def _without_prefix(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names without what wrappers have put before them, as often as they have."""
    while prefix := next((p for p in _PREFIXES if any(name.startswith(p) for name in tensors)), None):
        others = [name for name in tensors if not name.startswith(prefix)]
        if others:
            raise WeightsError(f"{path}: some names begin with {prefix}, others do not, such as {others[0]}")
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors
