import math

import pytest
import torch

from evaclip.config import AdamWConfig, LambConfig, LossConfig, ModelConfig
from evaclip.models.clip import CLIP
from evaclip.optim.table import is_frozen, layer_of, parameter_table, summary

MODEL = ModelConfig.model_validate(
    {
        "embed_dim": 8,
        "image": {
            "image_size": 16,
            "patch_size": 8,
            "width": 16,
            "depth": 3,
            "heads": 2,
            "mlp_width": 24,
            "layer_scale": 0.1,
        },
        "text": {"width": 16, "depth": 2, "heads": 2, "mlp_width": 24},
    }
)
TOWERS = {"image": {"lr": 2e-4, "layer_decay": 0.5}, "text": {"lr": 2e-5, "weight_decay": 0.2, "layer_decay": 0.1}}


def shapes():
    with torch.device("meta"):
        clip = CLIP(MODEL)
    return {name: tuple(p.shape) for name, p in clip.named_parameters()} | {"logit_scale": (1,)}


def table(**options):
    return {row.name: row for row in parameter_table(shapes(), LambConfig(**TOWERS, **options), MODEL, LossConfig())}


def test_every_parameter_has_exactly_one_row():
    rows = parameter_table(shapes(), LambConfig(), MODEL, LossConfig())
    assert [row.name for row in rows] == list(shapes())
    assert sum(row.numel for row in rows) == sum(math.prod(shape) for shape in shapes().values())


def test_learning_rates_follow_tower_and_layer():
    rows = table()
    assert rows["image.head.weight"].lr == pytest.approx(2e-4)
    assert rows["image.blocks.2.mlp.fc1.weight"].lr == pytest.approx(1e-4)
    assert rows["image.blocks.0.attn.qkv.weight"].lr == pytest.approx(0.25e-4)
    assert rows["image.patch_embed.weight"].lr == pytest.approx(0.125e-4)
    assert rows["image.class_token"].lr == rows["image.position_embedding"].lr == rows["image.patch_embed.weight"].lr
    assert rows["text.projection"].lr == pytest.approx(2e-5)
    assert rows["text.token_embedding.weight"].lr == pytest.approx(2e-8)
    assert rows["logit_scale"].lr == 5e-4


def test_matrices_decay_and_vectors_positions_and_the_logit_scale_do_not():
    rows = table()
    assert rows["image.blocks.0.attn.qkv.weight"].weight_decay == 0.05
    assert rows["text.token_embedding.weight"].weight_decay == 0.2
    still = ["image.norm.weight", "image.blocks.0.mlp.fc1.bias", "image.class_token", "image.position_embedding"]
    assert {rows[name].weight_decay for name in [*still, "text.position_embedding", "logit_scale"]} == {0.0}


def test_trust_ratios_are_for_decayed_rows_or_for_all_but_gains_and_the_logit_scale():
    decayed, everything = table(), table(trust_ratio="all")
    assert all(row.adapts == (row.weight_decay > 0) for row in decayed.values())
    assert {name for name, row in everything.items() if not row.adapts} == {
        name for name in shapes() if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "scale1", "scale2"))
    } | {"logit_scale"}
    adamw = parameter_table(shapes(), AdamWConfig(name="adamw"), MODEL, LossConfig())
    assert not any(row.adapts for row in adamw)


def test_logit_scale_is_bounded_by_the_log_of_its_maximum():
    assert table()["logit_scale"].upper_bound == pytest.approx(math.log(100))


@pytest.mark.parametrize("name", ["audio.head.weight", "image.adapter.weight"])
def test_names_without_a_rule_are_refused(name):
    with pytest.raises(ValueError, match=r"name its rule in optim/table\.py"):
        parameter_table({name: (2, 2)}, LambConfig(), MODEL, LossConfig())


def test_layers_are_counted_from_the_embeddings():
    names = ["patch_embed.bias", "blocks.0.norm1.weight", "blocks.11.attn.proj.bias", "norm.weight", "head.bias"]
    assert [layer_of(name, 12) for name in names] == [0, 1, 12, 13, 13]


@pytest.mark.parametrize("depth", [1, 3])
def test_embeddings_and_blocks_up_to_a_depth_are_frozen(depth):
    optim = LambConfig.model_validate({"image": {"freeze": depth}})
    frozen = {name for name in shapes() if name != "logit_scale" and is_frozen(name, optim, MODEL)}
    kinds = ("image.patch_embed.", "image.class_token", "image.position_embedding", "image.embed_norm.")
    expected = (*kinds, *(f"image.blocks.{block}." for block in range(depth)))
    assert frozen == {name for name in shapes() if name.startswith(expected)}
    assert len(frozen) > depth * 10


def test_a_whole_tower_is_frozen_or_nothing():
    names = [name for name in shapes() if name != "logit_scale"]
    whole = LambConfig.model_validate({"text": {"freeze": "all"}})
    assert {name for name in names if is_frozen(name, whole, MODEL)} == {n for n in names if n.startswith("text.")}
    assert not any(is_frozen(name, LambConfig(), MODEL) for name in names)


def test_what_belongs_to_no_tower_cannot_be_frozen():
    with pytest.raises(ValueError, match=r"belongs to no tower; name its rule in optim/table\.py"):
        is_frozen("audio.head.weight", LambConfig(), MODEL)


def test_description_accounts_for_every_parameter():
    rows = parameter_table(shapes(), LambConfig(), MODEL, LossConfig())
    learning, frozen = rows[:-5], {row.name: row.shape for row in rows[-5:]}
    lines = summary(learning, frozen)
    assert sum(int(line.split(" tensors")[0].split()[-1]) for line in lines) == len(rows)
    told = sum(int(line.split()[-2].replace(",", "")) for line in lines)
    assert told == sum(row.numel for row in rows)
    assert [line.split()[:2] for line in lines[-2:]] == [["text", "frozen"], ["logit_scale", "frozen"]]
    assert len({line.index(" tensors") for line in lines}) == 1, "aligned"
