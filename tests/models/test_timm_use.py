"""What is done with towers of timm: what is refused, how they learn, and what is done to them from outside."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peers import gradients
from timm.optim import param_groups_layer_decay
from timm_towers import SEEDS, TEXT, TOKENS, bare, build, config_of, images_of, shared
from torch import Tensor, nn

from evaclip.config import LambConfig, LossConfig, ModelConfig, TrainConfig
from evaclip.data.batch import PackedText
from evaclip.engine.prepare import prepare
from evaclip.errors import ConfigError
from evaclip.freezing import freeze
from evaclip.models.clip import CLIP
from evaclip.models.timm_parts import Drawing, replace_parts
from evaclip.optim.table import parameter_table

# ------------------------------------------------------------------------------------------------------------- refusals

REFUSED = [
    ({"model": "vit_bas_patch16_224"}, r"has no model 'vit_bas_patch16_224'; near it are vit_base_patch16_224"),
    ({"model": "hf-hub:timm/x"}, r"has no model 'hf-hub:timm/x'; timm\.list_models\(\) has all"),
    ({"model": "resnet18.nobody"}, "timm cannot build resnet18.nobody .*: Invalid pretrained tag"),
    (
        {"model": "test_vit", "pool": "median"},
        "timm cannot build test_vit with image_size 32 and pool median: (Only|it)",
    ),
    ({"model": "test_vit", "pool": ""}, r"test_vit makes \[2, 5, 24\] of 2 images, not \[2, 24\]; .*pool"),
    ({"model": "test_vit", "projection": "none"}, r"makes \[2, 64\] of 2 images, not \[2, 24\]; .*projection \(none\)"),
    ({"model": "test_vit", "image_size": 30}, "30 is not a multiple of 16, the patch size of .*; use 16"),
    ({"model": "samvit_base_patch16_224", "image_size": 224, "token_drop": 0.5}, "needs its patches in full rows and"),
    ({"model": "mobilenetv5_300m_enc", "projection": "linear"}, "it ends in tokens or maps, not in fea"),
    ({"model": "test_convnext", "image_size": 8}, "test_convnext does not take 8 x 8 images like this: .*alculated"),
    ({"model": "test_convnext", "token_drop": 0.5}, "token_drop 0.5: timm's test_convnext has no place where patches"),
    ({"model": "hiera_tiny_224", "image_size": 224, "token_drop": 0.5}, "token_drop 0.5: timm's hiera_tiny_224 has no"),
    ({"model": "densenet121", "drop_path": 0.1}, "drop_path 0.1: timm's densenet121 has no branches that a sample"),
    ({"model": "mixer_s16_224", "drop_path": 0.1}, r"blocks\.0\.drop_path of timm's mixer_s16_224 serves 2 branches"),
    (
        {"model": "mobilevit_xxs", "image_size": 256, "drop_path": 0.1},
        "drop_path: a branch of this timm model has 8 rows for 2 samples, so that they cannot skip it; set it to 0",
    ),
    ({"model": "hrnet_w18_small", "drop_path": 0.1}, "drop_path 0.1: timm's hrnet_w18_small has no branches that a"),
    ({"model": "ghostnet_050"}, r"the model itself would draw random numbers in training \(bernoulli_\)"),
    (
        {"model": "bat_resnext26ts", "image_size": 256},
        r"stages\.0\.0\.attn\.dropout and \d other modules would draw random numbers in training \(bernoulli_\)",
    ),
    ({"model": "csatv2"}, r"csatv2: stem_dct\.transform\.transform\.weights is no parameter, so checkpoints would"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[next(iter(o.values())) for o, _ in REFUSED])
def test_what_cannot_be_answered_for_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**{"image_size": 32, **options})


def test_a_place_to_drop_patches_that_is_never_passed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(self: Any, x: Tensor, **_: Any) -> Tensor:
        return self.norm(self.blocks(self._pos_embed(self.patch_embed(x))))

    monkeypatch.setattr("timm.models.vision_transformer.VisionTransformer.forward_features", without)
    with pytest.raises(ConfigError, match=r"token_drop 0\.5: timm's test_vit has no place .*; set it to 0"):
        build("vit", token_drop=0.5)


def test_a_model_made_for_images_of_no_whole_number_of_patches_is_taken_as_it_is() -> None:
    tower = {"kind": "timm", "model": "vit_so400m_patch14_siglip_384", "image_size": 384, "projection": "none"}
    with torch.device("meta"):
        model = CLIP(ModelConfig.model_validate({"embed_dim": 1152, "image": tower, "text": TEXT}))
    assert model.image.trunk.pos_embed.shape[1] == 27**2


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm(4), nn.BatchNorm2d(4, track_running_stats=False)])
def test_norms_that_cannot_be_frozen_are_refused(norm: nn.Module) -> None:
    message = rf"resnet18: 1 is a {type(norm).__name__}, whose statistics cannot be frozen; choose a model with other"
    with pytest.raises(ConfigError, match=message):
        replace_parts(nn.Sequential(nn.ReLU(), norm), Drawing(), config_of("resnet18").image)


def test_images_of_another_size_or_kind_are_refused() -> None:
    model = shared("vit")
    with pytest.raises(ValueError, match=r"this tower takes \[batch, 3, 48, 48\]"):
        model.image(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"images are torch\.int64; give uint8 pixels"):
        model.image(torch.zeros(1, 3, 48, 48, dtype=torch.int64))


# -------------------------------------------------------------------------------------------------- what learns and how


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_rates_and_decays_by_layer_are_timms(kind: str) -> None:
    model = build(kind)
    peer = bare(model)
    groups = param_groups_layer_decay(peer, 0.1, peer.no_weight_decay() if kind == "vit" else (), layer_decay=0.7)
    names = {id(parameter): name for name, parameter in peer.named_parameters()}
    expected = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    optim = LambConfig.model_validate({"lr": 1.0, "weight_decay": 0.1, "image": {"layer_decay": 0.7}})
    shapes = {f"image.{name}": tuple(p.shape) for name, p in model.image.named_parameters()}
    rows = parameter_table(shapes, optim, model.config, LossConfig(), model.image.layers())
    assert len({row.lr for row in rows}) > 5
    for row in rows:
        lr, decay = expected[row.name.removeprefix("image.trunk.")]
        assert (row.lr, row.weight_decay) == (pytest.approx(lr), decay)


def test_a_projection_stands_above_the_trunk_and_gains_do_not_adapt() -> None:
    model = build("convnext", projection="linear")
    optim = LambConfig.model_validate({"lr": 1.0, "trust_ratio": "all", "image": {"layer_decay": 0.5}})
    shapes = {f"image.{name}": tuple(p.shape) for name, p in model.image.named_parameters()}
    rows = {row.name: row for row in parameter_table(shapes, optim, model.config, LossConfig(), model.image.layers())}
    assert rows["image.head.proj.weight"].lr == 1.0
    assert rows["image.trunk.head.norm.weight"].lr == 0.5
    assert rows["image.trunk.stages.0.blocks.0.conv_dw.bias"].adapts
    gains = [row.name for row in rows.values() if not row.adapts]
    assert gains
    assert all(name.endswith(("norm.weight", "gamma", "stem.1.weight", "downsample.0.weight")) for name in gains)


def test_what_goes_by_layers_needs_a_model_whose_layers_are_known() -> None:
    model = build("pit_ti_224", image_size=224)
    shapes = {f"image.{name}": tuple(p.shape) for name, p in model.image.named_parameters()}
    arguments = model.config, LossConfig(), model.image.layers()
    assert len(parameter_table(shapes, LambConfig(), *arguments)) == len(shapes)
    for options, remedy in (({"layer_decay": 0.8}, "set it to 1"), ({"freeze": 2}, "freeze all, or 0")):
        message = rf"{next(iter(options))} .*: timm does not say in which layers the parameters .*; {remedy}"
        with pytest.raises(ConfigError, match=message):
            parameter_table(shapes, LambConfig.model_validate({"image": options}), *arguments)
    freeze(model, LambConfig.model_validate({"image": {"freeze": "all"}}))
    assert not any(parameter.requires_grad for parameter in model.image.parameters())


# -------------------------------------------------------------------------------------------- what is done from outside


def loss_and_gradients(model: CLIP, **train: Any) -> tuple[Tensor, dict[str, Tensor]]:
    options = {"steps": 1, "global_batch": 3, "precision": "fp32", **train}
    towers = prepare(model, TrainConfig.model_validate(options), torch.device("cpu"))
    features = towers(images_of(model), PackedText.pack([[1, 2]] * 3), SEEDS)
    loss = (features.image @ features.text.T).square().sum()
    loss.backward()
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients(model.image).items()}


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_checkpointed_blocks_see_the_same_draw(kind: str) -> None:
    options = {"drop_path": 0.5, **({"token_drop": 0.5} if kind in TOKENS else {})}
    loss, expected = loss_and_gradients(build(kind, **options))
    again, found = loss_and_gradients(build(kind, **options), activation_checkpointing=True)
    assert torch.equal(loss, again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_give_the_same_numbers(checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    loss, expected = loss_and_gradients(build(drop_path=0.5, token_drop=0.5))
    monkeypatch.setattr(torch, "compile", compiled)
    again, found = loss_and_gradients(
        build(drop_path=0.5, token_drop=0.5), compile=True, activation_checkpointing=checkpointed
    )
    assert torch.allclose(loss, again, rtol=1e-6)
    for name, gradient in found.items():  # autograd's own order of sums
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"compile": True}])
def test_a_trunk_without_blocks_is_not_taken_block_by_block(options: dict[str, bool]) -> None:
    with pytest.raises(ConfigError, match="timm's densenet121 has no blocks under the usual names; set both to false"):
        loss_and_gradients(build("densenet121"), **options)


@pytest.mark.parametrize("precision", ["bf16", "bf16_weights"])
@pytest.mark.parametrize("kind", ["eva02", "test_resnet"])
def test_16_bits_give_nearly_the_same_features(kind: str, precision: str) -> None:
    model = shared(kind)
    images, text = images_of(model), PackedText.pack([[1, 2]] * 3)
    with torch.no_grad():
        expected = model.encode_image(images, normalize=True)
        copy = build(kind)
        copy.load_state_dict(model.state_dict())
        train = TrainConfig.model_validate({"steps": 1, "global_batch": 3, "precision": precision})
        found = prepare(copy, train, torch.device("cpu"))(images, text, None).image
    assert found.dtype == torch.float32
    assert F.cosine_similarity(found, expected).min() > 0.995


def test_a_trunk_that_would_compute_otherwise_in_training_does_not() -> None:
    model = build("vit")
    assert model.training
    assert not any(part.training for part in model.image.trunk.modules())
    assert model.train().image.head.training
    assert not model.image.trunk.training
