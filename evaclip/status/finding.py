"""From what a run's files hold, and the time, to facts: pure functions.

Whether a run lives is told by its lock, where that can be asked, then by the launcher, then by how long it is silent.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from evaclip.logs import END, LINE
from evaclip.progress import seconds_left
from evaclip.status.facts import (
    Checkpoints,
    Data,
    Evaluation,
    Facts,
    Launcher,
    LauncherRank,
    Progress,
    RankTimes,
    Restart,
    Restarts,
    SkippedSteps,
    SlowRank,
    Source,
    Speed,
    State,
    StateName,
)
from evaclip.status.files import RunFiles
from evaclip.status.values import integer, mapping, mappings, number, text

_LEAST_SILENT_SECONDS = 120.0
"""Steps, evaluations and first compilations may take as long without a word."""
_SILENT_ROWS = 5
"""After so many times the usual time between two rows a run counts as silent."""
_FRESH_SECONDS = 30.0
"""The launcher writes every second; what it says is believed for so long."""
_AFTER_SECONDS = 5.0
"""By which clocks of nodes and of the storage may differ."""
_NEWEST_ROWS = 10
"""Rows over which speeds are averaged."""
_LAST = 5
"""Rows of a list, and lines of the log, that are given."""
_LOUD = ("WARNING", "ERROR", "CRITICAL")
_LAUNCHER_STATES: dict[str | None, tuple[StateName, str]] = {
    "preflight": ("waiting", "the launcher looks at its nodes"),
    "running": ("running", "the launcher says so"),
    "waiting": ("waiting", "the launcher waits"),
}
_ACTIONS: dict[str | None, tuple[StateName, str]] = {
    "restart": ("waiting", "to be restarted"),
    "requeue": ("waiting", "in the queue again"),
    "stop": ("ended", "stopped"),
    "done": ("ended", "done"),
}


def find_facts(files: RunFiles, now: float) -> Facts:
    """Everything that the files say at the time ``now``."""
    row = next((row for row in reversed(files.rows) if "train/loss" in row), None)
    speed = find_speed(files.rows)
    checkpoints = find_checkpoints(files, now)
    progress = find_progress(files, checkpoints.newest_step, speed)
    launcher = find_launcher(files.cluster, now)
    return Facts(
        run_dir=text(str(files.directory)) or "",
        time=now,
        state=find_state(files, progress, speed, now),
        progress=progress,
        speed=speed,
        row=None if row is None else _numbers(row),
        evaluation=find_evaluation(files, progress.step),
        checkpoints=checkpoints,
        launcher=launcher,
        restarts=find_restarts(files.restarts, complete=files.restarts_whole),
        data=find_data(files, row or {}),
        skipped_steps=find_skipped_steps(files, row or {}),
        ranks=find_ranks(files.ranks),
        log=loud_lines(files.log)[-_LAST:],
        unreadable=files.unreadable,
    )


# -------------------------------------------------------------------------------------------------------------- state


def find_state(files: RunFiles, progress: Progress, speed: Speed | None, now: float) -> State:
    """Whether the run lives, and why that is believed."""
    batch = number(mapping(files.config.get("train")).get("global_batch"))
    every = number(mapping(files.config.get("log")).get("every_steps"))
    row_seconds = every * batch / speed.samples_per_second if every and batch and speed else None
    seconds = None if files.last_write is None else max(0.0, now - files.last_write)
    silent = seconds is not None and seconds > max(_LEAST_SILENT_SECONDS, _SILENT_ROWS * (row_seconds or 0.0))
    done = progress.step is not None and progress.steps is not None and progress.step >= progress.steps
    alive = files.holder.alive if files.holder else None
    name, because = _judge(alive, _launcher_word(files, now), done, last_words(files.log), seconds, silent)
    return State(name, because, seconds, row_seconds, silent, text(files.holder.name) if files.holder else None)


def _judge(
    alive: bool | None,
    launcher: tuple[StateName, str] | None,
    done: bool,
    said: str | None,
    seconds: float | None,
    silent: bool,
) -> tuple[StateName, str]:
    """The first that holds."""
    verdicts: list[tuple[bool, tuple[StateName, str]]] = [
        (alive is True, ("running", "its process holds the lock")),
        (launcher is not None, launcher or ("unknown", "")),
        (done, ("ended", "all steps are done")),
        (said is not None, ("ended", said or "")),
        (alive is False, ("ended", "its process is gone without a word")),
        (seconds is None, ("unknown", "it has written nothing yet")),
        (silent, ("unknown", "it may hang, or its process is gone")),
        (True, ("running", "it writes")),
    ]
    return next(verdict for holds, verdict in verdicts if holds)


def _launcher_word(files: RunFiles, now: float) -> tuple[StateName, str] | None:
    """What the launcher says of the run; None where it says nothing, or nothing that still holds."""
    state, told = text(files.cluster.get("state")), number(files.cluster.get("time"))
    if state in _LAUNCHER_STATES and told is not None and now - told < _FRESH_SECONDS:
        return _LAUNCHER_STATES[state]
    last = files.restarts[-1] if files.restarts else {}
    action = text(last.get("action"))
    if action in _ACTIONS and _nothing_since(files, number(last.get("time"))):
        name, what = _ACTIONS[action]
        return name, f"{what}: {text(last.get('cause')) or 'no cause is given'}"
    if state == "ended" and _nothing_since(files, told):
        return "ended", "the launcher says so"
    return None


def _nothing_since(files: RunFiles, told: float | None) -> bool:
    """Whether the run has written nothing after a time."""
    return told is not None and (files.last_write is None or files.last_write < told + _AFTER_SECONDS)


def last_words(log: Sequence[str]) -> str | None:
    """The error that ended the run, if it is the last record of the log."""
    for line in reversed(log):
        if record := LINE.fullmatch(line):
            return record["message"] if record["name"] == END and record["level"] == "ERROR" else None
    return None


def loud_lines(log: Sequence[str]) -> list[str]:
    """Warnings and errors, without the names of modules."""
    records = (LINE.fullmatch(line) for line in log)
    return [f"{r['time']} {r['level']}: {r['message']}" for r in records if r and r["level"] in _LOUD]


# ------------------------------------------------------------------------------------------------------------ training


def find_speed(rows: Sequence[Mapping[str, Any]]) -> Speed | None:
    """Mean speed of the newest rows; each stands for as many samples, so times are 1 / speed."""
    timed = [(speed, row) for row in rows if (speed := number(row.get("speed/samples_per_second")) or 0.0) > 0]
    timed = timed[-_NEWEST_ROWS:]
    if not timed:
        return None
    seconds = sum(1 / speed for speed, _ in timed)
    waits = [(number(row.get("speed/data_wait_fraction")), 1 / speed) for speed, row in timed]
    known = [(wait, time) for wait, time in waits if wait is not None]
    waited = sum(wait * time for wait, time in known) / sum(time for _, time in known) if known else None
    return Speed(len(timed) / seconds, waited, len(timed))


def find_progress(files: RunFiles, saved_step: int | None, speed: Speed | None) -> Progress:
    """How far the run is: a checkpoint may be newer than the newest row."""
    train = mapping(files.config.get("train"))
    steps, batch = integer(train.get("steps")), number(train.get("global_batch"))
    newest = files.rows[-1] if files.rows else {}
    known = [step for step in (integer(newest.get("step")), saved_step) if step is not None]
    step = max(known, default=None)
    samples = number(newest.get("samples")) if step is None or not batch else step * batch
    left = None
    if step is not None and steps and samples and speed:
        row = {"step": step, "samples": samples, "speed/samples_per_second": speed.samples_per_second}
        left = seconds_left(row, steps=max(step, steps))
    fraction = min(1.0, step / steps) if step is not None and steps else None
    return Progress(step, steps, fraction, integer(samples), left)


def find_evaluation(files: RunFiles, step: int | None) -> Evaluation | None:
    """Results of the newest row that has some, or those that lie in ``evaluation.json``; none behind the run's step."""
    own, outside = (integer(row.get("step")) for row in (files.evaluated, files.followed))
    newer = outside is not None and outside <= (step or 0) and (own is None or outside > own)
    newest = files.followed if newer else files.evaluated
    if newest:
        found = {name: value for name, value in newest.items() if name.startswith("eval/")}
        return Evaluation(integer(newest.get("step")), _numbers(found))
    results = {
        f"eval/{name}/{metric}": value
        for name, result in files.evaluation.items()
        for metric, value in mapping(mapping(result).get("metrics")).items()
    }
    return Evaluation(None, _numbers(results)) if results else None


def _numbers(row: Mapping[str, Any]) -> dict[str, float | None]:
    return {text(name) or "": number(value) for name, value in row.items()}


def find_checkpoints(files: RunFiles, now: float) -> Checkpoints:
    """The newest checkpoint, and what is kept."""
    step, written = files.checkpoints[-1] if files.checkpoints else (None, None)
    age = None if written is None else max(0.0, now - written)
    return Checkpoints(step, age, [step for step, _ in files.checkpoints], files.damaged)


# ------------------------------------------------------------------------------------------------------------ launcher


def find_launcher(cluster: Mapping[str, Any], now: float) -> Launcher | None:
    """What the launcher sees of the ranks."""
    if not cluster:
        return None
    told = number(cluster.get("time"))
    nodes = {text(name) or "": mappings(ranks) for name, ranks in mapping(cluster.get("nodes")).items()}
    ranks = [
        LauncherRank(integer(r.get("rank")), node, integer(r.get("step")), text(r.get("phase")), age)
        for node, on_node in nodes.items()
        for r in on_node
        if (age := number(r.get("age_seconds"))) is not None
    ]
    return Launcher(
        state=text(cluster.get("state")),
        age_seconds=None if told is None else max(0.0, now - told),
        job=text(cluster.get("job")),
        attempt=integer(cluster.get("attempt")),
        nodes=len(nodes),
        ranks=sum(map(len, nodes.values())),
        step=min((rank.step for rank in ranks if rank.step is not None), default=None),
        oldest=max(ranks, key=lambda rank: rank.age_seconds, default=None),
    )


def find_restarts(rows: Sequence[Mapping[str, Any]], *, complete: bool) -> Restarts:
    """Attempts that ended."""
    last = [
        Restart(
            time=number(row.get("time")),
            attempt=integer(row.get("attempt")),
            step=integer(row.get("step")),
            cause=text(row.get("cause")),
            detail=text(row.get("detail")),
            action=text(row.get("action")),
        )
        for row in rows[-_LAST:]
    ]
    return Restarts(sum(row.get("action") in ("restart", "requeue") for row in rows), complete, last)


def find_ranks(ranks: Mapping[str, Any]) -> RankTimes | None:
    """Who works longest for a step, and who waits longest for data."""
    times = [
        (own, number(r.get("data_seconds")), integer(r.get("rank")), text(r.get("node")), r.get("slow") is True)
        for r in mappings(ranks.get("ranks"))
        if (own := number(r.get("own_seconds"))) is not None
    ]
    if not times:
        return None
    owns = [own for own, *_ in times]
    median = statistics.median_low(owns)  # of two ranks the faster one: that the other is slow should show
    slow = [SlowRank(rank, node, own, own / median) for own, _, rank, node, is_slow in times if is_slow and median > 0]
    waits = [(wait, rank) for _, wait, rank, *_ in times if wait is not None]
    wait, waiting = max(waits, key=lambda entry: entry[0], default=(None, None))
    return RankTimes(
        step=integer(ranks.get("step")),
        ranks=len(times),
        least=min(owns),
        median=median,
        most=max(owns),
        slow=sorted(slow, key=lambda rank: -rank.own_seconds),
        longest_data_seconds=wait,
        longest_data_rank=waiting,
    )


# ---------------------------------------------------------------------------------------------------------------- data


def find_data(files: RunFiles, row: Mapping[str, Any]) -> Data:
    """The books as of a row of metrics, and why records were skipped."""
    names = [name.removeprefix("data/delivered/") for name in row if name.startswith("data/delivered/")]
    sources: dict[str, Source] = {}
    for name in names:
        delivered, skipped, filtered, passes = (
            number(row.get(f"data/{what}/{name}")) for what in ("delivered", "skipped", "filtered", "passes")
        )
        taken = None if delivered is None or skipped is None else delivered + skipped
        fraction = skipped / taken if taken and skipped is not None else None
        sources[text(name) or ""] = Source(integer(delivered), integer(skipped), fraction, integer(filtered), passes)
    most = number(mapping(files.config.get("data")).get("max_bad_fraction"))
    reasons = Counter(reason for record in files.bad_records if (reason := text(record.get("reason"))))
    return Data(sources, most, dict(reasons.most_common()), files.bad_records_whole)


def find_skipped_steps(files: RunFiles, row: Mapping[str, Any]) -> SkippedSteps:
    """How many updates were skipped, and the last of them."""
    last = files.skipped_steps[-1] if files.skipped_steps else {}
    return SkippedSteps(
        count=len(files.skipped_steps),
        complete=files.skipped_steps_whole,
        last_step=integer(last.get("step")),
        last_cause=text(last.get("cause")),
        consecutive=integer(row.get("train/consecutive_skips")),
    )
