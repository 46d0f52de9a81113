"""Checkpoints: a folder that is whole or does not exist, readable at any world size and by any engine.

``step_00001000/`` holds ``meta.json`` (state, slot states, config, versions, the parts' checksums and its own),
``config.yaml`` and one safetensors file per rank. An entry of such a file is a run of one parameter's elements,
``weight/NAME@START``, ``exp_avg/...`` or ``exp_avg_sq/...``, in fp32: every rank writes what it owns, once, and a
reader puts together what it needs. Files are written under a temporary name, flushed and checksummed (xxh3); the
rename of the folder comes last.
"""

# safetensors leaves parts of its interface untyped:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evaclip.config import CheckpointConfig, RunConfig, ShardSource
from evaclip.config_file import dump, flatten, validate
from evaclip.distributed import Ranks, agreed
from evaclip.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

FORMAT = 1


class Entry(NamedTuple):
    """A run of one parameter's elements to be saved or filled, flat fp32."""

    kind: str
    name: str
    start: int
    values: Tensor


@dataclass(frozen=True)
class RunState:
    """Where a run stands: everything but tensors."""

    step: int
    """Attempted updates; also the position in the data and the schedule."""
    samples: int
    updates: int
    """Applied updates, which the bias correction counts."""
    grad_scale: float
    slots: int
    slot_states: dict[int, Any]
    """Slot -> ``SlotState`` as lists."""
    digests: dict[str, str]
    """Source -> identity of its content."""
    shapes: dict[str, list[int]]
    """Parameter -> shape, frozen ones included."""
    metrics: dict[str, float]
    """Evaluation results at this step."""
    meter: dict[str, Any]
    """Running sums of metrics since the last row."""
    versions: dict[str, str]
    consecutive_skips: int = 0
    """Updates skipped since the last applied one."""


# ------------------------------------------------------------------------------------------------------------ writing


def save(folder: Path, config: RunConfig, state: RunState, entries: Iterable[Entry], ranks: Ranks) -> Path:
    """Write ``folder/step_N`` from all ranks; returns it on every rank.

    Communicates one gather of a few hundred bytes, and three numbers. Training waits until the files are written.

    Raises:
        CheckpointError: Some rank could not write; nothing of the checkpoint is left, older ones are untouched.
    """
    final = folder / f"step_{state.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    try:
        with agreed(ranks), _writing():
            if ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with agreed(ranks), _writing():
            own = _write_part(temporary / f"part_{ranks.rank:05d}.safetensors", entries)
        parts = {name: part for written in ranks.gather_objects(own) for name, part in written.items()}
        with agreed(ranks), _writing():
            if ranks.is_main:
                _write(temporary / "config.yaml", dump(config))
                meta = {"format": FORMAT, **asdict(state), "config": config.model_dump(mode="json"), "parts": parts}
                _write(temporary / "meta.json", json.dumps({**meta, "xxh3": _meta_checksum(meta)}))
                _flush(temporary)
                if final.exists():  # a run that was cut back may write a step again
                    shutil.rmtree(final)
                temporary.rename(final)
                _write(folder / ".latest.tmp", final.name + "\n")
                (folder / ".latest.tmp").replace(folder / "latest")
                _flush(folder)
    except CheckpointError:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _write_part(path: Path, entries: Iterable[Entry]) -> dict[str, Any]:
    """Write this rank's entries; returns the file's name with its size and checksum."""
    save_file(
        {f"{e.kind}/{e.name}@{e.start}": e.values.detach().to("cpu", torch.float32, copy=True) for e in entries}, path
    )
    _flush(path)
    return {path.name: {"size": path.stat().st_size, "xxh3": _checksum(path)}}


@contextmanager
def _writing() -> Generator[None]:
    """Say what a person can do about a file that could not be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        remedy = "free disk space or lower checkpoint.keep_last" if full else "check run_dir"
        raise CheckpointError(
            f"the checkpoint could not be written: {error}; {remedy}, and start the run again "
            f"(older checkpoints are intact)"
        ) from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _meta_checksum(meta: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(meta).encode())


def _checksum(path: Path) -> str:
    state = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            state.update(block)
    return state.hexdigest()


# ---------------------------------------------------------------------------------------------------------- retention


def to_delete(
    scores: Sequence[tuple[int, float | None]], config: CheckpointConfig, current: int | None = None
) -> list[int]:
    """Steps whose checkpoints go, given all (step, value of the ``keep_best`` metric); ``current`` always stays."""
    newest_first = sorted(scores, reverse=True)
    keep = {step for step, _ in newest_first[: config.keep_last]} | {current}
    if config.keep_every_steps:
        keep |= {step for step, _ in scores if step % config.keep_every_steps == 0}
    scored = [(value, step) for step, value in scores if value is not None and math.isfinite(value)]
    if config.keep_best and scored:
        keep.add((max(scored) if config.best_is == "max" else min(scored))[1])
    return [step for step, _ in sorted(scores) if step not in keep]


def delete_old(folder: Path, config: CheckpointConfig, current: int) -> None:
    """Apply the retention rule to a folder of checkpoints, of which ``current`` was just written."""
    found = {int(path.name[5:]): path for path in _steps(folder)}
    scores = [(step, _score(path, config.keep_best)) for step, path in found.items()]
    for step in to_delete(scores, config, current):
        doomed = folder / f".{found[step].name}.deleted"
        try:
            found[step].rename(doomed)  # first it stops being a checkpoint, then it goes
            shutil.rmtree(doomed)
        except OSError as error:  # what is left goes at the next start
            log.warning("%s cannot be deleted: %s", found[step], error)


def _score(path: Path, metric: str | None) -> float | None:
    """Value of a metric; None for a damaged checkpoint too."""
    if metric is None:
        return None
    try:
        return _read_meta(path).get("metrics", {}).get(metric)
    except CheckpointError:
        return None


# ------------------------------------------------------------------------------------------------------------ reading


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name))


def _read_meta(checkpoint: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads((checkpoint / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}/meta.json cannot be read: {error}") from None
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{checkpoint} has format {meta.get('format')}, this version reads {FORMAT}")
    if meta.pop("xxh3", None) != _meta_checksum(meta):
        raise CheckpointError(f"{checkpoint}/meta.json differs from its checksum")
    return meta


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None; reads every byte."""
    try:
        parts: dict[str, Any] = _read_meta(checkpoint)["parts"]
        for name, part in parts.items():
            path = checkpoint / name
            if path.stat().st_size != part["size"]:
                return f"{path} has {path.stat().st_size} bytes instead of {part['size']}"
            if _checksum(path) != part["xxh3"]:
                return f"{path} differs from its checksum"
    except (CheckpointError, OSError, KeyError, TypeError) as error:
        return f"{checkpoint}: {error}"
    return None


def set_aside(folder: Path) -> tuple[Path | None, list[str]]:
    """Take damaged checkpoints newer than the newest intact one out of the way; returns what ``newest_intact`` does.

    They are renamed to ``.step_N.damaged``, unless none is intact: then all stay, so that every start says so. What
    interrupted writes and deletions left is removed.
    """
    for leftover in (*folder.glob(".step_*.tmp"), *folder.glob(".step_*.deleted")):
        shutil.rmtree(leftover, ignore_errors=True)
    intact, problems = newest_intact(folder)
    for path in _steps(folder) if intact else ():
        if intact and path.name > intact.name:
            aside = folder / f".{path.name}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return intact, problems


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without damage, and what is wrong with newer ones."""
    problems: list[str] = []
    for path in reversed(_steps(folder)):
        problem = damage(path)
        if problem is None:
            return path, problems
        problems.append(problem)
    return None, problems


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at ``path``, or the newest intact one of the run there.

    Raises:
        CheckpointError: There is none.
    """
    path = Path(path)
    if (path / "meta.json").is_file():
        problem = damage(path)
        if problem:
            raise CheckpointError(f"{problem}; use an older checkpoint")
        return path
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run directory or one of its checkpoints")
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give a run directory or one of its checkpoints")
    found, problems = newest_intact(path / "checkpoints")
    for problem in problems if found else ():
        log.warning("%s; using %s", problem, found)
    if found is None:
        because = f": {problems[0]}" if problems else ""
        raise CheckpointError(f"{path} holds no intact checkpoint{because}; give a run directory or a checkpoint")
    return found


class CheckpointReader:
    """Random access to a checkpoint's tensors, memory-mapped."""

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint
        meta = _read_meta(checkpoint)
        names = set(RunState.__dataclass_fields__)
        fields = {key: value for key, value in meta.items() if key in names}
        fields["slot_states"] = {int(slot): state for slot, state in fields["slot_states"].items()}
        self.state = RunState(**fields)
        self.config = validate(meta["config"], str(checkpoint))
        self._parts = [safe_open(checkpoint / part, "pt") for part in meta["parts"]]
        self._runs: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        for part in self._parts:
            for key in part.keys():  # noqa: SIM118  not a mapping
                kind, _, rest = str(key).partition("/")
                name, _, start = rest.rpartition("@")
                self._runs.setdefault((kind, name), []).append((int(start), part, str(key)))

    def fill(self, entry: Entry) -> None:
        """Copy a run of elements out of whatever runs were saved.

        Raises:
            CheckpointError: Elements are missing.
        """
        filled, stop = 0, entry.start + entry.values.numel()
        for start, part, key in self._runs.get((entry.kind, entry.name), []):
            length = part.get_slice(key).get_shape()[0]
            low, high = max(start, entry.start), min(start + length, stop)
            if low < high:
                values = part.get_slice(key)[low - start : high - start]
                entry.values[low - entry.start : high - entry.start].copy_(values)
                filled += high - low
        if filled != entry.values.numel():
            raise CheckpointError(f"{self.path}: {entry.kind} of {entry.name} is incomplete; use an older checkpoint")

    def weights(self) -> dict[str, Tensor]:
        """All parameters by name, fp32."""
        weights: dict[str, Tensor] = {}
        for name, shape in self.state.shapes.items():
            flat = torch.empty(shape, dtype=torch.float32)
            self.fill(Entry("weight", name, 0, flat.view(-1)))
            weights[name] = flat
        return weights


def _orders(config: RunConfig) -> dict[str, list[str]]:
    """Orders of keys that decide what is read next."""
    sources = config.data.sources
    captions = {
        f"data.sources.{name}.captions in order": list(source.captions)
        for name, source in sources.items()
        if isinstance(source, ShardSource)
    }
    return {"data.sources. in order": list(sources), **captions}


def refuse_changes(saved: RunConfig, wanted: RunConfig, origin: Path) -> list[str]:
    """Refuse to continue a run as another one; returns what else has changed, as lines for the log.

    Raises:
        ConfigError: Something that makes the model or the data order differs; the message holds the difference.
    """
    fixed = ("seed", "model.", "data.sources.", "data.augment.", "data.block_records", "data.window_blocks")
    fixed += ("data.max_image_pixels", "train.global_batch", "loss.name", "loss.logit_", "loss.learn_", "optim.name")
    movable = (".shards", "model.name")  # content is compared by digest, names by what they stand for
    before, now = (flatten(config) | _orders(config) for config in (saved, wanted))
    changed = [
        f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in sorted({*before, *now})
        if key.startswith(fixed) and not key.endswith(movable) and before.get(key) != now.get(key)
    ]
    if wanted.data.slots is not None and saved.data.slots != wanted.data.slots:
        changed.append(f"data.slots: {saved.data.slots} -> {wanted.data.slots}")
    if changed:
        raise ConfigError(
            "\n  ".join([f"{origin} was made by another model or data order; use a new run_dir", *changed])
        )
    return [
        f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
