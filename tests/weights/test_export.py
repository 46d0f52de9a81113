"""What is exported computes the same in the real open_clip, timm and transformers, and reads back bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor
from weights.stored import SIGMOID, stored

import evaclip
from evaclip import cli
from evaclip.config import InfoNceConfig, ModelConfig
from evaclip.errors import WeightsError
from evaclip.models.clip import create_model
from evaclip.weights.export import export
from evaclip.weights.express import open_clip_config
from evaclip.weights.files import read_weights
from evaclip.weights.load import load_tower

TEXTS = ["a digit", "two ships at sea, seen from above", "Ünïcode &amp; emoji 🙂"]
EVA = ("EVA01", "EVA02", "E", "8B", "18B")


def tiny(kind: str, **image: Any) -> dict[str, Any]:
    return {"name": f"tiny-{kind}", "image": image}


@pytest.fixture
def picture() -> Image.Image:
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8))
    return smooth.resize((300, 230), Image.Resampling.BICUBIC)


@torch.no_grad()
def ours(path: Path, picture: Image.Image) -> tuple[Tensor, Tensor]:
    clip = evaclip.load(path)
    return clip.encode_image(clip.preprocess(picture)[None]), clip.encode_text(clip.tokenize(TEXTS))


def weights_of(path: Path) -> dict[str, Tensor]:
    clip = evaclip.load(path)
    scalars = {"scale": torch.tensor(clip.logit_scale), "bias": torch.tensor(clip.logit_bias or 0.0)}
    return clip.model.state_dict() | scalars


# ----------------------------------------------------------------------------------------------------------- open_clip


@pytest.mark.parametrize(
    ("tree", "loss"),
    [
        (tiny("ViT"), None),
        (tiny("ViT", mlp="gelu", resize="squash", mean=[0.5, 0.4, 0.3]) | {"text": {"mlp": "gelu"}}, SIGMOID),
        ({"name": "EVA02-CLIP-B-16"}, None),
    ],
    ids=["quick_gelu", "gelu, squash, sigmoid", "EVA02-CLIP-B-16"],
)
def test_open_clip_computes_the_same_from_pixels_and_words(
    tmp_path: Path, picture: Image.Image, tree: dict[str, Any], loss: dict[str, Any] | None
) -> None:
    source, out = stored(tmp_path, tree, loss), tmp_path / "out"
    export(source, out, "open_clip")
    peer, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    peer.eval()
    words = open_clip.get_tokenizer(f"local-dir:{out}")(TEXTS)
    with torch.no_grad():
        image, text = peer.encode_image(preprocess(picture)[None]), peer.encode_text(words)
    for mine, theirs in zip(ours(source, picture), (image, text), strict=True):
        assert (mine - theirs).abs().max() < 1e-5 * max(1, mine.abs().max())
    assert peer.logit_scale.item() == 3.0
    assert (peer.logit_bias.item() if loss else peer.logit_bias) == (-7.5 if loss else None)


BACKBONES = {
    "test_vit": {"model": "test_vit", "image_size": 160},
    "test_vit, linear": {"model": "test_vit", "image_size": 160, "pool": "avg", "projection": "linear"},
    "test_convnext": {"model": "test_convnext", "image_size": 64},
    "test_convnext, max": {"model": "test_convnext", "image_size": 64, "pool": "max"},
    "resnet10t": {"model": "resnet10t", "image_size": 64},
}


def with_backbone(name: str, **image: Any) -> dict[str, Any]:
    text = {"width": 32, "depth": 1, "heads": 2, "mlp_width": 32}
    return {"embed_dim": 24, "image": {"kind": "timm", **BACKBONES[name], **image}, "text": text}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_of_timm_compute_the_same_in_open_clip_and_in_timm(
    tmp_path: Path, picture: Image.Image, name: str
) -> None:
    source = stored(tmp_path, with_backbone(name))
    image, text = ours(source, picture)
    export(source, tmp_path / "open_clip", "open_clip")
    peer = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}").eval()
    pixels = evaclip.load(source).preprocess(picture)[None]
    words = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'open_clip'}")(TEXTS)
    with torch.no_grad():
        assert (peer.encode_image(pixels) - image).abs().max() < 1e-5 * max(1, image.abs().max())
        assert (peer.encode_text(words) - text).abs().max() < 1e-5 * max(1, text.abs().max())
    again = evaclip.load(tmp_path / "open_clip").model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in evaclip.load(source).model.state_dict().items())
    if "linear" in name:
        with pytest.raises(WeightsError, match="projection linear lies behind its model; export it with --format open"):
            export(source, tmp_path / "timm", "timm")
        return
    export(source, tmp_path / "timm", "timm")
    assert timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=10).num_classes == 10
    alone = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        assert (alone(pixels) - image).abs().max() < 1e-5 * max(1, image.abs().max())


def test_a_backbone_of_another_size_than_open_clip_builds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="builds timm's test_vit for 160 pixels, not 48; export it with --format ti"):
        export(stored(tmp_path, with_backbone("test_vit", image_size=48)), tmp_path / "out", "open_clip")
    export(tmp_path / "run", tmp_path / "out", "timm")
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).patch_embed.img_size == (48, 48)


@pytest.mark.parametrize("name", ["EVA01-g-14", "EVA01-g-14-plus", "EVA02-L-14", "EVA02-L-14-336", "EVA02-E-14-plus"])
def test_named_models_are_described_as_open_clip_does(name: str) -> None:
    described = open_clip_config(ModelConfig(name=name), InfoNceConfig())["model_cfg"]
    known = open_clip.get_model_config(name)
    assert described.pop("quick_gelu") is False
    for section, defaults in (("text_cfg", {"mlp_ratio": 4.0}), ("vision_cfg", {})):
        theirs = {**defaults, **known.pop(section)}
        mine = described.pop(section) | {"timm_model_pretrained": theirs.get("timm_model_pretrained", False)}
        if theirs.get("timm_model_name") == "eva_giant_patch14_224":  # timm's other name of that tower
            theirs["timm_model_name"] = "eva_giant_patch14_clip_224"
        assert {key: mine[key] for key in theirs} == theirs
    assert described == known


# ----------------------------------------------------------------------------------------------------------------- timm


@pytest.mark.parametrize(
    "tree",
    [
        *(tiny(kind) for kind in ("EVA01", "EVA02", "E")),
        tiny("EVA02", qkv_bias="none"),
        tiny("EVA02", sub_norm=False),
        tiny("ViT", resize="squash"),
    ],
    ids=["EVA01", "EVA02", "E", "EVA02 without biases", "EVA02 without norms", "ViT"],
)
def test_timm_computes_the_same_image_features_from_pixels(
    tmp_path: Path, picture: Image.Image, tree: dict[str, Any]
) -> None:
    source, out = stored(tmp_path, tree), tmp_path / "out"
    export(source, out, "timm")
    peer = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(peer))
    with torch.no_grad():
        theirs = peer(preprocess(picture)[None])
    mine = ours(source, picture)[0]
    assert (mine - theirs).abs().max() < 1e-5 * max(1, mine.abs().max())
    with pytest.raises(WeightsError, match=r"holds an image tower alone; start from it with init\.image="):
        evaclip.load(out)


# --------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_transformers_computes_the_same_and_has_the_processor(
    tmp_path: Path, picture: Image.Image, resize: str
) -> None:
    source, out = stored(tmp_path, tiny("ViT", resize=resize)), tmp_path / "out"
    export(source, out, "hf")
    peer, processor = CLIPModel.from_pretrained(out).eval(), CLIPProcessor.from_pretrained(out)
    inputs = processor(text=TEXTS[:2], images=picture, return_tensors="pt", padding=True)
    clip = evaclip.load(source)
    packed = clip.tokenize(TEXTS[:2])
    for row, length in zip(inputs["input_ids"], inputs["attention_mask"].sum(1), strict=True):
        assert row[:length].tolist() in [text.tolist() for text in packed.ids.split(_lengths(packed))]
    pixels = clip.preprocess(picture)[None]
    assert (inputs["pixel_values"] - pixels).abs().max() < 2.1 / 255 / 0.26  # torchvision's bicubic rounds otherwise
    with torch.no_grad():
        found = peer(**{**inputs, "pixel_values": pixels})
        mine = clip.encode_image(pixels, normalize=True), clip.encode_text(packed, normalize=True)
    assert (found.image_embeds - mine[0]).abs().max() < 1e-5
    assert (found.text_embeds - mine[1]).abs().max() < 1e-5
    assert peer.logit_scale.item() == 3.0


def test_layers_from_the_end_are_those_of_transformers(tmp_path: Path, picture: Image.Image) -> None:
    source, out = stored(tmp_path, tiny("ViT")), tmp_path / "out"
    export(source, out, "hf")
    clip, peer = evaclip.load(source), CLIPModel.from_pretrained(out).eval()
    pixels, tokens = clip.preprocess(picture)[None], clip.tokenize(TEXTS[:2])
    ids = CLIPProcessor.from_pretrained(out)(text=TEXTS[:2], return_tensors="pt", padding=True)
    with torch.no_grad():
        seen = peer.vision_model(pixels, output_hidden_states=True).hidden_states
        read = peer.text_model(**ids, output_hidden_states=True).hidden_states
        for layer in (-1, -2):
            patches, (words, mask) = clip.image_tokens(pixels, layer), clip.text_tokens(tokens, layer)
            assert (patches - seen[layer][:, 1:]).abs().max() < 1e-5
            assert torch.equal(mask, ids["attention_mask"].bool())
            assert (words - read[layer])[mask].abs().max() < 1e-5


def _lengths(packed: Any) -> list[int]:
    return packed.cu_seqlens.diff().tolist()


# ------------------------------------------------------------------------------------------------------- names and bits


@pytest.mark.parametrize("kind", EVA)
def test_evas_names_are_those_of_its_checkpoints(tmp_path: Path, kind: str) -> None:
    export(stored(tmp_path, tiny(kind)), tmp_path / "out", "eva")
    names = set(torch.load(tmp_path / "out" / "eva_clip.pt", weights_only=True))
    sub, fused, biases = kind == "EVA02", kind != "EVA02", kind not in ("8B", "18B")
    block = {"norm1.weight", "norm2.weight", "attn.proj.weight", "attn.proj.bias"}
    block |= {"attn.qkv.weight"} if fused else {f"attn.{part}_proj.weight" for part in "qkv"}
    block |= {"attn.q_bias", "attn.v_bias", "norm1.bias", "norm2.bias"} if biases else set()
    layers = ("w1", "w2", "w3", "ffn_ln") if sub else ("fc1", "fc2")
    block |= {f"mlp.{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    block |= {f"attn.inner_attn_ln.{leaf}" for leaf in ("weight", "bias")} if sub else set()
    block |= {"gamma_1", "gamma_2"} if kind == "EVA01" else set()
    outer = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "head.weight"}
    outer |= {"norm.bias", "head.bias"} if biases else set()
    visual = {f"visual.{name}" for name in outer} | {f"visual.blocks.{n}.{name}" for n in range(2) for name in block}
    assert {name for name in names if name.startswith("visual.")} == visual
    text = {"text.positional_embedding", "text.text_projection", "text.token_embedding.weight"}
    assert text | {"logit_scale", "text.transformer.resblocks.1.attn.in_proj_weight", "text.ln_final.bias"} <= names


@pytest.mark.parametrize(
    ("kind", "formats"),
    [*((kind, ("eva", "safetensors")) for kind in EVA), ("ViT", ("open_clip", "hf", "safetensors"))],
)
def test_what_is_exported_reads_back_bit_for_bit_and_can_be_exported_again(
    tmp_path: Path, kind: str, formats: tuple[Any, ...]
) -> None:
    source = stored(tmp_path, tiny(kind), SIGMOID if kind == "EVA02" else None)
    expected = weights_of(source)
    for kind_of_export in formats:
        source = export(source, tmp_path / kind_of_export, kind_of_export)[0].parent
        found = weights_of(source)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), kind_of_export


@pytest.mark.parametrize("kind", ["EVA01", "EVA02", "E", "ViT"])
def test_a_tower_exported_for_timm_reads_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    source = stored(tmp_path, tiny(kind))
    export(source, tmp_path / "out", "timm")
    tower = create_model(ModelConfig.model_validate(tiny(kind))).image
    tensors = {name: kept.read() for name, kept in read_weights(tmp_path / "out").items()}
    report = load_tower(tower, "image", tensors, "out", "timm", alone=False)
    assert not report.initialised
    expected = evaclip.load(source).model.image.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tower.state_dict().items())


# ------------------------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    ("tree", "loss", "kind", "message"),
    [
        (tiny("EVA02"), None, "open_clip", r"builds EVA towers by timm's names \(eva_giant.*--format timm"),
        ({"name": "tiny-ViT", "text": {"mlp": "gelu"}}, None, "open_clip", "one activation, not quick_gelu and gelu"),
        (tiny("18B"), None, "timm", r"model\.image\.norm is rms_norm, not layer_norm; export it with --format saf"),
        (tiny("EVA01", post_norm=True), None, "timm", "post_norm and model.image.layer_scale are both set, of which"),
        (tiny("EVA02"), None, "hf", r"model\.image\.embed_norm is False, not True.*--format open_clip"),
        (tiny("ViT"), SIGMOID, "hf", "loss.name is sigmoid, whose logit_bias it has not"),
        (tiny("ViT"), None, "eva", r"eva has no place for image\.embed_norm\.weight; .* --format safetensors"),
    ],
)
def test_what_a_tool_cannot_express_is_refused_and_nothing_is_written(
    tmp_path: Path, tree: dict[str, Any], loss: dict[str, Any] | None, kind: Any, message: str
) -> None:
    source = stored(tmp_path, tree, loss)
    with pytest.raises(WeightsError, match=message):
        export(source, tmp_path / "out", kind)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    source = stored(tmp_path, tiny("ViT"))
    (tmp_path / "out").mkdir()
    files = export(source, tmp_path / "out", "safetensors")
    assert len({path.stat().st_mode for path in files}) == 1, "others may read all of it"
    with pytest.raises(WeightsError, match="out is there already; name a new folder"):
        export(source, tmp_path / "out", "safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "eva"])
def test_a_flipped_bit_of_an_export_is_told(tmp_path: Path, kind: Any) -> None:
    export(stored(tmp_path, tiny("EVA01")), tmp_path / "out", kind)
    (weights,) = (path for path in (tmp_path / "out").iterdir() if path.name != "evaclip.json")
    data = bytearray(weights.read_bytes())
    data[-500] ^= 1
    weights.write_bytes(data)
    with pytest.raises(WeightsError, match=rf"{weights.name} differs from its checksum; copy it again"):
        evaclip.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: "{", "cannot be read"),
        (lambda about: json.dumps({**about, "format": 9}), "has format 9, this version reads 1"),
        (lambda about: json.dumps({**about, "model": {"embed_dim": 0}}), "cannot be read"),
    ],
)
def test_a_spoilt_description_is_told(tmp_path: Path, change: Any, message: str) -> None:
    export(stored(tmp_path, tiny("ViT")), tmp_path / "out", "safetensors")
    about = tmp_path / "out" / "evaclip.json"
    about.write_text(change(json.loads(about.read_text())))
    with pytest.raises(WeightsError, match=f"{message}.*export the model again"):
        evaclip.load(tmp_path / "out")


def test_the_command_lists_the_files_and_says_how_to_load_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["export", str(stored(tmp_path, tiny("ViT"))), str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert re.search(r"[\d,]+  .*open_clip_model\.safetensors", told)
    assert f'open_clip.create_model_and_transforms("local-dir:{tmp_path / "out"}")' in told
