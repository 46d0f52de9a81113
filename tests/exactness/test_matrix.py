"""Everything of which the default suite runs a sample: ours at every number of ranks, engine, stage and precision."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.cases import ENGINES, OFFLOADED, PIECES, STEPS, accumulated, bad_steps, same_gradients, trained
from distributed.spawn import Case, run_on_ranks
from distributed.test_ranks import EXPECTED_BAD_STEPS, _apart
from tables import record

from evaclip.config_file import load
from evaclip.data.batch import PackedText
from evaclip.distributed import Ranks
from evaclip.history import load_history
from evaclip.models.text import TextTower
from evaclip.train import train_on

pytestmark = pytest.mark.matrix

ROOT = Path(__file__).parents[2]
WORLDS = (1, 2, 4)
PRECISIONS = ("fp32", "bf16", "bf16_weights", "fp16")
ALL_ENGINES = ENGINES | OFFLOADED
BAD = [(e, p) for e in ALL_ENGINES for p in PRECISIONS if not (e.startswith("zero1") and p == "bf16_weights")]
"""Engines and precisions of the bad steps; two micro-batches are refused by ZeRO-1 with 16-bit weights."""
LOSSES = {"InfoNCE": {}, "sigmoid": {"loss__name": "sigmoid"}}


def demo(ranks: Ranks, folder: Path, *, pieces: int, padded: bool, overrides: list[str]) -> list[float]:
    """30 steps of the demo; the losses."""
    text_forward = TextTower.forward
    if padded:
        TextTower.forward = padded_forward
    micro_batch = 256 // ranks.world_size // pieces
    short = ["train.steps=30", "eval.every_steps=null", "eval.datasets={}", "checkpoint.keep_best=null"]
    short += ["log.every_steps=1", "log.wandb.mode=off", "checkpoint.every_steps=30", "schedule.warmup_steps=10"]
    run = [f"run_dir={folder}", f"train.micro_batch={micro_batch}", *short, *overrides]
    train_on(ranks, load(ROOT / "configs" / "demo.yaml", run))
    TextTower.forward = text_forward
    return [row["train/loss"] for row in load_history(folder / "metrics.jsonl")]


def padded_forward(tower: TextTower, text: PackedText) -> torch.Tensor:
    """The text tower on captions padded to the context, as everybody else computes it."""
    number, width = text.num_captions, tower.config.context_length
    sizes = text.cu_seqlens.diff()[:number].long()
    ids = torch.zeros(number, width, dtype=torch.int64)
    ids[torch.arange(width) < sizes[:, None]] = text.ids[: int(sizes.sum())]
    bounds = torch.arange(0, number * width + 1, width, dtype=torch.int32)
    places = torch.arange(width).repeat(number)
    whole = PackedText(ids.view(-1), places, bounds, torch.arange(number), ((width, number),), 128)
    x = tower.token_embedding(whole.ids) + tower.position_embedding[whole.positions]
    for block in tower.blocks:
        x = block(x, whole)
    return (tower.norm(x[bounds[:-1] + sizes - 1]) @ tower.projection)[text.restore]


def all_cases(world: int, source: dict[str, str]) -> dict[tuple, Case]:
    """By kind, loss or optimizer, engine and precision."""
    cases: dict[tuple, Case] = {("demo", name): case for name, case in whole_loops(world).items()}
    for engine, options in ALL_ENGINES.items():
        for precision in PRECISIONS:
            chosen = {**options, "train__precision": precision}
            if (engine, precision) in BAD:
                cases["bad", engine, precision] = partial(bad_steps, options=chosen)
            for optim in ("lamb", "adamw"):
                same = {**chosen, "optim__name": optim}
                cases["same", optim, engine, precision] = partial(same_gradients, options=same)
        for loss, loss_options in LOSSES.items():
            cases["accumulated", loss, engine] = partial(accumulated, options={**options, **loss_options})
        for pieces in (1, 4):
            chosen = {**options, "train__micro_batch": 16 // world // pieces}
            cases["trained", engine, pieces] = partial(trained, source=source, options=chosen)
    return cases


def whole_loops(world: int) -> dict[str, Case]:
    """Cases of the demo by ``engine, micro-batches, text, workers``."""
    cases = {"torch, padded text": partial(demo, pieces=1, padded=True, overrides=["data.workers=0"])}
    for workers in (1, 2, 3):
        overrides = [f"data.workers={workers}"]
        cases[f"torch, {workers} workers"] = partial(demo, pieces=1, padded=False, overrides=overrides)
    # ZeRO-3 comes last: DeepSpeed replaces torch's linear layer for the whole process
    for engine, options in ENGINES.items():
        overrides = [f"{name.replace('__', '.')}={value}" for name, value in options.items()]
        for pieces in (1, 4):
            cases[f"{engine}, {pieces} micro-batches"] = partial(
                demo, pieces=pieces, padded=False, overrides=[*overrides, "data.workers=0"]
            )
    return cases


@pytest.fixture(scope="module")
def results(tmp_path_factory, colour_shards):
    """All cases' answers on a number of ranks, which run when it is first asked for."""
    source = {"shards": str(colour_shards / "{00000..00002}.tar")}

    @cache
    def on(world: int) -> dict[tuple, list[Any]]:
        cases = all_cases(world, source)
        named = {str(number): case for number, case in enumerate(cases.values())}
        answers = run_on_ranks(world, named, tmp_path_factory.mktemp(f"matrix{world}_"))
        return dict(zip(cases, answers.values(), strict=True))

    return on


def _on(world):
    return "1 rank" if world == 1 else f"{world} ranks"


def of(results, world, *case):
    answers = results(world)[case]
    for answer in answers:
        if isinstance(answer, RuntimeError):
            raise answer
    return answers


def largest_difference(first, second):
    return max(abs(a - b) / abs(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", whole_loops(1))
def test_the_demo_has_one_loss_curve(results, world, case):
    reference = of(results, 1, "demo", "torch, 1 micro-batches")[0]
    found = of(results, world, "demo", case)[0]
    assert len(found) == 30
    assert found[-1] < 0.9 * found[0], "it learns"
    difference = largest_difference(found, reference)
    record("Demo, 30 steps: largest relative difference of a loss", case, _on(world), difference)
    assert difference <= 1e-4  # fp32, sums in another order, 30 steps of LAMB


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("engine", list(ENGINES)[1:])
def test_engines_alone_differ_less(results, world, engine):
    reference = of(results, world, "demo", "torch, 1 micro-batches")[0]
    found = of(results, world, "demo", f"{engine}, 1 micro-batches")[0]
    assert largest_difference(found, reference) <= 1e-5


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("optim", ["lamb", "adamw"])
def test_optimizers_are_the_peers_on_the_same_gradients(results, world, precision, engine, optim):
    rank = of(results, world, "same", optim, engine, precision)[0]
    peer = "timm's LAMB" if optim == "lamb" else "torch's AdamW"
    record(
        f"Off {peer} in fp64 on the same gradients, 20 steps, of the movement",
        f"{engine}, {precision}",
        _on(world),
        rank["apart"],
    )
    assert rank["apart"] < 1e-6
    assert rank["applied"] == STEPS


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_any_number_of_micro_batches(results, world, engine, loss):
    found = of(results, world, "accumulated", loss, engine)[0]
    for pieces in PIECES:
        record(
            "Gradient in fp32 off the whole batch's in fp64: worst tensor, of the norm of all",
            f"{loss}, {engine}, {_on(world)}",
            f"{pieces} micro-batches",
            found[pieces][0],
        )
        assert found[pieces][0] <= 1e-6, found[pieces][1]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_lamb_end_to_end(results, world, engine, pieces):
    whole, parts = (of(results, 1, "trained", "torch", k)[0] for k in (1, 4))
    floor = _apart(whole, parts)
    units = _apart(whole, of(results, world, "trained", engine, pieces)[0]) / floor
    record(
        "Weights after 20 steps of LAMB, in units of one process's own difference with 4 micro-batches",
        f"{engine}, {pieces} micro-batches",
        _on(world),
        units,
    )
    assert units <= 3


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("engine", "precision"), BAD)
def test_bad_steps_change_nothing(results, world, precision, engine):
    for rank in of(results, world, "bad", engine, precision):
        assert rank == EXPECTED_BAD_STEPS
