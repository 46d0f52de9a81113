"""What is run on one and on two ranks; the tests compare what comes back."""

from __future__ import annotations

import hashlib
import math
import shutil
import signal
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm.optim
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from tiny import SYNTHETIC
from tiny import tiny_config as wider_config

from evaclip.accumulation import forward_backward
from evaclip.checkpoint import CheckpointReader, Entry, RunState, find_checkpoint, save
from evaclip.config import RunConfig
from evaclip.data.order import choose_slots
from evaclip.data.pipeline import Stream, make_plan
from evaclip.distributed import Ranks
from evaclip.engine import create_engine
from evaclip.errors import CheckpointError, EvaclipError, TrainingStoppedError
from evaclip.history import load_history
from evaclip.loss import ContrastiveLoss, info_nce, sigmoid_loss
from evaclip.models.clip import create_model
from evaclip.optim.table import parameter_table
from evaclip.preemption import listening
from evaclip.sources import open_sources
from evaclip.train import train_on

STEPS = 20
INTERRUPTED = {"train__steps": STEPS, "checkpoint__every_steps": STEPS // 2, "data__workers": 2}
SHORT = {"train__steps": 6, "checkpoint__every_steps": 6}
ENGINES = {
    "torch": {"engine__name": "torch"},
    **{f"zero{n}": {"engine__name": "deepspeed", "engine__zero_stage": n} for n in (1, 2, 3)},
}
PRECISIONS = [("torch", "fp32"), ("torch", "bf16"), ("zero2", "bf16"), *((e, "bf16_weights") for e in ENGINES)]
CONSTANT = {"checkpoint__every_steps": 10, "schedule__warmup_steps": 0, "schedule__final_fraction": 1.0}


def tiny_config(folder: Path, source: dict[str, Any] = SYNTHETIC, **changes: Any) -> RunConfig:
    """As elsewhere with half the token embedding, which takes most of the time."""
    return wider_config(folder, source, **{"model__text__width": 16, **changes})


def losses(ranks: Ranks, folder: Path, *, source: dict[str, Any], options: dict[str, Any]) -> list[float]:
    """Train from scratch; the loss of every step."""
    options = {"train__steps": STEPS, "checkpoint__every_steps": STEPS, **options}
    train_on(ranks, tiny_config(folder, source, **options))
    return [row["train/loss"] for row in load_history(folder / "metrics.jsonl")]


def evaluated(ranks: Ranks, folder: Path, *, source: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """Results after two steps, on 25 records: the ranks' shares differ."""
    tasks = {task: {"task": task, "path": source["shards"], "limit": 25} for task in ("loss", "retrieval")}
    train_on(ranks, tiny_config(folder, source, **options, train__steps=2, eval__datasets=tasks, eval__batch=5))
    return {name: value for name, value in load_history(folder / "metrics.jsonl")[-1].items() if "eval/" in name}


def interrupted(ranks: Ranks, folder: Path, *, source: dict[str, Any], options: dict[str, Any]) -> bool:
    """Whether a run that loses its last checkpoint and is continued from the middle ends in the same weights."""
    train_on(ranks, tiny_config(folder, source, **options))
    straight = CheckpointReader(find_checkpoint(folder)).weights()
    before = load_history(folder / "metrics.jsonl") if ranks.is_main else []
    ranks.barrier()
    if ranks.is_main:
        shutil.rmtree(find_checkpoint(folder))
    ranks.barrier()
    train_on(ranks, tiny_config(folder, source, **options))
    again = CheckpointReader(find_checkpoint(folder)).weights()
    after = load_history(folder / "metrics.jsonl") if ranks.is_main else []
    same_rows = [row["train/loss"] for row in before] == [row["train/loss"] for row in after]
    return same_rows and all(torch.equal(straight[name], again[name]) for name in straight)


def continued(ranks: Ranks, folder: Path, *, source: dict[str, Any], origin: Path) -> tuple[list[float], str]:
    """Another world's run, which lost its last checkpoint, goes on here: the losses of all steps, and the log."""
    if ranks.is_main:
        shutil.copytree(origin, folder, dirs_exist_ok=True)
        shutil.rmtree(find_checkpoint(folder))
        (folder / "log.txt").unlink()
    ranks.barrier()
    train_on(ranks, tiny_config(folder, source, **INTERRUPTED))
    return [row["train/loss"] for row in load_history(folder / "metrics.jsonl")], (folder / "log.txt").read_text()


def handed_over(ranks: Ranks, folder: Path, *, source: dict[str, Any]) -> list[float]:
    """Ten steps each of ZeRO-3, torch and ZeRO-1 from one another's checkpoints."""
    for number, engine in enumerate(("zero3", "torch", "zero1"), 1):
        # a constant learning rate, because the schedule follows train.steps
        train_on(ranks, tiny_config(folder, source, **CONSTANT, **ENGINES[engine], train__steps=10 * number))
    return [row["train/loss"] for row in load_history(folder / "metrics.jsonl")]


def _rows_of(config: RunConfig) -> dict[str, Any]:
    """The parameter table's rows by name."""
    shapes = {name: tuple(p.shape) for name, p in create_model(config.model, seed=0).named_parameters()}
    return {row.name: row for row in parameter_table(shapes, config.optim, config.model, config.loss)}


def same_gradients(ranks: Ranks, folder: Path, *, options: dict[str, Any]) -> dict[str, Any]:
    """LAMB under an engine, and timm's in this process on the gradients that the engine had: how far are they apart?

    timm's runs in double: in fp32 it is 1e-4 off, because its norm of the token embedding is one sum of 1.6 M squares.
    Also how many collectives a step of the optimizer took.
    """
    config = tiny_config(folder, **options, optim__name="lamb", optim__lr=3e-2)
    clip = create_model(config.model, seed=0)
    peers = {name: p.detach().double().requires_grad_() for name, p in clip.named_parameters()}
    start = {name: p.detach().clone() for name, p in peers.items()}
    decayed = {row.name for row in _rows_of(config).values() if row.weight_decay > 0}
    groups = [
        {"params": [p for name, p in peers.items() if (name in decayed) == decays], "weight_decay": 0.05 * decays}
        for decays in (True, False)
    ]
    optim = config.optim
    peer = timm.optim.Lamb(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, max_grad_norm=None)
    loss = ContrastiveLoss(config.loss, ranks.device)
    engine = create_engine(config, clip, loss, ranks)
    names = {id(p): name for name, p in clip.named_parameters()}
    deepspeed = "engine__zero_stage" in options
    sources = open_sources(config, ranks)
    stream = Stream(config, make_plan(config, sources, 16), sources, ranks, steps=STEPS, states={})
    collectives = []
    for micro_batches, _ in stream:
        output = forward_backward(engine, loss, micro_batches, ranks)
        for parameter in clip.parameters():
            whole = safe_get_full_grad(parameter) * ranks.world_size if deepspeed else ranks.sum(parameter.grad.clone())
            peers[names[id(parameter)]].grad = whole.detach().double().view(peers[names[id(parameter)]].shape)
        with counted(engine.optimizer) as calls:
            engine.step(1.0, output.loss)
        collectives.append(len(calls))
        peer.step()
    apart, moved = torch.zeros(2, dtype=torch.float64)
    for piece in engine.optimizer.local_pieces():
        if piece.row.name in peers:
            part = slice(piece.start, piece.start + len(piece.weight))
            apart += (piece.weight - peers[piece.row.name].detach().view(-1)[part]).double().square().sum()
            moved += (peers[piece.row.name].detach() - start[piece.row.name]).view(-1)[part].double().square().sum()
    return {"apart": float((apart / moved).sqrt()), "collectives": collectives}


@contextmanager
def counted(optimizer: Any) -> Generator[list[int]]:
    """The sizes of what a step of the optimizer sends."""
    calls: list[int] = []
    step, original = optimizer.step, dist.all_reduce

    def counting(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(tensor.numel())
        return original(tensor, *arguments, **options)

    def stepping(*arguments: Any, **options: Any) -> Any:
        dist.all_reduce = counting
        try:
            return step(*arguments, **options)
        finally:
            dist.all_reduce = original

    optimizer.step = stepping
    try:
        yield calls
    finally:
        optimizer.step = step


def trained(ranks: Ranks, folder: Path, *, source: dict[str, Any], options: dict[str, Any]) -> str:
    """Train with LAMB for 20 steps; the checkpoint's path."""
    options = {"train__steps": STEPS, "checkpoint__every_steps": STEPS, "optim__name": "lamb", **options}
    train_on(ranks, tiny_config(folder, source, **options))
    return str(find_checkpoint(folder))


def loss_and_gradients(ranks: Ranks, folder: Path, *, name: str) -> dict[str, Any]:
    """A loss of 24 pairs split over the ranks."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(24, 8, generator=generator), dim=1)
    text = F.normalize(image + torch.randn(24, 8, generator=generator), dim=1)
    share = slice(ranks.rank * 24 // ranks.world_size, (ranks.rank + 1) * 24 // ranks.world_size)
    if name == "info_nce":
        output = info_nce(image[share], text[share], torch.tensor(20.0), ranks)
    else:
        output = sigmoid_loss(image[share], text[share], torch.tensor(20.0), torch.tensor(-5.0), ranks)
    return {name: value.tolist() for name, value in output._asdict().items()}


def batches(ranks: Ranks, folder: Path, *, source: dict[str, Any], workers: int) -> list[list[str]]:
    """Digests of this rank's samples, per step."""
    config = tiny_config(folder, source, data__workers=workers, data__slots=8)
    sources = open_sources(config, ranks)
    plan = make_plan(config, sources, choose_slots(16, ranks.world_size, 8))
    found = []
    for (batch,), _ in Stream(config, plan, sources, ranks, steps=12, states={}):
        text = [batch.text.ids.tolist(), batch.text.restore.tolist()]
        captions = _unpacked(*text, batch.text.cu_seqlens.tolist())
        rows = zip(batch.images, captions, batch.seeds.tolist(), strict=True)
        found.append([hashlib.sha256(i.numpy().tobytes() + repr((c, s)).encode()).hexdigest() for i, c, s in rows])
    return found


def _unpacked(ids: list[int], restore: list[int], bounds: list[int]) -> list[list[int]]:
    return [ids[bounds[place] : bounds[place + 1]] for place in restore]


def bad_step(ranks: Ranks, folder: Path, *, options: dict[str, Any]) -> dict[str, Any]:
    """One good step, then one in which the last rank's gradient is NaN: what changes?"""
    config = tiny_config(folder, **options)
    clip = create_model(config.model, seed=0)
    loss = ContrastiveLoss(config.loss, ranks.device)
    engine = create_engine(config, clip, loss, ranks)
    sources = open_sources(config, ranks)
    stream = Stream(config, make_plan(config, sources, 16), sources, ranks, steps=3, states={})
    seen = []
    for step, ((batch,), _) in enumerate(stream):
        features = engine.forward(batch, last=True)
        output = loss(features.image, features.text, ranks)
        poison = math.nan if step == 1 and ranks.rank == ranks.world_size - 1 else 1.0
        engine.backward(output.surrogate(features.image, features.text) * poison)
        engine.step(1.0, output.loss)
        pieces = engine.optimizer.local_pieces()
        state = [t.clone() for p in pieces for t in (p.weight, p.exp_avg, p.exp_avg_sq)]
        seen.append((state, int(engine.optimizer.updates), int(engine.optimizer.consecutive_skips)))
    (first, *_), (second, *_), (third, *_) = seen
    return {
        "unchanged": all(
            torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(first, second, strict=True)
        ),
        "goes_on": any(not torch.equal(a, b) for a, b in zip(second, third, strict=True))
        and all(t.isfinite().all() for t in third),
        "updates": [updates for _, updates, _ in seen],
        "skips": [skips for _, _, skips in seen],
    }


def masters(ranks: Ranks, folder: Path, *, options: dict[str, Any]) -> bool:
    """Whether this rank's masters of 16-bit weights hold every bit of the fp32 weights that the engine was given."""
    config = tiny_config(folder, **options, train__precision="bf16_weights")
    clip = create_model(config.model, seed=0)
    given = {name: p.detach().clone().view(-1) for name, p in clip.named_parameters()}
    engine = create_engine(config, clip, ContrastiveLoss(config.loss, ranks.device), ranks)
    pieces = [piece for piece in engine.optimizer.local_pieces() if piece.row.name in given]
    kept = [torch.equal(p.weight, given[p.row.name][p.start : p.start + len(p.weight)]) for p in pieces]
    return len(kept) > 1 and all(kept)


def stop_request(ranks: Ranks, folder: Path) -> list[int]:
    """What ranks hear, step by step, when rank 0 alone is signalled before step 2."""
    heard = []
    with listening(ranks) as stop:
        for step in range(6):
            if step == 2 and ranks.is_main:
                signal.raise_signal(signal.SIGTERM)
            heard.append(stop.agreed())
        stop.finish()
    return heard


def terminated(ranks: Ranks, folder: Path) -> list[str]:
    """A whole run of which the last rank gets SIGTERM in its third step, and the same command once more."""
    config = tiny_config(folder, train__steps=8, checkpoint__every_steps=100)
    messages = []
    if ranks.rank == ranks.world_size - 1:
        original = ContrastiveLoss.forward
        calls = iter(range(100))

        def forward(self: ContrastiveLoss, *arguments: Any) -> Any:
            if next(calls) == 2:
                signal.raise_signal(signal.SIGTERM)
            return original(self, *arguments)

        ContrastiveLoss.forward = forward
    try:
        train_on(ranks, config)
    except TrainingStoppedError as error:
        messages.append(str(error))
    if ranks.rank == ranks.world_size - 1:
        ContrastiveLoss.forward = original
    ranks.barrier()
    train_on(ranks, config)
    return [*messages, find_checkpoint(folder).name, (folder / "log.txt").read_text()]


def failed_write(ranks: Ranks, folder: Path) -> list[str]:
    """The last rank cannot write its part: every rank is told, nothing is left, the older checkpoint stays."""
    config = tiny_config(folder)
    progress = RunState(1, 16, 1, 1.0, 16, {}, {}, {"a": [4]}, {}, {}, {})
    entries = [Entry("weight", "a", 0, torch.zeros(4))] if ranks.is_main else []
    save(folder, config, progress, entries, ranks)
    broken = [Entry("weight", "a", 0, _Unwritable())] if ranks.rank == ranks.world_size - 1 else []
    try:
        save(folder, config, RunState(**{**progress.__dict__, "step": 2}), broken, ranks)
    except CheckpointError as error:
        ranks.barrier()
        return [str(error), *sorted(path.name for path in folder.iterdir())]
    return ["no error"]


class _Unwritable:
    """Stands for a tensor that no longer fits on the disk."""

    def detach(self) -> _Unwritable:
        return self

    def to(self, *_arguments: Any, **_options: Any) -> Any:
        raise OSError(28, "No space left on device")


def missing_shard(ranks: Ranks, folder: Path, *, shards: str) -> str:
    """A damaged shard that only one rank looks at stops all of them."""
    try:
        open_sources(tiny_config(folder, {"shards": shards}), ranks)
    except EvaclipError as error:
        return str(error)
    return "no error"


def all_cases(source: dict[str, Any], damaged: str, ranks_of_case: int) -> dict[str, Any]:
    """Cases by name, for one rank or for two; what takes long and is no other on one rank runs on two."""
    several = ranks_of_case > 1
    cases: dict[str, Any] = {
        f"losses_{engine}_{workers}": partial(losses, source=source, options={**options, "data__workers": workers})
        for engine, options in ENGINES.items()
        for workers in ((0, 2) if engine == "torch" else (0,))
    }
    for engine, precision in PRECISIONS:
        options = {**ENGINES[engine], **SHORT, "optim__lr": 1e-4, "train__precision": precision}
        cases[f"losses_{engine}_{precision}"] = partial(losses, source=source, options=options)
    for engine in ("torch", "zero3") if several else ("torch",):
        cases[f"evaluated_{engine}"] = partial(evaluated, source=source, options=ENGINES[engine])
    for engine, options in ENGINES.items():
        if several or engine in ("torch", "zero3"):
            chosen = {**options, **(INTERRUPTED if engine == "torch" else {**SHORT, "checkpoint__every_steps": 3})}
            cases[f"interrupted_{engine}"] = partial(interrupted, source=source, options=chosen)
            trained_options = {**options, "train__micro_batch": 16 // ranks_of_case // 4}
            cases[f"trained_{engine}_4"] = partial(trained, source=source, options=trained_options)
        cases[f"masters_{engine}"] = partial(masters, options=options)
        cases[f"bad_step_{engine}"] = partial(bad_step, options=options)
    for workers in (0, 3):
        cases[f"batches_{workers}"] = partial(batches, source=source, workers=workers)
    if several:
        cases["handed_over"] = partial(handed_over, source=source)
        for engine, options in ENGINES.items():
            cases[f"same_gradients_{engine}"] = partial(same_gradients, options=options)
        for engine in ("torch", "zero3"):  # one makes its own check for overflow, the other does not
            fp16 = {**ENGINES[engine], "train__precision": "fp16", "optim__name": "lamb"}
            cases[f"fp16_{engine}"] = partial(losses, source=source, options=fp16)
    else:
        cases["losses_constant"] = partial(losses, source=source, options={**CONSTANT, "train__steps": 30})
        cases["trained_torch_1"] = partial(trained, source=source, options={})
    for name in ("info_nce", "sigmoid"):
        cases[f"loss_{name}"] = partial(loss_and_gradients, name=name)
    cases["stop_request"] = stop_request
    cases["terminated"] = terminated
    cases["failed_write"] = failed_write
    cases["damaged_shard"] = partial(missing_shard, shards=damaged)
    return cases
