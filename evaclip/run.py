"""Opening a run: from a configuration to something that can take its next step, fresh or continued.

Order of text is order of execution: directory, checkpoint, data, towers, engine, state. What a run is made of is a
plain object; ``train`` holds the loop that moves it.
"""

from __future__ import annotations

import logging
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import evaclip
from evaclip import changes, checkpoint
from evaclip.accumulation import adds_up_in_16_bits, num_micro_batches
from evaclip.checkpoint_writer import CheckpointWriter
from evaclip.config import ImageTowerConfig
from evaclip.config.tokenizer_file import TOKENIZER, read_tokenizer
from evaclip.config_file import dump
from evaclip.data.order import Plan, SlotState, choose_slots
from evaclip.data.pipeline import Stream, make_plan
from evaclip.data.readers import OpenedSource
from evaclip.distributed import Ranks, agreed
from evaclip.engine import create_engine
from evaclip.errors import CheckpointError, ConfigError, DataError, writing
from evaclip.files import replacing, write_text
from evaclip.freezing import FrozenPiece, freeze
from evaclip.lock import lock
from evaclip.logs import log_setup
from evaclip.loss import ContrastiveLoss
from evaclip.models.attention import kernel_name
from evaclip.models.clip import CLIP
from evaclip.optim.table import summary
from evaclip.sources import open_sources
from evaclip.starting_weights import StartingWeights, require_files
from evaclip.trial import largest_that_fits, try_a_step
from evaclip.wandb_id import require_own_folder

if TYPE_CHECKING:
    from evaclip.config import RunConfig
    from evaclip.data.batch import Place
    from evaclip.data.pipeline import BadRecord
    from evaclip.engine.protocol import Engine

log = logging.getLogger(__name__)

_TOKEN_MULTIPLE = 1024  # packed captions are padded to this on GPUs, so that compiled shapes repeat


@dataclass
class Run:
    """A run between two steps."""

    config: RunConfig
    ranks: Ranks
    plan: Plan
    sources: Mapping[str, OpenedSource]
    shapes: dict[str, list[int]]
    """Parameter -> whole shape; ZeRO-3 leaves only slices in the modules."""
    loss: ContrastiveLoss
    engine: Engine
    frozen: list[FrozenPiece]
    """This rank's share of the weights that do not learn."""
    num_micro_batches: int
    """Forwards that a rank needs for its share of a global batch."""
    writer: CheckpointWriter
    step: int = 0
    """Attempted updates."""
    slot_states: dict[int, SlotState] | None = None
    """Of this rank's slots; None before the first step."""
    skipped: list[BadRecord] = field(default_factory=list)
    """Records that this rank's slots had to replace since the last row."""
    meter_state: Mapping[str, tuple[float, int]] | None = None
    """Sums of metrics since the last row, of the checkpoint that the run continues; None where it does not."""

    @property
    def directory(self) -> Path:
        """Where everything about the run is written."""
        return Path(self.config.run_dir)

    @property
    def samples(self) -> int:
        """Samples taken by all attempted updates."""
        return self.step * self.config.train.global_batch

    def stream(self) -> Stream:
        """Batches from here to the last step."""
        gpu_compiled = self.config.train.compile and self.ranks.device.type == "cuda"
        return Stream(
            self.config,
            self.plan,
            self.sources,
            self.ranks,
            steps=self.config.train.steps - self.step,
            states=self.slot_states or {},
            micro_batches=self.num_micro_batches,
            token_multiple=_TOKEN_MULTIPLE if gpu_compiled else 1,
        )

    def record_names(self, places: Sequence[Place]) -> list[str]:
        """Source, shard and key of samples; numbers instead where a shard can no longer be opened."""
        names: list[str] = []
        for place in places:
            source = self.plan.sources[place.source].name
            try:
                names.append(f"{source} {self.sources[source].reader.record_name(place.shard, place.record)}")
            except (DataError, OSError):
                names.append(f"{source} shard {place.shard} record {place.record}")
        return names

    def save(self, metrics: Mapping[str, float], meter_state: Mapping[str, tuple[float, int]], *, final: bool) -> None:
        """Start to write a checkpoint of this step; wait for it if it is the final one."""
        gathered = self.ranks.gather_objects(self.slot_states or {})
        optimizer = self.engine.optimizer
        state = checkpoint.RunState(
            step=self.step,
            samples=self.samples,
            updates=int(optimizer.updates),
            grad_scale=float(optimizer.grad_scale),
            slots=self.plan.slots,
            slot_states={slot: state for states in gathered for slot, state in states.items()},
            digests={name: source.digest for name, source in self.sources.items()},
            shapes=self.shapes,
            metrics=dict(metrics),
            meter=dict(meter_state),
            versions=self.versions,
            consecutive_skips=int(optimizer.consecutive_skips),
        )
        entries: list[checkpoint.Entry] = []
        for piece in optimizer.pieces():
            entries += [checkpoint.Entry(kind, piece.row.name, piece.start, t) for kind, t in piece.tensors.items()]
        entries += [checkpoint.Entry("weight", *piece) for piece in self.frozen]
        self.writer.save(state, entries, final=final)

    @cached_property
    def versions(self) -> dict[str, str]:
        """What runs here: this code, what it stands on, and how many ranks."""
        return {
            "evaclip": _commit(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "ranks": str(self.ranks.world_size),
        }


def open_run(config: RunConfig, ranks: Ranks) -> Run:
    """Start a run, or continue the one in ``run_dir`` from its newest intact checkpoint.

    Raises:
        ConfigError: The configuration does not fit the ranks, or is that of another run.
        DataError: The sources cannot be used.
        CheckpointError: The checkpoint does not fit the data or the model.
    """
    pieces = num_micro_batches(config.train, ranks.world_size)
    _require_exact_accumulation(config, ranks, pieces)
    _make_directory(config, ranks)
    reader = _find_state(config, ranks)
    if not reader:
        require_files(config.init, ranks)
    changed = changes.refuse_changes(reader.config, config, reader.path, slots=reader.state.slots) if reader else {}
    config = _keep_tokenizer(config, ranks)
    sources = open_sources(config, ranks)
    if reader:
        _require_same_data(reader, sources)
    slots = choose_slots(
        config.train.global_batch, ranks.world_size, reader.state.slots if reader else config.data.slots
    )
    plan = make_plan(config, sources, slots)

    with torch.device("meta"):
        clip = CLIP(config.model)
    freeze(clip, config.optim)
    loss = ContrastiveLoss(config.loss, ranks.device)
    shapes = {name: list(p.shape) for name, p in chain(clip.named_parameters(), loss.named_parameters())}
    weights = StartingWeights(config, clip, loss, reader, ranks)
    engine = create_engine(config, clip, loss, ranks, weights.fill)
    weights.require_set()
    if config.train.micro_batch == "auto":
        largest = largest_that_fits(engine, loss, config, ranks)
        pieces = -(-(config.train.global_batch // ranks.world_size) // largest)
        _require_exact_accumulation(config, ranks, pieces)
    elif not reader:  # where a run is continued, it has shown that it can
        try_a_step(engine, loss, config, pieces, ranks)
    writer = CheckpointWriter(Path(config.run_dir) / "checkpoints", config, ranks)
    run = Run(config, ranks, plan, sources, shapes, loss, engine, weights.frozen, pieces, writer)
    if reader:
        _load_state(reader, run)
    with agreed(ranks), writing(f"run_dir {run.directory}"):
        if ranks.is_main:
            write_text(run.directory / "config.yaml", dump(config))
            _announce(run, reader)
            if reader:
                _record_changes(run, reader, changed)
    return run


def _require_exact_accumulation(config: RunConfig, ranks: Ranks, pieces: int) -> None:
    """Refuse to add up micro-batches in 16 bits: the gradient would depend on their number."""
    if adds_up_in_16_bits(config, pieces):
        larger = "" if config.train.micro_batch == "auto" else " or a larger micro_batch"
        raise ConfigError(
            f"train.micro_batch {config.train.micro_batch} on {ranks.world_size} ranks makes {pieces} micro-batches, "
            f"whose gradients ZeRO-1 adds up in 16 bits under train.precision bf16_weights; "
            f"use engine.zero_stage=2, train.precision=bf16{larger}"
        )


def _make_directory(config: RunConfig, ranks: Ranks) -> None:
    """Create the run directory and send the log there."""
    directory = Path(config.run_dir)
    log_setup(None, ranks.rank)
    with agreed(ranks), writing(f"run_dir {directory}"):
        if ranks.is_main:
            (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock(directory)
            require_own_folder(directory)
            log_setup(directory, ranks.rank)
            if ranks.world_size > 1:
                (directory / "logs").mkdir(exist_ok=True)
    if not ranks.is_main:
        log_setup(directory, ranks.rank)
        log.info("rank %d is process %d on %s, %s", ranks.rank, os.getpid(), platform.node(), ranks.device)


def _keep_tokenizer(config: RunConfig, ranks: Ranks) -> RunConfig:
    """Copy the tokenizer's file into the run directory, and go on with the copy: the original may go or change.

    Raises:
        ConfigError: The file is gone, or has changed since the configuration was read.
    """
    text, own = config.model.text, Path(config.run_dir) / TOKENIZER
    if text.tokenizer is None:
        return config
    with agreed(ranks), writing(f"run_dir {own.parent}"):
        if ranks.is_main:
            file = read_tokenizer(text.tokenizer, text.tokenizer_digest, text.vocab_size)
            if not own.exists() or own.read_bytes() != file.content:
                with replacing(own) as copy:
                    copy.write(file.content)
            log.info("tokenizer %s: %d ids, %s ends a text", text.tokenizer, file.vocab_size, file.after[-1].name)
    return config.model_copy(update={"model": config.model.with_tokenizer(own)})


def _find_state(config: RunConfig, ranks: Ranks) -> checkpoint.CheckpointReader | None:
    """The newest intact checkpoint of the run directory; rank 0 looks, all ranks use the same."""
    found: tuple[Path | None, list[str]] = (None, [])
    folder = Path(config.run_dir) / "checkpoints"
    with agreed(ranks), writing(f"run_dir {folder}"):
        if ranks.is_main:
            found = checkpoint.set_aside(folder)
    path, damaged = ranks.from_main(found)
    if damaged and path is None:
        raise CheckpointError(f"no checkpoint of {config.run_dir} is intact: {'; '.join(damaged)}; use a new run_dir")
    for text in damaged:
        log.warning("damaged checkpoint set aside: %s", text)
    return checkpoint.CheckpointReader(path) if path else None


def _require_same_data(reader: checkpoint.CheckpointReader, sources: Mapping[str, OpenedSource]) -> None:
    for name, source in sources.items():
        saved = reader.state.digests.get(name)
        if saved != source.digest:
            raise CheckpointError(
                f"source {name} holds other records, or its filter other keys, than when {reader.path} was written "
                f"(digest {source.digest}, saved {saved}); restore the shards and lists of keys, or the indexes by "
                f"tools/index_shards.py --rebuild, or use a new run_dir"
            )


def _load_state(reader: checkpoint.CheckpointReader, run: Run) -> None:
    """Fill masters and moments, whatever their layout, and take up where the run stood."""
    optimizer = run.engine.optimizer
    for piece in optimizer.local_pieces():
        for kind, values in piece.tensors.items():
            saved = "weight" if kind == "ema" and not reader.has_ema else kind  # an average that begins here
            reader.fill(checkpoint.Entry(saved, piece.row.name, piece.start, values))
    run.engine.refresh_weights()
    state = reader.state
    optimizer.updates.fill_(state.updates)
    optimizer.consecutive_skips.fill_(state.consecutive_skips)
    if reader.config.train.precision == run.config.train.precision:  # a loss scale belongs to its precision
        optimizer.grad_scale.fill_(state.grad_scale)
    run.step = state.step
    run.meter_state = state.meter
    run.slot_states = {slot: SlotState.parse(state) for slot, state in state.slot_states.items()}


def _announce(run: Run, reader: checkpoint.CheckpointReader | None) -> None:
    """Tell the log what is about to run."""
    config, ranks = run.config, run.ranks
    worlds = [w for w in range(1, run.plan.slots + 1) if run.plan.slots % w == 0]
    log.info(
        "evaclip %s, torch %s, %d ranks on %s",
        run.versions["evaclip"],
        torch.__version__,
        ranks.world_size,
        ranks.device,
    )
    for source in run.plan.sources:
        layout = source.layout
        log.info(
            "source %s: %d records in %d shards, blocks of %d",
            source.name,
            layout.num_records,
            len(layout.shard_records),
            layout.block_records,
        )
    share = config.train.global_batch // ranks.world_size
    log.info("each rank takes its %d samples of a step in %d micro-batches", share, run.num_micro_batches)
    log.info("%d slots; the run can continue on %s ranks", run.plan.slots, ", ".join(map(str, worlds)))
    per_rank = run.plan.slots // ranks.world_size
    if per_rank < config.data.workers:
        log.warning(
            "data.workers %d, but a rank has %d of the %d slots, and a worker without one does nothing; lower it, or "
            "give a new run more data.slots",
            config.data.workers,
            per_rank,
            run.plan.slots,
        )
    if config.train.overfit_one_batch:
        log.warning(
            "train.overfit_one_batch: every step takes the %d samples of step 1, same crops and dropped patches; "
            "samples and speed count them each time, data/delivered and data/passes once",
            config.train.global_batch,
        )
    log.info("image tower %s", run.engine.towers.clip.image.description)
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    text, own = config.model.text, isinstance(config.model.image, ImageTowerConfig)
    kernels = kernel_name(ranks.device, dtype, text.width // text.heads, own_images=own)
    log.info("attention: %s; precision %s; engine %s", kernels, config.train.precision, config.engine.name)
    rows = run.engine.optimizer.rows
    learning = {row.name for row in rows}
    for line in summary(rows, {name: shape for name, shape in run.shapes.items() if name not in learning}):
        log.info("optimizer: %s", line)
    log.info("continuing %s at step %d" if reader else "starting %s at step %d", run.directory, run.step)


def _record_changes(run: Run, reader: checkpoint.CheckpointReader, changed: changes.Changes) -> None:
    """Tell the log and the run's history what is not as it was when the checkpoint was written."""
    for line in changes.lines(changed):
        log.info("changed since then: %s", line)
    rates = changes.changed_rates(reader.config, run.config, run.step)
    if rates:
        log.info(
            "learning rates of the next step: %s",
            ", ".join(f"{name} {old:.4g} -> {new:.4g}" for name, (old, new) in rates.items()),
        )
    versions = changes.differences(reader.state.versions, run.versions)
    if changed or versions:
        changes.record(run.directory, run.step, changed, versions)


def _commit() -> str:
    """Version and, in a checkout, commit of this code."""
    root = Path(evaclip.__file__).parents[1]
    if (root / "commit.txt").exists():  # a job's own copy of the code
        return f"{evaclip.__version__}+{(root / 'commit.txt').read_text(encoding='utf-8').strip()}"
    if not (root / ".git").exists():  # installed, perhaps into somebody else's checkout
        return evaclip.__version__
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        described = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return evaclip.__version__
    return f"{evaclip.__version__}+{described}"
