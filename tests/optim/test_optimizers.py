import math

import pytest
import timm.optim
import torch

from evaclip.config import AdamWConfig, LambConfig
from evaclip.distributed import Ranks
from evaclip.optim import base
from evaclip.optim.adamw import AdamW
from evaclip.optim.base import Span
from evaclip.optim.lamb import Lamb
from evaclip.optim.table import Row

SHAPES = {"a": (12, 5), "bias": (12,), "b": (7, 3)}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES.values()]


def rows(*, decay=0.05, adapts=True, lr=0.01):
    return tuple(
        Row(name, shape, lr, decay if len(shape) > 1 else 0.0, adapts=adapts and len(shape) > 1)
        for name, shape in SHAPES.items()
    )


def make(kind, config, table, tensors, fragments=False):
    optimizer = kind(tensors, table, config, Ranks())
    optimizer.bind([(t, [Span(row, 0, t.numel())]) for row, t in enumerate(tensors)], sharded=False)
    return optimizer


def set_gradients(tensors, step):
    generator = torch.Generator().manual_seed(100 + step)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator)


def movement(before, after):
    return math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in zip(after, before, strict=True)))


def test_lamb_equals_timm_over_20_steps():
    ours, peers, start = parameters(), parameters(), parameters()
    optimizer = make(Lamb, LambConfig(betas=(0.9, 0.98)), rows(), ours)
    groups = [{"params": [peers[0], peers[2]], "weight_decay": 0.05}, {"params": [peers[1]], "weight_decay": 0.0}]
    # timm clips to norm 1 and divides first and takes the decay into the update; its clip is switched off here
    peer = timm.optim.Lamb(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-6, max_grad_norm=None)
    for step in range(20):
        set_gradients(ours, step)
        set_gradients(peers, step)
        optimizer.step()
        peer.step()
    assert movement(ours, peers) < 1e-6 * movement(start, ours)  # fp32 rounding over 20 steps


@pytest.mark.parametrize(
    ("options", "peer_options"),
    [
        ({"bias_correction": False}, {"bias_correction": False}),
        ({"trust_ratio_bounds": (0.0, 1.0)}, {"trust_clip": True}),
    ],
    ids=["no bias correction", "clamped"],
)
def test_lambs_options_are_timms(options, peer_options):
    ours, peers, start = parameters(), parameters(), parameters()
    table = rows()
    optimizer = make(Lamb, LambConfig(betas=(0.9, 0.98), **options), table, ours)
    plain = make(Lamb, LambConfig(betas=(0.9, 0.98)), table, others := parameters())
    groups = [{"params": [peers[0], peers[2]], "weight_decay": 0.05}, {"params": [peers[1]], "weight_decay": 0.0}]
    peer = timm.optim.Lamb(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-6, max_grad_norm=None, **peer_options)
    for step in range(20):
        for tensors in (ours, peers, others):
            set_gradients(tensors, step)
        optimizer.step()
        plain.step()
        peer.step()
    assert movement(ours, peers) < 1e-6 * movement(start, ours)
    assert movement(ours, others) > 0.01 * movement(start, ours), "the option makes a difference"


def test_trust_ratios_stay_within_their_bounds():
    ours = parameters()
    optimizer = make(Lamb, LambConfig(trust_ratio_bounds=(0.999, 1.001)), rows(), ours)
    set_gradients(ours, 0)
    optimizer.step()
    assert optimizer.trust_ratios.tolist() == pytest.approx([min(max(r, 0.999), 1.001) for r in _free_ratios()])


def _free_ratios():
    ours = parameters()
    optimizer = make(Lamb, LambConfig(), rows(), ours)
    set_gradients(ours, 0)
    optimizer.step()
    ratios = optimizer.trust_ratios.tolist()
    assert any(not 0.999 < ratio < 1.001 for ratio in ratios)
    return ratios


def test_adamw_equals_torch_over_20_steps():
    ours, peers, start = parameters(), parameters(), parameters()
    table = tuple(Row(name, shape, 0.01, 0.05, adapts=False) for name, shape in SHAPES.items())
    optimizer = make(AdamW, AdamWConfig(name="adamw", betas=(0.9, 0.98), eps=1e-8), table, ours)
    peer = torch.optim.AdamW(peers, lr=0.01, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.05)
    for step in range(20):
        set_gradients(ours, step)
        set_gradients(peers, step)
        optimizer.step()
        peer.step()
    # weights near 1 move by 0.05 each: 20 roundings to fp32 in another order leave 1e-5 of the movement
    assert movement(ours, peers) < 2e-5 * movement(start, ours)


def test_rows_have_their_own_learning_rate_and_the_factor_scales_it():
    ours, start = parameters(), parameters()
    table = tuple(
        Row(name, shape, lr, 0.0, adapts=False)
        for (name, shape), lr in zip(SHAPES.items(), (0.1, 0.0, 0.2), strict=True)
    )
    optimizer = make(AdamW, AdamWConfig(name="adamw", eps=1e-12), table, ours)
    set_gradients(ours, 0)
    optimizer.factor = 0.5
    optimizer.step()
    moved = [(a - b).abs().max().item() for a, b in zip(ours, start, strict=True)]
    assert moved == pytest.approx([0.05, 0.0, 0.1], rel=1e-4)  # the first Adam step has unit size


@pytest.mark.parametrize("kind", [Lamb, AdamW])
def test_clipping_to_a_norm_equals_scaling_the_gradient(kind):
    config = (LambConfig if kind is Lamb else AdamWConfig)(name=kind.__name__.lower(), clip_norm=0.5)
    ours, scaled = parameters(), parameters()
    clipped, plain = (
        make(kind, config, rows(), ours),
        make(kind, config.model_copy(update={"clip_norm": None}), rows(), scaled),
    )
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(scaled, step)
        norm = math.sqrt(sum(float(t.grad.square().sum()) for t in scaled))
        for tensor in scaled:
            tensor.grad *= 0.5 / (norm + 1e-6)
        clipped.step()
        plain.step()
        assert clipped.grad_norm.item() == pytest.approx(norm, rel=1e-6)
    assert movement(ours, scaled) < 1e-5 * movement(ours, parameters())


@pytest.mark.parametrize("early", [True, False], ids=["as on CPUs", "as on GPUs"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, "loss"])
@pytest.mark.parametrize("kind", [Lamb, AdamW])
def test_a_step_that_is_not_finite_changes_nothing(monkeypatch, kind, poison, early):
    monkeypatch.setattr(base, "_SKIPS_EARLY", early)
    config = LambConfig() if kind is Lamb else AdamWConfig(name="adamw")
    ours = parameters()
    optimizer = make(kind, config, rows(), ours)
    set_gradients(ours, 0)
    optimizer.step()
    before = [t.detach().clone() for piece in optimizer.pieces() for t in piece.tensors.values()]
    told = optimizer.trust_ratios.clone(), optimizer.update_rms.clone()
    set_gradients(ours, 1)
    if poison == "loss":
        optimizer.loss = torch.tensor(math.nan)
    else:
        ours[2].grad[0, 0] = poison
    optimizer.step()
    after = [t for piece in optimizer.pieces() for t in piece.tensors.values()]
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(before, after, strict=True))
    assert optimizer.updates.item() == 1
    assert optimizer.consecutive_skips.item() == 1
    assert torch.equal(optimizer.trust_ratios, told[0])
    assert torch.equal(optimizer.update_rms, told[1])
    optimizer.loss = torch.zeros(())
    set_gradients(ours, 2)
    optimizer.step()
    assert optimizer.updates.item() == 2
    assert optimizer.consecutive_skips.item() == 0


def test_zero_weights_and_zero_updates_have_trust_ratio_one():
    weights = [torch.zeros(4, 4).requires_grad_(), torch.ones(4, 4).requires_grad_()]
    table = (Row("zero", (4, 4), 0.1, 0.0, adapts=True), Row("still", (4, 4), 0.1, 0.0, adapts=True))
    optimizer = make(Lamb, LambConfig(), table, weights)
    weights[0].grad, weights[1].grad = torch.ones(4, 4), torch.zeros(4, 4)
    optimizer.step()
    assert optimizer.trust_ratios.tolist() == [1.0, 1.0]
    assert weights[0].detach().flatten().tolist() == pytest.approx([-0.1] * 16, rel=1e-4)


def test_upper_bound_is_kept():
    scale = torch.full((1,), 4.6).requires_grad_()
    optimizer = make(
        Lamb, LambConfig(), (Row("logit_scale", (1,), 1.0, 0.0, adapts=False, upper_bound=math.log(100)),), [scale]
    )
    scale.grad = torch.tensor([-1.0])
    optimizer.step()
    assert scale.item() == pytest.approx(math.log(100))


@pytest.mark.parametrize("kind", [Lamb, AdamW])
def test_spans_of_a_flat_tensor_step_like_whole_parameters(kind):
    """ZeRO's view on one rank: all rows in one tensor, one of them in two pieces."""
    config = LambConfig() if kind is Lamb else AdamWConfig(name="adamw")
    whole = parameters()
    flat = torch.cat([t.detach().view(-1) for t in whole]).requires_grad_()
    sizes = [t.numel() for t in whole]
    spans = [Span(0, 0, 20, 0), Span(0, 20, 40, 20), Span(1, 0, 12, 60), Span(2, 0, 21, 72)]
    reference, other = make(kind, config, rows(), whole), kind([flat], rows(), config, Ranks())
    other.bind([(flat, spans)], sharded=True)
    for step in range(5):
        set_gradients(whole, step)
        flat.grad = torch.cat([t.grad.view(-1) for t in whole])
        reference.step()
        other.step()
    for want, got in zip(whole, flat.detach().split(sizes), strict=True):
        # the squares of a row are added in another order
        torch.testing.assert_close(got, want.detach().view(-1), rtol=1e-6, atol=1e-7)
