"""Towers of timm under ZeRO-3, which brings parameters in module by module, against the torch engine."""

from functools import partial

import pytest
from tiny import SYNTHETIC, tiny_config

from distributed.spawn import run_on_ranks
from evaclip.history import load_history
from evaclip.train import train_on

TOWERS = {
    "test_vit": {"token_drop": 0.5, "drop_path": 0.2},
    "test_convnext": {"drop_path": 0.2, "projection": "linear"},
    "test_resnet": {"drop_path": 0.2},
}
ENGINES = {"torch": {}, "zero3": {"engine__name": "deepspeed", "engine__zero_stage": 3}}


def losses(ranks, folder, *, name, options):
    image = {"kind": "timm", "model": name, "image_size": 32, **TOWERS[name]}
    changes = {"model__image": image, "model__text__width": 16, "train__micro_batch": 4, **options}
    train_on(ranks, tiny_config(folder, SYNTHETIC, **changes))
    return [row["train/loss"] for row in load_history(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cases = {
        f"{name}_{engine}": partial(losses, name=name, options=ENGINES[engine]) for name in TOWERS for engine in ENGINES
    }
    return run_on_ranks(2, cases, tmp_path_factory.mktemp("timm"))


@pytest.mark.matrix
@pytest.mark.parametrize("name", TOWERS)
def test_zero3_trains_a_timm_tower_as_the_torch_engine_does(results, name):
    plain, sharded = (results[f"{name}_{engine}"][0] for engine in ENGINES)
    assert len(plain) == 4
    assert sharded == pytest.approx(plain, rel=1e-5)  # fp32 sums in another order
