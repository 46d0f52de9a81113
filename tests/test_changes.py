import json

import pytest
from tiny import tiny_config

from evaclip.changes import changed_rates, differences, lines, record, refuse_changes
from evaclip.errors import ConfigError
from evaclip.optim.schedule import Schedule


def test_harmless_changes_are_returned_with_old_and_new_value(tmp_path):
    before, now = tiny_config(tmp_path), tiny_config(tmp_path, optim__lr=5e-4, train__steps=9, log__every_steps=3)
    assert refuse_changes(before, now, tmp_path, slots=16) == {
        "log.every_steps": (1, 3),
        "optim.lr": (0.001, 0.0005),
        "train.steps": (4, 9),
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 3),
        ("model__image__depth", 3),
        ("train__global_batch", 32),
        ("train__overfit_one_batch", True),
        ("optim__name", "lamb"),
        ("data__slots", 4),
    ],
)
def test_what_makes_the_model_or_the_order_is_refused(tmp_path, key, value):
    with pytest.raises(
        ConfigError, match=rf"(?s)another model, data order or freezing; use a new run_dir.*{key.split('__')[-1]}"
    ):
        refuse_changes(tiny_config(tmp_path), tiny_config(tmp_path, **{key: value}), tmp_path, slots=16)


@pytest.mark.parametrize(("before", "now"), [(1, "all"), ("all", 1), (1, 0)])
def test_other_freezing_is_refused_with_the_way_to_fork(tmp_path, before, now):
    saved, wanted = (tiny_config(tmp_path, init__model="w", optim__text__freeze=freeze) for freeze in (before, now))
    expected = (
        rf"(?s)use a new run_dir.*optim\.text\.freeze: {before} -> {now}.*init\.model={tmp_path} takes its weights"
    )
    with pytest.raises(ConfigError, match=expected):
        refuse_changes(saved, wanted, tmp_path, slots=16)


def test_the_slots_that_a_run_has_may_be_named(tmp_path):
    refuse_changes(tiny_config(tmp_path), tiny_config(tmp_path, data__slots=16), tmp_path, slots=16)


def test_learning_rates_of_the_next_step_follow_the_schedule_of_each_configuration(tmp_path):
    before = tiny_config(tmp_path, optim__lr=1e-3, train__steps=10)
    now = tiny_config(tmp_path, optim__lr=1e-3, optim__text__lr=2e-3, train__steps=20)
    old, new = (1e-3 * Schedule(steps, 0, 0, "cosine", 0.0).factor(5) for steps in (10, 20))
    rates = changed_rates(before, now, 5)
    assert rates["lr/image"] == pytest.approx((old, new))
    assert rates["lr/text"] == pytest.approx((old, 2 * new))
    assert changed_rates(before, tiny_config(tmp_path, train__steps=10, log__every_steps=2), 5) == {}


def test_what_one_side_lacks_is_absent_there():
    assert lines(differences({"a": 1, "b": 2}, {"b": 2, "c": 3})) == ["a: 1 -> absent", "c: absent -> 3"]


def test_changes_are_appended_as_lines_of_json(tmp_path):
    for step in (4, 8):
        record(tmp_path, step, {"optim.lr": (1e-3, 2e-3)}, {"evaclip": ("0.1.0+a", "0.1.0+b")})
    first, second = (json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (4, 8)
    assert first["changed"] == {"optim.lr": [0.001, 0.002]}
    assert first["versions"] == {"evaclip": ["0.1.0+a", "0.1.0+b"]}
    assert first["time"].endswith("+00:00")
