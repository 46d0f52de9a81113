"""Facts for people: some twenty aligned lines. Pure functions; which facts there are is said in ``facts``."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Collection, Iterable, Iterator

from evaclip.progress import summary
from evaclip.status.facts import Data, Evaluation, Facts, RankTimes, Restarts, SkippedSteps

_INDENT = 15
_MOST_SOURCES = 3
_MOST_DATASETS = 3
_MOST_SLOW = 3
_MOST_RESTARTS = 2
_MOST_REASONS = 4


def render(facts: Facts) -> list[str]:
    """The lines; what is not known is left out."""
    entries = [(label, text) for label, text in _entries(facts) if text]
    width = max(len(label) for label, _ in entries)
    before = ""
    lines: list[str] = []
    for label, text in entries:
        lines.append(f"{'' if label == before else label:<{width}}  {text}")
        before = label
    return lines


def fitting(lines: Iterable[str], columns: int) -> list[str]:
    """The lines, broken between words where a terminal would break them anywhere."""
    indent = " " * _INDENT
    return [part for line in lines for part in textwrap.wrap(line, max(columns, 40), subsequent_indent=indent)]


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, hours, days = (round(seconds / unit) for unit in (60, 3600, 86400))
    if minutes < 120:
        return f"{minutes} min"
    return f"{hours} h" if hours < 48 else f"{days} days"


def moment(seconds: float | None) -> str:
    """A point in time, as the clock here shows it."""
    if seconds is None:
        return "no time"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):  # no year has so many digits
        return f"time {seconds:.3g}"


def fraction(value: float) -> str:
    """A share, precise enough to see the small ones."""
    if value == 0:
        return "0 %"
    return f"{100 * value:.2g} %" if 0 < value < 0.1 else f"{100 * value:.1f} %"


def _entries(facts: Facts) -> Iterator[tuple[str, str]]:
    """Label and text of each line; lines of one label follow each other."""
    yield "run", f"{facts.run_dir}, {moment(facts.time)}"
    yield "state", _state(facts)
    yield "progress", _progress(facts)
    yield "speed", _speed(facts)
    if facts.row:
        step = f"step {facts.row['step']:,.0f}: " if facts.row.get("step") is not None else ""
        yield "training", step + summary({name: v for name, v in facts.row.items() if name.startswith("train/")})
    yield from (("evaluation", line) for line in (_evaluation(facts.evaluation) if facts.evaluation else ()))
    yield "checkpoints", _checkpoints(facts)
    yield "launcher", _launcher(facts)
    yield from (("restarts", line) for line in _restarts(facts.restarts))
    yield from (("data", line) for line in _data(facts.data))
    yield "bad steps", _skipped_steps(facts.skipped_steps)
    yield from (("ranks", line) for line in (_ranks(facts.ranks) if facts.ranks else ()))
    yield from (("log", line) for line in facts.log)
    yield "unreadable", "; ".join(f"{name}: {why}" for name, why in facts.unreadable.items())


def _state(facts: Facts) -> str:
    state = facts.state
    parts = [f"{state.name}: {state.because}"]
    if state.silent_seconds is not None:
        ago = duration(state.silent_seconds)
        if state.silent and state.name != "ended":
            usual = f" (a row usually comes every {duration(state.row_seconds)})" if state.row_seconds else ""
            parts.append(f"no sign of life for {ago}{usual}")
        else:
            parts.append(f"{ago} ago" if state.name == "ended" else f"last sign of life {ago} ago")
    if state.holder and state.name in ("running", "unknown"):
        parts.append(state.holder)
    return "; ".join(parts)


def _progress(facts: Facts) -> str:
    progress = facts.progress
    if progress.step is None:
        return f"no step yet of {progress.steps:,}" if progress.steps else "no step yet"
    parts = [f"step {progress.step:,}"]
    if progress.steps:
        parts = [f"{parts[0]} of {progress.steps:,}"]
    if progress.fraction is not None:
        parts.append(f"{100 * math.floor(1000 * progress.fraction) / 1000:.1f} %")  # 100 % is the last step's
    if progress.samples is not None:
        parts.append(f"{progress.samples:,} samples")
    return ", ".join(parts)


def _speed(facts: Facts) -> str:
    speed = facts.speed
    if not speed:
        return ""
    parts = [f"{speed.samples_per_second:,.{0 if speed.samples_per_second >= 10 else 1}f} samples/s"]
    if speed.data_wait_fraction is not None:
        parts.append(f"{fraction(speed.data_wait_fraction)} of the time waiting for data")
    if facts.progress.seconds_left and facts.state.name != "ended":
        parts.append(f"{duration(facts.progress.seconds_left)} of training left")
    return ", ".join(parts)


def _evaluation(evaluation: Evaluation) -> Iterator[str]:
    """A line per dataset; recall@1, recall@5 and recall@10 stand together."""
    datasets: dict[str, dict[str, dict[str, str]]] = {}
    for name, value in evaluation.results.items():
        dataset, _, metric = name.removeprefix("eval/").rpartition("/")
        kind, _, k = metric.partition("@")
        groups = datasets.setdefault(dataset, {})
        groups.setdefault(kind, {})[k] = "not finite" if value is None else f"{value:.4f}"
    start = "" if evaluation.step is None else f"step {evaluation.step:,}: "
    hidden = _more(datasets, _MOST_DATASETS)
    for place, (dataset, groups) in enumerate(list(datasets.items())[:_MOST_DATASETS], 1):
        shown = [f"{kind}{'@' * any(at)}{'/'.join(at)} {'/'.join(at.values())}" for kind, at in groups.items()]
        yield f"{start}{dataset} {', '.join(shown)}{f';{hidden}' if hidden and place == _MOST_DATASETS else ''}"
        start = " " * len(start)


def _checkpoints(facts: Facts) -> str:
    found = facts.checkpoints
    parts = ["none yet"]
    if found.newest_step is not None:
        age = "" if found.newest_age_seconds is None else f", {duration(found.newest_age_seconds)} old"
        parts = [f"step {found.newest_step:,}{age}", f"{len(found.steps)} kept"]
    if found.damaged_steps:
        parts.append(f"damaged and set aside: step {', '.join(map(str, found.damaged_steps[-3:]))}")
    return "; ".join(parts)


def _launcher(facts: Facts) -> str:
    launcher = facts.launcher
    if not launcher:
        return ""
    parts = [f"job {launcher.job}"] if launcher.job else []
    parts += [f"attempt {launcher.attempt}"] if launcher.attempt is not None else []
    parts.append(f"{launcher.ranks} ranks on {launcher.nodes} nodes")
    if launcher.step is not None:
        parts.append(f"the rearmost at step {launcher.step:,}")
    if launcher.oldest and facts.state.name == "running":
        oldest = launcher.oldest
        heard = duration(oldest.age_seconds)
        parts.append(f"rank {oldest.rank} on {oldest.node} last heard of {heard} ago, in {oldest.phase}")
    if launcher.age_seconds is not None and facts.state.name != "ended":
        parts.append(f"{launcher.state}, written {duration(launcher.age_seconds)} ago")
    return ", ".join(parts)


def _restarts(restarts: Restarts) -> Iterator[str]:
    if not restarts.last:
        return
    yield f"{_at_least(restarts.count, complete=restarts.complete)}; last of the attempts that ended:"
    for row in restarts.last[-_MOST_RESTARTS:]:
        step = "" if row.step is None else f" at step {row.step:,}"
        yield f"  {moment(row.time)} {row.cause}{step} -> {row.action}: {row.detail}"


def _data(data: Data) -> Iterator[str]:
    worst = sorted(data.sources.items(), key=lambda item: -(item[1].skipped_fraction or 0.0))
    hidden = _more(worst, _MOST_SOURCES)
    for place, (name, source) in enumerate(worst[:_MOST_SOURCES], 1):
        limit = f", limit {fraction(data.max_bad_fraction)}" if data.max_bad_fraction is not None else ""
        parts = [] if source.delivered is None else [f"{source.delivered:,} delivered"]
        if source.skipped is not None:
            share = "" if source.skipped_fraction is None else f" ({fraction(source.skipped_fraction)}{limit})"
            parts.append(f"{source.skipped:,} skipped{share}")
        if source.filtered is not None:
            parts.append(f"{source.filtered:,} filtered")
        if source.passes is not None:
            parts.append(f"{source.passes:.3g} passes")
        if hidden and place == _MOST_SOURCES:
            parts.append(f"{hidden.strip()} with less skipped")
        yield f"{name}: {', '.join(parts)}"
    if data.reasons:
        shown = [f"{count:,} {reason}" for reason, count in list(data.reasons.items())[:_MOST_REASONS]]
        start = "skipped for: " if data.reasons_complete else "lately skipped for: "
        yield start + ", ".join(shown) + _more(data.reasons, _MOST_REASONS)


def _skipped_steps(skipped: SkippedSteps) -> str:
    if not skipped.count and not skipped.consecutive:
        return "none"
    parts = [f"{_at_least(skipped.count, complete=skipped.complete)} skipped"]
    if skipped.last_step is not None:
        parts.append(f"the last was {skipped.last_step:,} ({skipped.last_cause})")
    if skipped.consecutive:
        parts.append(f"{skipped.consecutive} in a row up to now")
    return ", ".join(parts)


def _ranks(ranks: RankTimes) -> Iterator[str]:
    wait = ""
    if ranks.longest_data_seconds is not None:
        wait = f"; longest wait for data {ranks.longest_data_seconds:.3g} s (rank {ranks.longest_data_rank})"
    if ranks.slow:
        shown = [
            f"rank {rank.rank} on {rank.node} {rank.own_seconds:.3g} s ({rank.times_median:.1f} x)"
            for rank in ranks.slow[:_MOST_SLOW]
        ]
        yield f"slow: {', '.join(shown)}{_more(ranks.slow, _MOST_SLOW)}; median {ranks.median:.3g} s{wait}"
    else:
        spread = f"{ranks.least:.3g} / {ranks.median:.3g} / {ranks.most:.3g} s"
        yield f"{ranks.ranks}, none slow: {spread} of own work per step (least, median, most){wait}"


def _more(items: Collection[object], shown: int) -> str:
    return f" and {len(items) - shown} more" if len(items) > shown else ""


def _at_least(count: int, *, complete: bool) -> str:
    return f"{count:,}" if complete else f"at least {count:,}"
