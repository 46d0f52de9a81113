"""Towers of timm against the bare timm models, which are the reference for everything but what is random."""

from __future__ import annotations

from typing import Any

import open_clip.timm_model
import pytest
import timm
import torch
import torch.nn.functional as F
from peers import shake
from timm.layers.drop import DropPath
from timm_towers import KINDS, SEEDS, TOKENS, bare, build, config_of, images_of, shared
from torch import Tensor, nn

from evaclip.models.clip import create_model
from evaclip.models.timm_parts import FrozenBatchNorm, SeededDropPath
from evaclip.models.timm_probe import watch
from evaclip.models.timm_tower import TimmTower
from evaclip.models.token_drop import drop_path_scales, kept_patches

# ------------------------------------------------------------------------------------------------ the same as the peers


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_bare_model(kind: str) -> None:
    model = shared(kind)
    images = images_of(model)
    with torch.no_grad():
        assert torch.equal(model.image(images), bare(model)(images))  # the same operations, so the same bits


@pytest.mark.parametrize("kind", ["vit", "clip_resnet"])
def test_pixels_are_normalised_by_mean_and_std(kind: str) -> None:
    model = shared(kind)
    config = model.config.image
    pixels = torch.randint(0, 256, images_of(model).shape, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.mean, config.std))
    with torch.no_grad():
        found = model.image(pixels.to(torch.uint8))
        expected = model.image((pixels / 255 - mean) / std)
    assert F.cosine_similarity(found, expected).min() > 1 - 1e-6  # one multiplication and addition round otherwise


@pytest.mark.parametrize(
    ("kind", "projection", "pool", "peer"),
    [
        ("test_vit", "head", "avg", {"pool": "avg", "proj": None}),
        ("test_vit", "linear", "avg", {"pool": "avg", "proj": "linear"}),
        ("test_convnext", "linear", None, {"pool": "", "proj": "linear"}),
        ("test_convnext", "mlp", None, {"pool": "", "proj": "mlp"}),
        ("test_vit", "none", "token", {"pool": "token", "proj": "none", "embed_dim": 64}),
    ],
)
def test_names_and_features_are_those_of_open_clip(
    kind: str, projection: str, pool: str | None, peer: dict[str, Any]
) -> None:
    options = {"embed_dim": 24, "image_size": 160, **peer}  # open_clip takes models at their own size
    theirs = open_clip.timm_model.TimmModel(kind, **options).eval()
    given = {"embed_dim": options["embed_dim"], "image_size": 160, "projection": projection, "pool": pool}
    model = build(kind, **given)
    theirs.load_state_dict(model.image.state_dict(), strict=True)
    images = images_of(model, 2)
    with torch.no_grad():
        assert torch.equal(model.image(images), theirs(images))


@pytest.mark.parametrize("kind", TOKENS)
def test_dropped_patches_are_dropped_as_timm_drops_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind, token_drop=0.6)
    peer, images = bare(model, patch_drop_rate=0.6).train(), images_of(model)  # nothing else is random there
    kept = kept_patches(SEEDS, 9, 4)
    # timm keeps 3 of 9, the floor of what is left; ours the nearest number
    monkeypatch.setattr("timm.layers.patch_dropout.int", lambda _: 4, raising=False)
    order = torch.full((3, 9), 9.0).scatter(1, kept, torch.arange(4.0).expand(3, 4))
    monkeypatch.setattr(torch, "randn", lambda *_, **__: order)
    with torch.no_grad():
        assert torch.equal(model.image(images, SEEDS), peer(images))


@pytest.mark.parametrize("kind", ["vit", "eva02"])
def test_a_dropped_patch_has_no_gradient(kind: str) -> None:
    model = build(kind, token_drop=0.6)
    images = images_of(model).requires_grad_()
    model.image(images, SEEDS).square().sum().backward()
    assert images.grad is not None
    side = images.shape[-1] // 3
    used = images.grad.unflatten(3, (3, side)).unflatten(2, (3, side)).abs().sum((1, 3, 5)).flatten(1) > 0
    assert [row.nonzero().flatten().tolist() for row in used] == kept_patches(SEEDS, 9, 4).tolist()


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_branches_are_skipped_whole_by_sample_at_timms_own_rates(kind: str) -> None:
    model = build(kind, drop_path=0.6)
    rates = [part.drop_prob for part in bare(model, drop_path_rate=0.6).modules() if isinstance(part, DropPath)]
    assert model.image.drop_path.value.tolist() == rates
    scales = drop_path_scales(SEEDS, torch.tensor(rates, dtype=torch.float64))[:, 0]
    parts = [part for part in model.image.modules() if isinstance(part, SeededDropPath)]
    assert len(parts) == len(rates) > 2
    seen: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        part.register_forward_hook(lambda _module, given, output: seen.append((given[0], output)))
    with torch.no_grad():
        model.image(images_of(model), SEEDS)
    assert (scales == 0).any()
    for (branch, output), factors in zip(seen, scales, strict=True):
        assert torch.equal(output, branch * factors.view(-1, *[1] * (branch.ndim - 1)))


# ------------------------------------------------------------------------------------------------------- what is random


@pytest.mark.parametrize("kind", ["vit", "dinov3", "convnext", "test_resnet"])
def test_only_seeds_are_random(kind: str) -> None:
    options = {"token_drop": 0.5} if kind in TOKENS else {}
    model = build(kind, drop_path=0.5, **options).train()
    shake(model.image)  # a ResNet's branches begin at zero
    images = images_of(model)
    found = []
    for number in range(2):
        torch.manual_seed(number)
        state = torch.get_rng_state()
        with torch.no_grad():
            found.append([model.image(images, seeds) for seeds in (SEEDS, SEEDS + 1, None)])
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
    assert not any(torch.equal(found[0][0], other) for other in found[0][1:])
    assert torch.equal(found[0][2], model.eval().image(images))


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_what_a_sample_drops_does_not_depend_on_its_batch(kind: str) -> None:
    model = build(kind, drop_path=0.5)
    images = images_of(model)
    with torch.no_grad():
        whole = model.image(images, SEEDS)
        alone = torch.cat([model.image(images[i : i + 1], SEEDS[i : i + 1]) for i in range(3)])
    assert torch.allclose(whole, alone, atol=1e-5)  # matrix products of another size


def test_a_failed_forward_leaves_no_draw_behind() -> None:
    model = build(drop_path=0.5)
    images = images_of(model)
    expected = model.image(images)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    hook = model.image.blocks[1].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model.image(images, SEEDS)
    hook.remove()
    assert model.image.drawing.current is None
    assert torch.equal(model.image(images), expected)


def test_operations_that_draw_are_seen_wherever_they_are() -> None:
    class Part(nn.Module):
        def __init__(self, run: Any) -> None:
            super().__init__()
            self.run = run

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    draws = {
        "dropout": lambda x: F.dropout(x, 0.1),
        "rand": lambda x: x * torch.rand(4, device=x.device),
        "like": torch.rand_like,
        "host": lambda x: x * torch.empty(2, device="cpu").uniform_().sum().to(x.device),
        "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
        "permutation": lambda x: x[torch.randperm(2, device=x.device)],
    }
    still = {
        "zero": lambda x: F.dropout(x, 0.0),
        "attends": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.0),
        "relu": F.relu,
    }
    parts = {name: Part(run) for name, run in {**draws, **still}.items()}
    module = nn.ModuleDict({"inner": nn.Sequential(nn.ModuleDict(parts))})
    module.forward = lambda x: [part(x) for part in parts.values()]
    seen = watch(module, torch.zeros(2, 2, 4, 4, device="meta"))
    assert seen.random.keys() == {f"inner.0.{name}" for name in draws}
    assert seen.random["inner.0.permutation"] == "randperm"


# ---------------------------------------------------------------------------------------------------- frozen statistics


def test_batch_norms_keep_their_statistics_and_learn_gain_and_bias() -> None:
    model = build("test_resnet", image_size=64).train()
    norms = [part for part in model.image.modules() if isinstance(part, FrozenBatchNorm)]
    assert len(norms) > 5
    assert not any(part for part in model.image.modules() if isinstance(part, nn.BatchNorm2d))
    before = [part.running_var.clone() for part in norms]
    learning = [p for p in model.image.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    for _ in range(2):
        model.image(images_of(model) * 5 + 3).square().sum().backward()
        optimizer.step()
    for part, variance in zip(norms, before, strict=True):
        assert not part.running_mean.requires_grad
        assert torch.equal(part.running_var, variance)
        assert torch.equal(part.running_mean, torch.zeros_like(part.running_mean))
        assert part.weight.grad is not None
        assert part.bias.grad is not None


def test_statistics_are_parameters_under_timms_names() -> None:
    model = shared("clip_resnet")
    names = {name for name, _ in model.image.trunk.named_parameters()}
    theirs = set(timm.create_model("resnet50_clip").state_dict())
    assert names == {name for name in theirs if not name.endswith("num_batches_tracked")}
    assert names == set(model.image.trunk.state_dict())


# ------------------------------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("kind", ["vit", "dinov3", "convnext"])
def test_weights_and_tables_are_as_timm_draws_them_but_for_the_head(kind: str) -> None:
    state = torch.get_rng_state()
    tower = build(kind).image
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(tower, TimmTower)
    tower.initialise(5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        size = {"img_size": tower.config.image_size} if kind != "convnext" else {}
        peer = timm.create_model(tower.config.model, num_classes=24, **size)
    tables = dict(tower.trunk.named_buffers())
    assert all(torch.equal(tables[name], table) for name, table in peer.named_buffers())
    head = peer.get_classifier()
    for name, parameter in peer.named_parameters():
        if parameter is not head.weight:
            assert torch.equal(tower.trunk.get_parameter(name), parameter), name
    deviation = tower.trunk.get_classifier().weight.std().item() * head.in_features**0.5
    assert deviation == pytest.approx(1, abs=0.1)


def test_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (create_model(config_of("test_convnext", projection="linear"), seed=s) for s in (1, 1, 2))
    weights = [torch.cat([p.flatten() for p in model.image.parameters()]) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
