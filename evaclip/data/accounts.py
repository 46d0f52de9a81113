"""What has become of every record: delivered + skipped + filtered = taken, and taken = what the order says.

Pure functions of plans and slot states. How the numbers are published, and where bad records are listed, is decided
elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from evaclip.data.order import Plan, SlotState
from evaclip.errors import DataError


class SourceAccount(NamedTuple):
    """What has become of a source's records."""

    passes: float
    """Passes over the source, the running one as a fraction."""
    delivered: int
    skipped: dict[str, int]
    """Reason -> records."""
    filtered: dict[str, int] = {}  # noqa: RUF012  never changed
    """Condition of the source's filter -> records that it left out."""

    @property
    def num_skipped(self) -> int:
        """Records that were skipped for any reason."""
        return sum(self.skipped.values())

    @property
    def num_filtered(self) -> int:
        """Records that the filter left out."""
        return sum(self.filtered.values())

    @property
    def num_taken(self) -> int:
        """Records of which something has become."""
        return self.delivered + self.num_skipped + self.num_filtered

    @property
    def reasons(self) -> str:
        """Why records were skipped, in words."""
        return in_words(self.skipped)


def in_words(counts: Mapping[str, int]) -> str:
    """Numbers of records with their reasons."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))


def account(plan: Plan, states: Mapping[int, SlotState]) -> dict[str, SourceAccount]:
    """Add up slot states per source."""
    accounts: dict[str, SourceAccount] = {}
    for number, source in enumerate(plan.sources):
        skipped, filtered = Counter[str](), Counter[str]()
        for state in states.values():
            for total, counts in ((skipped, state.skipped), (filtered, state.filtered)):
                total.update({reason: count for which, reason, count in counts if which == number})
        delivered = sum(state.delivered[number] for state in states.values())
        entry = SourceAccount(0.0, delivered, dict(skipped), dict(filtered))
        accounts[source.name] = entry._replace(passes=entry.num_taken / source.layout.num_records)
    return accounts


def require_balance(plan: Plan, before: Mapping[int, SlotState], after: Mapping[int, SlotState]) -> None:
    """Check that slots took, between two states, the records that lie between the two, each once.

    Raises:
        DataError: A slot has taken more or fewer.
    """
    for slot, state in after.items():
        start = before.get(slot) or SlotState.first(len(plan.sources))
        for number, source in enumerate(plan.sources):
            counted = _taken(state, number) - _taken(start, number)
            expected = plan.records_between(number, slot, start.positions[number], state.positions[number])
            if counted != expected:
                place = state.positions[number]
                window = plan.window(number, place.pass_number, slot, place.window)
                shards = sorted({block.shard for block in window})
                raise DataError(
                    f"source {source.name}, slot {slot}: {counted} records were delivered, skipped or filtered "
                    f"where the order has {expected} (pass {place.pass_number}, window {place.window}, shards number "
                    f"{', '.join(map(str, shards))}); the state is damaged: go on from an older checkpoint"
                )


def _taken(state: SlotState, source: int) -> int:
    counts = (*state.skipped, *state.filtered)
    return state.delivered[source] + sum(count for which, _, count in counts if which == source)


def require_few_bad(accounts: Mapping[str, SourceAccount], most: float, worst: Callable[[str], str]) -> None:
    """Stop at too many unusable records; small numbers are given the benefit of the doubt.

    Args:
        accounts: Source -> account.
        most: Largest allowed share of bad records.
        worst: Gives a source's shard with the most bad records, in words; asked where the run stops only.

    Raises:
        DataError: A source's share of bad records is above ``most``.
    """
    for name, entry in accounts.items():
        bad = entry.num_skipped
        taken = bad + entry.delivered
        if bad > max(10, most * taken):
            raise DataError(
                f"source {name}: {bad} of {taken} records cannot be used ({entry.reasons}), more than "
                f"data.max_bad_fraction {most}; the worst shard is {worst(name)}; mend the shards "
                f"(bad_records.jsonl names the records), rebuild their indexes if those are of other shards "
                f"(tools/index_shards.py --rebuild), or raise the limit"
            )
