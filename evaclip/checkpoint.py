"""Checkpoints: a folder that is whole or does not exist, readable at any world size and by any engine.

``step_00001000/`` holds ``meta.json`` (state, slot states, config, versions, the parts' checksums and its own),
``config.yaml``, a copy of the tokenizer's file if it is not CLIP's, and one safetensors file per rank. An entry of
these is a run of one parameter's elements, ``weight/NAME@START``, ``exp_avg/...``, ``exp_avg_sq/...`` or, where weights
are averaged, ``ema/...``, in fp32: every rank writes what it owns, once (of what is frozen an equal share, without
moments), and a reader puts together what it needs. This module knows the format, what is wrong with a checkpoint,
which ones may go, and how to read one; ``checkpoint_writer`` writes them behind the training.
"""

# safetensors leaves parts of its interface untyped:
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from evaclip.checkpoint_names import complete, place_aside, step_of
from evaclip.config import CheckpointConfig
from evaclip.config.tokenizer_file import TOKENIZER
from evaclip.config_file import validate
from evaclip.errors import CheckpointError
from evaclip.heartbeat import beat

log = logging.getLogger(__name__)

FORMAT = 1
"""Of ``meta.json``. Every format has the checksum of ``meta_checksum``, so that a flipped bit is no other format."""
_RETRY_SECONDS = (1.0, 2.0, 4.0)
"""Before each new try to read."""
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

T = TypeVar("T")


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


def meta_checksum(meta: dict[str, Any]) -> str:
    """Checksum of the content of ``meta.json``, itself left out."""
    return xxhash.xxh3_64_hexdigest(json.dumps(meta).encode())


class DamagedError(CheckpointError):
    """A checkpoint that is proven to be damaged; any other error while it is read proves nothing."""


def _patiently(path: Path, read: Callable[[Path], T]) -> T:
    """Read a file of a checkpoint; what the storage refuses is tried again.

    Raises:
        DamagedError: The file is not there.
        CheckpointError: The storage still refuses.
    """
    for seconds in (*_RETRY_SECONDS, None):
        try:
            return read(path)
        except _ABSENT as error:
            raise DamagedError(f"{path} cannot be read: {error}") from None
        except OSError as error:
            if seconds is None:
                raise CheckpointError(
                    f"{path} cannot be read: {error}; this need not be the checkpoint's fault: check the storage and "
                    f"start again, or move {path.parent.name} away to use an older one"
                ) from error
            log.warning("%s cannot be read: %s; trying again in %g s", path, error, seconds)
            time.sleep(seconds)
    raise AssertionError


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _size(path: Path) -> int:
    return path.stat().st_size


def file_checksum(path: Path) -> str:
    """xxh3 of a file's bytes, 64 bits."""
    state, block = xxhash.xxh3_64(), bytearray(1 << 22)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            state.update(memoryview(block)[:size])
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
    keep.add(best_step(scores, config))
    return [step for step, _ in sorted(scores) if step not in keep]


def best_step(scores: Sequence[tuple[int, float | None]], config: CheckpointConfig) -> int | None:
    """The step with the best value, given all (step, value of the ``keep_best`` metric); None where none has one."""
    scored = [(value, step) for step, value in scores if value is not None and math.isfinite(value)]
    if not (config.keep_best and scored):
        return None
    return (max(scored) if config.best_is == "max" else min(scored))[1]


def best(folder: Path, config: CheckpointConfig) -> Path | None:
    """The checkpoint with the best value of the ``keep_best`` metric.

    Raises:
        CheckpointError: The storage refuses to read one.
    """
    found = {int(path.name[5:]): path for path in complete(folder)}
    step = best_step([(step, _score(path, config.keep_best)) for step, path in found.items()], config)
    return None if step is None else found[step]


def delete_old(folder: Path, config: CheckpointConfig, current: int) -> None:
    """Apply the retention rule to a folder of checkpoints, of which ``current`` was just written.

    Raises:
        CheckpointError: The storage refuses to read one, which may be the best; nothing is deleted.
    """
    found = {step: path for path in complete(folder) if (step := step_of(path)) is not None}
    scores = [(step, _score(path, config.keep_best)) for step, path in found.items()]
    for step in to_delete(scores, config, current):
        doomed = folder / f".{found[step].name}.deleted"
        try:
            found[step].rename(doomed)  # first it stops being a checkpoint, then it goes
            shutil.rmtree(doomed)
        except OSError as error:  # what is left goes at the next start
            log.warning("%s cannot be deleted: %s", found[step], error)


def _score(path: Path, metric: str | None) -> float | None:
    """Value of a metric; None for a damaged checkpoint too, but not for one that cannot be read now."""
    if metric is None:
        return None
    try:
        return _read_meta(path).get("metrics", {}).get(metric)
    except DamagedError:
        return None


# ------------------------------------------------------------------------------------------------------------ reading


def _read_meta(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "meta.json"
    try:
        meta: Any = json.loads(_patiently(path, _read_text))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from None
    if not isinstance(meta, dict):
        raise DamagedError(f"{path} is no checkpoint's: it holds a {type(meta).__name__}")
    if meta.pop("xxh3", None) != meta_checksum(meta):
        raise DamagedError(f"{path} differs from its checksum")
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint} has format {meta.get('format')}, this version reads {FORMAT}; use the code that wrote it"
        )
    return meta


def digest(checkpoint: Path) -> str:
    """What tells a checkpoint from all others: the checksum of ``meta.json``, which holds those of the parts.

    Raises:
        DamagedError: ``meta.json`` is.
        CheckpointError: As of ``damage``.
    """
    return meta_checksum(_read_meta(checkpoint))


def damage(checkpoint: Path) -> str | None:
    """What is proven to be wrong with a checkpoint, or None; reads every byte.

    Raises:
        CheckpointError: It cannot be told: the storage refuses to read, or the format is another one.
    """
    try:
        meta = _read_meta(checkpoint)
        if step_of(checkpoint) not in (None, meta["step"]):
            return f"{checkpoint} holds step {meta['step']}: its files are another checkpoint's"
        for name, part in meta["parts"].items():
            path = checkpoint / name
            if (size := _patiently(path, _size)) != part["size"]:
                return f"{path} has {size} bytes instead of {part['size']}"
            beat()  # in a start this is the longest wait
            if _patiently(path, file_checksum) != part["xxh3"]:
                return f"{path} differs from its checksum"
    except (DamagedError, KeyError, TypeError) as error:
        return f"{checkpoint}: {error}"
    return None


def set_aside(folder: Path) -> tuple[Path | None, list[str]]:
    """Take damaged checkpoints newer than the newest intact one out of the way; returns what ``newest_intact`` does.

    They are renamed to ``.step_N.damaged``, unless none is intact: then all stay, so that every start says so. What
    interrupted writes and deletions left is removed; a checkpoint whose replacement never got its name gets it back.

    Raises:
        CheckpointError: As of ``damage``; all stay.
    """
    for leftover in (*folder.glob(".step_*.tmp"), *folder.glob(".step_*.deleted")):
        shutil.rmtree(leftover, ignore_errors=True)
    for replaced in folder.glob(".step_*.replaced"):
        path = folder / replaced.stem.removeprefix(".")
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(path)
    intact, problems = newest_intact(folder)
    for path in reversed(complete(folder)) if intact else ():
        if path == intact:
            break
        shutil.rmtree(place_aside(path), ignore_errors=True)
        path.rename(place_aside(path))
    return intact, problems


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without damage, and what is wrong with newer ones."""
    problems: list[str] = []
    for path in reversed(complete(folder)):
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
        config = validate(meta["config"], str(checkpoint))
        own = config.model.with_tokenizer(checkpoint / TOKENIZER)  # wherever the run had it
        self.config = config.model_copy(update={"model": own})
        self._parts = [safe_open(checkpoint / part, "pt") for part in meta["parts"] if part != TOKENIZER]
        self._runs: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        for part in self._parts:
            for key in part.keys():  # noqa: SIM118  not a mapping
                kind, _, rest = str(key).partition("/")
                name, _, start = rest.rpartition("@")
                self._runs.setdefault((kind, name), []).append((int(start), part, str(key)))

    @property
    def has_ema(self) -> bool:
        """Whether the run averaged its weights."""
        return any(kind == "ema" for kind, _ in self._runs)

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

    def require_shapes(self, shapes: Mapping[str, list[int]]) -> None:
        """Refuse a model with other parameters than the checkpoint's, or of other shapes.

        Raises:
            CheckpointError: Names the first that differ.
        """
        saved = self.state.shapes
        wrong = [
            f"{name}: {saved.get(name, 'absent')} in the checkpoint, {shapes.get(name, 'absent')} in the model"
            for name in sorted({*saved, *shapes})
            if saved.get(name) != shapes.get(name)
        ]
        if wrong:
            raise CheckpointError("\n  ".join([f"{self.path} is of another model; use a new run_dir", *wrong[:5]]))

    def load(self, name: str, parameter: Tensor, *, ema: bool = False) -> None:
        """Set a whole parameter, on any device and in any dtype; see ``weight``.

        Raises:
            CheckpointError: Elements are missing.
        """
        parameter.data.copy_(self.weight(name, ema=ema))

    def weight(self, name: str, *, ema: bool = False) -> Tensor:
        """A parameter, fp32; with ``ema`` its average, which what is frozen has none of.

        Raises:
            CheckpointError: Elements are missing.
        """
        values = torch.empty(self.state.shapes[name], dtype=torch.float32)
        kind = "ema" if ema and ("ema", name) in self._runs else "weight"
        self.fill(Entry(kind, name, 0, values.view(-1)))
        return values

    def weights(self, *, ema: bool = False) -> dict[str, Tensor]:
        """All parameters by name, fp32; see ``weight``."""
        return {name: self.weight(name, ema=ema) for name in self.state.shapes}
