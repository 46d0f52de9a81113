"""Weight files are opened without running anything in them, and say what is wrong with them."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from evaclip.errors import WeightsError
from evaclip.weights.files import StoredTensor, read_weights

TENSORS = {"norm.weight": torch.arange(6.0), "head.weight": torch.ones(2, 3)}


def same(found: dict[str, StoredTensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name].read(), TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.module.", "_orig_mod.module."])
@pytest.mark.parametrize("legacy", [False, True])
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, wrapper: str, prefix: str, legacy: bool) -> None:
    content = {wrapper: {prefix + name: value for name, value in TENSORS.items()}, "epoch": 3, "optimizer": {"lr": 1.0}}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    assert same(read_weights(tmp_path / "w.pt"))


def test_safetensors_alone_in_folders_and_in_parts(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "any.safetensors")
    assert same(read_weights(tmp_path / "any.safetensors"))
    (tmp_path / "any.safetensors").rename(tmp_path / "model.safetensors")
    assert same(read_weights(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    for number, name in enumerate(TENSORS):
        save_file({name: TENSORS[name]}, tmp_path / f"model-{number}.safetensors")
    parts = ", ".join(f'"{name}": "model-{number}.safetensors"' for number, name in enumerate(TENSORS))
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{parts}}}}}')
    assert same(read_weights(tmp_path))


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    unsafe = [{wrapper: TENSORS, "args": argparse.Namespace(lr=1)} for wrapper in ("module", "model")]
    for content in (*unsafe, nn.ParameterDict({"norm": TENSORS["norm.weight"]})):
        torch.save(content, tmp_path / "deepspeed.pt")
        with pytest.raises(WeightsError, match=r"holds more than tensors.*weights_only=False") as caught:
            read_weights(tmp_path / "deepspeed.pt")
        advice = str(caught.value).partition('python -c "')[2].removesuffix('"')
        subprocess.run([sys.executable, "-c", advice], cwd=tmp_path, check=True)
        found = read_weights(tmp_path / "safe.pt")
        assert found.keys() == {"norm"} if isinstance(content, nn.Module) else same(found)
    with warnings.catch_warnings(action="ignore"):  # deprecated, but people have such files
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(WeightsError, match=r"TorchScript archive.*torch\.jit\.load\('ViT-B-32\.pt'"):
        read_weights(tmp_path / "ViT-B-32.pt")


def test_files_that_are_none_say_what_they_are(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    save_file(TENSORS, tmp_path / "whole.safetensors")
    for name, content, message in (
        ("empty.pt", b"", "is empty"),
        ("short.pt", whole[: len(whole) // 2], "cannot be read"),
        ("short.safetensors", (tmp_path / "whole.safetensors").read_bytes()[:-8], "cannot be read"),
        ("page.pt", b"<!DOCTYPE html><html>", "neither safetensors nor what torch.save writes"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            read_weights(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="holds no tensors by name; found epoch"):
        read_weights(tmp_path / "other.pt")
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "mixed.pt")
    with pytest.raises(WeightsError, match=r"others do not, such as b"):
        read_weights(tmp_path / "mixed.pt")
    with pytest.raises(WeightsError, match="does not exist"):
        read_weights(tmp_path / "nothing.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WeightsError, match=r"holds none of open_clip_model\.safetensors"):
        read_weights(tmp_path / "folder")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_point_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({name: value.to(dtype) for name, value in TENSORS.items()}, tmp_path / "w.pt")
    assert {value.read().dtype for value in read_weights(tmp_path / "w.pt").values()} == {dtype}


def test_damaged_pickles_are_refused_whatever_they_raise(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    refused = 0
    for legacy in (True, False):
        torch.save(TENSORS, tmp_path / "whole.pt", _use_new_zipfile_serialization=not legacy)
        whole = (tmp_path / "whole.pt").read_bytes()
        for _ in range(100):
            damaged = bytearray(whole)
            damaged[random.integers(2, min(len(whole), 400))] ^= 1 << random.integers(8)
            (tmp_path / "damaged.pt").write_bytes(damaged)
            try:
                read_weights(tmp_path / "damaged.pt")
            except WeightsError:
                refused += 1
    assert refused > 50  # other bits are a number's or padding, which has no checksum


HUB = """
import sys
import torch
from evaclip.errors import WeightsError
from evaclip.weights.files import read_weights
print(sum(float(stored.read().double().sum()) for stored in read_weights("timm:test_vit.r160_in1k").values()))
lacking = read_weights("timm:convnextv2_atto.fcmae")
print(sorted(name for name in lacking if name.startswith("head.")), len(lacking))
try:
    read_weights("timm:test_vit2.r160_in1k")
except WeightsError as error:
    print(error)
"""


def test_weights_of_timm_come_out_of_its_cache_and_a_missing_name_is_told(tmp_path: Path) -> None:
    def keep(name: str, tensors: dict[str, torch.Tensor]) -> None:
        folder = tmp_path / "hub" / f"models--timm--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        save_file(tensors, folder / "snapshots" / ("0" * 40) / "model.safetensors")

    model = timm.create_model("test_vit")
    keep("test_vit.r160_in1k", model.state_dict())
    backbone = timm.create_model("convnextv2_atto").state_dict()
    keep("convnextv2_atto.fcmae", {name: value for name, value in backbone.items() if not name.startswith("head.")})
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HUB],
        env=environment,
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    total, lacking, refusal = done.stdout.splitlines()
    assert lacking == f"[] {len(backbone) - 4}", "what the file lacks and timm draws is not passed off as read"
    expected = sum(float(value.double().sum()) for value in model.state_dict().values())
    assert float(total) == pytest.approx(expected, rel=1e-9)
    assert re.match(r"timm:test_vit2\.r160_in1k: timm [\d.]+ has no such weights here \(.*name the file$", refusal)
