"""What somebody is told who does not look at the run. Decided here, sent by ``tracking``; the log has all of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from evaclip.errors import EvaclipError, TrainingStoppedError

if TYPE_CHECKING:
    from evaclip.config import RunConfig
    from evaclip.data.accounts import SourceAccount

_SKIPS = 10
"""Updates skipped in a row that are worth an alert, or half of those that stop the run if these are fewer."""
_LEAST_BAD = 10
"""Records that are never too many, as where they would stop the run."""


class Alert(NamedTuple):
    """One message."""

    title: str
    text: str


class Alarms:
    """What of the rows is told: each streak of skipped updates and each source with many bad records once.

    Args:
        config: Of the run.
        continued: The run goes on from a checkpoint; what its first row says of records was told before.
    """

    def __init__(self, config: RunConfig, *, continued: bool) -> None:
        most = config.train.max_consecutive_skipped_steps
        # fp16 finds its loss scale by skipping up to 16 updates
        self._skips = max(1, most // 2 if config.train.precision == "fp16" else min(_SKIPS, most // 2))
        self._in_streak = False
        self._most_bad = config.data.max_bad_fraction / 2
        self._continued = continued
        self._told: set[str] = set()

    def row(self, step: int, consecutive_skips: float, accounts: Mapping[str, SourceAccount]) -> list[Alert]:
        """What is new in a row.

        Args:
            step: Of the row.
            consecutive_skips: Updates skipped in a row.
            accounts: Source -> what has become of its records.
        """
        found: list[Alert] = []
        streak = consecutive_skips >= self._skips
        if streak and not self._in_streak:
            found.append(
                Alert(
                    f"{consecutive_skips:.0f} updates in a row were skipped",
                    f"up to step {step} loss or gradient was not finite {consecutive_skips:.0f} times in a row; "
                    f"skipped_steps.jsonl names the samples",
                )
            )
        self._in_streak = streak
        for name, entry in accounts.items():
            taken = entry.num_skipped + entry.delivered
            if entry.num_skipped > max(_LEAST_BAD, self._most_bad * taken) and name not in self._told:
                self._told.add(name)
                if not self._continued:
                    text = (
                        f"up to step {step} {entry.num_skipped} of {taken} records of source {name} could not be used "
                        f"({entry.reasons}); at {2 * self._most_bad:g} of them the run stops; bad_records.jsonl names "
                        f"the records"
                    )
                    found.append(Alert("many unusable records", text))
        self._continued = False
        return found


def ending(error: EvaclipError) -> Alert:
    """That the run ends before its last step."""
    asked = isinstance(error, TrainingStoppedError) and error.can_continue
    return Alert("the run was asked to stop" if asked else "the run has stopped", str(error))


def restarts(rows: Iterable[Mapping[str, Any]]) -> list[Alert]:
    """Rows of ``restarts.jsonl`` after which the launcher started the run again."""
    again = [row for row in rows if row.get("action") in ("restart", "requeue")]
    return [Alert(f"restarted: {row.get('cause')}", str(row.get("detail"))) for row in again]
