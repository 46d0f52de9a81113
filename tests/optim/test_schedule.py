import pytest
from tiny import tiny_config

from evaclip.config import LambConfig
from evaclip.optim.schedule import Schedule, learning_rates


def curve(*, steps, warmup_steps=0, cooldown_steps=0, shape="cosine", final_fraction=0.0):
    schedule = Schedule(steps, warmup_steps, cooldown_steps, shape, final_fraction)
    return [schedule.factor(step) for step in range(steps)]


def test_warm_up_is_linear_and_reaches_the_peak():
    factors = curve(steps=20, warmup_steps=4, final_fraction=0.0)
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_falls_to_the_floor_at_the_last_step():
    factors = curve(steps=21, warmup_steps=0, final_fraction=0.1)
    assert factors[0] == 1.0
    assert factors[10] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)


def test_constant_stays_at_its_peak_until_it_cools_down_in_a_line_to_the_floor():
    factors = curve(steps=10, warmup_steps=2, cooldown_steps=4, shape="constant", final_fraction=0.2)
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert curve(steps=3, shape="constant") == [1, 1, 1]


def test_inverse_square_root_falls_from_the_warm_ups_end_and_cools_down_from_where_it_is():
    factors = curve(steps=18, warmup_steps=4, cooldown_steps=2, shape="inverse_sqrt")
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert [factors[step - 1] for step in (9, 16)] == pytest.approx([2 / 3, 0.5])
    assert factors[-2:] == pytest.approx([0.25, 0.0])


@pytest.mark.parametrize(("shape", "cooldown_steps"), [("cosine", 0), ("constant", 0), ("constant", 3)])
def test_behind_its_end_the_rate_is_that_of_the_last_step(shape, cooldown_steps):
    schedule = Schedule(10, 2, cooldown_steps, shape, 0.1)
    assert schedule.factor(10) == schedule.factor(25) == schedule.factor(9)


@pytest.mark.parametrize("shape", ["constant", "inverse_sqrt"])
def test_a_longer_run_repeats_a_shorter_one_up_to_its_cooldown(shape):
    short, long = (curve(steps=n, warmup_steps=3, cooldown_steps=5, shape=shape) for n in (20, 40))
    assert short[:15] == long[:15]


def test_lengths_in_samples_are_steps_of_the_global_batch(tmp_path):
    options = {"schedule__shape": "constant", "schedule__warmup_samples": 33, "schedule__cooldown_samples": 32}
    config = tiny_config(tmp_path, train__steps=None, train__samples=161, train__global_batch=16, **options)
    assert config.train.steps == 11
    assert Schedule.of(config) == Schedule(11, 3, 2, "constant", 0.0)
    assert type(config).model_validate(config.model_dump(mode="json")) == config, "as it is written into the run"


@pytest.mark.parametrize("steps", [1, 2])
def test_short_runs_have_a_schedule_too(steps):
    assert all(0 <= factor <= 1 for factor in curve(steps=steps, warmup_steps=steps - 1, final_fraction=0.0))


def test_a_tower_that_is_frozen_whole_has_no_learning_rate():
    optim = {"lr": 1e-3, "image": {"lr": 2e-3, "freeze": "all"}, "text": {"lr": 4e-3, "freeze": 1}}
    rates = learning_rates(LambConfig.model_validate(optim), 0.5)
    assert rates == {"lr/text": 2e-3, "lr/logit_scale": 5e-4}
