"""Reading a run directory while others write to it.

Whatever a file is like (missing, torn, damaged, endless, not to be read), reading it costs a bounded number of bytes
and raises nothing: what cannot be had is empty, and why is in ``RunFiles.unreadable``. Nothing is written, no lock is
taken. What the values mean is said in ``finding``.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from evaclip import lock
from evaclip.checkpoint_names import complete, damaged_steps, step_of
from evaclip.config_file import parse_yaml
from evaclip.errors import ConfigError
from evaclip.followed import RESULTS
from evaclip.status.values import mapping, text

_LONG, _SHORT = 4 << 20, 1 << 20
"""Bytes that are read off the end of a file."""
_MOST_ROWS = 20
"""Of ``metrics.jsonl``."""
_WHOLE = 32 << 20
"""Bytes of a file that has to be read from its start."""
_MOST_SAID = 150
"""Characters of a parser's complaint."""
_TORN_SECONDS = 0.03
"""After which a file that is rewritten in place is read again."""
_MADE_BY_A_RUN = ("metrics.jsonl", "log.txt", "checkpoints", "cluster.json", "restarts.jsonl")
_WRITTEN_BY_RANKS = (
    *("metrics.jsonl", "log.txt", "ranks.json", "skipped_steps.jsonl", "bad_records.jsonl", "checkpoints"),
)


class Tail(NamedTuple):
    """The last lines of a file."""

    lines: list[bytes]
    """Without line breaks; half a line at either end is left out."""
    whole: bool
    """Whether they are all there are."""


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run hold at one moment."""

    directory: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    """Newest of ``metrics.jsonl``, oldest first."""
    evaluated: dict[str, Any]
    """Newest row with results, if it is not too far back."""
    evaluation: dict[str, Any]
    followed: dict[str, Any]
    """Last row that ``evaclip evaluate --follow`` has found."""
    ranks: dict[str, Any]
    cluster: dict[str, Any]
    restarts: list[dict[str, Any]]
    restarts_whole: bool
    """Whether these are all restarts; so of the next two."""
    skipped_steps: list[dict[str, Any]]
    skipped_steps_whole: bool
    bad_records: list[dict[str, Any]]
    bad_records_whole: bool
    log: list[str]
    """Last lines of ``log.txt``."""
    checkpoints: list[tuple[int, float | None]]
    """Step, and when it was written."""
    damaged: list[int]
    """Steps of checkpoints that were set aside."""
    last_write: float | None
    """When the run last wrote something; the launcher's files do not count."""
    holder: lock.Holder | None
    unreadable: dict[str, str]
    """File -> why it could not be read."""


def read_run(directory: Path) -> RunFiles:
    """Read the files of a run.

    Raises:
        ConfigError: The folder is no run's, or cannot be read.
    """
    _require_run(directory)
    reader = Reader(directory)
    holder = reader.holder()  # first: of a process that is gone by now, all files are there
    metrics = reader.tail("metrics.jsonl", _LONG).lines
    restarts, skipped = reader.rows("restarts.jsonl"), reader.rows("skipped_steps.jsonl")
    bad = reader.rows("bad_records.jsonl")
    log = [text(line.decode(errors="replace")) or "" for line in reader.tail("log.txt", _SHORT).lines]
    return RunFiles(
        directory=directory,
        config=reader.config(),
        rows=list(_rows(metrics[-_MOST_ROWS:])),
        evaluated=next(_rows(line for line in reversed(metrics) if b'"eval/' in line), dict[str, Any]()),
        evaluation=reader.json("evaluation.json"),
        followed=next(reversed(reader.rows(RESULTS)[0]), dict[str, Any]()),
        ranks=reader.json("ranks.json"),
        cluster=reader.json("cluster.json"),
        restarts=restarts[0],
        restarts_whole=restarts[1],
        skipped_steps=skipped[0],
        skipped_steps_whole=skipped[1],
        bad_records=bad[0],
        bad_records_whole=bad[1],
        log=log,
        checkpoints=reader.checkpoints(),
        damaged=reader.damaged(),
        last_write=max(reader.times(), default=None),
        holder=holder,
        unreadable=reader.problems,
    )


def _require_run(directory: Path) -> None:
    try:
        names = {path.name for path in directory.iterdir()}
    except FileNotFoundError:
        raise ConfigError(f"{directory} does not exist; give a run directory") from None
    except NotADirectoryError:
        raise ConfigError(f"{directory} is a file; give a run directory") from None
    except OSError as error:
        raise ConfigError(f"{directory} cannot be read: {error.strerror}; ask its owner for the permission") from None
    if names.isdisjoint(_MADE_BY_A_RUN):
        raise ConfigError(
            f"{directory} is no run directory: it holds none of {', '.join(_MADE_BY_A_RUN)}; give the run_dir of a "
            f"configuration that has been trained"
        )


@dataclass
class Reader:
    """Reads files of one folder, and remembers which could not be read."""

    directory: Path
    problems: dict[str, str] = field(default_factory=dict[str, str])

    def rows(self, name: str) -> tuple[list[dict[str, Any]], bool]:
        """The last rows of a list of JSON, and whether they are all."""
        lines, whole = self.tail(name, _SHORT)
        return list(_rows(lines)), whole

    def tail(self, name: str, most: int) -> Tail:
        """The last lines of a file, out of ``most`` bytes."""
        content, start = self._end(name, most)
        lines = (content or b"").split(b"\n")  # the last one has no end yet
        return Tail(lines[1 if start else 0 : -1], not start)

    def json(self, name: str) -> dict[str, Any]:
        """An object of JSON; a file that does not parse may be half-written, and is read once more."""
        for last in (False, True):
            content, _ = self._end(name, _WHOLE)
            if content is None:
                break
            try:
                return mapping(json.loads(content))
            except (ValueError, RecursionError) as error:
                if last:
                    self.problems[name] = f"no JSON: {text(str(error)[:_MOST_SAID])}"
                else:
                    time.sleep(_TORN_SECONDS)
        return {}

    def config(self) -> dict[str, Any]:
        """``config.yaml`` as it stands there: that of another version is good enough for a few numbers."""
        content, _ = self._end("config.yaml", _SHORT)
        try:
            return mapping(parse_yaml((content or b"").decode()))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self.problems["config.yaml"] = f"no YAML: {text(str(error)[:_MOST_SAID])}"
            return {}

    def checkpoints(self) -> list[tuple[int, float | None]]:
        """Step and time of every checkpoint, oldest first."""
        try:
            found = complete(self.directory / "checkpoints")
        except OSError as error:
            self.problems["checkpoints"] = error.strerror or str(error)
            return []
        return [(step, _changed(path / "meta.json")) for path in found if (step := step_of(path)) is not None]

    def damaged(self) -> list[int]:
        """Steps of checkpoints that were set aside."""
        try:
            return damaged_steps(self.directory / "checkpoints")
        except OSError:  # told by ``checkpoints``
            return []

    def times(self) -> Iterator[float]:
        """When each file of the run last changed; a checkpoint that is being written is one of them."""
        paths = [self.directory / name for name in _WRITTEN_BY_RANKS]
        with suppress(OSError):  # it has just got its name
            paths += (self.directory / "checkpoints").glob(".step_*.tmp/*")
        yield from (changed for path in paths if (changed := _changed(path)) is not None)

    def holder(self) -> lock.Holder | None:
        """Who holds the run's lock."""
        try:
            return lock.holder(self.directory)
        except OSError as error:
            self.problems[".lock"] = error.strerror or str(error)
            return None

    def _end(self, name: str, most: int) -> tuple[bytes | None, int]:
        """The last bytes of a file, and at which byte they start; None where it is missing or cannot be read."""
        path = self.directory / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for ever
                self.problems[name] = "not a file"
                return None, 0
            with path.open("rb", buffering=0) as file:
                start = max(0, file.seek(0, os.SEEK_END) - most)
                file.seek(start)
                return file.read(most), start
        except FileNotFoundError:
            pass
        except OSError as error:
            self.problems[name] = error.strerror or str(error)
        return None, 0


def _rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects that lines of JSON hold; damaged lines are left out."""
    for line in lines:
        try:
            row = mapping(json.loads(line))
        except (ValueError, RecursionError):
            continue
        if row:
            yield row


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
