import pytest

from evaclip.config import LambConfig
from evaclip.optim.schedule import learning_rate_factor, learning_rates


def curve(**options):
    return [learning_rate_factor(step, **options) for step in range(options["steps"])]


def test_warm_up_is_linear_and_reaches_the_peak():
    factors = curve(steps=20, warmup_steps=4, final_fraction=0.0)
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_falls_to_the_floor_at_the_last_step():
    factors = curve(steps=21, warmup_steps=0, final_fraction=0.1)
    assert factors[0] == 1.0
    assert factors[10] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("steps", [1, 2])
def test_short_runs_have_a_schedule_too(steps):
    assert all(0 <= factor <= 1 for factor in curve(steps=steps, warmup_steps=steps - 1, final_fraction=0.0))


def test_a_tower_that_is_frozen_whole_has_no_learning_rate():
    optim = {"lr": 1e-3, "image": {"lr": 2e-3, "freeze": "all"}, "text": {"lr": 4e-3, "freeze": 1}}
    rates = learning_rates(LambConfig.model_validate(optim), 0.5)
    assert rates == {"lr/text": 2e-3, "lr/logit_scale": 5e-4}
