"""Writing a model as other tools read it: their names, their configuration, their tokenizer.

An export is a folder that is whole or does not exist. Beside what the other tool wants it holds ``evaclip.json``, from
which ``evaclip.load`` knows the model; the weights are the same numbers under other names.
"""

# safetensors leaves parts of its interface untyped:
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from evaclip.checkpoint import file_checksum
from evaclip.config import ModelConfig
from evaclip.config.tokenizer_file import TOKENIZER, read_tokenizer
from evaclip.errors import WeightsError, writing
from evaclip.files import flush
from evaclip.models.clip import CLIP
from evaclip.models.vision import ImageTower
from evaclip.weights.express import (
    is_vit,
    open_clip_config,
    timm_config,
    tokenizer_files,
    transformers_configs,
)
from evaclip.weights.match import PLACES
from evaclip.weights.names import Layout, TowerName, rules
from evaclip.weights.origin import ABOUT, ABOUT_FORMAT
from evaclip.weights.stored import Stored, open_model

ExportFormat = Literal["open_clip", "timm", "hf", "eva", "safetensors", "tower"]
"""Of ``evaclip export``, and ``tower``: an image tower alone under our names, for those that timm cannot express."""

WEIGHT_FILES: Mapping[ExportFormat, str] = {
    "open_clip": "open_clip_model.safetensors",
    "timm": "model.safetensors",
    "hf": "model.safetensors",
    "eva": "eva_clip.pt",
    "safetensors": "model.safetensors",
    "tower": "model.safetensors",
}
"""Names under which each tool looks for weights; EVA's own code takes a path."""


class _Content(NamedTuple):
    tensors: dict[str, Tensor]
    about: dict[str, Any]
    """Of ``evaclip.json``."""
    files: dict[str, str]
    """Name -> text of what lies beside the weights."""


def export(source: str | Path, out: Path, kind: ExportFormat, *, ema: bool = False) -> list[Path]:
    """Write the model of a run, a checkpoint or another export for another tool: ``open_model`` and ``write``."""
    _require_free(out)
    return write(open_model(source, ema=ema), out, kind)


def tower_format(model: ModelConfig) -> ExportFormat:
    """How an image tower is written alone: for timm, if that can express it."""
    try:
        timm_config(model.image, model.embed_dim)
    except WeightsError:
        return "tower"
    return "timm"


def write(stored: Stored, out: Path, kind: ExportFormat, classes: Sequence[str] = ()) -> list[Path]:
    """Write a model for another tool.

    Args:
        stored: The model.
        out: Folder to be made; one that holds something is refused.
        kind: Whose names and configuration.
        classes: What the outputs of an image tower stand for; timm keeps them as ``pretrained_cfg["label_names"]``.

    Returns:
        The files.

    Raises:
        WeightsError: The tool cannot express the model; says which of its options.
        EvaclipError: ``out`` cannot be written.
    """
    _require_free(out)
    content = _content(stored, kind, classes)
    hidden = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        with writing(f"export {out}", WeightsError):
            hidden.mkdir(parents=True)
            write_tensors(hidden / WEIGHT_FILES[kind], content.tensors)
            checksum = file_checksum(hidden / WEIGHT_FILES[kind])
            about = {**content.about, "weights": {"file": WEIGHT_FILES[kind], "xxh3": checksum}}
            for name, text in {**content.files, ABOUT: json.dumps(about, indent=2)}.items():
                (hidden / name).write_text(text, encoding="utf-8")
            for path in (*hidden.iterdir(), hidden):
                flush(path)
            hidden.replace(out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return sorted(out.iterdir())


def _require_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(f"{out} is there already; name a new folder, or remove it first")


def write_tensors(path: Path, tensors: dict[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write a weight file that others may read as far as the process lets them.

    Args:
        path: Of the file; torch.save writes a ``.pt``, safetensors all others.
        tensors: By name.
        about: What safetensors keeps beside them.

    Raises:
        OSError: The disk refuses.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        if path.suffix == ".pt":
            torch.save(tensors, path)
        else:
            save_file(tensors, path, {"format": "pt", **(about or {})})
    except (SafetensorError, RuntimeError) as error:  # what both make of a full disk
        full = shutil.disk_usage(path.parent).free < sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error).splitlines()[0]) from None
    path.chmod(mode)  # safetensors would let nobody else


def usage(out: str, kind: ExportFormat) -> str:
    """The line with which an export is loaded."""
    return {
        "open_clip": f'open_clip.create_model_and_transforms("local-dir:{out}")',
        "timm": f'timm.create_model("local-dir:{out}", pretrained=True)',
        "hf": f'transformers.CLIPModel.from_pretrained("{out}")',
        "eva": f'eva_clip.create_model_and_transforms(NAME, "{out}/{WEIGHT_FILES["eva"]}")',
        "safetensors": f'evaclip.load("{out}")',
        "tower": f"evaclip train CONFIG init.image={out}",
    }[kind]


def _content(stored: Stored, kind: ExportFormat, classes: Sequence[str]) -> _Content:
    """What lies in the folder; fails before anything is written."""
    model = stored.clip.config
    text, files = model.text, dict[str, Any]()
    file = read_tokenizer(text.tokenizer, text.tokenizer_digest) if text.tokenizer else None
    if kind == "open_clip":
        files["open_clip_config.json"] = open_clip_config(model, stored.loss_config, _timm_pool(stored.clip), file)
        files |= tokenizer_files(text.context_length, file)
    elif kind == "timm":
        labels = {"label_names": list(classes)} if classes else {}
        files["config.json"] = timm_config(model.image, model.embed_dim) | labels
    elif kind == "hf":
        files |= transformers_configs(model, stored.loss_config, file)
        files |= tokenizer_files(text.context_length, file)
    elif kind == "safetensors" and file:
        files[TOKENIZER] = file.content.decode()
    elif kind == "eva" and file:
        raise WeightsError(f"eva_clip knows CLIP's tokenizer alone, not {text.tokenizer}; export it with --format hf")
    described = model.model_dump(mode="json")
    if TOKENIZER in files:  # completed for tools that need it, so perhaps of another digest
        digest = xxhash.xxh3_64_hexdigest(files[TOKENIZER].encode())
        described["text"] |= {"tokenizer": TOKENIZER, "tokenizer_digest": digest}
    about = {
        "format": ABOUT_FORMAT,
        "exported_as": kind,
        "model": described,
        "loss": stored.loss_config.model_dump(mode="json"),
        "origin": stored.origin,
    }
    texts = {name: text if isinstance(text, str) else json.dumps(text, indent=2) for name, text in files.items()}
    return _Content(_tensors(stored, kind), about, texts)


def _tensors(stored: Stored, kind: ExportFormat) -> dict[str, Tensor]:
    """All weights under the tool's names; views of ours wherever that is possible."""
    clip = stored.clip
    tensors: dict[str, Tensor] = {}
    for tower, (prefix, layout) in _places(clip, kind).items():
        for name, value in renamed(clip.get_submodule(tower), tower, layout):
            tensors[prefix + name] = value
    own = isinstance(clip.image, ImageTower)
    if own and (kind == "timm" or "visual.trunk.head.weight" in tensors):  # timm's heads always have a bias
        prefix = "" if kind == "timm" else "visual.trunk."
        tensors.setdefault(f"{prefix}head.bias", torch.zeros(clip.config.embed_dim))
    if kind not in ("timm", "tower"):
        ours = kind == "safetensors"  # a scalar elsewhere
        scalars = stored.loss.named_parameters()
        tensors |= {name: value.detach().reshape(value.shape if ours else ()).clone() for name, value in scalars}
    return tensors


def _timm_pool(clip: CLIP) -> str | None:
    """How a backbone of timm pools, as far as it says."""
    if isinstance(clip.image, ImageTower):
        return None
    trunk: Any = clip.image.trunk
    found = [clip.image.config.pool, getattr(trunk, "global_pool", None)]
    found.append(getattr(getattr(trunk, "head", None), "global_pool", None))
    names = (pool if isinstance(pool, str) else getattr(pool, "pool_type", None) for pool in found)
    return next((name for name in names if name), None)


def _places(clip: CLIP, kind: ExportFormat) -> Mapping[TowerName, tuple[str, Layout]]:
    """Prefix and layout of each tower; those of open_clip depend on the image tower."""
    if kind == "tower":
        return {"image": ("image.", "ours")}
    if kind != "open_clip":
        known = PLACES["evaclip" if kind == "safetensors" else kind]
        return {tower: places[0] for tower, places in known.items() if places}
    if is_vit(clip.config.image):
        return {"image": ("visual.", "openai"), "text": ("", "openai")}
    if not isinstance(clip.image, ImageTower):
        return {"image": ("visual.", "ours"), "text": ("text.", "openai")}
    return {"image": ("visual.trunk.", "timm"), "text": ("text.", "openai")}


def renamed(module: nn.Module, tower: TowerName, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """A tower's tensors as a layout names and shapes them.

    Raises:
        WeightsError: It has no name for one of them.
    """
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for rule in rules(tower, layout, parameters):
        if not rule.theirs:
            raise WeightsError(
                f"{layout} has no place for {tower}.{rule.ours[0]}; export the model with --format safetensors"
            )
        keys = rule.theirs[0]
        values = [parameters[name] for name in rule.ours]
        joined = torch.cat(values) if len(values) > 1 else values[0]
        pieces = joined.chunk(len(keys)) if len(keys) > 1 else [joined]
        for key, piece in zip(keys, pieces, strict=True):
            yield key, rule.to_theirs(piece).contiguous()
