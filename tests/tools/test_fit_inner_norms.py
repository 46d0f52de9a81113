"""The tool that fits inner norms writes a file that a run can start from."""

from __future__ import annotations

from pathlib import Path

import fit_inner_norms
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import colour_records

from evaclip.config import ModelConfig
from evaclip.data.shards import write_shards
from evaclip.models.clip import create_model
from evaclip.weights.export import renamed
from evaclip.weights.load import load_tower


def mim_file(folder: Path) -> Path:
    tower = create_model(ModelConfig(name="tiny-EVA02"), seed=2).image
    left_out = ("inner_attn_ln", "head.")
    tensors = {n: v for n, v in renamed(tower, "image", "eva") if not any(part in n for part in left_out)}
    save_file(tensors, folder / "mim.safetensors")
    return folder / "mim.safetensors"


def test_the_tool_writes_a_file_that_a_run_can_start_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = mim_file(tmp_path)
    (shard,) = write_shards(tmp_path / "shards", colour_records(40), 100)
    out = tmp_path / "fitted.safetensors"
    assert fit_inner_norms.main(["tiny-EVA02", str(weights), str(shard), str(out), "--images", "30"]) == 0
    assert "fitted on 30 images" in capsys.readouterr().out
    tensors = load_file(out)
    tower = create_model(ModelConfig(name="tiny-EVA02")).image
    report = load_tower(tower, "image", tensors, "fitted", alone=True)
    assert report.initialised == ["head.weight", "head.bias"]
    before = load_file(weights)
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
    assert fit_inner_norms.main(["tiny-EVA02", str(weights), str(shard), str(out)]) == 1
    assert "is there already, or its folder is not" in capsys.readouterr().err
    assert fit_inner_norms.main(["tiny-EVA02", str(weights), str(shard), str(tmp_path / "new"), "--images", "0"]) == 1
    assert "--images 0 fits nothing" in capsys.readouterr().err
    assert fit_inner_norms.main(["tiny-EVA02", str(out), str(shard), str(tmp_path / "again.safetensors")]) == 1
    assert "holds inner norms; give it to init.image as it is" in capsys.readouterr().err
    assert fit_inner_norms.main(["tiny-EVA01", str(weights), str(shard), str(tmp_path / "new")]) == 1
    assert "tiny-EVA01 has no inner norms, so nothing is missing" in capsys.readouterr().err
