"""README's table of formats and models holds cell by cell: what it says is read is read, what not is refused.

That the names are the other tools' own is what ``test_load`` and ``test_export`` show with the tools themselves.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from weights.stored import stored

import evaclip
from evaclip.config import InfoNceConfig, ModelConfig
from evaclip.errors import WeightsError
from evaclip.models.clip import CLIP, create_model
from evaclip.weights.export import export, renamed
from evaclip.weights.express import open_clip_config
from evaclip.weights.load import load_tower

README = Path(__file__).parents[2] / "README.md"
TEXT = {"width": 32, "depth": 1, "heads": 2, "mlp_width": 32, "context_length": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "EVA-01": {"name": "tiny-EVA01"},
    "EVA-02": {"name": "tiny-EVA02"},
    "bigE": {"name": "tiny-E"},
    "8B, 18B": {"name": "tiny-18B"},
    "OpenAI's ViT": {"name": "tiny-ViT"},
    "timm's backbones": {
        "embed_dim": 24,
        "image": {"kind": "timm", "model": "test_vit", "image_size": 160},
        "text": TEXT,
    },
    "text tower": {"name": "tiny-ViT"},
}
NAMED = {"EVA-01": "EVA01-CLIP-g-14", "EVA-02": "EVA02-CLIP-L-14", "bigE": "EVA02-CLIP-bigE-14"}
SOURCES: dict[str, tuple[Any, list[tuple[str, Any]], tuple[str, Any] | None]] = {
    "EVA's MIM": ("eva", [("", "eva")], None),
    "EVA-CLIP": ("eva", [("visual.", "eva")], ("text.", "openai")),
    "open_clip": (
        "open_clip",
        [("visual.trunk.", "timm"), ("visual.", "openai")],
        ("text.", "openai"),
    ),
    "OpenAI": ("openai", [("visual.", "openai")], ("", "openai")),
    "timm": ("timm", [("", "timm")], None),
    "transformers": ("hf", [("", "hf")], ("", "hf")),
    "a run or an export": ("evaclip", [("image.", "ours")], ("text.", "ours")),
}
"""Row -> the format's name, and prefix and layout of the image tower (of EVA or timm, of others) and the text tower."""


def cells() -> list[tuple[str, str, str]]:
    """Row, column and what stands there."""
    lines = README.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| | EVA-01 |"))
    columns = [cell.strip() for cell in lines[start].strip("|").split("|")][1:]
    found: list[tuple[str, str, str]] = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        row, *values = (cell.strip() for cell in line.strip("|").split("|"))
        found += [(row, column, value) for column, value in zip(columns, values, strict=True)]
    return found


CELLS = cells()


def under_names(clip: CLIP, tower: Any, places: list[tuple[str, Any]]) -> dict[str, Tensor]:
    """A tower's tensors in the first layout that has names for all of them."""
    for prefix, layout in places:
        try:
            return {prefix + name: value for name, value in renamed(clip.get_submodule(tower), tower, layout)}
        except WeightsError as error:
            problem = error
    raise problem


def test_the_table_has_a_row_for_every_format_and_a_column_for_every_family() -> None:
    assert {column for _, column, _ in CELLS} == FAMILIES.keys()
    assert {row.removeprefix("read ") for row, _, _ in CELLS if row.startswith("read ")} == SOURCES.keys()
    assert {row for row, _, _ in CELLS if row.startswith("write ")} == {
        *("write open_clip", "write timm", "write transformers (hf)", "write EVA-CLIP (eva)", "write safetensors")
    }
    assert {value for _, _, value in CELLS} == {"yes", "no", "named"}


@pytest.mark.parametrize(("row", "column", "value"), [cell for cell in CELLS if cell[0].startswith("read ")])
def test_what_the_table_says_is_read(row: str, column: str, value: str) -> None:
    wanted, image, text = SOURCES[row.removeprefix("read ")]
    tower: Any = "text" if column == "text tower" else "image"
    config = ModelConfig.model_validate(FAMILIES[column])
    source, target = create_model(config, seed=1), create_model(config, seed=2)
    if tower == "text" and text is None:
        assert value == "no"
        others = under_names(create_model(ModelConfig.model_validate(FAMILIES["EVA-01"])), "image", image)
        with pytest.raises(WeightsError, match="does not hold this text tower"):
            load_tower(target.text, "text", others, "file", wanted, alone=True)
        return
    places = [text] if tower == "text" and text else image
    mim = row == "read EVA's MIM"
    try:
        tensors = under_names(source, tower, places)
    except WeightsError:
        assert value == "no"
        family = "OpenAI's ViT" if image[0][1] in ("openai", "hf") else "EVA-01"  # whose checkpoints have these names
        others = under_names(create_model(ModelConfig.model_validate(FAMILIES[family])), "image", image)
        with pytest.raises(WeightsError, match=f"does not hold this {tower} tower|is not this {tower} tower"):
            load_tower(getattr(target, tower), tower, others, "file", wanted, alone=True)
        return
    assert value == "yes"
    if mim:
        tensors = {name: v for name, v in tensors.items() if not re.search(r"^head\.|inner_attn_ln", name)}
    report = load_tower(getattr(target, tower), tower, tensors, "file", wanted, alone=mim)
    theirs = dict(getattr(source, tower).named_parameters())
    left_out = {name for name in theirs if mim and re.search(r"^head\.|attn\.norm", name)}
    assert set(report.initialised) == left_out
    for name, parameter in getattr(target, tower).named_parameters():
        assert torch.equal(parameter, theirs[name]) or name in left_out


@pytest.mark.parametrize(("row", "column", "value"), [cell for cell in CELLS if cell[0].startswith("write ")])
def test_what_the_table_says_is_written(tmp_path: Path, row: str, column: str, value: str) -> None:
    kind: Any = re.sub(r"write |.*\(|\)", "", row)
    source = stored(tmp_path, FAMILIES["EVA-01" if (kind, column) == ("eva", "text tower") else column])
    if value == "named":
        described = open_clip_config(ModelConfig(name=NAMED[column]), InfoNceConfig())["model_cfg"]
        assert timm.is_model(described["vision_cfg"]["timm_model_name"])
    if value != "yes" and column != "text tower":
        with pytest.raises(WeightsError, match=r"cannot express this model|has no place for"):
            export(source, tmp_path / "out", kind)
        return
    export(source, tmp_path / "out", kind)
    if kind == "timm":
        assert column != "text tower" or value == "no"
        with pytest.raises(WeightsError, match="holds an image tower alone"):
            evaclip.load(tmp_path / "out")
        return
    expected, found = (evaclip.load(path).model.state_dict() for path in (source, tmp_path / "out"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
