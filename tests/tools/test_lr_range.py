"""The learning-rate range test trains as the run would, with the rates that it was asked for, and leaves a picture."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import lr_range
import pytest
import yaml
from tiny import tiny_config, tiny_tree

from evaclip.distributed import Ranks

SOURCE = {"kind": "synthetic", "num_records": 200}


def test_rates_grow_by_a_factor_per_step_and_towers_keep_their_relation(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, SOURCE, optim__lr=1e-3, optim__text__lr=2e-3)
    config = lr_range.ranged(config, 0.1, 12)
    assert (config.optim.lr, config.optim.text.lr, config.optim.image.lr) == (0.1, pytest.approx(0.2), None)
    points = list(lr_range.measure(config, 1e-6, tmp_path, Ranks()))
    assert [point.lr for point in points] == pytest.approx([1e-6 * 10 ** (5 * step / 11) for step in range(12)])
    assert points[0].loss == points[0].smoothed


def test_a_rate_that_is_too_high_ends_it(tmp_path: Path) -> None:
    config = lr_range.ranged(tiny_config(tmp_path, SOURCE, optim__name="adamw"), 1e4, 60)
    points = list(lr_range.measure(config, 1e-3, tmp_path, Ranks()))
    assert len(points) < 60
    assert not points[-1].smoothed < 1.5 * min(point.smoothed for point in points[:-1])


def test_the_steepest_fall_and_the_lowest_loss_are_found() -> None:
    losses = [3.0] * 12 + [2.9, 2.5, 2.4, 2.35, 2.6, math.inf]
    points = [lr_range.Point(10.0**step, loss, loss) for step, loss in enumerate(losses)]
    assert [point.lr for point in lr_range.notable(points)] == [1e13, 1e15]


def test_the_command_leaves_a_picture_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_tree(tmp_path / "run", SOURCE)))
    command = [str(tmp_path / "config.yaml"), "--output", str(tmp_path / "range.png"), "--highest", "0.1"]
    assert lr_range.main([*command, "--steps", "12", "train.global_batch=32"]) == 0
    assert "12 steps from 1e-06 to 0.1\nthe loss fell fastest at " in capsys.readouterr().out
    assert (tmp_path / "range.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "range.png", "scratch"}
    assert not list((tmp_path / "scratch").iterdir())
    assert lr_range.main([*command, "--steps", "9"]) == 1
    assert "--steps 9 show nothing; give at least 10" in capsys.readouterr().err
    assert lr_range.main([*command[:2], "range.jpg"]) == 1
    assert "--output range.jpg is no .png" in capsys.readouterr().err
    assert lr_range.main([*command, "--lowest", "1"]) == 1
    assert "--lowest 1 has to be above 0 and below --highest 0.1" in capsys.readouterr().err
