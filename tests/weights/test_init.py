"""Runs that start from weights: what ``init`` names is loaded once, told in the log, and not needed again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from evaclip.checkpoint import CheckpointReader, find_checkpoint
from evaclip.errors import ConfigError, WeightsError
from evaclip.train import train

STILL = {"optim__lr": 1e-30, "train__steps": 2}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To within what two steps at that rate move."""
    return one.shape == other.shape and bool((one - other).abs().max() < 1e-29)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return CheckpointReader(find_checkpoint(run)).weights()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("weights") / "trained"
    train(tiny_config(run))
    return run


def test_a_fork_has_the_other_runs_weights_and_its_own_seed_and_learning_rate(tmp_path: Path, trained: Path) -> None:
    train(tiny_config(tmp_path / "fork", seed=9, init__model=str(trained), **STILL))
    assert all(same(value, weights(trained)[name]) for name, value in weights(tmp_path / "fork").items())
    told = (tmp_path / "fork" / "log.txt").read_text()
    assert f"initial weights: image: 42 of 42 parameters from {trained}, 0 under other names (as of ours)" in told
    assert "initial weights: loss: 1 of 1 parameters" in told


def test_a_fork_may_have_another_resolution(tmp_path: Path, trained: Path) -> None:
    train(tiny_config(tmp_path / "fork", init__model=str(trained), model__image__image_size=24, **STILL))
    assert (
        "initial weights: image: resized: position_embedding from [17, 32]" in (tmp_path / "fork/log.txt").read_text()
    )
    ours, theirs = weights(tmp_path / "fork"), weights(trained)
    assert [name for name in ours if not same(ours[name], theirs[name])] == ["image.position_embedding"]


def test_one_tower_alone_leaves_the_other_as_it_was_drawn(tmp_path: Path, trained: Path) -> None:
    train(tiny_config(tmp_path / "drawn", seed=9, **STILL))
    train(tiny_config(tmp_path / "fork", seed=9, init__text=str(trained), init__text_format="evaclip", **STILL))
    expected = weights(tmp_path / "drawn") | {n: v for n, v in weights(trained).items() if n.startswith("text.")}
    assert all(same(value, expected[name]) for name, value in weights(tmp_path / "fork").items())


def test_weights_of_a_run_with_other_options_are_refused(tmp_path: Path, trained: Path) -> None:
    for init in ("init__model", "init__image"):
        changed = {init: str(trained), "model__image__rope": False, "model__image__heads": 4}
        with pytest.raises(WeightsError, match=r"was trained with other options; set model\.image\.heads=2 \(now 4\)"):
            train(tiny_config(tmp_path / init, **changed))


def test_a_continued_run_does_not_look_at_the_file(tmp_path: Path, trained: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    train(tiny_config(tmp_path / "fork", init__model=str(source), **STILL))
    shutil.rmtree(source)
    train(tiny_config(tmp_path / "fork", init__model=str(source), **{**STILL, "train__steps": 3}))
    assert CheckpointReader(find_checkpoint(tmp_path / "fork")).state.step == 3


def test_a_wrong_path_is_told_before_shards_are_looked_at(tmp_path: Path) -> None:
    source = {"shards": str(tmp_path / "none.tar")}
    with pytest.raises(WeightsError, match=r"init: .*nowhere\.pt does not exist"):
        train(tiny_config(tmp_path / "fork", source, init__image=str(tmp_path / "nowhere.pt")))


def test_another_model_and_contradictions_are_refused(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(WeightsError, match=r"is not this image tower; check model\.name and the file"):
        train(tiny_config(tmp_path / "fork", init__model=str(trained), model__image__width=64))
    with pytest.raises(ConfigError, match=r"give either it, or init\.image and init\.text"):
        tiny_config(tmp_path, init__model="a", init__image="b")
    with pytest.raises(ConfigError, match=r"init\.image is empty; name a file, or null"):
        tiny_config(tmp_path, init__image="")
    with pytest.raises(ConfigError, match=r"init\.text_format is set, but init\.text is not"):
        tiny_config(tmp_path, init__text_format="hf")
