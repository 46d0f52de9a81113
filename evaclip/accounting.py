"""The run's books of its data: every record that slots took is delivered, filtered or listed, or the run stops.

Over all ranks, whenever a row or a checkpoint is written: slot states are checked against the order, bad records go
to ``bad_records.jsonl``, and their numbers are compared with ``max_bad_fraction``. Why a record is bad is decided by
readers.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

from evaclip.data.accounts import SourceAccount, account, in_words, require_balance, require_few_bad
from evaclip.distributed import agreed
from evaclip.errors import writing
from evaclip.history import append_rows, cut_rows, read_rows

if TYPE_CHECKING:
    from evaclip.data.pipeline import BadRecord
    from evaclip.run import Run

log = logging.getLogger(__name__)


class Accounting:
    """Accounts of all sources, up to date after ``collect``.

    Communicates one gather of the slots' states and of what was skipped since the last one. The main rank writes.
    """

    def __init__(self, run: Run) -> None:
        self._path = run.directory / "bad_records.jsonl"
        self._counted = dict(run.slot_states or {})
        self._step = -1
        self._told: dict[str, int] = {}
        self._bad: Counter[tuple[str, str]] = Counter()
        self.accounts: dict[str, SourceAccount] = {}
        sources = run.config.data.sources
        self._with_filter = {name for name in sources if getattr(sources[name], "filter", None)}
        with agreed(run.ranks), writing(f"run_dir {run.directory}"):
            if run.ranks.is_main:
                cut_rows(self._path, run.step if run.slot_states else -1)
                self._bad.update((str(row["source"]), str(row["shard"])) for row in read_rows(self._path))
        self._bad = run.ranks.from_main(self._bad)

    def collect(self, run: Run) -> None:
        """Bring the accounts to this step; every rank calls it.

        Raises:
            DataError: Some slot's account does not add up.
        """
        if self._step == run.step:
            return
        self._step = run.step
        own = run.slot_states or {}
        with agreed(run.ranks):
            require_balance(run.plan, self._counted, own)
        self._counted = dict(own)
        gathered = run.ranks.gather_objects((own, run.skipped))
        run.skipped = []
        states = {slot: state for part, _ in gathered for slot, state in part.items()}
        self.accounts = account(run.plan, states)
        skipped = [record for _, part in gathered for record in part]
        for record in skipped:
            source = run.plan.sources[record.place.source].name
            self._bad[source, run.sources[source].reader.shard_name(record.place.shard)] += 1
        with agreed(run.ranks), writing(f"run_dir {run.directory}"):
            if skipped and run.ranks.is_main:
                append_rows(self._path, (self._row(run, record) for record in skipped))
        if run.ranks.is_main:
            self._tell()

    def metrics(self) -> dict[str, float]:
        """Values of the current row."""
        values: dict[str, float] = {}
        for name, entry in self.accounts.items():
            values[f"data/passes/{name}"] = entry.passes
            values[f"data/delivered/{name}"] = entry.delivered
            values[f"data/skipped/{name}"] = entry.num_skipped
            if name in self._with_filter:
                values[f"data/filtered/{name}"] = entry.num_filtered
        return values

    def require_few_bad(self, most: float) -> None:
        """Stop at too many bad records; see ``accounts.require_few_bad``."""
        require_few_bad(self.accounts, most, self._worst)

    def lines(self) -> list[str]:
        """The accounts in words, for the end of the log."""
        return [
            f"source {name}: {entry.delivered:,} delivered + {entry.num_skipped:,} skipped"
            + (f" ({entry.reasons})" if entry.skipped else "")
            + (f" + {entry.num_filtered:,} filtered ({in_words(entry.filtered)})" if entry.filtered else "")
            + f" = {entry.num_taken:,} records, {entry.passes:.3g} passes"
            for name, entry in self.accounts.items()
        ]

    def _row(self, run: Run, record: BadRecord) -> dict[str, object]:
        source = run.plan.sources[record.place.source].name
        shard = run.sources[source].reader.shard_name(record.place.shard)
        return {
            "step": run.step,
            "source": source,
            "shard": shard,
            "record": record.name,
            "pass": record.pass_number,
            "reason": record.reason,
        }

    def _worst(self, source: str) -> str:
        """The source's shard with the most bad records."""
        counts = [(count, shard) for (name, shard), count in self._bad.items() if name == source]
        return "{1} with {0}".format(*max(counts)) if counts else "not known"  # the list was deleted

    def _tell(self) -> None:
        for name, entry in self.accounts.items():
            if entry.num_skipped and entry.num_skipped >= 2 * self._told.get(name, 0):  # each time they have doubled
                log.warning("source %s: records skipped so far: %s; most in %s", name, entry.reasons, self._worst(name))
                self._told[name] = entry.num_skipped
