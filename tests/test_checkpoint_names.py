from pathlib import Path

import pytest

from evaclip.checkpoint_names import complete, damaged_steps, place_aside, step_name, step_of


@pytest.mark.parametrize("step", [0, 1000, 99_999_999, 123_456_789])
def test_a_step_is_read_off_the_name_that_it_gives(step):
    assert step_of(Path("run") / step_name(step)) == step


@pytest.mark.parametrize(
    "name", ["step_1", "step_0000000x", "best", ".step_00000001", "step_00000001.tmp", f"step_{chr(0x0661) * 8}"]
)
def test_other_names_are_no_steps(name):
    assert step_of(Path(name)) is None


def test_checkpoints_are_listed_by_number_and_those_set_aside_apart(tmp_path):
    for name in ("step_100000000", "step_99999999", "step_00000005", ".step_00000007.1234.tmp", "latest", "best"):
        (tmp_path / name).mkdir()
    place_aside(tmp_path / step_name(9)).mkdir()
    place_aside(tmp_path / step_name(6)).mkdir()
    assert [step_of(path) for path in complete(tmp_path)] == [5, 99_999_999, 100_000_000]
    assert damaged_steps(tmp_path) == [6, 9]


def test_a_folder_that_is_missing_holds_nothing(tmp_path):
    assert complete(tmp_path / "x") == []
    assert damaged_steps(tmp_path / "x") == []
