import math

import pytest
import torch
import torch.nn.functional as F

from evaclip import loss as loss_module
from evaclip.config import LossConfig, SigmoidConfig
from evaclip.distributed import Ranks
from evaclip.loss import ContrastiveLoss, info_nce, sigmoid_loss


def features(batch, dim, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(batch, dim, generator=generator), dim=1)
    return image, F.normalize(image + noise * torch.randn(batch, dim, generator=generator), dim=1)


def naive(image, text, log_scale):
    logits = log_scale.exp() * image @ text.T
    places = torch.arange(len(image))
    return (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("tile", [7 * 7, 1 << 22])
def test_value_and_gradients_equal_the_naive_loss_in_double(monkeypatch, scale, tile):
    monkeypatch.setitem(loss_module._TILE_NUMBERS, "cpu", tile)
    image, text = features(33, 16)
    output = info_nce(image, text, torch.tensor(scale), Ranks())
    inputs = [t.double().requires_grad_() for t in (image, text, torch.tensor(scale).log())]
    expected = naive(*inputs)
    grads = torch.autograd.grad(expected, inputs)
    # fp32 sums over 33 columns; the gradient is small beside one at uniform softmax, which is about scale / batch
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    floor = scale / 33
    for got, want in zip((output.image_grad, output.text_grad, output.scale_grad), grads, strict=True):
        assert (got - want).norm() <= 1e-5 * max(float(want.norm()), floor)


def naive_sigmoid(image, text, log_scale, bias):
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(signs * (log_scale.exp() * image @ text.T + bias)).sum() / len(image)


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (100.0, -30.0)])
@pytest.mark.parametrize("tile", [7 * 7, 1 << 22])
def test_sigmoid_loss_and_gradients_equal_the_naive_ones_in_double(monkeypatch, scale, bias, tile):
    monkeypatch.setitem(loss_module._TILE_NUMBERS, "cpu", tile)
    image, text = features(33, 16)
    output = sigmoid_loss(image, text, torch.tensor(scale), torch.tensor(bias), Ranks())
    inputs = [t.double().requires_grad_() for t in (image, text, torch.tensor(scale).log(), torch.tensor(bias))]
    expected = naive_sigmoid(*inputs)
    grads = torch.autograd.grad(expected, inputs)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    floor = scale / 33
    found = (output.image_grad, output.text_grad, output.scale_grad, output.bias_grad)
    for got, want in zip(found, grads, strict=True):
        assert (got - want).norm() <= 1e-5 * max(float(want.norm()), floor)
    logits = image @ text.T
    assert output.image_to_text.item() == pytest.approx((logits.argmax(1) == torch.arange(33)).float().mean().item())
    assert output.text_to_image.item() == pytest.approx((logits.argmax(0) == torch.arange(33)).float().mean().item())


def test_the_sigmoid_loss_learns_its_scale_and_its_bias():
    image, text = features(8, 4)
    loss = ContrastiveLoss(SigmoidConfig(name="sigmoid"), torch.device("cpu"))
    assert loss.similarity == (pytest.approx(10), -10.0)
    output = loss(image, text, Ranks())
    assert loss.logit_scale.grad.item() == output.scale_grad.item() != 0
    assert loss.logit_bias.grad.item() == output.bias_grad.item() != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bit_features_are_taken_in_fp32(dtype):
    image, text = (t.to(dtype) for t in features(64, 16))
    output = info_nce(image, text, torch.tensor(30.0), Ranks())
    expected = naive(image.double(), text.double(), torch.tensor(30.0).double().log())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.image_grad.dtype == torch.float32


def test_surrogate_has_the_gradient_of_the_loss():
    image, text = (t.requires_grad_() for t in features(8, 4))
    output = info_nce(image, text, torch.tensor(10.0), Ranks())
    output.surrogate(image, text).backward()
    torch.testing.assert_close(image.grad, output.image_grad)
    torch.testing.assert_close(text.grad, output.text_grad)


def test_identical_features_at_scale_100_give_the_log_of_the_batch():
    same = F.normalize(torch.ones(64, 8), dim=1)
    output = info_nce(same, same, torch.tensor(100.0), Ranks())
    assert output.loss.item() == pytest.approx(math.log(64), rel=1e-5)  # fp32
    assert output.image_grad.isfinite().all()


def test_accuracies_are_the_shares_of_nearest_partners():
    image, text = features(50, 8, noise=1.5)
    output = info_nce(image, text, torch.tensor(20.0), Ranks())
    logits = image @ text.T
    places = torch.arange(50)
    assert output.image_to_text.item() == pytest.approx((logits.argmax(1) == places).float().mean().item())
    assert output.text_to_image.item() == pytest.approx((logits.argmax(0) == places).float().mean().item())
    assert 0 < output.image_to_text.item() < 1


def test_fixed_temperature_takes_no_gradient():
    image, text = features(8, 4)
    fixed = ContrastiveLoss(LossConfig(logit_scale=100.0, learn_logit_scale=False), torch.device("cpu"))
    learned = ContrastiveLoss(LossConfig(), torch.device("cpu"))
    fixed(image, text, Ranks())
    learned(image, text, Ranks())
    assert fixed.logit_scale.grad is None
    assert fixed.logit_scale.item() == pytest.approx(math.log(100))
    assert learned.logit_scale.grad is not None


def test_a_nan_feature_makes_the_loss_nan():
    image, text = features(8, 4)
    image[3, 0] = math.nan
    assert info_nce(image, text, torch.tensor(10.0), Ranks()).loss.isnan()
