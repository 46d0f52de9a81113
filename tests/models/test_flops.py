from __future__ import annotations

import pytest
import torch
from peers import captions
from torch.utils.flop_counter import FlopCounterMode

from evaclip.config import ModelConfig
from evaclip.data.batch import PackedText
from evaclip.models.attention import use_kernel
from evaclip.models.clip import create_model
from evaclip.models.flops import forward_flops

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
    kept = 8 if token_drop else None
    assert forward_flops(config, float(length), kept=kept) == counter.get_total_flops() - unneeded


def test_large_tower_costs_what_is_published() -> None:
    # timm's model card of eva02_large_patch14_224: 81.1 G multiply-adds.
    assert forward_flops(ModelConfig(name="EVA02-CLIP-L-14"), 0.0) == pytest.approx(2 * 81.1e9, rel=0.005)
