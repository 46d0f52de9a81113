from __future__ import annotations

import pytest
import torch
from peers import captions
from torch.utils.flop_counter import FlopCounterMode

from evaclip.config import Freeze, LambConfig, ModelConfig
from evaclip.data.batch import PackedText
from evaclip.freezing import freeze
from evaclip.models.attention import use_kernel
from evaclip.models.clip import create_model
from evaclip.models.flops import forward_flops, training_flops

TEXT = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 96}


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("token_drop", [0.0, 0.5])
def test_count_equals_torchs_counter(mlp: str, token_drop: float) -> None:
    image = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "heads": 2, "mlp_width": 40, "mlp": mlp}
    config = ModelConfig.model_validate(
        {"embed_dim": 24, "image": {**image, "token_drop": token_drop, "rope": True}, "text": TEXT}
    )
    model, length = create_model(config), 10
    counter = FlopCounterMode(display=False)
    with use_kernel("reference"), counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32), PackedText.pack(captions([length])), torch.zeros(1, dtype=torch.int64))
    # The reference multiplies the whole square of scores, of which causal attention needs the lower half.
    unneeded = 2 * 2 * TEXT["depth"] * TEXT["width"] * (length**2 - length * (length + 1) / 2)
    assert forward_flops(config, float(length), training=True) == counter.get_total_flops() - unneeded


@pytest.mark.parametrize("frozen", [("all", 1), (1, 2), (3, "all"), (2, 0), (0, 0)])
def test_count_of_a_step_equals_torchs_counter(frozen: tuple[Freeze, Freeze]) -> None:
    image = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 3, "heads": 2, "mlp_width": 40}
    config = ModelConfig.model_validate({"embed_dim": 24, "image": image, "text": TEXT})
    model, length = create_model(config), 10
    freeze(model, LambConfig.model_validate({"image": {"freeze": frozen[0]}, "text": {"freeze": frozen[1]}}))
    counter = FlopCounterMode(display=False)
    with use_kernel("reference"), counter:
        features = model(torch.zeros(1, 3, 32, 32), PackedText.pack(captions([length])))
        (features.image.sum() + features.text.sum()).backward()
    # The reference multiplies the whole square of scores, of which causal attention needs the lower half.
    learning = TEXT["depth"] - (TEXT["depth"] if frozen[1] == "all" else frozen[1])
    unneeded = 2 * 2 * TEXT["width"] * (length**2 - length * (length + 1) / 2) * (TEXT["depth"] + 2 * learning)
    pixels = 2 * 16 * 3 * 8**2 * 48 if frozen[0] == 0 else 0  # backward stops before the pixels, which no formula knows
    counted = training_flops(config, float(length), frozen=frozen)
    assert counted == counter.get_total_flops() - unneeded + pixels


def test_a_tower_of_timm_costs_what_ours_of_the_same_shape_does() -> None:
    image = {"kind": "timm", "model": "vit_base_patch16_clip_224", "token_drop": 0.5}
    ours = ModelConfig.model_validate({"name": "ViT-B-16", "image": {"token_drop": 0.5}})
    timms = ModelConfig.model_validate({"embed_dim": 512, "image": image, "text": ours.text.model_dump()})
    embedded = 2 * 98 * 3 * 16**2 * 768  # timm embeds what it then drops
    assert forward_flops(timms, 20.0) == forward_flops(ours, 20.0)
    for frozen, passes in (((0, 0), 3), (("all", 0), 1)):
        counted = training_flops(timms, 20.0, frozen=frozen)
        assert counted == training_flops(ours, 20.0, frozen=frozen) + passes * embedded


def test_large_tower_costs_what_is_published() -> None:
    # timm's model card of eva02_large_patch14_224: 81.1 G multiply-adds.
    assert forward_flops(ModelConfig(name="EVA02-CLIP-L-14"), 0.0) == pytest.approx(2 * 81.1e9, rel=0.005)


def test_operations_are_counted_where_a_parameter_is_a_modules_input() -> None:
    image = {"kind": "timm", "model": "test_vit", "image_size": 160, "pool": "map"}  # whose query is a parameter
    text = {"width": 32, "depth": 1, "heads": 2, "mlp_width": 32}
    config = ModelConfig.model_validate({"embed_dim": 24, "image": image, "text": text})
    assert forward_flops(config, 5.0, training=True) > 1e6
