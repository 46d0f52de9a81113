"""Runs with an image tower of timm: trained, continued, refused and loaded."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_config

import evaclip
from evaclip.checkpoint import CheckpointReader, find_checkpoint
from evaclip.errors import ConfigError
from evaclip.history import load_history
from evaclip.models.clip import create_model
from evaclip.models.timm_tower import TimmTower
from evaclip.train import train

TOWERS = {
    "vit": {"model": "test_vit", "image_size": 32, "token_drop": 0.5, "drop_path": 0.2},
    "convnext": {"model": "test_convnext", "image_size": 32, "drop_path": 0.2, "projection": "linear"},
    "resnet": {"model": "test_resnet", "image_size": 64, "drop_path": 0.2},
}


def timm_config(run_dir, kind="vit", **changes):
    return tiny_config(run_dir, model__image={"kind": "timm", **TOWERS[kind]}, model__text__width=16, **changes)


def weights(run_dir):
    return CheckpointReader(find_checkpoint(run_dir)).weights()


def losses(run_dir):
    return [row["train/loss"] for row in load_history(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("kind", TOWERS)
def test_a_timm_tower_is_trained_continued_and_loaded(tmp_path, kind):
    options = {"optim__image": {"layer_decay": 0.8}, "optim__name": "lamb", "train__micro_batch": 8}
    train(timm_config(tmp_path, kind, **options))
    straight, before = weights(tmp_path), losses(tmp_path)
    shutil.rmtree(find_checkpoint(tmp_path))
    train(timm_config(tmp_path, kind, **options))
    assert losses(tmp_path) == before
    assert all(torch.equal(straight[name], value) for name, value in weights(tmp_path).items())
    assert all(row["speed/model_tflops"] > 0 for row in load_history(tmp_path / "metrics.jsonl"))

    clip = evaclip.load(tmp_path)
    assert isinstance(clip.model.image, TimmTower)
    for name, parameter in clip.model.image.named_parameters():
        assert torch.equal(parameter, straight[f"image.{name}"])
    image = clip.preprocess(Image.new("RGB", (40, 50), "red"))
    assert image.shape[1:] == (TOWERS[kind]["image_size"],) * 2
    with torch.no_grad():
        assert clip.encode_image(image[None], normalize=True).norm().item() == pytest.approx(1)


def test_the_log_says_what_the_tower_is_and_drops(tmp_path):
    train(timm_config(tmp_path, train__steps=1))
    log = (tmp_path / "log.txt").read_text()
    assert "image tower is test_vit of timm, keeps 2 of 4 patches in training; with timm's weights" in log
    assert "model.image.mean would be [0.5, 0.5, 0.5] and model.image.std [0.5, 0.5, 0.5]" in log
    assert "attention: image attention: as in timm; text" in log


def test_a_run_does_not_go_on_with_a_tower_of_another_kind(tmp_path):
    train(timm_config(tmp_path, train__steps=1))
    with pytest.raises(ConfigError, match=r"model\.image\.kind: timm -> eva"):
        train(tiny_config(tmp_path, model__text__width=16))


def start_of(folder, kind):
    """A file with weights and statistics as if somebody had trained them."""
    model = create_model(timm_config(folder, kind).model, seed=7)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: p.detach() + torch.rand(p.shape, generator=generator) / 50 for name, p in model.named_parameters()}
    save_file({**tensors, "logit_scale": torch.tensor([2.0])}, folder / "start.safetensors")
    return str(folder / "start.safetensors"), tensors


def test_statistics_are_those_that_a_run_began_with(tmp_path):
    path, before = start_of(tmp_path, "resnet")
    train(timm_config(tmp_path / "run", "resnet", init__model=path, train__steps=2))
    after = weights(tmp_path / "run")
    statistics = [name for name in before if "running_" in name]
    assert len(statistics) > 10
    assert all(torch.equal(after[name], before[name]) for name in statistics)
    assert not torch.equal(after["image.trunk.bn1.bias"], before["image.trunk.bn1.bias"])


@pytest.mark.parametrize(("kind", "freeze"), [("vit", 2), ("resnet", 3), ("vit", "all")])
def test_layers_of_a_timm_tower_are_frozen(tmp_path, kind, freeze):
    path, before = start_of(tmp_path, kind)
    train(timm_config(tmp_path / "run", kind, init__model=path, train__steps=2, optim__image={"freeze": freeze}))
    after = weights(tmp_path / "run")
    same = {name for name in before if torch.equal(after[name], before[name])}
    layers = create_model(timm_config(tmp_path, kind).model).image.layers().of
    frozen = {f"image.{name}" for name, layer in layers.items() if freeze == "all" or layer <= freeze}
    assert same == frozen | {name for name in before if "running_" in name}


def test_more_layers_than_there_are_cannot_be_frozen(tmp_path):
    path, _ = start_of(tmp_path, "vit")
    with pytest.raises(
        ConfigError, match=r"optim\.image\.freeze 7 is more than the 6 blocks of the image tower; give at"
    ):
        train(timm_config(tmp_path / "run", init__model=path, optim__image={"freeze": 7}))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_micro_batches_change_no_loss_of_a_timm_tower(tmp_path, kind):
    """A batch norm that took its statistics from a micro-batch would."""
    train(timm_config(tmp_path / "whole", kind))
    train(timm_config(tmp_path / "pieces", kind, train__micro_batch=4))
    assert losses(tmp_path / "pieces") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)  # sums in another order
