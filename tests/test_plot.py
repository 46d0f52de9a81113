"""``evaclip plot``: what the figure holds, against ``metrics.jsonl``; how it looks is for people to see."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

from evaclip import cli
from evaclip.errors import ConfigError, EvaclipError
from evaclip.history import load_history
from evaclip.plot import COLOURS, choose_panels, draw, labels, plot, read_runs, thin
from evaclip.train import train

DEFAULT = {
    "training loss, in nats": ["train/loss"],
    "accuracy within the batch": ["train/accuracy_image_to_text", "train/accuracy_text_to_image"],
    "logit scale": ["train/logit_scale"],
    "gradient norm": ["train/grad_norm"],
    "learning rate": ["lr/image", "lr/text"],
    "samples per second": ["speed/samples_per_second"],
    "share of time waiting for data": ["speed/data_wait_fraction"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, colour_shards):
    """A run of 12 steps, evaluated four times."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    held = {"held": {"task": "loss", "path": str(colour_shards / "00000.tar")}}
    source = {"shards": str(colour_shards / "{00000..00002}.tar")}
    train(tiny_config(folder, source, train__steps=12, eval__datasets=held, eval__batch=10, eval__every_steps=4))
    return folder


def figure_of(run_dirs, metrics=None, by="step"):
    runs = read_runs(run_dirs, metrics)
    return draw(runs, choose_panels(runs, metrics), by)


def drawn(figure):
    """Title -> metric -> (x, y) of its curve."""
    return {
        axes.get_title("left"): {line.get_gid(): line.get_data() for line in axes.lines if line.get_gid()}
        for axes in figure.axes
    }


def written(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def made_up(losses, *, speed=8.0, start=1, **more):
    return [
        {"step": n, "samples": 16 * n, "train/loss": loss, "speed/samples_per_second": speed, **more}
        for n, loss in enumerate(losses, start)
    ]


def test_the_panels_show_what_metrics_jsonl_has(trained):
    found = drawn(figure_of([trained]))
    assert {title: list(curves) for title, curves in found.items()} == {
        **DEFAULT,
        "validation loss, in nats": ["eval/held/loss"],
    }
    rows = load_history(trained / "metrics.jsonl")
    for name, (x, y) in ((name, data) for curves in found.values() for name, data in curves.items()):
        expected = [(row["step"], row[name]) for row in rows if name in row]
        assert list(zip(x, y, strict=True)) == expected, name
    assert list(found["validation loss, in nats"]["eval/held/loss"][0]) == [0, 4, 8, 12]


def test_the_command_writes_one_png(trained, tmp_path, capsys):
    out = tmp_path / "curves.png"
    cli.main(["plot", str(trained), "--output", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in COLOURS[:2]} <= colours


def test_named_metrics_have_a_panel_each_and_no_others(trained):
    found = drawn(figure_of([trained], ["data/passes/tiny", "train/loss", "train/loss"]))
    assert {title: list(curves) for title, curves in found.items()} == {
        "data/passes/tiny": ["data/passes/tiny"],
        "train/loss": ["train/loss"],
    }


def test_an_unknown_metric_is_refused_with_the_names_there_are(trained):
    with pytest.raises(
        ConfigError, match=r"^--metric loss: no run has it; there are data/delivered/tiny, .*train/loss"
    ):
        read_runs([trained], ["train/loss", "loss"])


def test_runs_have_a_colour_each_and_are_named_once(tmp_path):
    folders = [written(tmp_path / name / "run", made_up([3.0, 2.0, 1.0])) for name in "ab"]
    figure = figure_of([*folders, folders[0]], ["train/loss", "speed/samples_per_second"])
    for axes in figure.axes:
        assert [line.get_color() for line in axes.lines] == list(COLOURS[:2])
    assert [label.get_text() for label in figure.legends[0].texts] == ["a/run", "b/run"]


def test_curves_of_one_run_in_a_panel_differ_by_colour_and_those_of_several_by_stroke(trained, tmp_path):
    other = written(tmp_path / "other", load_history(trained / "metrics.jsonl"))
    alone, compared = figure_of([trained]).axes[1], figure_of([trained, other]).axes[1]
    assert [line.get_color() for line in alone.lines] == list(COLOURS[:2])
    assert [line.get_color() for line in compared.lines] == [COLOURS[0], COLOURS[0], COLOURS[1], COLOURS[1]]
    strokes = [line.get_linestyle() for line in compared.lines]
    assert strokes[:2] == strokes[2:]
    assert strokes[0] != strokes[1]
    for axes in (alone, compared):
        assert [label.get_text() for label in axes.get_legend().texts] == ["image to text", "text to image"]


@pytest.mark.parametrize(("by", "expected"), [("step", [1, 2, 5]), ("samples", [16, 32, 80])])
def test_runs_are_compared_by_steps_or_samples(tmp_path, by, expected):
    rows = [*made_up([3.0, 2.0]), *made_up([1.0], start=5)]
    figure = figure_of([written(tmp_path / "run", rows)], ["train/loss"], by)
    assert list(drawn(figure)["train/loss"]["train/loss"][0]) == expected


def test_hours_are_those_of_training_alone(tmp_path):
    rows = [
        {"step": 0, "samples": 0, "eval/x/loss": 4.0},
        {"step": 1, "samples": 3600, "train/loss": 3.0, "speed/samples_per_second": 1.0},
        {"step": 2, "samples": 7200, "eval/x/loss": 2.0},  # between two rows of training
        {"step": 3, "samples": 10800, "train/loss": 1.0, "speed/samples_per_second": 2.0},
    ]
    found = drawn(figure_of([written(tmp_path / "run", rows)], ["train/loss", "eval/x/loss"], "hours"))
    assert list(found["train/loss"]["train/loss"][0]) == [1.0, 2.0]
    assert list(found["eval/x/loss"]["eval/x/loss"][0]) == [0.0, 1.5]


def test_values_that_are_not_finite_leave_gaps_and_what_stands_alone_between_them_is_marked(tmp_path):
    losses = [float(n) for n in range(50)]
    losses[20] = losses[22] = None
    figure = figure_of([written(tmp_path / "run", made_up(losses))], ["train/loss"])
    (line,) = figure.axes[0].lines
    assert np.flatnonzero(np.isnan(line.get_ydata())).tolist() == [20, 22]
    assert line.get_markevery() == [21]


def test_a_metric_that_was_never_finite_says_so(tmp_path):
    (axes,) = figure_of([written(tmp_path / "run", made_up([None, None]))], ["train/loss"]).axes
    assert [text.get_text() for text in axes.texts] == ["no finite value"]


def test_thinning_loses_neither_spikes_nor_gaps():
    values = np.sin(np.arange(100_000) / 5000)
    values[[1234, 56_789]] = 9.0, -9.0
    values[77_777] = math.nan
    kept = thin(values)
    assert len(kept) <= 3 * 800 + 2
    assert (np.diff(kept) > 0).all()
    assert {0, 1234, 56_789, 77_777, 99_999} <= set(kept.tolist())
    assert np.array_equal(thin(values[:2400]), np.arange(2400))


def test_long_curves_are_drawn_faintly_below_their_medians(tmp_path):
    losses = [2.0 + n % 2 for n in range(3000)]
    losses[1500] = 50.0
    found = drawn(figure_of([written(tmp_path / "run", made_up(losses))], ["train/loss"]))["train/loss"]
    assert max(found["train/loss"][1]) == 50.0
    assert len(found["train/loss, medians"][1]) == 150
    assert max(found["train/loss, medians"][1]) <= 3.0


def test_restarts_and_skipped_updates_are_marked_where_one_run_is_drawn(tmp_path):
    run = written(tmp_path / "run", made_up([3.0, 2.0, 1.5, 1.0]))
    rows = load_history(run / "metrics.jsonl")
    rows[1]["train/skipped_steps"] = 2.0
    written(run, rows)
    attempts = [{"step": 3, "action": "restart"}, {"step": None, "action": "restart"}, {"step": 4, "action": "done"}]
    torn = '{"step": 2, "act'
    (run / "restarts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in attempts) + torn)
    figure = figure_of([run], ["train/loss"], "samples")
    curve, *marks = figure.axes[0].lines
    assert curve.get_gid() == "train/loss"
    assert [list(np.unique(mark.get_xdata())) for mark in marks] == [[48.0], [32.0]]
    assert [text.get_text() for text in figure.legends[0].texts] == ["started again", "updates skipped"]
    compared = figure_of([run, written(tmp_path / "other", rows)], ["train/loss"])
    assert len(compared.axes[0].lines) == 2


def test_labels_are_the_shortest_ends_that_differ():
    paths = [Path("/x/a/run"), Path("/x/b/run"), Path("/x/b/other"), Path("/run")]
    assert labels(paths) == ["a/run", "b/run", "other", "/run"]
    assert labels([Path("/x/only")]) == ["only"]


def test_a_label_is_no_formula_and_none_is_left_out(tmp_path):
    folders = [written(tmp_path / name, made_up([1.0, 2.0])) for name in ("_a$b$", "c\x1b[2J")]
    out = plot(folders, tmp_path / "p.png", metrics=None, by="step")
    assert out.stat().st_size > 10_000
    texts = [label.get_text() for label in figure_of(folders).legends[0].texts]
    assert texts == ["\u200b_a\\$b\\$", "c [2J"]


def test_gradient_norms_over_powers_of_ten_have_a_logarithmic_scale(tmp_path):
    wide, narrow = (
        written(
            tmp_path / name, [{"step": n, "samples": n, "train/grad_norm": value} for n, value in enumerate(values)]
        )
        for name, values in (("wide", (100.0, 1.0)), ("narrow", (2.0, 1.0)))
    )
    scales = [figure_of([run], ["train/grad_norm"]).axes[0].get_yscale() for run in (wide, narrow)]
    assert scales == ["log", "linear"]


def test_without_matplotlib_the_message_names_the_extra(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ConfigError, match=r"the plot needs matplotlib, which is missing; pip install 'evaclip\[plot\]'"
    ):
        plot([trained], tmp_path / "p.png", metrics=None, by="step")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run", None, r"metrics\.jsonl does not exist; give run directories that have been trained"),
        ("run", "", r"metrics\.jsonl has no rows yet; wait for the first one"),
        ("run", '{"step": 1, "sam', r"metrics\.jsonl has no rows yet"),
        ("metrics.jsonl", "loop", r"metrics\.jsonl cannot be read: Too many levels of symbolic links; ask its owner"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, name, content, message):
    run = tmp_path / "run"
    run.mkdir()
    if content == "loop":
        (run / name).symlink_to(name)
    elif content is not None:
        (run / "metrics.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        plot([run], tmp_path / "p.png", metrics=None, by="step")


def test_odd_values_are_gaps_and_odd_rows_no_reason_to_fail(tmp_path):
    rows = [*made_up([2.0]), {"step": 2, "samples": "x", "train/loss": [], "speed/samples_per_second": {}}]
    run = written(tmp_path / "run", [*rows, *made_up([10**400 - 10**400, 1e308], start=3)])
    assert plot([run], tmp_path / "p.png", metrics=None, by="hours").exists()


def test_only_png_is_written_and_a_folder_that_is_missing_is_told(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"--output p\.svg is no \.png"):
        plot([trained], Path("p.svg"), metrics=None, by="step")
    with pytest.raises(EvaclipError, match=r"nowhere/p\.png cannot be written: No such file or directory; choose"):
        plot([trained], tmp_path / "nowhere/p.png", metrics=["train/loss"], by="step")
