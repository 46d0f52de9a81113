"""Towers filled from real timm, open_clip and transformers models compute what those compute; all else is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from models.peers import captions, noise, padded, shake, timm_eva
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import eva
from torch import Tensor, nn
from transformers import CLIPConfig
from transformers import CLIPModel as HuggingFaceClip

from evaclip.config import InfoNceConfig, InitConfig, ModelConfig
from evaclip.data.batch import PackedText
from evaclip.errors import WeightsError
from evaclip.loss import ContrastiveLoss
from evaclip.models.clip import CLIP, create_model
from evaclip.weights.load import initialise_from, load_tower
from evaclip.weights.names import rules

TEXTS = captions([5, 3, 9])
CPU = torch.device("cpu")


def tiny(kind: str, **image: Any) -> CLIP:
    return create_model(ModelConfig.model_validate({"name": f"tiny-{kind}", "image": image}), seed=1)


def peer_of(kind: str) -> nn.Module:
    """timm's tower of the tiny model of a kind, with weights that are not ours."""
    config = ModelConfig(name=f"tiny-{kind}")
    peer = timm_eva(config.image, config.embed_dim)
    shake(peer)
    if not config.image.head_bias:
        nn.init.zeros_(peer.head.bias)  # timm's heads always have one
    return peer.eval()


def under_evas_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of timm's EVA-02 under the names of EVA's own code."""
    names = [
        (r"mlp\.fc1_g\.", "mlp.w1."),
        (r"mlp\.fc1_x\.", "mlp.w2."),
        (r"mlp\.fc2\.", "mlp.w3."),
        (r"attn\.norm\.", "attn.inner_attn_ln."),
        (r"mlp\.norm\.", "mlp.ffn_ln."),
        (r"attn\.([qv])_proj\.bias", r"attn.\1_bias"),
    ]
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        renamed = name
        for pattern, replacement in names:
            renamed = re.sub(pattern, replacement, renamed)
        found[renamed] = value
    return found


# ------------------------------------------------------------------------------------------------------------- reading


def test_these_tests_name_evas_tensors_as_timm_reads_them() -> None:
    peer = peer_of("EVA02")
    again = eva.checkpoint_filter_fn(under_evas_names(peer.state_dict()), peer)
    assert again.keys() == peer.state_dict().keys()


@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
@pytest.mark.parametrize("kind", ["EVA01", "EVA02", "E", "8B", "18B"])
def test_image_towers_of_timm_give_the_same_features_and_gradients(kind: str, prefix: str) -> None:
    peer, model = peer_of(kind), tiny(kind)
    tensors = {f"{prefix}{name}": value for name, value in peer.state_dict().items()}
    report = load_tower(model.image, "image", tensors, "peer", alone=False)
    assert (report.initialised, report.resized) == ([], [])
    assert report.loaded == len(list(model.image.parameters()))
    images = noise(3, 3, 28, 28)
    ours, theirs = model.image(images), peer(images)
    assert (ours - theirs).abs().max() < 1e-5
    ours.square().sum().backward()
    theirs.square().sum().backward()
    mine, yours = model.image.patch_embed.weight.grad, peer.patch_embed.proj.weight.grad
    assert mine is not None
    assert (mine - yours.flatten(1)).norm() < 2e-5 * yours.norm()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("prefix", ["", "visual."])
def test_masked_image_models_of_eva_fill_all_but_head_and_inner_norms(prefix: str, fused: bool) -> None:
    peer, model = peer_of("EVA02"), tiny("EVA02")
    tensors = under_evas_names(peer.state_dict())
    for name in list(tensors):
        if "inner_attn_ln" in name or name.startswith("head."):
            del tensors[name]
    if fused:
        for start in (f"blocks.{layer}.mlp." for layer in range(2)):
            for leaf in ("weight", "bias"):
                tensors[f"{start}w12.{leaf}"] = torch.cat(
                    [tensors.pop(f"{start}{part}.{leaf}") for part in ("w1", "w2")]
                )
    extra = {"mask_token": torch.zeros(1, 1, 32), "rope.freqs_cos": torch.zeros(16, 16)}
    extra |= {"lm_head.weight": torch.zeros(8, 32), "blocks.0.attn.rope.freqs_sin": torch.zeros(16, 16)}
    tensors = {prefix + name: value for name, value in (tensors | extra).items()}
    before = {name: value.clone() for name, value in model.image.state_dict().items()}
    report = load_tower(model.image, "image", tensors, "mim.pt", alone=True)
    assert report.layout == "eva"
    norms = [f"blocks.{layer}.attn.norm.{leaf}" for layer in range(2) for leaf in ("weight", "bias")]
    assert set(report.initialised) == {"head.weight", "head.bias", *norms}
    assert set(report.unused) == set(extra)
    after = model.image.state_dict()
    assert {name for name in after if torch.equal(after[name], before[name])} == set(report.initialised)
    with pytest.raises(WeightsError, match=r"parameters are not there: .*attn\.norm"):
        load_tower(model.image, "image", tensors, "mim.pt", alone=False)
    tensors[f"{prefix}blocks.0.attn.inner_attn_ln.weight"] = torch.ones(32)
    with pytest.raises(WeightsError, match=r"3 parameters are not there"):  # some norms, but not all of them
        load_tower(model.image, "image", tensors, "mim.pt", alone=True)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("kind", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_towers_of_open_clip_and_openai_give_the_same_features(kind: Any, quick: bool) -> None:
    peer, mlp = tiny_open_clip(kind, quick=quick), "quick_gelu" if quick else "gelu"
    tree = {"name": "tiny-ViT", "image": {"mlp": mlp}, "text": {"mlp": mlp}}
    model = create_model(ModelConfig.model_validate(tree), seed=1)
    for report in (
        load_tower(model.image, "image", peer.state_dict(), "peer", alone=False),
        load_tower(model.text, "text", peer.state_dict(), "peer", alone=False),
    ):
        assert (report.layout, report.initialised) == ("openai", [])
    images = noise(3, 3, 28, 28)
    with torch.no_grad():
        assert (model.image(images) - peer.encode_image(images)).abs().max() < 1e-5
        assert (model.text(PackedText.pack(TEXTS)) - peer.encode_text(padded(TEXTS, 77))).abs().max() < 1e-5


def tiny_open_clip(kind: Any = open_clip.CLIP, *, quick: bool = True) -> nn.Module:
    """open_clip's own towers in the shape of tiny-ViT."""
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, mlp_ratio=2, patch_size=7, image_size=28)
    peer = kind(24, vision, CLIPTextCfg(width=32, heads=2, layers=2), quick_gelu=quick)
    shake(peer)
    return peer.eval()


def test_a_folder_of_transformers_gives_the_same_features_and_temperature(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**shape, "intermediate_size": 128, "eos_token_id": 49407, "vocab_size": 49408},
        vision_config={**shape, "intermediate_size": 64, "image_size": 28, "patch_size": 7},
        projection_dim=24,
    )
    peer = HuggingFaceClip(config).eval()
    shake(peer)
    peer.save_pretrained(tmp_path)
    model, loss = tiny("ViT"), ContrastiveLoss(InfoNceConfig(), CPU)
    reports = initialise_from(InitConfig(model=str(tmp_path)), model, loss, 100.0)
    assert [report.layout for report in reports[:2]] == ["hf", "hf"]
    assert not any(report.initialised for report in reports)
    mask = (torch.arange(77) < torch.tensor([[len(text)] for text in TEXTS])).long()
    images = noise(3, 3, 28, 28)
    with torch.no_grad():
        theirs = peer(input_ids=padded(TEXTS, 77), attention_mask=mask, pixel_values=images)
        ours = model(images, PackedText.pack(TEXTS))
    assert (ours.image - theirs.image_embeds).abs().max() < 1e-5
    assert (ours.text - theirs.text_embeds).abs().max() < 1e-5
    assert loss.similarity[0] == pytest.approx(peer.logit_scale.detach().exp().item(), rel=1e-6)


def test_another_activation_than_a_folder_tells_is_refused_and_told_of_a_tower_alone(tmp_path: Path) -> None:
    peer = tiny_open_clip()
    save_file(peer.state_dict(), tmp_path / "open_clip_model.safetensors")
    cases = {
        "config.json": '{"vision_config": {}, "text_config": {}}',  # of transformers, which has quick_gelu by default
        "open_clip_config.json": '{"model_cfg": {"quick_gelu": true, "vision_cfg": {}}}',
    }
    for name, text in cases.items():
        (tmp_path / name).write_text(text)
        loss, model = ContrastiveLoss(InfoNceConfig(), CPU), tiny("ViT", mlp="gelu")
        message = r"was trained with other options; set model\.image\.mlp=quick_gelu \(now gelu\)"
        with pytest.raises(WeightsError, match=message):
            initialise_from(InitConfig(model=str(tmp_path)), model, loss, 100.0)
        (report,) = initialise_from(InitConfig(image=str(tmp_path)), model, loss, 100.0)
        assert report.lines()[-1] == "image: was trained with quick_gelu and has gelu here, as configured"
        (tmp_path / name).unlink()


def test_a_bias_that_the_loss_has_not_is_told(tmp_path: Path) -> None:
    init = InitConfig(model=eva_clip(tmp_path, logit_bias=torch.tensor(-9.0)))
    reports = initialise_from(init, tiny("EVA02"), ContrastiveLoss(InfoNceConfig(), CPU), 100.0)
    assert reports[-1].unused == ["logit_bias (this loss has none)"]


def eva_clip(path: Path, **changes: Tensor) -> str:
    """A published EVA-CLIP file: flat, both towers, rotary tables, temperature."""
    tensors = {f"visual.{name}": value for name, value in under_evas_names(peer_of("EVA02").state_dict()).items()}
    text = tiny_open_clip(open_clip.CustomTextCLIP).state_dict()
    tensors |= {name: value for name, value in text.items() if name.startswith("text.")}
    tensors |= {"visual.rope.freqs_cos": torch.zeros(16, 16), "logit_scale": torch.tensor(3.0)}
    torch.save({name: value for name, value in (tensors | changes).items() if value.numel()}, path / "clip.pt")
    return str(path / "clip.pt")


def test_a_whole_eva_clip_file_fills_both_towers_and_the_temperature(tmp_path: Path) -> None:
    model, loss = tiny("EVA02"), ContrastiveLoss(InfoNceConfig(), CPU)
    reports = initialise_from(InitConfig(model=eva_clip(tmp_path)), model, loss, 100.0)
    assert [(report.layout, report.initialised) for report in reports[:2]] == [("eva", []), ("openai", [])]
    assert loss.similarity.scale == pytest.approx(torch.tensor(3.0).exp().item())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_scale": torch.tensor([])}, "logit_scale is not there; is it a whole CLIP model"),
        ({"logit_scale": torch.tensor(torch.nan)}, "logit_scale is nan, not one finite number"),
        ({"decoder.weight": torch.ones(2)}, r"holds 1 tensors that belong to no tower: decoder\.weight"),
    ],
)
def test_what_a_whole_model_lacks_or_has_beside_its_towers_is_refused(
    tmp_path: Path, changes: dict[str, Tensor], message: str
) -> None:
    loss = ContrastiveLoss(InfoNceConfig(), CPU)
    with pytest.raises(WeightsError, match=message):
        initialise_from(InitConfig(model=eva_clip(tmp_path, **changes)), tiny("EVA02"), loss, 100.0)


def test_a_temperature_is_bounded_and_a_fixed_one_stays(tmp_path: Path) -> None:
    init = InitConfig(model=eva_clip(tmp_path, logit_scale=torch.tensor(6.0)))
    for config, scale in ((InfoNceConfig(), 100.0), (InfoNceConfig(logit_scale=50.0, learn_logit_scale=False), 50.0)):
        loss = ContrastiveLoss(config, CPU)
        initialise_from(init, tiny("EVA02"), loss, 100.0)
        assert loss.similarity.scale == pytest.approx(scale)


def test_the_way_into_another_space_is_drawn_anew_for_a_tower_alone() -> None:
    text = tiny_open_clip().state_dict()
    wider = create_model(ModelConfig.model_validate({"name": "tiny-ViT", "embed_dim": 40}))
    assert load_tower(wider.text, "text", text, "peer", alone=True).initialised == ["projection"]
    with pytest.raises(WeightsError, match="text_projection"):
        load_tower(wider.text, "text", text, "peer", alone=False)
    model, peer = tiny("8B"), peer_of("8B").state_dict()
    peer["head.bias"] = torch.ones(24)
    with pytest.raises(WeightsError, match=r"no place in the model: head\.bias"):  # its head.weight would be loaded
        load_tower(model.image, "image", peer, "peer", alone=True)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "resnet10t"])
def test_a_classifier_of_timm_fills_all_of_its_backbone_but_the_classifier(name: str) -> None:
    image = {"kind": "timm", "model": name, "image_size": 160 if name == "test_vit" else 64}
    text = {"width": 32, "depth": 1, "heads": 2, "mlp_width": 32}
    model = create_model(ModelConfig.model_validate({"embed_dim": 24, "image": image, "text": text}))
    peer = timm.create_model(name, num_classes=1000)
    shake(peer)
    tensors = peer.state_dict()
    report = load_tower(model.image, "image", tensors, "timm.safetensors", alone=True)
    classifier = peer.pretrained_cfg["classifier"]
    assert set(report.initialised) == {f"trunk.{classifier}.{leaf}" for leaf in ("weight", "bias")}
    trunk = model.image.trunk.state_dict()
    others = [key for key in tensors if not key.startswith(classifier) and not key.endswith("num_batches_tracked")]
    assert all(torch.equal(trunk[key], tensors[key]) for key in others)
    with pytest.raises(WeightsError, match=rf"shapes differ: {classifier}\.weight \[1000, "):
        load_tower(model.image, "image", tensors, "timm.safetensors", alone=False)


def test_other_grids_and_patches_are_resampled_as_timm_does() -> None:
    peer, model = peer_of("EVA01"), tiny("EVA01", image_size=40, patch_size=8)
    tensors = peer.state_dict()
    report = load_tower(model.image, "image", tensors, "peer", alone=False)
    assert sorted(line.split(" from ")[0] for line in report.resized) == ["patch_embed.weight", "position_embedding"]
    assert torch.equal(model.image.position_embedding, resample_abs_pos_embed(tensors["pos_embed"], [5, 5])[0])
    patches = resample_patch_embed(tensors["patch_embed.proj.weight"], [8, 8])
    assert torch.equal(model.image.patch_embed.weight, patches.flatten(1))


def test_a_text_tower_of_another_context_is_refused_and_not_resampled() -> None:
    config = ModelConfig.model_validate({"name": "tiny-ViT", "text": {"context_length": 17}})
    longer = ModelConfig.model_validate({"name": "tiny-ViT", "text": {"context_length": 65}})
    tensors = {f"text.{name}": value for name, value in create_model(longer).text.state_dict().items()}
    with pytest.raises(WeightsError, match=r"position_embedding \[65, 32\] where position_embedding needs \[17, 32\]"):
        load_tower(create_model(config).text, "text", tensors, "peer", alone=False)


@pytest.mark.parametrize("kind", ["EVA01", "EVA02", "E", "8B", "18B", "ViT"])
@pytest.mark.parametrize(
    ("tower", "layout"),
    [*(("image", layout) for layout in ("eva", "timm", "openai", "hf")), ("text", "openai"), ("text", "hf")],
)
def test_every_rule_read_backwards_and_forwards_gives_the_same_bits(kind: str, layout: Any, tower: Any) -> None:
    parameters = dict(tiny(kind).get_submodule(tower).named_parameters())
    table = rules(tower, layout, parameters)
    assert sorted(name for rule in table for name in rule.ours) == sorted(parameters)
    for rule in table:
        joined = torch.cat([parameters[name] for name in rule.ours])
        assert torch.equal(rule.to_ours(rule.to_theirs(joined)), joined), rule


# ------------------------------------------------------------------------------------------------------------- refusing

Spoil = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Spoil:
    return lambda tensors: {**tensors, name: change(tensors[name])}


SPOILT: dict[str, tuple[str, Spoil, str]] = {
    "a missing parameter": (
        "EVA01",
        lambda tensors: {name: value for name, value in tensors.items() if name != "blocks.1.mlp.fc2.bias"},
        r"1 parameters are not there: blocks\.1\.mlp\.fc2\.bias",
    ),
    "a tensor more": (
        "EVA01",
        lambda tensors: {**tensors, "blocks.2.norm1.weight": torch.ones(32)},
        r"no place in the model: blocks\.2\.norm1\.weight",
    ),
    "another width": (
        "EVA01",
        changed("blocks.0.mlp.fc1.weight", lambda value: value[:60]),
        r"shapes differ: blocks\.0\.mlp\.fc1\.weight \[60, 32\] where blocks\.0\.mlp\.fc1\.weight needs \[64, 32\]",
    ),
    "quantised weights": (
        "EVA01",
        changed("blocks.1.mlp.fc1.weight", lambda value: value.to(torch.int8)),
        r"blocks\.1\.mlp\.fc1\.weight is torch\.int8; quantised weights cannot be read",
    ),
    "a transposed matrix": ("EVA01", changed("blocks.0.mlp.fc2.weight", torch.t), r"fc2\.weight \[64, 32\] where"),
    "a grid that is no square": (
        "EVA01",
        changed("pos_embed", lambda value: value[:, :12]),
        r"pos_embed \[1, 12, 32\]",
    ),
    "a bias that we lack": ("8B", changed("head.bias", torch.ones_like), r"no place in the model: head\.bias"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(fault: str) -> None:
    kind, spoil, message = SPOILT[fault]
    model = tiny(kind)
    before = {name: value.clone() for name, value in model.image.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        load_tower(model.image, "image", spoil(peer_of(kind).state_dict()), "peer.pt", alone=False)
    assert all(torch.equal(value, before[name]) for name, value in model.image.state_dict().items())


def test_values_that_are_not_finite_are_refused() -> None:
    for value in (torch.nan, -torch.inf):
        spoilt = changed("norm.weight", lambda tensor, value=value: tensor + value)(peer_of("EVA01").state_dict())
        with pytest.raises(
            WeightsError, match=r"peer\.pt: image\.norm\.weight holds infinities or NaN; the file is damaged"
        ):
            load_tower(tiny("EVA01").image, "image", spoilt, "peer.pt", alone=False)


def test_the_other_tower_and_another_format_are_refused() -> None:
    tensors = tiny_open_clip().state_dict()
    text = {name: value for name, value in tensors.items() if not name.startswith("visual.")}
    with pytest.raises(
        WeightsError, match=r"is not this image tower; .*(?s:.*) no place in the model: text_projection"
    ):
        load_tower(tiny("ViT").image, "image", text, "peer.pt", alone=True)
    with pytest.raises(WeightsError, match=r"does not hold this image tower: .* it begins with positional_embedding"):
        load_tower(tiny("EVA02").image, "image", text, "peer.pt", alone=True)
    with pytest.raises(WeightsError, match="does not hold this image tower in format hf"):
        load_tower(tiny("ViT").image, "image", tensors, "peer.pt", "hf", alone=True)
