"""Gradients from micro-batches against those of the whole batch, in double precision."""

import itertools

import pytest
import torch
from tiny import tiny_config

from evaclip.accumulation import forward_backward
from evaclip.config import InfoNceConfig, SigmoidConfig
from evaclip.data.batch import Batch, PackedText
from evaclip.distributed import Ranks
from evaclip.engine.prepare import PreparedTowers
from evaclip.freezing import freeze
from evaclip.loss import ContrastiveLoss
from evaclip.models.clip import create_model

SAMPLES = 16


class DoubleEngine:
    """The least that an engine is, in double precision."""

    def __init__(self, clip):
        self.clip = clip.double()
        self.towers = PreparedTowers(self.clip, "fp32", torch.device("cpu"))

    def forward(self, batch, *, last, known=None):
        return self.towers(batch.images, batch.text, batch.seeds, known)

    def backward(self, surrogate):
        surrogate.backward()


def batches(pieces):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (SAMPLES, 3, 16, 16), dtype=torch.uint8, generator=generator)
    lengths = torch.randint(2, 16, (SAMPLES,), generator=generator).tolist()
    captions = [torch.randint(0, 49408, (length,), generator=generator).tolist() for length in lengths]
    seeds = torch.randint(0, 1 << 62, (SAMPLES,), generator=generator)
    bounds = [number * SAMPLES // pieces for number in range(pieces + 1)]
    parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
    return [Batch(images[part], PackedText.pack(captions[part]), seeds[part]) for part in parts]


def gradients(loss_config, pieces, **changes):
    config = tiny_config("unused", **changes)
    clip = create_model(config.model, seed=0)
    freeze(clip, config.optim)
    engine = DoubleEngine(clip)
    loss = ContrastiveLoss(loss_config, torch.device("cpu")).double()
    output = forward_backward(engine, loss, batches(pieces), Ranks())
    named = {**dict(engine.clip.named_parameters()), **dict(loss.named_parameters())}
    return output.loss, {name: parameter.grad for name, parameter in named.items()}


@pytest.mark.parametrize("loss", [InfoNceConfig(), SigmoidConfig(name="sigmoid")], ids=lambda config: config.name)
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
@pytest.mark.parametrize("token_drop", [0.0, 0.5, 0.75])
def test_gradients_of_micro_batches_are_those_of_the_batch(loss, token_drop, drop_path):
    changes = {"model__image__token_drop": token_drop, "model__image__drop_path": drop_path}
    value, whole = gradients(loss, 1, **changes)
    for pieces in (2, 3, 4, 8, 16):
        other, parts = gradients(loss, pieces, **changes)
        assert other.item() == pytest.approx(value.item(), rel=1e-12)
        for name, gradient in whole.items():
            assert (parts[name] - gradient).norm() <= 1e-12 * max(float(gradient.norm()), 1e-3), name


FROZEN = {"init__model": "unused", "model__image__drop_path": 0.3}


@pytest.mark.parametrize(("image", "text"), [("all", 1), (1, "all"), (2, 2)])
def test_gradients_of_micro_batches_are_those_of_the_batch_where_a_part_is_frozen(image, text):
    changes = {**FROZEN, "optim__image__freeze": image, "optim__text__freeze": text}
    value, whole = gradients(InfoNceConfig(), 1, **changes)
    everything = gradients(InfoNceConfig(), 1, model__image__drop_path=0.3)[1]
    assert any(gradient is None for gradient in whole.values())
    for pieces in (1, 3):
        other, parts = gradients(InfoNceConfig(), pieces, **changes)
        assert other.item() == pytest.approx(value.item(), rel=1e-12)
        for name, gradient in parts.items():
            assert (gradient is None) == (whole[name] is None), name
            if gradient is not None:
                exact = everything[name]
                assert (gradient - exact).norm() <= 1e-12 * max(float(exact.norm()), 1e-3), name


@pytest.mark.parametrize(("frozen", "calls"), [("all", [3, 6]), (2, [6, 6])])
@pytest.mark.parametrize("towers", [("image", "text"), ("text", "image")])
def test_only_a_tower_that_is_frozen_whole_is_not_computed_again(frozen, calls, towers):
    options = {**FROZEN, f"optim__{towers[0]}__freeze": frozen}
    clip = create_model(tiny_config("unused").model, seed=0)
    freeze(clip, tiny_config("unused", **options).optim)
    seen = []
    for name in towers:
        getattr(clip, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    engine = DoubleEngine(clip)
    forward_backward(engine, ContrastiveLoss(InfoNceConfig(), torch.device("cpu")).double(), batches(3), Ranks())
    assert [seen.count(name) for name in towers] == calls


def test_dropped_patches_and_paths_make_a_difference():
    plain = gradients(InfoNceConfig(), 1, model__image__token_drop=0.0)[0]
    assert gradients(InfoNceConfig(), 1, model__image__token_drop=0.5)[0] != plain
    assert gradients(InfoNceConfig(), 1, model__image__token_drop=0.0, model__image__drop_path=0.3)[0] != plain


def test_only_key_biases_have_no_gradient_by_construction():
    """A bias of all keys adds one number to all scores of a query, which softmax takes out; only the text has one."""
    grads = gradients(InfoNceConfig(), 1)[1]
    zero = {name for name, grad in grads.items() if grad.norm() <= 1e-12}
    assert zero == set()
    for name in [name for name in grads if name.endswith("attn.qkv.bias")]:
        query, key, value = grads[name].chunk(3)
        assert key.norm() <= 1e-14 * grads[name].norm()
        assert min(query.norm(), value.norm()) > 1e-6
    assert {name for name in grads if name.endswith("attn.qkv.bias")} == {
        f"text.blocks.{n}.attn.qkv.bias" for n in (0, 1)
    }
