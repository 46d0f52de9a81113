import json

from evaclip.evaluation import Predictions, Result, format_table, write_results

DIGITS = Result(
    "digits",
    "zero_shot",
    {"top1": 0.5, "top5": 1.0, "mean_per_class": 0.25},
    2,
    Predictions(("zero", "one"), (0, 1), (0, -1)),
)
HELD_OUT = Result("held_out", "loss", {"loss": float("nan")}, 1024)


def test_results_are_written_as_json_with_predictions_beside(tmp_path):
    write_results(tmp_path / "run", [DIGITS, HELD_OUT])
    assert json.loads((tmp_path / "run/evaluation.json").read_text()) == {
        "digits": {"task": "zero_shot", "metrics": DIGITS.metrics, "num_records": 2},
        "held_out": {"task": "loss", "metrics": {"loss": None}, "num_records": 1024},
    }
    assert json.loads((tmp_path / "run/predictions/digits.json").read_text()) == {
        "task": "zero_shot",
        "metrics": DIGITS.metrics,
        "class_names": ["zero", "one"],
        "labels": [0, 1],
        "predictions": [0, -1],
    }
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["run/evaluation.json", "run/predictions/digits.json"]


def test_the_table_has_a_line_per_metric():
    assert format_table([DIGITS, HELD_OUT]).splitlines() == [
        "dataset   records  metric           value",
        "digits          2  top1            0.5000",
        "                   top5            1.0000",
        "                   mean_per_class  0.2500",
        "held_out     1024  loss               nan",
    ]


def test_iterating_gives_published_names():
    assert dict(DIGITS) == {"eval/digits/top1": 0.5, "eval/digits/top5": 1.0, "eval/digits/mean_per_class": 0.25}
