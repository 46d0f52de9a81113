"""``evaclip plot``: the curves of one run, or of several to be compared, as one PNG.

Values are those of ``metrics.jsonl``. A long curve is thinned to the smallest and the largest value of each stretch, so
that no spike is lost, and drawn faintly below the medians of longer stretches. matplotlib is optional.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from evaclip.errors import ConfigError
from evaclip.history import read_history, training_time
from evaclip.picture import COLOURS, require_png, write_png
from evaclip.status.files import Reader
from evaclip.status.values import number, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

By = Literal["step", "samples", "hours"]
Values = NDArray[np.float64]

STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_BUCKETS = 800
"""Stretches of a curve; a panel has fewer pixels."""
_FEW = 30
"""Points up to which each is marked."""
_MANY = 400
"""Points from which a curve is drawn faintly, below the medians of its stretches."""
_MEDIANS = 150
_SPEED = "speed/samples_per_second"
_AXES = {"step": "step", "samples": "samples", "hours": "hours of training"}
INSTALL = "the plot needs matplotlib, which is missing; pip install 'evaclip[plot]'"


@dataclass(frozen=True)
class Panel:
    """What is drawn together."""

    title: str
    lines: dict[str, str]
    """Metric -> label."""
    from_zero: bool = False
    log: bool = False
    """Where the values cover powers of ten."""


PANELS = (
    Panel("training loss, in nats", {"train/loss": "loss"}),
    Panel(
        "accuracy within the batch",
        {"train/accuracy_image_to_text": "image to text", "train/accuracy_text_to_image": "text to image"},
        from_zero=True,
    ),
    Panel("logit scale", {"train/logit_scale": "logit scale"}),
    Panel("gradient norm", {"train/grad_norm": "gradient norm"}, log=True),
    Panel("learning rate", {"lr/image": "image tower", "lr/text": "text tower"}, from_zero=True),
    Panel("samples per second", {"speed/samples_per_second": "samples per second"}, from_zero=True),
    Panel("share of time waiting for data", {"speed/data_wait_fraction": "waiting"}, from_zero=True),
)
"""Drawn where no metric is named; evaluation results follow."""
_EVALUATIONS = {
    "classification top-1": {"top1": ""},
    "retrieval recall@1": {
        "image_to_text_recall@1": ", image to text",
        "text_to_image_recall@1": ", text to image",
    },
    "validation loss, in nats": {"loss": ""},
}


@dataclass
class Curves:
    """A run's history by columns."""

    label: str
    steps: array[float] = field(default_factory=lambda: array("d"))
    samples: array[float] = field(default_factory=lambda: array("d"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    """Of training."""
    rows: dict[str, array[float]] = field(default_factory=dict)
    """Metric -> numbers of the rows that have it."""
    values: dict[str, array[float]] = field(default_factory=dict)
    """Metric -> its values in these; NaN stands for one that was not finite."""
    skipped: list[float] = field(default_factory=list)
    """Steps at which rows tell of skipped updates."""
    restarts: list[float] = field(default_factory=list)
    """Steps at which an attempt ended and another one followed."""

    def places(self, by: By) -> Values:
        """The horizontal axis: a place for every row."""
        if by == "hours":
            return np.asarray(self.seconds) / 3600
        return np.asarray(self.steps if by == "step" else self.samples)

    def curve(self, name: str, by: By) -> tuple[Values, Values]:
        """Places and values of a metric, thinned; empty where the run has it not."""
        places, values = self._whole(name, by)
        kept = thin(values)
        return places[kept], values[kept]

    def medians(self, name: str, by: By) -> tuple[Values, Values]:
        """Medians of stretches of a metric with many values; empty for others."""
        places, values = self._whole(name, by)
        if len(values) < _MANY:
            return np.array([]), np.array([])
        parts = [part[np.isfinite(part)] for part in np.array_split(values, _MEDIANS)]
        middles = [part.mean() for part in np.array_split(places, _MEDIANS)]
        return np.array(middles), np.array([np.median(part) if len(part) else np.nan for part in parts])

    def _whole(self, name: str, by: By) -> tuple[Values, Values]:
        rows = np.asarray(self.rows.get(name, array("d"))).astype(int)
        return self.places(by)[rows], np.asarray(self.values.get(name, array("d")))


def plot(run_dirs: Sequence[Path], output: Path, *, metrics: Sequence[str] | None, by: By) -> Path:
    """Draw the curves of runs.

    Args:
        run_dirs: Run directories.
        output: PNG to be written.
        metrics: Names of metrics, a panel each; None: what people look at first.
        by: What runs are compared by.

    Returns:
        The file written.

    Raises:
        ConfigError: matplotlib is missing, a folder is no run's, or no run has a metric of that name.
    """
    require_png(output)
    runs = read_runs(run_dirs, metrics)
    figure = draw(runs, choose_panels(runs, metrics), by)
    save(figure, output)
    return output


def save(figure: Figure, output: Path) -> None:
    """Write a PNG, whole or not at all."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    write_png(output, file.getvalue())


# ------------------------------------------------------------------------------------------------------------- reading


def read_runs(run_dirs: Sequence[Path], metrics: Collection[str] | None) -> list[Curves]:
    """Read the histories of runs, each once; raises ConfigError as ``plot`` does."""
    unique = list(dict.fromkeys(path.resolve() for path in run_dirs))
    names: set[str] = set()
    wanted = set(metrics or [name for panel in PANELS for name in panel.lines])
    runs = [
        _read(path, label, wanted, names, with_results=metrics is None)
        for path, label in zip(unique, labels(unique), strict=True)
    ]
    names -= {"step", "samples"}
    if unknown := [name for name in metrics or () if name not in names]:
        raise ConfigError(f"--metric {unknown[0]}: no run has it; there are {', '.join(sorted(names)) or 'none'}")
    return runs


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other one has."""
    found: list[str] = []
    for path in paths:
        ends = (Path(*path.parts[start:]) for start in reversed(range(len(path.parts))))
        others = [other.parts for other in paths if other != path]
        shortest = (end for end in ends if all(other[-len(end.parts) :] != end.parts for other in others))
        found.append(text(str(next(shortest, path))) or "")
    return found


def _read(directory: Path, label: str, wanted: Collection[str], names: set[str], *, with_results: bool) -> Curves:
    """Read the wanted metrics of a run, and the names of all that it has into ``names``."""
    curves = Curves(label)
    path = directory / "metrics.jsonl"
    clock: list[Mapping[str, float | None]] = []
    try:
        for row in read_history(path):
            names.update(row)
            samples = number(row.get("samples")) or 0.0
            clock.append({"samples": samples, _SPEED: number(row.get(_SPEED))})
            for name in row:
                if name in wanted or (with_results and name.startswith("eval/")):
                    value = number(row[name])
                    curves.rows.setdefault(name, array("d")).append(len(curves.steps))
                    curves.values.setdefault(name, array("d")).append(np.nan if value is None else value)
            curves.steps.append(number(row["step"]) or 0.0)
            curves.samples.append(samples)
            if number(row.get("train/skipped_steps")):
                curves.skipped.append(curves.steps[-1])
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give run directories that have been trained") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; ask its owner for the permission") from None
    if not curves.steps:
        raise ConfigError(f"{path} has no rows yet; wait for the first one (log.every_steps)")
    known_samples, known_seconds = zip(*training_time(clock), strict=True)
    curves.seconds.extend(np.interp(np.asarray(curves.samples), known_samples, known_seconds))
    attempts, _ = Reader(directory).rows("restarts.jsonl")
    again = [number(row.get("step")) for row in attempts if row.get("action") in ("restart", "requeue")]
    curves.restarts = [step for step in again if step is not None]
    return curves


def thin(values: Values) -> NDArray[np.intp]:
    """Places of at most 3 values per stretch: the smallest, the largest, and one that is not finite."""
    if len(values) <= 3 * _BUCKETS:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), _BUCKETS + 1).astype(int)
    kept: set[int] = {0, len(values) - 1}
    for start, end in pairwise(edges):
        part = values[start:end]
        finite = np.flatnonzero(np.isfinite(part))
        if len(finite):
            kept |= {int(start + finite[part[finite].argmin()]), int(start + finite[part[finite].argmax()])}
        if len(finite) < len(part):
            kept.add(int(start + np.flatnonzero(~np.isfinite(part))[0]))
    return np.array(sorted(kept))


# ------------------------------------------------------------------------------------------------------------- drawing


def choose_panels(runs: Sequence[Curves], metrics: Sequence[str] | None) -> list[Panel]:
    """The panels that have something to show, in order."""
    found = dict.fromkeys(name for run in runs for name in run.values)
    if metrics is not None:
        log = {name for panel in PANELS if panel.log for name in panel.lines}
        return [Panel(name, {name: name}, log=name in log) for name in dict.fromkeys(metrics)]
    shown = [
        Panel(panel.title, lines, panel.from_zero, panel.log)
        for panel in PANELS
        if (lines := {name: label for name, label in panel.lines.items() if name in found})
    ]
    for title, kinds in _EVALUATIONS.items():
        lines: dict[str, str] = {}
        for name in found:
            dataset, _, metric = name.removeprefix("eval/").rpartition("/")
            if name.startswith("eval/") and metric in kinds:
                lines[name] = dataset + kinds[metric]
        if lines:
            shown.append(Panel(title, lines, from_zero=not title.startswith("validation")))
    return shown


def draw(runs: Sequence[Curves], panels: Sequence[Panel], by: By) -> Figure:
    """A grid of panels; a colour per run, or of a single run per curve.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415  an optional dependency, and slow
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(INSTALL) from error

    count = len(panels)
    choices = (3, 4) if count > 4 else (2 if count == 4 else count,)
    columns = min(choices, key=lambda columns: -count % columns)  # few empty places
    rows = -(-count // columns)
    look: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(look):
        figure = Figure(figsize=(max(6.0, 4.3 * columns), 2.8 * rows + 0.6), layout="constrained")
        right = max(float(run.places(by)[-1]) for run in runs)
        for place, panel in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, place)
            _draw_panel(axes, panel, runs, by)
            axes.set_xlim(0, right * 1.01 or 1)
            if place + columns > count:
                axes.set_xlabel(_AXES[by])
        _name_runs(figure, runs)
        if len(runs) == 1:
            _mark(figure, runs[0], by)
    return figure


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[Curves], by: By) -> None:
    from matplotlib.ticker import EngFormatter  # noqa: PLC0415  as in draw

    axes.set_title(_plain(panel.title), loc="left", fontweight="bold")
    axes.grid(visible=True, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    seen: list[Values] = [np.array([])]
    for number_of_run, run in enumerate(runs):
        for number_of_line, name in enumerate(panel.lines):
            look: dict[str, Any] = {
                "color": COLOURS[(number_of_line if len(runs) == 1 else number_of_run) % len(COLOURS)],
                "linestyle": STYLES[(number_of_line + number_of_run // len(COLOURS)) % len(STYLES)],
            }
            seen.append(_draw_curve(axes, run, name, by, look))
    values = np.concatenate(seen)
    if not len(values):
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color="0.4")
    if panel.log and len(values) and values.min() > 0 and values.max() > 30 * values.min():
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        if panel.from_zero:
            axes.set_ylim(bottom=min(0.0, *values) if len(values) else 0.0)
    if by != "hours":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(panel.lines) > 1:
        _name_lines(axes, panel, one_run=len(runs) == 1)


def _draw_curve(axes: Axes, run: Curves, name: str, by: By, look: Mapping[str, Any]) -> Values:
    """Draw a metric of a run; returns its finite values."""
    x, y = run.curve(name, by)
    middles, medians = run.medians(name, by)
    few, faint = len(x) <= _FEW, {"linewidth": 0.6, "alpha": 0.35, "linestyle": "-"} if len(medians) else {}
    marks = {"marker": "o", "markersize": 3 if few else 2, "markevery": None if few else _isolated(y)}
    axes.plot(x, y, gid=name, **{"linewidth": 1.3, **look, **marks, **faint})
    if len(medians):
        axes.plot(middles, medians, gid=f"{name}, medians", linewidth=1.5, **look)
    return y[np.isfinite(y)]


def _isolated(values: Values) -> list[int]:
    """Places of values between gaps, of which a line shows nothing."""
    finite = np.concatenate([[False], np.isfinite(values), [False]])
    return np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:]).tolist()


def _name_lines(axes: Axes, panel: Panel, *, one_run: bool) -> None:
    """Say which curve of a panel is which; between runs they differ by their stroke alone."""
    from matplotlib.lines import Line2D  # noqa: PLC0415  as in draw

    handles = [
        Line2D([], [], color=COLOURS[place % len(COLOURS)] if one_run else "0.3", linestyle=STYLES[place % len(STYLES)])
        for place in range(len(panel.lines))
    ]
    axes.legend(handles, [_plain(label) for label in panel.lines.values()], frameon=False, fontsize=8)


def _name_runs(figure: Figure, runs: Sequence[Curves]) -> None:
    """The run's name above all, or a legend of several."""
    from matplotlib.lines import Line2D  # noqa: PLC0415  as in draw

    names = [_plain(run.label) for run in runs]
    if len(runs) == 1:
        figure.suptitle(names[0], x=0.01, ha="left", fontsize=11)
        return
    handles = [
        Line2D([], [], color=COLOURS[place % len(COLOURS)], linestyle=STYLES[place // len(COLOURS) % len(STYLES)])
        for place in range(len(runs))
    ]
    across = max(1, min(len(runs), 130 // (8 + max(map(len, names)))))
    figure.legend(handles, names, loc="outside upper left", ncols=across, frameon=False, fontsize=10)


def _mark(figure: Figure, run: Curves, by: By) -> None:
    """Thin ticks where updates were skipped, thin lines where the run was started again."""
    steps, places = np.asarray(run.steps), run.places(by)
    skipped, restarts = (
        np.unique(np.interp(found, steps, places).round(9)) if found else np.array([])
        for found in (run.skipped[:: max(1, len(run.skipped) // _BUCKETS)], run.restarts)
    )
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for place in restarts:
            handles["started again"] = axes.axvline(place, color="0.55", linewidth=0.7, linestyle=":", zorder=0.5)
        if len(skipped):
            (handles["updates skipped"],) = axes.plot(
                skipped,
                np.zeros(len(skipped)),
                transform=axes.get_xaxis_transform(),
                color="#d55e00",
                marker="|",
                markersize=8,
                markeredgewidth=0.8,
                linestyle="",
                clip_on=False,
                scalex=False,
                scaley=False,
            )
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower left", ncols=2, frameon=False)


def _plain(label: str) -> str:
    """A label that matplotlib neither takes for a formula nor leaves out."""
    return ("\u200b" if label.startswith("_") else "") + label.replace("$", r"\$")
