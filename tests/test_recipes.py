"""Recipes of published models say what was published; the other recipes are valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evaclip import config_file
from evaclip.config import RunConfig, TextTowerConfig
from evaclip.data.order import choose_slots
from evaclip.models.clip import CLIP
from evaclip.models.registry import PRESETS
from evaclip.models.text import TextTower

CONFIGS = Path(__file__).parents[1] / "configs"
FOLDERS = ("LAION2B", "LAION400M", "COYO", "CC12M", "PAIRS", "WEIGHTS", "IMAGENET")

# Model, global batch, samples, rate and layer decay of image and text tower, dropped patches, precision, ZeRO stage.
# From EVA-CLIP's README (launch scripts and model card; rates and decays of eva01_g14 are those of eva01_g14_plus, for
# want of a script); 8B and 18B from arXiv:2402.04252, Tables 12 and 13.
PUBLISHED = {
    "eva01_g14": ("EVA01-CLIP-g-14", 40_960, 11e9, (4e-4, 0.85), (4e-5, 0.75), 0.0, "fp16", 1),
    "eva01_g14_plus": ("EVA01-CLIP-g-14-plus", 114_688, 11e9, (4e-4, 0.85), (4e-5, 0.75), 0.5, "fp16", 1),
    "eva02_b16": ("EVA02-CLIP-B-16", 131_072, 8e9, (2e-4, 0.75), (2e-5, 0.75), 0.0, "fp16", 1),
    "eva02_l14": ("EVA02-CLIP-L-14", 131_072, 4e9, (4e-4, 0.85), (4e-5, 0.75), 0.0, "fp16", 1),
    "eva02_l14_336": ("EVA02-CLIP-L-14-336", 61_440, 2e9, (4e-4, 0.75), (4e-5, 0.65), 0.0, "fp16", 1),
    "eva02_e14": ("EVA02-CLIP-bigE-14", 115_200, 4e9, (4e-4, 0.9), (4e-5, 0.75), 0.5, "fp16", 1),
    "eva02_e14_plus": ("EVA02-CLIP-bigE-14-plus", 144_000, 9e9, (4e-4, 0.9), (4e-5, 0.75), 0.5, "bf16", 1),
    "eva_clip_8b": ("EVA-CLIP-8B", 178_176, 9e9, (4e-4, 0.9), (4e-5, 0.75), 0.5, "bf16", 3),
    "eva_clip_8b_448": ("EVA-CLIP-8B-plus", 24_576, 0.8e9, (2e-4, 0.85), (2e-5, 0.75), 0.0, "bf16", 3),
    "eva_clip_18b": ("EVA-CLIP-18B", 108_000, 5.4e9, (4e-4, 0.9), (4e-5, 0.75), 0.5, "bf16", 3),
}


@pytest.fixture
def load(monkeypatch):
    for name in FOLDERS:
        monkeypatch.setenv(name, f"/{name.lower()}")
    return lambda name: config_file.load(CONFIGS / f"{name}.yaml")


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_of_published_models_have_the_published_numbers(load, name):
    model, batch, samples, image, text, drop, precision, stage = PUBLISHED[name]
    run: RunConfig = load(name)
    assert (run.model.name, run.train.global_batch, run.train.precision) == (model, batch, precision)
    assert run.train.steps * batch == pytest.approx(samples, rel=1e-4)
    assert (run.optim.image.lr, run.optim.image.layer_decay) == image
    assert (run.optim.text.lr, run.optim.text.layer_decay) == text
    assert (run.model.image.token_drop, run.engine.zero_stage, run.schedule.warmup_steps) == (drop, stage, 2000)
    billions = "8b" in name.lower()
    assert (run.optim.betas, run.optim.eps) == (((0.9, 0.95), 1e-6) if billions else ((0.9, 0.999), 1e-8))
    assert (run.optim.weight_decay, run.optim.clip_norm) == ((0.0, None) if billions else (0.05, 5.0))
    assert run.loss.learn_logit_scale != billions
    assert run.init.image or run.init.model


def test_every_published_model_with_a_recipe_has_one_here():
    models = {name for name in PRESETS if name.startswith("EVA")} - {"EVA01-CLIP-B-16"}  # whose run was not published
    assert models == {values[0] for values in PUBLISHED.values()}


def test_all_recipes_are_valid_and_named_as_their_run(load):
    for path in {*CONFIGS.glob("*.yaml")} - {CONFIGS / "sweep.yaml"}:  # which is W&B's
        assert Path(load(path.stem).run_dir).name == path.stem


GPUS = {"eva01_g14": 256, "eva01_g14_plus": 112, "eva02_b16": 64, "eva02_l14": 128, "eva02_l14_336": 128}
GPUS |= {"eva02_e14": 144, "eva02_e14_plus": 144, "eva_clip_8b": 384, "eva_clip_8b_448": 384, "eva_clip_18b": 360}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_run_on_as_many_gpus_as_the_published_runs(load, name):
    run: RunConfig = load(name)
    batch, gpus = run.train.global_batch, GPUS[name]
    assert choose_slots(batch, gpus, run.data.slots) // gpus >= run.data.workers, "a worker without a slot does nothing"
    assert batch == gpus * run.train.micro_batch


def test_lit_freezes_a_whole_published_image_tower_and_runs_on_one_to_eight_gpus(load):
    run: RunConfig = load("lit_b16")
    assert run.optim.frozen == ("all", 0)
    assert (run.model.name, Path(str(run.init.image)).name) == ("EVA02-CLIP-B-16", "EVA02_CLIP_B_psz16_s8B.pt")
    assert (run.init.text, run.model.image.token_drop, run.model.image.drop_path) == (None, 0.0, 0.0)
    assert all(choose_slots(run.train.global_batch, gpus, run.data.slots) % gpus == 0 for gpus in (1, 2, 4, 8))


# Width and feature channels of the text towers that recipes name, as their publishers give them.
TEXT_TOWERS = {
    "clip-vit-base-patch16": (512, 12, 512),
    "clip-vit-large-patch14": (768, 12, 768),
    "CLIP-ViT-H-14-laion2B": (1024, 24, 1024),
    "CLIP-ViT-bigG-14-laion2B": (1280, 32, 1280),
}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in ("eva02_l14_336", "eva_clip_8b_448")])
def test_initial_text_towers_fit_and_projections_are_drawn_anew_where_the_recipe_says_so(load, name):
    run: RunConfig = load(name)
    width, depth, features = TEXT_TOWERS[Path(str(run.init.text)).name]
    shape = {"width": width, "depth": depth, "heads": width // 64, "mlp_width": 4 * width}
    with torch.device("meta"):
        source, target = TextTower(TextTowerConfig.model_validate(shape), features), CLIP(run.model).text
    shapes = [{key: value.shape for key, value in tower.state_dict().items()} for tower in (source, target)]
    assert shapes[0].keys() == shapes[1].keys()
    differing = [key for key in shapes[0] if shapes[0][key] != shapes[1][key]]
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert differing == (["projection"] if "projection is drawn anew" in text else [])


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_of_published_models_name_source_and_deviations(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert "# Source: " in text
    assert "# Deviations from the published run:\n# - " in text
