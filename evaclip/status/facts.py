"""What is known of a run, as values.

``Facts`` is what ``evaclip status --json`` prints: these names are its keys, and null stands for what is not known. How
they follow from the files is said in ``finding``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StateName = Literal["running", "waiting", "ended", "unknown"]


@dataclass(frozen=True)
class State:
    """Whether the run lives."""

    name: StateName
    because: str
    """In words."""
    silent_seconds: float | None
    """Since the run last wrote something."""
    row_seconds: float | None
    """Usual time between two rows of metrics."""
    silent: bool
    """Whether it has not written for much longer than that."""
    holder: str | None
    """The process that trains here, or did last."""


@dataclass(frozen=True)
class Progress:
    """How far the run is."""

    step: int | None
    """Of the newest row or checkpoint."""
    steps: int | None
    fraction: float | None
    samples: int | None
    seconds_left: float | None
    """Of training at the speed of the newest rows; evaluations, checkpoints and down time come on top."""


@dataclass(frozen=True)
class Speed:
    """Means over the newest rows, by time."""

    samples_per_second: float
    data_wait_fraction: float | None
    rows: int
    """How many."""


@dataclass(frozen=True)
class Evaluation:
    """Newest results."""

    step: int | None
    """None where the row is too far back in metrics.jsonl; the results are evaluation.json's then."""
    results: dict[str, float | None]
    """By metric, ``eval/DATASET/METRIC``."""


@dataclass(frozen=True)
class Checkpoints:
    """What lies in ``checkpoints``; names and times only, no byte is checked."""

    newest_step: int | None
    newest_age_seconds: float | None
    steps: list[int]
    """Of all that are kept, ascending."""
    damaged_steps: list[int]
    """Of those that were set aside."""


@dataclass(frozen=True)
class LauncherRank:
    """The rank that was heard of longest ago."""

    rank: int | None
    node: str
    step: int | None
    phase: str | None
    age_seconds: float


@dataclass(frozen=True)
class Launcher:
    """What the launcher wrote last (cluster.json)."""

    state: str | None
    age_seconds: float | None
    """Since it wrote; it does every second."""
    job: str | None
    attempt: int | None
    nodes: int
    ranks: int
    step: int | None
    """Smallest of the ranks'."""
    oldest: LauncherRank | None


@dataclass(frozen=True)
class Restart:
    """An attempt that ended."""

    time: float | None
    attempt: int | None
    step: int | None
    cause: str | None
    detail: str | None
    action: str | None
    """restart, requeue, stop or done."""


@dataclass(frozen=True)
class Restarts:
    """Attempts that ended (restarts.jsonl)."""

    count: int
    """Of those that were followed by another one, or wait for it."""
    complete: bool
    """Whether all were counted: of a long list only the end is read."""
    last: list[Restart]
    """Oldest first, the final one of a run too."""


@dataclass(frozen=True)
class Source:
    """What has become of a source's records."""

    delivered: int | None
    skipped: int | None
    skipped_fraction: float | None
    filtered: int | None
    """Records that the source's filter left out; none where there is no filter."""
    passes: float | None


@dataclass(frozen=True)
class Data:
    """The books of the data."""

    sources: dict[str, Source]
    max_bad_fraction: float | None
    """Skipped fraction of a source above which the run stops."""
    reasons: dict[str, int]
    """Why records were skipped, most frequent first (bad_records.jsonl)."""
    reasons_complete: bool
    """Whether all records were counted: of a long list only the end is read."""


@dataclass(frozen=True)
class SkippedSteps:
    """Updates that were skipped (skipped_steps.jsonl, where fp16's search of its loss scale does not stand)."""

    count: int
    complete: bool
    """Whether all were counted: of a long list only the end is read."""
    last_step: int | None
    last_cause: str | None
    consecutive: int | None
    """Up to the newest row."""


@dataclass(frozen=True)
class SlowRank:
    """A rank that the run found to be slow by itself (``pace``)."""

    rank: int | None
    node: str | None
    own_seconds: float
    times_median: float


@dataclass(frozen=True)
class RankTimes:
    """What the ranks take for a step's own work, without waiting for others (ranks.json)."""

    step: int | None
    ranks: int
    least: float
    median: float
    """The lower of the two middle ones where the number is even."""
    most: float
    slow: list[SlowRank]
    """Slowest first."""
    longest_data_seconds: float | None
    """Longest that a rank waits for data, per step."""
    longest_data_rank: int | None


@dataclass(frozen=True)
class Facts:
    """All that is known of a run."""

    run_dir: str
    time: float
    """When this was read, in Unix seconds."""
    state: State
    progress: Progress
    speed: Speed | None
    row: dict[str, float | None] | None
    """Newest row with a loss; null in it stands for a value that is not finite."""
    evaluation: Evaluation | None
    checkpoints: Checkpoints
    launcher: Launcher | None
    restarts: Restarts
    data: Data
    skipped_steps: SkippedSteps
    ranks: RankTimes | None
    log: list[str]
    """Last warnings and errors of log.txt, oldest first."""
    unreadable: dict[str, str]
    """File -> why it could not be read."""
