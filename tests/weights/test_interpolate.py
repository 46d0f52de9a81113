"""A model between two others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from weights.stored import SIGMOID, stored

import evaclip
from evaclip import cli
from evaclip.errors import WeightsError
from evaclip.weights.export import write
from evaclip.weights.interpolate import interpolate

TINY = {"name": "tiny-EVA02"}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return stored(tmp_path / "first", TINY), stored(tmp_path / "second", TINY, std=0.05)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    clip = evaclip.load(path)
    return clip.model.state_dict() | {"log_scale": torch.tensor(clip.logit_scale).log()}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_each_weight_lies_between_and_the_ends_are_the_two_bit_for_bit(two, tmp_path, share, capsys):
    first, second = map(weights_of, two)
    assert cli.main(["interpolate", *map(str, two), str(tmp_path / "out"), "--share", str(share)]) in (0, None)
    assert f'evaclip.load("{tmp_path}/out")' in capsys.readouterr().out
    found = weights_of(tmp_path / "out")
    for name, value in found.items():
        expected = (1 - share) * first[name].double() + share * second[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)  # of fp32
    for name, value in found.items() if share in (0, 1) else ():
        end = (second if share else first)[name]
        assert torch.equal(value, end) or name == "log_scale"  # which went through exp
    about = json.loads((tmp_path / "out/evaclip.json").read_text())
    assert about["origin"]["interpolated"]["share"] == share


def test_models_of_different_shape_or_loss_are_refused_with_what_differs(two, tmp_path):
    other = stored(tmp_path / "other", {"name": "tiny-EVA01"})
    with pytest.raises(WeightsError, match=r"(?s)are not models of one kind; what differs:.*image\.rope"):
        interpolate(two[0], other, 0.5)
    sigmoid = stored(tmp_path / "sigmoid", TINY, SIGMOID)
    with pytest.raises(WeightsError, match=r"loss\.name: info_nce -> sigmoid"):
        interpolate(two[0], sigmoid, 0.5)
    with pytest.raises(WeightsError, match=r"--share 1\.5 lies outside of the two models"):
        interpolate(*two, 1.5)


def test_what_lies_between_is_evaluated_like_a_run(two, tmp_path, colour_shards, capsys):
    write(interpolate(*two, 1.0), tmp_path / "out", "safetensors")
    measure = ["--dataset", str(colour_shards / "00000.tar"), "--task", "retrieval", "--precision", "fp32"]
    printed: list[list[str]] = []
    for path in (two[1], tmp_path / "out"):
        cli.main(["evaluate", str(path), *measure])
        printed.append(capsys.readouterr().out.splitlines()[1:])  # the first line names the model
    assert printed[0] == printed[1]
    assert "image_to_text_recall@1" in "\n".join(printed[0])
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tmp_path / "out")])
    assert f"{tmp_path}/out names no datasets; give one with --dataset PATH" in capsys.readouterr().err
