"""What is run on one and on two ranks; the tests compare what comes back."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import resource
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
from exactness.peer_losses import bytes_sent
from tiny import SYNTHETIC
from tiny import tiny_config as wider_config

from evaclip import checkpoint_writer
from evaclip import loss as loss_module
from evaclip.accumulation import forward_backward
from evaclip.anomalies import Anomalies
from evaclip.checkpoint import CheckpointReader, Entry, RunState, find_checkpoint
from evaclip.checkpoint_writer import CheckpointWriter
from evaclip.config import RunConfig
from evaclip.data.batch import Batch
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
from evaclip.run import open_run
from evaclip.sources import open_sources
from evaclip.train import train_on
from evaclip.trial import trial_step

STEPS = 20
INTERRUPTED = {"train__steps": STEPS, "checkpoint__every_steps": STEPS // 2, "data__workers": 2}
SHORT = {"train__steps": 6, "checkpoint__every_steps": 6}
ENGINES = {
    "torch": {},
    **{f"zero{n}": {"engine__name": "deepspeed", "engine__zero_stage": n} for n in (1, 2, 3)},
}
PRECISIONS = [("torch", "fp32"), ("torch", "bf16"), ("zero2", "bf16"), *((e, "bf16_weights") for e in ENGINES)]
CONSTANT = {"checkpoint__every_steps": 10, "schedule__warmup_steps": 0, "schedule__final_fraction": 1.0}


OFFLOADED = {
    f"{name}_offload": {**ENGINES[name], "engine__offload_optimizer": True} for name in ("zero1", "zero2", "zero3")
}
BAD_STEPS = {
    1: (("torch", "fp32"),),
    2: (
        *((name, "fp32") for name in (*ENGINES, "zero3_offload")),
        *(("torch", "fp16"), ("zero1", "bf16"), ("zero2_offload", "bf16_weights"), ("zero3", "fp16")),
    ),
    4: (("zero2", "fp32"),),
}
"""Here and below: what the default suite runs by number of ranks; ``make exactness`` runs everything."""
SAME_GRADIENTS = {2: ("torch", "zero1", "zero2_offload", "zero3"), 4: ("zero2",)}
ACCUMULATED = {1: ("torch",), 2: ("zero1", "zero3"), 4: ("zero2",)}
TRAINED = {1: ("torch",), 2: ("torch", "zero2", "zero3"), 4: ()}


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
    """An optimizer under an engine, and the peer's in this process on the gradients that the engine had: how far apart?

    LAMB's peer is timm's, AdamW's torch's, both in double: in fp32 timm's is 1e-4 off, because its norm of the token
    embedding is one sum of 1.6 M squares. Also how many collectives a step of the optimizer took.
    """
    config = tiny_config(folder, **{"optim__name": "lamb", **options}, optim__lr=3e-2)
    clip = create_model(config.model, seed=0)
    peers = {name: p.detach().double().requires_grad_() for name, p in clip.named_parameters()}
    start = {name: p.detach().clone() for name, p in peers.items()}
    decayed = {row.name for row in _rows_of(config).values() if row.weight_decay > 0}
    groups = [
        {"params": [p for name, p in peers.items() if (name in decayed) == decays], "weight_decay": 0.05 * decays}
        for decays in (True, False)
    ]
    optim = config.optim
    if optim.name == "lamb":
        peer = timm.optim.Lamb(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, max_grad_norm=None)
    else:
        peer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    loss = ContrastiveLoss(config.loss, ranks.device)
    names = {id(p): name for name, p in clip.named_parameters()}
    engine = create_engine(config, clip, loss, ranks)
    engine.optimizer.grad_scale.clamp_(max=1024.0)  # the tiny towers overflow at what fp16 starts with
    sources = open_sources(config, ranks)
    stream = Stream(config, make_plan(config, sources, 16), sources, ranks, steps=STEPS, states={})
    collectives = []
    for micro_batches, *_ in stream:
        output = forward_backward(engine, loss, micro_batches, ranks)
        for parameter, master in zip(clip.parameters(), masters_of(engine, clip), strict=True):
            peer_parameter = peers[names[id(parameter)]]
            grad = engine_gradient(master, ranks, options).double() / engine.optimizer.grad_scale
            peer_parameter.grad = grad.view(peer_parameter.shape)
        with counted(engine.optimizer) as calls:
            engine.step(1.0, output.loss)
        collectives.append(len(calls))
        peer.step()
    sums = torch.zeros(2, dtype=torch.float64)  # squared: apart, moved
    for piece in engine.optimizer.local_pieces():
        if piece.row.name in peers:
            part = slice(piece.start, piece.start + len(piece.weight))
            sums[0] += (piece.weight - peers[piece.row.name].detach().view(-1)[part]).double().square().sum()
            sums[1] += (peers[piece.row.name].detach() - start[piece.row.name]).view(-1)[part].double().square().sum()
    apart, moved = ranks.sum(sums)
    applied = int(engine.optimizer.updates)
    return {"apart": float((apart / moved).sqrt()), "collectives": collectives, "applied": applied}


def masters_of(engine: Any, clip: Any) -> list[torch.Tensor]:
    """What holds the gradients: the parameters, or the torch engine's masters of 16-bit ones."""
    return getattr(engine, "_masters", None) or list(clip.parameters())


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
    """Train with LAMB for 20 steps; the last checkpoint's path, beside that of half the steps."""
    options = {"train__steps": STEPS, "checkpoint__every_steps": STEPS // 2, "optim__name": "lamb", **options}
    train_on(ranks, tiny_config(folder, source, **options))
    return str(find_checkpoint(folder))


def loss_pairs(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """24 pairs of unit vectors, of which some are near one another at a scale of 20 and all but one far at 100."""
    generator = torch.Generator().manual_seed(int(scale))
    image = F.normalize(torch.randn(24, 8, generator=generator), dim=1)
    return image, F.normalize(image + torch.randn(24, 8, generator=generator), dim=1)


def loss_and_gradients(ranks: Ranks, folder: Path, *, name: str, scale: float) -> dict[str, Any]:
    """A loss of 24 pairs split over the ranks, in tiles of 5 x 5, which divide no rank's share."""
    image, text = loss_pairs(scale)
    share = slice(ranks.rank * 24 // ranks.world_size, (ranks.rank + 1) * 24 // ranks.world_size)
    numbers, loss_module._TILE_NUMBERS["cpu"] = loss_module._TILE_NUMBERS["cpu"], 5 * 5
    if name == "info_nce":
        output = info_nce(image[share], text[share], torch.tensor(scale), ranks)
    else:
        output = sigmoid_loss(image[share], text[share], torch.tensor(scale), torch.tensor(-5.0), ranks)
    loss_module._TILE_NUMBERS["cpu"] = numbers
    return {name: value.tolist() for name, value in output._asdict().items()}


PIECES = (1, 2, 4, 8, 16)
RANDOM = {"model__image__token_drop": 0.5, "model__image__drop_path": 0.3, "train__global_batch": 64}


def accumulated(ranks: Ranks, folder: Path, *, options: dict[str, Any]) -> dict[int, tuple[float, str]]:
    """Gradients of a global batch in k micro-batches per rank: the largest distance of a tensor from fp64, and whose.

    Relative to the norm of the gradient of all parameters; fp64 takes the whole batch at once in this process.
    """
    config = tiny_config(folder, **RANDOM, **options)
    clip = create_model(config.model, seed=0)
    exact = {name: p.detach().double() for name, p in clip.named_parameters()}
    loss = ContrastiveLoss(config.loss, ranks.device)
    names = {id(p): name for name, p in clip.named_parameters()}
    engine = create_engine(config, clip, loss, ranks)
    engine.optimizer.grad_scale.fill_(1.0)
    sources = open_sources(config, ranks)
    plan = make_plan(config, sources, 64)

    def micro_batches(ranks: Ranks, number: int) -> list[Batch]:
        return next(iter(Stream(config, plan, sources, ranks, steps=1, states={}, micro_batches=number)))[0]

    reference = exact_gradients(config, exact, micro_batches(Ranks(), 1)[0])
    total = math.sqrt(sum(float(grad.square().sum()) for grad in reference.values()))
    scalars = dict(loss.named_parameters())
    found = {}
    for pieces in [k for k in PIECES if k * ranks.world_size <= 64]:
        forward_backward(engine, loss, micro_batches(ranks, pieces), ranks)
        distances = []
        for parameter, master in zip(clip.parameters(), masters_of(engine, clip), strict=True):
            name = names[id(parameter)]
            grad = engine_gradient(master, ranks, options).double().view(reference[name].shape)
            distances.append((float((grad - reference[name]).norm()) / total, name))
        for name, scalar in scalars.items():  # whole on every rank
            distances.append((float((scalar.grad - reference[name]).norm()) / total, name))
        found[pieces] = max(distances)
        engine.step(0.0, torch.tensor(math.nan))  # throws the gradient away
    return found


def exact_gradients(config: RunConfig, weights: dict[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
    """Gradients of a batch by plain autograd of the naive loss in fp64."""
    clip = create_model(config.model, seed=0).double()
    clip.load_state_dict(weights)
    features = clip(batch.images, batch.text, batch.seeds)
    scalars = {"logit_scale": torch.tensor(config.loss.logit_scale, dtype=torch.float64).log().requires_grad_()}
    if config.loss.name == "sigmoid":
        scalars["logit_bias"] = torch.tensor(config.loss.logit_bias, dtype=torch.float64, requires_grad=True)
        logits = scalars["logit_scale"].exp() * features.image @ features.text.T + scalars["logit_bias"]
        value = -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).sum() / len(logits)
    else:
        logits = scalars["logit_scale"].exp() * features.image @ features.text.T
        labels = torch.arange(len(logits))
        value = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    names, parameters = zip(*clip.named_parameters(), *scalars.items(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))


def engine_gradient(parameter: torch.Tensor, ranks: Ranks, options: dict[str, Any]) -> torch.Tensor:
    """The whole gradient of a parameter, added up over ranks, before an engine's step."""
    if "engine__name" in options:
        return safe_get_full_grad(parameter).detach() * ranks.world_size  # DeepSpeed averages
    return ranks.sum(parameter.grad.clone())


def batches(ranks: Ranks, folder: Path, *, source: dict[str, Any], workers: int) -> list[list[str]]:
    """Digests of this rank's samples, per step."""
    config = tiny_config(folder, source, data__workers=workers, data__slots=8)
    sources = open_sources(config, ranks)
    plan = make_plan(config, sources, choose_slots(16, ranks.world_size, 8))
    found = []
    for (batch,), *_ in Stream(config, plan, sources, ranks, steps=12, states={}):
        text = [batch.text.ids.tolist(), batch.text.restore.tolist()]
        captions = _unpacked(*text, batch.text.cu_seqlens.tolist())
        rows = zip(batch.images, captions, batch.seeds.tolist(), strict=True)
        found.append([hashlib.sha256(i.numpy().tobytes() + repr((c, s)).encode()).hexdigest() for i, c, s in rows])
    return found


def _unpacked(ids: list[int], restore: list[int], bounds: list[int]) -> list[list[int]]:
    return [ids[bounds[place] : bounds[place + 1]] for place in restore]


def trial(ranks: Ranks, folder: Path, *, options: dict[str, Any]) -> list[bool]:
    """A step, a trial, a step: does the trial leave everything as it was, and are both steps applied?"""
    config = tiny_config(folder, **options, optim__name="lamb")
    run = open_run(config, ranks)
    optimizer = run.engine.optimizer
    optimizer.grad_scale.clamp_(max=1024.0)
    ((batches, *_), *_) = run.stream()

    def step() -> None:
        run.engine.step(1.0, forward_backward(run.engine, run.loss, batches, ranks).loss)

    def state() -> list[torch.Tensor]:
        return [t.clone() for t in (optimizer.updates, optimizer.consecutive_skips, optimizer.grad_scale)]

    step()
    before = [*_bits(optimizer), *state()]
    peak = trial_step(run.engine, run.loss, config.model, 3, ranks)
    after = [*_bits(optimizer), *state()]
    step()
    same = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    return [peak > 0, same, int(optimizer.updates) == 2]


TRIALS = (("torch", "fp16"), ("zero2", "bf16_weights"), ("zero3", "fp16"))
POISONS = ("gradient", "loss", "image", "parameter")


def bad_steps(ranks: Ranks, folder: Path, *, options: dict[str, Any]) -> dict[str, Any]:
    """A good step, one with each poison on the last rank, a good one: what changes, and who is blamed?"""
    config = tiny_config(folder, **options)
    ranks = _Untrustworthy(ranks.rank, ranks.world_size)
    bad_rank = ranks.rank == ranks.world_size - 1
    loss = ContrastiveLoss(config.loss, ranks.device)
    engine = create_engine(config, create_model(config.model, seed=0), loss, ranks)
    optimizer = engine.optimizer
    if config.train.precision == "fp16":
        optimizer.grad_scale.fill_(1024.0)  # the tiny towers overflow at the one that it starts with
    anomalies = Anomalies(engine.towers.clip, optimizer)
    sources = open_sources(config, ranks)
    stream = Stream(config, make_plan(config, sources, 16), sources, ranks, steps=6, states={}, micro_batches=2)
    found: dict[str, Any] = {}
    for number, (poison, (batches, *_)) in enumerate(zip(("", *POISONS, "again"), stream, strict=True)):
        target = torch.zeros(1)  # on the last rank a weight of a block
        if bad_rank:
            target = next(piece for piece in optimizer.local_pieces() if "blocks" in piece.row.name).weight[:1]
        kept = target.clone()
        if poison == "image" and bad_rank:
            image = (batches[1].images.float() / 255).index_fill_(0, torch.tensor(len(batches[1].images) - 1), math.nan)
            batches[1] = dataclasses.replace(batches[1], images=image)
        if poison == "parameter":
            if bad_rank:
                target.fill_(math.nan)
            engine.refresh_weights()
        before = _bits(optimizer)
        with torch.no_grad():
            cached = [engine.forward(batch, last=False) for batch in batches]
        ranks.lies = poison == "loss" and bad_rank
        output = loss(torch.cat([f.image for f in cached]), torch.cat([f.text for f in cached]), ranks)
        ranks.lies = False
        for place, batch in enumerate(batches):
            features = engine.forward(batch, last=place == 1)
            rows = slice(place * len(batch.images), (place + 1) * len(batch.images))
            factor = math.nan if poison == "gradient" and bad_rank and place == 1 else 1.0
            engine.backward(output.surrogate(features.image, features.text, rows) * factor)
        engine.step(1.0, output.loss)
        anomalies.step(number, batches, output)
        after = _bits(optimizer)
        blamed = anomalies.skipped_steps(ranks)
        shares = ranks.gather_objects([list(batch.places) for batch in batches])
        last = shares[-1][1]
        seen = shares if "engine__name" in options else shares[-1:]  # under torch, others have a good copy
        everywhere = [place for share in seen for places in share for place in places]
        expected = {"image": last[-1:], "gradient": last, "loss": []}.get(poison, everywhere)
        found[poison or "good"] = {
            "unchanged": all(torch.equal(one, other) for one, other in zip(before, after, strict=True)),
            "blamed": [step.cause for step in blamed],
            "named": all(sorted(step.places) == sorted(expected) for step in blamed),
            "updates": int(optimizer.updates),
        }
        if poison == "parameter":
            target.copy_(kept)
            engine.refresh_weights()
    return found


class _Untrustworthy(Ranks):
    """Ranks of which one can be told to add NaN to the sum of the loss."""

    lies = False

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.lies and tensor.numel() == 4:
            tensor[0] = math.nan
        return super().sum(tensor)


def _bits(optimizer: Any) -> list[torch.Tensor]:
    """Weights and moments of this rank as integers."""
    pieces = list(optimizer.local_pieces())
    return [t.clone().view(torch.int32) for p in pieces for t in p.tensors.values()]


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
            if next(calls) == 1 + 2:  # after the trial
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
    """The last rank cannot write its part, then nothing at all: every rank is told, only the older one is left."""
    checkpoint_writer._RETRY_SECONDS = checkpoint_writer._WAITED_FOR_SECONDS = (0.1,)
    writer = CheckpointWriter(folder, tiny_config(folder), ranks)
    progress = RunState(1, 16, 1, 1.0, 16, {}, {}, {"a": [4096]}, {}, {}, {})
    entries = [Entry("weight", "a", 0, torch.zeros(4096))] if ranks.rank == ranks.world_size - 1 else []
    writer.save(progress, entries, final=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if entries:  # as on a disk that is full for this rank
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        writer.save(dataclasses.replace(progress, step=2), entries, final=False)  # training goes on
        if entries:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        writer.save(dataclasses.replace(progress, step=3), entries, final=True)
    except CheckpointError as error:
        ranks.barrier()
        return [str(error), *sorted(path.name for path in folder.iterdir())]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ["no error"]


def unusable_shard(ranks: Ranks, folder: Path, *, shards: str) -> str:
    """A shard that only one rank looks at and cannot use stops all of them."""
    try:
        open_sources(tiny_config(folder, {"shards": shards}), ranks)
    except EvaclipError as error:
        return str(error)
    return "no error"


def all_cases(source: dict[str, Any], unusable: str, world: int) -> dict[str, Any]:
    """Cases by name for a number of ranks: what takes long runs on two, what depends on how shares are cut on four."""
    cases: dict[str, Any] = {}
    for name in ("info_nce", "sigmoid"):
        for scale in (20.0, 100.0):
            cases[f"loss_{name}_{scale:g}"] = partial(loss_and_gradients, name=name, scale=scale)
    for engine in ACCUMULATED[world]:
        cases[f"accumulated_{engine}"] = partial(accumulated, options=ENGINES[engine])
    for engine in SAME_GRADIENTS.get(world, ()):
        cases[f"same_gradients_{engine}"] = partial(same_gradients, options=(ENGINES | OFFLOADED)[engine])
    for engine in TRAINED[world]:
        options = {**ENGINES[engine], "train__micro_batch": 16 // world // 4}
        cases[f"trained_{engine}_4"] = partial(trained, source=source, options=options)
    for engine, precision in BAD_STEPS[world]:
        options = {**(ENGINES | OFFLOADED)[engine], "train__precision": precision}
        cases[f"bad_steps_{engine}_{precision}"] = partial(bad_steps, options=options)
    if world <= 2:
        cases |= _runs(source, unusable, several=world > 1)
    return cases


def _runs(source: dict[str, Any], unusable: str, *, several: bool) -> dict[str, Any]:
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
        cases[f"masters_{engine}"] = partial(masters, options=options)
    for workers in (0, 3):
        cases[f"batches_{workers}"] = partial(batches, source=source, workers=workers)
    if several:
        for engine, precision in TRIALS:
            options = {**ENGINES[engine], "train__precision": precision}
            cases[f"trial_{engine}_{precision}"] = partial(trial, options=options)
        cases["bytes"] = bytes_sent
        cases["handed_over"] = partial(handed_over, source=source)
        for engine in ("torch", "zero3"):  # one makes its own check for overflow, the other does not
            fp16 = {**ENGINES[engine], "train__precision": "fp16", "optim__lr": 1e-4}
            cases[f"fp16_{engine}"] = partial(losses, source=source, options=fp16)
    else:
        cases["losses_constant"] = partial(losses, source=source, options={**CONSTANT, "train__steps": 30})
        cases["trained_torch_1"] = partial(trained, source=source, options={})
    cases["stop_request"] = stop_request
    cases["terminated"] = terminated
    cases["failed_write"] = failed_write
    cases["unusable_shard"] = partial(unusable_shard, shards=unusable)
    return cases
