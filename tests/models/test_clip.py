from __future__ import annotations

from functools import partial

import open_clip
import pytest
import torch
from peers import (
    captions,
    gradients,
    load_image,
    load_text,
    noise,
    open_clip_text_tensors,
    padded,
    randomise,
    timm_tensors,
    weights,
)
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint

from evaclip.config import ModelConfig
from evaclip.data.batch import PackedText
from evaclip.models.clip import CLIP, create_model
from evaclip.models.initial import initialise

SMALL = {
    "embed_dim": 24,
    "image": {
        "image_size": 32,
        "patch_size": 8,
        "width": 32,
        "depth": 3,
        "heads": 2,
        "mlp_width": 48,
        "mlp": "swiglu",
        "sub_norm": True,
        "rope": True,
        "token_drop": 0.5,
        "drop_path": 0.2,
    },
    "text": {"width": 32, "depth": 2, "heads": 2, "mlp_width": 64},
}
CONFIG = ModelConfig.model_validate(SMALL)
TEXTS = captions([9, 3, 5, 9])


def with_image(**options: object) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL, "image": {**SMALL["image"], **options}})


def pixels(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, 32, 32), generator=generator, dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------------------- peers


def test_base_model_equals_open_clips_end_to_end() -> None:
    with torch.device("meta"):
        model = CLIP(ModelConfig(name="EVA02-CLIP-B-16"))
    randomise(model.to_empty(device="cpu"))
    peer = open_clip.create_model("EVA02-B-16", pretrained=None)
    load_image(peer.visual.trunk, model.image)
    load_text(peer.text, model.text)
    images, texts = noise(1, 3, 224, 224), captions([30])
    ours = model(images, PackedText.pack(texts))
    theirs = peer(images, padded(texts, 77))[:2]
    direction = noise(1, 512, seed=1)
    for mine, yours in zip(ours, theirs, strict=True):
        assert cosine_similarity(mine, yours).min() > 0.99999
        (mine * direction).sum().backward()
        (yours * direction).sum().backward()

    image = timm_tensors(gradients(model.image), model.image), gradients(peer.visual.trunk)
    text = open_clip_text_tensors(gradients(model.text)), gradients(peer.text)
    for mine, yours in (image, text):
        assert mine.keys() == yours.keys()
        for name in mine:
            cosine = cosine_similarity(mine[name].flatten(), yours[name].flatten(), dim=0)
            assert cosine > 0.99999, f"{name}: {cosine}"


# ---------------------------------------------------------------------------------------------------------- features


def test_features_are_unit_vectors_in_fp32_under_autocast_too() -> None:
    model = create_model(CONFIG)
    images, text = pixels(4), PackedText.pack(TEXTS)
    exact = model(images, text)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images, text)
        raw = model.encode_image(images), model.encode_text(text)
    assert all(features.dtype == torch.float32 for features in (*exact, *rounded, *raw))
    for features in (*exact, *rounded):
        assert torch.allclose(features.norm(dim=-1), torch.ones(4), atol=1e-6)
    for features, reference in zip(rounded, exact, strict=True):
        assert cosine_similarity(features, reference).min() > 0.999  # 8 bits, 3 blocks
        assert not torch.equal(features, reference)


def test_encoding_a_tower_alone_equals_forward() -> None:
    model = create_model(CONFIG)
    images, text, seeds = pixels(4), PackedText.pack(TEXTS), torch.arange(4)
    both = model(images, text, seeds)
    assert torch.equal(model.encode_image(images, normalize=True, seeds=seeds), both.image)
    assert torch.equal(model.encode_text(text, normalize=True), both.text)
    raw = model.encode_image(images, seeds=seeds)
    assert torch.allclose(raw / raw.norm(dim=-1, keepdim=True), both.image, atol=1e-6)
    assert not torch.equal(raw, both.image)


def test_model_is_deterministic_without_seeds_and_replays_with_them() -> None:
    model = create_model(CONFIG).train()
    images, text = pixels(4), PackedText.pack(TEXTS)
    plain = model(images, text).image
    first = model(images, text, torch.arange(4)).image
    assert torch.equal(plain, model(images, text).image)
    assert torch.equal(first, model(images, text, torch.arange(4)).image)
    assert not torch.equal(first, plain)
    assert not torch.equal(first, model(images, text, torch.arange(4) + 1).image)


# --------------------------------------------------------------------------------------------------- initial weights


def test_initial_weights_have_the_stated_deviation() -> None:
    model = create_model(CONFIG)
    linear = 0.64 * 32**-0.5  # EVA-CLIP's 0.02 at width 1024
    expected = {
        "image.patch_embed.weight": 0.02,
        "image.position_embedding": 0.02,
        "image.blocks.1.attn.qkv.weight": linear,
        "image.blocks.1.attn.proj.weight": linear / 4**0.5,
        "image.blocks.2.mlp.w3.weight": linear / 6**0.5,
        "image.head.weight": 32**-0.5,
        "text.token_embedding.weight": 0.02,
        "text.position_embedding": 0.01,
        "text.blocks.0.attn.qkv.weight": 32**-0.5,
        "text.blocks.1.attn.proj.weight": 32**-0.5 * 4**-0.5,
        "text.blocks.1.mlp.fc1.weight": 64**-0.5,
        "text.blocks.1.mlp.fc2.weight": 32**-0.5 * 4**-0.5,
        "text.projection": 32**-0.5,
    }
    for name, std in expected.items():
        values = model.get_parameter(name)
        # The deviation of n values is known to 1 / sqrt(2 n), its mean to 1 / sqrt(n): five times that.
        assert values.std().item() == pytest.approx(std, rel=5 / (2 * values.numel()) ** 0.5), name
        assert abs(values.mean().item()) < 5 * std / values.numel() ** 0.5, name


def test_gains_start_at_one_biases_at_zero_and_layer_scale_at_its_value() -> None:
    model = create_model(with_image(layer_scale=0.1, mlp="gelu"))
    constants = {"image.blocks.0.scale1": 0.1, "image.blocks.2.scale2": 0.1}
    for name, _ in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            constants[name] = 1.0
        elif name.endswith("bias"):
            constants[name] = 0.0
    assert len(constants) > 40
    for name, value in constants.items():
        assert torch.equal(model.get_parameter(name), torch.full_like(model.get_parameter(name), value)), name


def test_initial_weights_are_a_function_of_seed_and_name_alone() -> None:
    deep, shallow = (weights(create_model(with_image(depth=depth), seed=3)) for depth in (3, 1))
    shared = [name for name in shallow if name.startswith("image.")]
    assert len(shared) > 10
    assert all(torch.equal(shallow[name], deep[name]) for name in shared)
    assert all(
        torch.equal(a, b) for a, b in zip(deep.values(), weights(create_model(CONFIG, seed=3)).values(), strict=True)
    )
    other = weights(create_model(CONFIG, seed=4))
    drawn = [name for name in deep if deep[name].std() > 0]
    assert len(drawn) > 20
    assert not any(torch.equal(deep[name], other[name]) for name in drawn)


def test_no_two_parameters_start_equal() -> None:
    drawn = [values.flatten()[:8].tolist() for values in weights(create_model(CONFIG)).values() if values.std() > 0]
    assert len(drawn) > 20
    assert len({tuple(values) for values in drawn}) == len(drawn)


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    create_model(CONFIG)
    assert torch.equal(torch.rand(3), expected)


def test_a_parameter_without_a_rule_is_an_error_that_names_it() -> None:
    model = CLIP(CONFIG)
    model.image.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"^image.extra was not initialised; add a rule to evaclip/models/initial"):
        initialise(model, CONFIG, seed=0)


def test_a_model_built_without_memory_equals_one_built_in_place() -> None:
    model, plain = create_model(CONFIG), CLIP(CONFIG)
    initialise(plain, CONFIG, seed=0)
    images, text = pixels(4), PackedText.pack(TEXTS)
    for lazy, direct in zip(model(images, text, torch.arange(4)), plain(images, text, torch.arange(4)), strict=True):
        assert torch.equal(lazy, direct)


# ------------------------------------------------------------------------------------------- what is done from outside


def loss_and_gradients(model: CLIP) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    features = model(pixels(4), PackedText.pack(TEXTS, 16), torch.arange(4))
    loss = (features.image @ features.text.T).square().sum()
    loss.backward()
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients(model).items()}


def test_checkpointed_blocks_give_the_same_bits() -> None:
    model = create_model(CONFIG)
    loss, expected = loss_and_gradients(model)
    for block in (*model.image.blocks, *model.text.blocks):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    again, found = loss_and_gradients(model)
    assert torch.equal(loss, again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Dynamo looks at the gradient of tensors that are no leaves and hides its own warning, but not where it is an error.
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_compiled_blocks_give_the_same_numbers() -> None:
    model = create_model(CONFIG)
    loss, expected = loss_and_gradients(model)
    for block in model.image.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for block in model.text.blocks:
        block.compile(backend="aot_eager")  # grouping by length stays outside of the graph
    again, found = loss_and_gradients(model)
    assert torch.allclose(loss, again, rtol=1e-6)
    for name, gradient in found.items():  # autograd's own order of sums
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_every_parameter_is_used_by_its_own_module_alone() -> None:
    """What ZeRO-3 relies on: a module's parameters exist only while it runs."""
    model = create_model(with_image(layer_scale=0.1))
    images, text = pixels(4), PackedText.pack(TEXTS, 16)
    expected = model(images, text, torch.arange(4))
    kept = weights(model)
    full = {parameter: kept[name].clone() for name, parameter in model.named_parameters()}

    def gather(module: nn.Module, _args: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = full[parameter]

    def release(module: nn.Module, _args: object, _out: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module, None, None)
    with torch.no_grad():
        found = model(images, text, torch.arange(4))
    assert torch.equal(found.image, expected.image)
    assert torch.equal(found.text, expected.text)
