"""``evaclip finetune``: the image tower and a linear head learn the classes of a labelled set.

End-to-end fine-tuning, which CLIP's paper sets beside zero-shot use and linear probes (arXiv:2103.00020, section 3.2).

Update s takes the samples s B to (s + 1) B of an order that is arithmetic (``labelled``), of which each rank has an
equal run; the loss is the mean over all B. So ranks, workers and micro-batches change nothing but the order in which
is added up. Communication: the gradient (``TorchEngine``), one number per update for the loss, and an evaluation's.

After each pass, and when it is asked to stop, rank 0 writes weights, moments and position as one file, whole or not at
all. What follows from it, as what is measured then, is computed again where a run goes on.
"""

# safetensors leaves parts of its interface untyped:
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from evaclip.changes import differences, lines
from evaclip.classifier import last_layer, prompts, set_head, with_head
from evaclip.config import AdamWConfig, FinetuneConfig, LossConfig
from evaclip.config_file import flatten
from evaclip.distributed import Ranks, agreed, started
from evaclip.embed import digest
from evaclip.engine.prepare import PreparedTowers
from evaclip.engine.torch_engine import TorchEngine
from evaclip.errors import CheckpointError, ConfigError, DataError, TrainingStoppedError, writing
from evaclip.evaluation import Predictions, Result, format_table, open_bench, write_results
from evaclip.evaluation.accuracy import accuracies, nearest_classes
from evaclip.evaluation.datasets import label_of
from evaclip.evaluation.encoding import Bench, in_batches, in_order
from evaclip.files import flush, write_json
from evaclip.labelled import MAX_PIXELS, Batch, Samples, Sets, batches, epoch_ends, open_sets
from evaclip.lock import lock
from evaclip.metrics import EVAL_METRICS
from evaclip.models.clip import CLIP
from evaclip.models.vision import ImageTower
from evaclip.optim.adamw import AdamW
from evaclip.optim.schedule import Schedule
from evaclip.optim.table import parameter_table
from evaclip.preemption import StopRequest, listening
from evaclip.weights.export import tower_format, usage, write, write_tensors
from evaclip.weights.stored import Stored, find_model, open_model

_ABOUT, _CHECKPOINT = "finetune.json", "checkpoint.safetensors"
_FREE = ("workers", "micro_batch", "class_names", "templates")
"""Options that may change when a run goes on; of the files their content may not."""
_LOOK_UPDATES = 50
"""Between two looks at whether all updates were applied, for which the device is waited for."""


def finetune(path: Path, dataset: str, out: Path, config: FinetuneConfig) -> None:
    """Fine-tune, or go on with what is in ``out``, and print what is measured after each pass.

    Args:
        path: Run, checkpoint or export that the tower is taken from.
        dataset: Folder with a split to train on and one that is measured, in a layout that evaluation reads.
        out: Folder of the result: ``result.json``, ``evaluation.json``, ``predictions/`` and ``model/``.
        config: All options.

    Raises:
        EvaclipError: With a message for the user.
    """
    with started(need_group=False) as ranks:
        finetune_on(ranks, path, dataset, out, config)


def finetune_on(ranks: Ranks, path: Path, dataset: str, out: Path, config: FinetuneConfig) -> None:
    """The same on ranks that have met already."""
    default = "bf16" if ranks.device.type == "cuda" else "fp32"
    config = config.model_copy(update={"precision": config.precision or default})
    sets = open_sets(dataset, config, ranks)
    about: dict[str, Any] = {}
    with agreed(ranks):
        _require_equal_shares(config, ranks)
        own = find_model(path) if ranks.is_main else None
    place = ranks.from_main(own)
    assert place is not None
    with agreed(ranks):
        stored = open_model(place, ranks.device)
        if ranks.is_main:
            about = {"model": digest(stored.clip), **sets.identity(), **flatten(config)}
            about = {key: value for key, value in about.items() if key not in _FREE}
            _claim(out, about)
    stored = stored._replace(clip=_tuned(stored, str(path), sets, config, ranks))
    engine, state = _engine(stored.clip, config, ranks), _State()
    if ranks.from_main((out / _CHECKPOINT).exists()):
        with agreed(ranks):
            state = _load(out / _CHECKPOINT, engine)
    with listening(ranks) as stop:
        result = _learn(engine, sets, state, config, ranks, out, stop)
    with agreed(ranks), writing(str(out)):
        if ranks.is_main:
            kind = tower_format(stored.clip.config)
            if not (out / "model").exists():  # else it was complete before
                origin = {"finetuned": {"from": stored.origin, **about}}
                write(stored._replace(origin=origin), out / "model", kind, sets.names)
            write_results(out, [result])
            found = {"metrics": result.metrics, "num_records": result.num_records, "epochs": state.rows}
            write_json(out / "result.json", {**found, "class_names": sets.names, "made_from": about}, indent=2)
            print(f"{format_table([result])}\n{usage(str(out / 'model'), kind)}")  # noqa: T201  what was asked for


def _require_equal_shares(config: FinetuneConfig, ranks: Ranks) -> None:
    if config.batch % ranks.world_size:
        multiple = -(-config.batch // ranks.world_size) * ranks.world_size
        raise ConfigError(
            f"batch {config.batch} is not a multiple of the {ranks.world_size} ranks; give one, such as {multiple}"
        )


# ---------------------------------------------------------------------------------------------------------- beginning


def _tuned(stored: Stored, source: str, sets: Sets, config: FinetuneConfig, ranks: Ranks) -> CLIP:
    """The model as it is before the first update."""
    tuned = with_head(stored.clip, source, len(sets.names), config.drop_path, ranks)
    if config.head == "zero_shot":
        with agreed(ranks):
            projection = last_layer(stored.clip, f"for head=zero_shot the projection of {source}'s image tower")
        bench = _bench(stored.clip, PreparedTowers(stored.clip, str(config.precision), ranks.device), config, ranks)
        set_head(tuned, projection, prompts(bench, stored.loss.similarity.scale, sets))
    return tuned


def _bench(clip: CLIP, towers: PreparedTowers, config: FinetuneConfig, ranks: Ranks) -> Bench:
    share = config.batch // ranks.world_size
    batch = min(config.micro_batch or share, share)
    return open_bench(towers, clip.config, ranks, batch=batch, workers=_workers(config), max_image_pixels=MAX_PIXELS)


def _engine(clip: CLIP, config: FinetuneConfig, ranks: Ranks) -> TorchEngine:
    """AdamW over the table of parameters, whose last layer the head is, and the gradient's reduction."""
    keys = {"lr": config.lr, "weight_decay": config.weight_decay, "image": {"layer_decay": config.layer_decay}}
    optim = AdamWConfig.model_validate({"name": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "clip_norm": 1.0, **keys})
    learning = {name: parameter for name, parameter in clip.named_parameters() if parameter.requires_grad}
    shapes = {name: tuple(parameter.shape) for name, parameter in learning.items()}
    layers = None if isinstance(clip.image, ImageTower) else clip.image.layers()
    rows = parameter_table(shapes, optim, clip.config, LossConfig(), layers)
    parameters = list(learning.values())
    towers = PreparedTowers(clip, str(config.precision), ranks.device)
    return TorchEngine(towers, parameters, AdamW(parameters, rows, optim, ranks), ranks)


# ----------------------------------------------------------------------------------------------------------- learning


@dataclass
class _State:
    """Where a run stands: everything but tensors."""

    step: int = 0
    """Updates."""
    loss: float = 0.0
    """Sum over the updates since the last row."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """What was measured after each pass."""


def _learn(
    engine: TorchEngine,
    sets: Sets,
    state: _State,
    config: FinetuneConfig,
    ranks: Ranks,
    out: Path,
    stop: StopRequest,
) -> Result:
    """All updates from here on; returns what was measured after the last one.

    Raises:
        TrainingStoppedError: A loss or a gradient was not finite, or somebody asked to stop, for which all is saved.
        DataError: A record cannot be used.
    """
    clip, share = engine.towers.clip, config.batch // ranks.world_size
    bench = _bench(clip, engine.towers, config, ranks)
    ends = epoch_ends(len(sets.train), config.batch, config.epochs)
    steps, measured = ends[-1], {*ends, *([0] if config.head == "zero_shot" else [])}
    schedule = Schedule(steps, round(config.warmup * steps), 0, "cosine", 0.0)
    result = _measure(bench, sets, state, config) if state.step in measured else None
    firsts = (step * config.batch + ranks.rank * share for step in range(state.step, steps))
    spans = [span for first in firsts for span in in_batches(range(first, first + share), bench.batch)]
    samples, pin = Samples(sets, clip.config.image, config), ranks.device.type == "cuda"
    stream = batches(samples, spans, workers=_workers(config), pin=pin)
    loss = torch.tensor(state.loss, dtype=torch.float64, device=ranks.device)
    with tqdm(total=steps, initial=state.step, unit=" updates", disable=not ranks.is_main or None) as bar:
        while state.step < steps:
            loss += _update(engine, stream, -(-share // bench.batch), schedule.factor(state.step), config, ranks)
            state.step += 1
            bar.update()
            asked, ended = stop.agreed(), state.step in measured
            if asked or ended or state.step % _LOOK_UPDATES == 0:
                _require_applied(state.step, int(engine.optimizer.updates), config)
            if asked or ended:
                state.loss = float(loss)
                with agreed(ranks), writing(str(out)):
                    if ranks.is_main:
                        _save(out / _CHECKPOINT, engine, state)
            if asked and state.step < steps:
                raise TrainingStoppedError(
                    f"stopped by {signal.Signals(asked).name} after update {state.step} of {steps}, which is saved; "
                    f"the same command continues from there",
                    can_continue=True,
                )
            if ended:
                result = _measure(bench, sets, state, config)
                loss.zero_()
    assert result is not None, "the last update ends a pass"
    return result


def _update(
    engine: TorchEngine, stream: Iterator[Batch], pieces: int, factor: float, config: FinetuneConfig, ranks: Ranks
) -> Tensor:
    """One update from so many micro-batches; returns the mean loss of the global batch (0-d)."""
    total = torch.zeros((), device=ranks.device)
    for _ in range(pieces):
        images, labels, seeds = (tensor.to(ranks.device, non_blocking=True) for tensor in next(stream))
        logits = engine.towers.encode_image(images, seeds=seeds)
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=config.label_smoothing) / config.batch
        engine.backward(loss)
        total += loss.detach()
    engine.step(factor, ranks.sum(total))
    return total


def _require_applied(step: int, applied: int, config: FinetuneConfig) -> None:
    if applied < step:
        raise TrainingStoppedError(
            f"of the first {step} updates {step - applied} had a loss or a gradient that is not finite, and were left "
            f"out; give a lower lr (now {config.lr:g}) or precision=fp32, and another OUT"
        )


def _measure(bench: Bench, sets: Sets, state: _State, config: FinetuneConfig) -> Result:
    """Classify the test split, and make a row of it.

    The bench scales an image's scores to length 1, as it does with features: the order of the classes stays.
    """
    parts: list[Tensor] = []
    for scores, labels in bench.images(sets.test, partial(label_of, num_classes=len(sets.names))):
        given = torch.tensor(labels, device=scores.device)[:, None]
        parts.append(torch.cat([given, nearest_classes(scores)], dim=1))
    found = in_order(torch.cat(parts), len(sets.test), bench.ranks).cpu()
    labels, nearest = found[:, 0], found[:, 1:]
    metrics = dict(zip(EVAL_METRICS["zero_shot"], accuracies(labels, nearest, len(sets.names)), strict=True))
    updates = state.step - (state.rows[-1]["step"] if state.rows else 0)
    values = {"loss": state.loss / updates, **metrics} if updates else metrics
    epochs = state.step * config.batch / len(sets.train)
    state.rows.append({"step": state.step, "epochs": epochs, **values})
    state.loss = 0.0
    if bench.ranks.is_main:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        tqdm.write(f"update {state.step}, {epochs:.2f} of {config.epochs} epochs: {shown}")
    predictions = Predictions(tuple(sets.names), tuple(labels.tolist()), tuple(nearest[:, 0].tolist()))
    return Result(config.test_split, "finetuned", metrics, len(sets.test), predictions)


# -------------------------------------------------------------------------------------------------------------- files


def _claim(out: Path, about: dict[str, Any]) -> None:
    """Make the folder, or check that it holds the same fine-tuning.

    Raises:
        DataError: It holds another one, or something else.
        RunLockedError: Another process is at it.
    """
    if (out / _ABOUT).is_file():
        changed = differences(json.loads((out / _ABOUT).read_text(encoding="utf-8")), about)
        if changed:
            what = [f"{out} holds a fine-tuning that differs from this one; choose another OUT", *lines(changed)]
            raise DataError("\n  ".join(what))
    elif out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise DataError(f"{out} holds something else than a fine-tuning; choose another OUT")
    with writing(str(out)):
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
        write_json(out / _ABOUT, about, indent=2)


def _workers(config: FinetuneConfig) -> int:
    return min(config.workers, len(os.sched_getaffinity(0)))


def _save(path: Path, engine: TorchEngine, state: _State) -> None:
    tensors = {
        f"{kind}/{piece.row.name}": values
        for piece in engine.optimizer.local_pieces()
        for kind, values in piece.tensors.items()
    }
    hidden, said = path.with_name(f".{path.name}"), json.dumps(asdict(state))
    write_tensors(hidden, tensors, {"state": said, "xxh3": _checksum(said, tensors)})
    flush(hidden)
    hidden.replace(path)
    flush(path.parent)


def _checksum(said: str, tensors: Mapping[str, Tensor]) -> str:
    found = xxhash.xxh3_64(said.encode())
    for name in sorted(tensors):
        found.update(name.encode())
        values: Any = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        found.update(values)
    return found.hexdigest()


def _load(path: Path, engine: TorchEngine) -> _State:
    """Fill weights and moments, and say where they stand.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            said, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _checksum(said["state"], tensors) != said["xxh3"]:
            raise ValueError("it differs from its checksum")
        state = _State(**json.loads(said["state"]))
        for piece in engine.optimizer.local_pieces():
            for kind, values in piece.tensors.items():
                values.copy_(tensors[f"{kind}/{piece.row.name}"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it, and all begins anew") from None
    engine.optimizer.updates.fill_(state.step)
    engine.refresh_weights()
    return state
