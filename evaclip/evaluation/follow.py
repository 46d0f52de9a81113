"""``evaclip evaluate --follow``: measure each checkpoint of a run that another process trains, as it appears.

It writes into ``RUN_DIR/followed`` alone, which one follower at a time holds: rows of ``results.jsonl`` (``followed``
knows them) and, while a checkpoint is measured, a folder of hard links to its files, so that retention can delete it
meanwhile; where the file system has no links, copies. A checkpoint is looked at once it has got its name, so it is
whole, and is measured once, which its digest tells. Oldest first: retention takes them in this order.

The process that trains sends new rows to W&B whenever it sends its own (``tracking``); what is left when the run is
complete is sent from here, by resuming the run.

On several ranks the main one looks and waits, and tells the others every few seconds, so that no collective is late.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import xxhash

from evaclip.checkpoint import CheckpointReader, DamagedError, damage, digest
from evaclip.checkpoint_names import complete, step_of
from evaclip.distributed import agreed, started
from evaclip.errors import ConfigError, RunLockedError, writing
from evaclip.evaluation.command import Request, measure_model
from evaclip.evaluation.results import Result
from evaclip.evaluation.suite import placed
from evaclip.files import write_json
from evaclip.followed import FOLDER, RESULTS, read_results
from evaclip.history import append_rows, cut_rows
from evaclip.lock import holder, lock
from evaclip.status.files import read_run
from evaclip.status.finding import find_facts
from evaclip.tracking import send_rest
from evaclip.weights.origin import ABOUT

_POLL_SECONDS = 10.0
_REQUEST = "request.json"
"""What was asked for at the first start."""


@dataclass(frozen=True)
class _Held:
    """A checkpoint that cannot go away."""

    checkpoint: Path
    """Where the run has it."""
    files: Path
    """Where its files are held."""
    row: dict[str, Any]
    """What its results will be known by."""


_Found = _Held | Literal["none yet", "complete"]


def follow(run_dir: Path, request: Request) -> None:
    """Measure the checkpoints of a run until its last one is measured.

    Results are named as in training, averaged weights as ``NAME.ema``; of a part of a set (``limit``) as
    ``NAME.firstN``.

    Args:
        run_dir: Run directory; may not be there yet.
        request: What to measure; the same at every start.

    Raises:
        ConfigError: This is no run directory, somebody else follows it, or its results are of another request.
        EvaclipError: With a message for the user; what was measured so far stays.
    """
    if (run_dir / "meta.json").is_file() or (run_dir / ABOUT).is_file():
        raise ConfigError(f"--follow takes a run directory, and {run_dir} is a single model; leave --follow out")
    with started(need_group=False) as ranks, closing(_checkpoints(run_dir, _asked(request))) as found:
        while True:
            held: _Found = "none yet"
            with agreed(ranks), writing(f"{run_dir / FOLDER}"):
                held = next(found) if ranks.is_main else held
            held = ranks.from_main(held)
            if held == "complete":
                break
            if isinstance(held, _Held):
                own = replace(request, output=request.output and request.output / held.checkpoint.name)
                results = measure_model(held.files, own, ranks, held.checkpoint)
                with agreed(ranks), writing(f"{run_dir / RESULTS}"):
                    if ranks.is_main:
                        append_rows(run_dir / RESULTS, [{**held.row, **_values(results, request)}])
    if ranks.is_main:
        _say(f"{run_dir} is complete, and its last checkpoint is measured; the results are in {run_dir / RESULTS}")
        with writing(f"{run_dir}"):
            _send_rest(run_dir)


def _asked(request: Request) -> dict[str, Any]:
    """What decides the results, as plain data; null where that is the run's to say."""
    sets = placed(request.suite, request.limit) if request.suite else None
    if request.datasets:
        sets = {name: {"": dataset} for name, dataset in request.datasets.items()}
    plain = sets and {
        name: {mode: one.model_dump(mode="json") for mode, one in modes.items()} for name, modes in sets.items()
    }
    return {"sets": plain, "limit": request.limit, "precision": request.precision, "ema": request.ema}


def _values(results: Sequence[Result], request: Request) -> dict[str, float | None]:
    """Name -> value; None for one that is not finite."""
    part = ("" if request.limit is None else f".first{request.limit}") + (".ema" if request.ema else "")
    return {
        name: value if math.isfinite(value) else None
        for result in results
        for name, value in replace(result, name=f"{result.name}{part}")
    }


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  hours may pass until the next word


# ------------------------------------------------------------------------------------------------------- the main rank


def _checkpoints(run_dir: Path, asked: dict[str, Any]) -> Generator[_Found]:
    """Yield each checkpoint that is not measured yet, "none yet" after a pause, and "complete" at the end."""
    measured = xxhash.xxh3_64_hexdigest(json.dumps(asked).encode())
    known: set[str] | None = None
    looked_at: dict[tuple[str, float], bool] = {}  # checkpoint as it was then -> whether its results are there
    said = ""
    while True:
        there = {mark: path for path in complete(run_dir / "checkpoints") if (mark := _mark(path))}
        mark = next((mark for mark in there if mark not in looked_at), None)
        if mark is None:
            newest = next(reversed(there), None)
            step = step_of(there[newest]) if newest and looked_at[newest] else None
            state, text = _state(run_dir, step)
            if state == "complete":
                yield "complete"
            if state != said:
                _say(text)
                said = state
            time.sleep(_POLL_SECONDS)
            yield "none yet"
            continue
        if known is None:
            known = _take(run_dir, asked)
        checkpoint = there[mark]
        with _holding(checkpoint, run_dir / FOLDER) as files:
            name, problem = _judge(files, known) if files else ("", "it was deleted before it could be measured")
            if problem:
                _say(f"{checkpoint} is passed over: {problem}")
            elif files and name not in known:
                at = CheckpointReader(files).state
                row = {"step": at.step, "samples": at.samples, "checkpoint": name, "written": mark[1]}
                yield _Held(checkpoint, files, {**row, "measured": measured})
                known.add(name)
            looked_at[mark] = name in known


def _mark(checkpoint: Path) -> tuple[str, float] | None:
    """Name, and when it was written; another one of the same step has another time. None where it is gone."""
    try:
        return checkpoint.name, (checkpoint / "meta.json").stat().st_mtime
    except FileNotFoundError:
        return None


def _state(run_dir: Path, measured_step: int | None) -> tuple[str, str]:
    """What the run does, in a word and in a sentence; complete when its newest checkpoint is the last and measured."""
    try:
        facts = find_facts(read_run(run_dir), time.time())
    except ConfigError as error:  # nothing is there yet
        return str(error), f"waiting for checkpoints: {error}"
    if measured_step is not None and facts.progress.steps is not None and measured_step >= facts.progress.steps:
        return "complete", ""
    behind = "" if measured_step is None else f" behind step {measured_step}"
    name, because = facts.state.name, facts.state.because
    return name, f"waiting for a checkpoint{behind} of {run_dir} ({name}: {because})"


def _take(run_dir: Path, asked: dict[str, Any]) -> set[str]:
    """Hold the follower's folder as long as this process lives; digests of the checkpoints that are measured."""
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    try:
        lock(folder)
    except RunLockedError:
        found = holder(folder)
        raise RunLockedError(
            f"{run_dir} is followed already ({found.name if found else 'by a process that has just ended'}); wait for "
            f"that process or end it"
        ) from None
    for left in folder.glob("step_*"):
        shutil.rmtree(left)
    cut_rows(run_dir / RESULTS, sys.maxsize)
    before = json.loads((folder / _REQUEST).read_text(encoding="utf-8")) if (folder / _REQUEST).exists() else asked
    if other := [_difference(key, before, asked) for key in asked if before.get(key) != asked[key]]:
        raise ConfigError(
            f"{folder} holds results of another request ({', '.join(other)}); ask for the same, or move that folder "
            f"away to measure all checkpoints once more"
        )
    write_json(folder / _REQUEST, asked, indent=2)
    return {row["checkpoint"] for row in read_results(run_dir)}


def _difference(key: str, before: dict[str, Any], asked: dict[str, Any]) -> str:
    return "other sets" if key == "sets" else f"{key} {before.get(key)}, now {asked[key]}"


@contextmanager
def _holding(checkpoint: Path, folder: Path) -> Iterator[Path | None]:
    """A folder of the checkpoint's files that nobody deletes; None where they were deleted meanwhile."""
    own = folder / checkpoint.name
    own.mkdir()
    try:
        yield own if _link_all(checkpoint, own) else None
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _link_all(source: Path, target: Path) -> bool:
    """Whether all files were there."""
    try:
        for file in source.iterdir():
            _link(file, target / file.name)
    except FileNotFoundError:
        return False
    return True


def _link(file: Path, link: Path) -> None:
    try:
        os.link(file, link)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links, or with rules about them
        shutil.copyfile(file, link)


def _judge(files: Path, known: set[str]) -> tuple[str, str | None]:
    """Digest of a checkpoint, and what is wrong with it, if that is not known to be nothing."""
    try:
        name = digest(files)
    except DamagedError as error:
        return "", str(error)
    return name, None if name in known else damage(files)


def _send_rest(run_dir: Path) -> None:
    """Send W&B what it lacks, once the process that trains has ended."""
    said = False
    while True:
        try:
            return send_rest(run_dir)
        except RunLockedError as error:
            if not said:
                _say(f"W&B gets the last results when the run's process has ended: {error}")
                said = True
            time.sleep(_POLL_SECONDS)
