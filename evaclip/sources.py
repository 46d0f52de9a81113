"""Finding and counting the data of a run, over all ranks: missing indexes are built, each by one of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import xxhash
from tqdm import tqdm

from evaclip.config import CLIP_VOCABULARY, IMAGE_KEYS, RunConfig, ShardSource
from evaclip.data.file_tokenizer import tokenizer_of
from evaclip.data.filters import RecordFilter
from evaclip.data.index import ensure_index
from evaclip.data.readers import OpenedSource, ShardReader, SyntheticReader
from evaclip.data.shards import ShardSet, missing_files, require_files
from evaclip.data.storage import Cache
from evaclip.data.tar import expand_names
from evaclip.distributed import Ranks, agreed
from evaclip.errors import DataError
from evaclip.heartbeat import beat

log = logging.getLogger(__name__)

_MOST_NAMES = 20  # damaged shards that are named one by one


class ShardFacts(NamedTuple):
    """What every rank must know of a shard."""

    records: int
    digest: str
    extensions: tuple[str, ...]
    lost_records: int
    """Records that damage has cost, about."""
    damage: str
    """The first damaged place, in words; empty if there is none."""


def open_sources(config: RunConfig, ranks: Ranks) -> dict[str, OpenedSource]:
    """Find and count all sources; missing indexes are built in parallel over the ranks.

    Communicates one gather of a few bytes per shard, one of the names of those that are missing, and one of the digests
    of a filter's lists.

    Raises:
        ConfigError: The tokenizer cannot be used.
        DataError: A shard or a list of keys is missing, too much of a source is damaged, or it has no images, no
            captions or nothing to filter by.
    """
    text = config.model.text
    with agreed(ranks):
        tokenizer = tokenizer_of(text)
    size = config.model.image.image_size
    opened: dict[str, OpenedSource] = {}
    for name, source in config.data.sources.items():
        if not isinstance(source, ShardSource):
            reader = SyntheticReader(size, text.context_length, text.vocab_size if text.tokenizer else CLIP_VOCABULARY)
            opened[name] = OpenedSource(reader, (source.num_records,), f"synthetic-{source.num_records}")
            continue
        conditions = _open_filter(name, source, ranks)
        paths = expand_shards(source.shards, ranks)
        facts = count_shards(name, paths, config.data.index_dir, ranks)
        _require_little_damage(name, paths, facts, config.data.max_bad_fraction)
        _require_members(name, source, facts)
        cache = Cache(Path(config.data.cache_dir), config.data.cache_gib << 30) if config.data.cache_dir else None
        shards = ShardSet(paths, config.data.index_dir, [fact.digest for fact in facts], cache)
        reader = ShardReader(
            shards, source.captions, config.data.augment, size, config.data.max_image_pixels, tokenizer, conditions
        )
        digest = xxhash.xxh3_64_hexdigest("".join(fact.digest for fact in facts).encode())
        digest += conditions.digest if conditions else ""
        opened[name] = OpenedSource(reader, tuple(fact.records for fact in facts), digest)
    return opened


def _open_filter(name: str, source: ShardSource, ranks: Ranks) -> RecordFilter | None:
    """A source's filter; every rank reads its lists, and they must be the same."""
    if source.filter is None:
        return None
    conditions: RecordFilter | None = None
    with agreed(ranks):
        conditions = RecordFilter(source.filter)
    digests = ranks.gather_objects(conditions.digest if conditions else "")
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise DataError(
                f"source {name}: the lists of keys that rank {rank} reads hold other keys than those of rank 0; "
                f"put them where all nodes see the same files"
            )
    return conditions


def expand_shards(pattern: str | Sequence[str], ranks: Ranks) -> list[str]:
    """The shards that a pattern names; each rank looks for those it counts, before any of them is read.

    Raises:
        DataError: As ``data.shards.expand``.
    """
    with agreed(ranks):
        paths = expand_names(pattern)
        missing = ranks.gather_objects(missing_files(paths[ranks.rank :: ranks.world_size]))
        require_files(paths, sorted(chain.from_iterable(missing)))
    return paths


def count_shards(name: str, paths: Sequence[str], index_dir: str | None, ranks: Ranks) -> list[ShardFacts]:
    """What every rank must know of each shard; missing indexes are built in parallel over the ranks.

    Raises:
        DataError: A shard cannot be read, or an index not saved.
    """
    mine = paths[ranks.rank :: ranks.world_size]
    quiet = not (ranks.is_main and sys.stderr.isatty())
    facts: list[ShardFacts] = []
    with agreed(ranks):
        for path in tqdm(mine, f"indexing {name}", disable=quiet, leave=False):
            beat("start")
            index = ensure_index(path, index_dir)
            facts.append(
                ShardFacts(index.num_records, index.digest, index.extensions, index.lost_records, index.damage)
            )
    gathered = ranks.gather_objects(facts)
    return [gathered[number % ranks.world_size][number // ranks.world_size] for number in range(len(paths))]


def _require_little_damage(name: str, paths: Sequence[str], facts: Sequence[ShardFacts], most: float) -> None:
    """Name damaged shards; stop where they cost more than ``max_bad_fraction``, or more than a few of small numbers."""
    records = sum(fact.records for fact in facts)
    usual = records // max(1, sum(fact.records > 0 for fact in facts))  # of a shard of which nothing is left
    damaged = [
        (fact.lost_records if fact.records else usual, f"{path}: {fact.damage}")
        for path, fact in zip(paths, facts, strict=True)
        if fact.damage
    ]
    for count, what in damaged[:_MOST_NAMES]:
        log.warning("%s; perhaps %d of its records are lost: restore it", what, count)
    lost = sum(count for count, _ in damaged)
    if damaged:
        log.warning(
            "source %s: %d of %d shards are damaged and lack perhaps %d records; all that is left is read",
            *(name, len(damaged), len(facts), lost),
        )
    if not records or lost > max(10, most * (lost + records)):
        raise DataError(
            f"source {name}: about {lost} of {lost + records} records are lost in {len(damaged)} damaged shards, more "
            f"than data.max_bad_fraction {most}; the worst is {max(damaged)[1]}; restore the shards or raise the limit"
        )


def _require_members(name: str, source: ShardSource, facts: Sequence[ShardFacts]) -> None:
    found = {extension for fact in facts for extension in fact.extensions}
    wanted = {key.partition(".")[0] for key in source.captions}
    needs = [("images", set(IMAGE_KEYS), "captions and img2dataset's layout"), ("captions", wanted, "captions")]
    if source.filter and source.filter.fields:
        needs.append(("fields to filter by", {"json"}, "filter.fields"))
    for what, keys, option in needs:
        if not keys & found:
            raise DataError(
                f"the shards of source {name} hold no {what}: wanted members {', '.join(sorted(keys))}, "
                f"found {', '.join(sorted(found))}; see data.sources.{name}.{option}"
            )
