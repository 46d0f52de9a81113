"""What a source yields: a place in it becomes an image and its token ids.

Only faults that are a function of the record's bytes are ``BadRecordError``, to be counted and skipped; everything
else stops the run, because another run would not repeat the skip. Readers do not know in which order they are asked.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from evaclip.config import IMAGE_KEYS, AugmentConfig, DataConfig, RunConfig, ShardSource
from evaclip.data import images
from evaclip.data.captions import BadCaptionError, choose_caption
from evaclip.data.order import hash64
from evaclip.data.shards import CorruptRecordError, ShardSet, ensure_index, expand
from evaclip.data.tokenizer import Tokenizer
from evaclip.errors import DataError

if TYPE_CHECKING:
    from evaclip.distributed import Ranks


class Sample(NamedTuple):
    """One image-text pair, ready for the model."""

    image: Tensor
    """uint8 [3, size, size]."""
    tokens: list[int]


class BadRecordError(Exception):
    """A record that no run can use, with the reason it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Reader(Protocol):
    """Turns a place in a source into a sample."""

    def load(self, shard: int, record: int, seed: int) -> Sample:
        """Read, decode, crop and tokenize; raises ``BadRecordError`` for what is counted and skipped."""
        ...

    def describe(self, shard: int) -> str:
        """Name of a shard for messages."""
        ...


@dataclass
class ShardReader:
    """Image-text pairs out of tars."""

    shards: ShardSet
    captions: Mapping[str, float]
    augment: AugmentConfig
    image_size: int
    max_pixels: int
    tokenizer: Tokenizer

    def load(self, shard: int, record: int, seed: int) -> Sample:
        """See ``Reader.load``."""
        try:
            members = self.shards.read(shard, record).members
            data = next((members[key] for key in IMAGE_KEYS if key in members), None)
            if data is None:
                raise BadRecordError("no_image")
            caption = choose_caption(members, self.captions, seed)
            least = images.min_decode_size(self.image_size, self.augment)
            pixels = images.decode(data, max_pixels=self.max_pixels, min_size=least)
        except (images.BadImageError, BadCaptionError) as error:
            raise BadRecordError(error.reason) from error
        except CorruptRecordError as error:
            raise BadRecordError("checksum") from error
        image = images.train_crop(pixels, self.image_size, self.augment, seed)
        return Sample(image, self.tokenizer.encode(caption))

    def describe(self, shard: int) -> str:
        """See ``Reader.describe``."""
        return str(self.shards.paths[shard])


@dataclass
class SyntheticReader:
    """Noise and random token ids, functions of the record."""

    image_size: int
    context_length: int

    def load(self, shard: int, record: int, seed: int) -> Sample:
        """See ``Reader.load``."""
        random = np.random.Generator(np.random.Philox(hash64(shard, record)))
        image = torch.from_numpy(random.integers(0, 256, (3, self.image_size, self.image_size), np.uint8))
        length = int(random.integers(1, self.context_length - 1))
        return Sample(image, [49406, *random.integers(1, 49405, length).tolist(), 49407])

    def describe(self, shard: int) -> str:
        """See ``Reader.describe``."""
        return f"synthetic {shard}"


# ---------------------------------------------------------------------------------------------------------- opening


class OpenedSource(NamedTuple):
    """A source with everything counted."""

    reader: Reader
    shard_records: tuple[int, ...]
    digest: str
    """Identity of the content."""


class ShardFacts(NamedTuple):
    """What every rank must know of a shard."""

    records: int
    digest: str
    extensions: tuple[str, ...]


def open_sources(config: RunConfig, ranks: Ranks) -> dict[str, OpenedSource]:
    """Find and count all sources; missing indexes are built in parallel over the ranks.

    Communicates one gather of a few bytes per shard.

    Raises:
        DataError: A shard is missing or damaged, or a source has no images or no captions.
    """
    tokenizer = Tokenizer(config.model.text.context_length)
    size = config.model.image.image_size
    opened: dict[str, OpenedSource] = {}
    for name, source in config.data.sources.items():
        if not isinstance(source, ShardSource):
            reader = SyntheticReader(size, config.model.text.context_length)
            opened[name] = OpenedSource(reader, (source.num_records,), f"synthetic-{source.num_records}")
            continue
        shards = ShardSet(expand(source.shards), config.data.index_dir)
        facts = _count(name, shards, config.data, ranks)
        _require_members(name, source, facts)
        reader = ShardReader(
            shards, source.captions, config.data.augment, size, config.data.max_image_pixels, tokenizer
        )
        digest = xxhash.xxh3_64_hexdigest("".join(fact.digest for fact in facts).encode())
        opened[name] = OpenedSource(reader, tuple(fact.records for fact in facts), digest)
    return opened


def _count(name: str, shards: ShardSet, data: DataConfig, ranks: Ranks) -> list[ShardFacts]:
    mine = shards.paths[ranks.rank :: ranks.world_size]
    quiet = not (ranks.is_main and sys.stderr.isatty())
    facts: list[ShardFacts] = []
    problem = ""
    try:
        for path in tqdm(mine, f"indexing {name}", disable=quiet, leave=False):
            index = ensure_index(path, data.index_dir)
            facts.append(ShardFacts(index.num_records, index.digest, index.extensions))
    except DataError as error:  # every rank must reach the gather, and then every rank stops
        problem = str(error)
    gathered = ranks.gather_objects((facts, problem))
    problems = [text for _, text in gathered if text]
    if problems:
        raise DataError(problems[0])
    return [gathered[number % ranks.world_size][0][number // ranks.world_size] for number in range(len(shards.paths))]


def _require_members(name: str, source: ShardSource, facts: Sequence[ShardFacts]) -> None:
    found = {extension for fact in facts for extension in fact.extensions}
    wanted = {key.partition(".")[0] for key in source.captions}
    for what, keys in (("images", set(IMAGE_KEYS)), ("captions", wanted)):
        if not keys & found:
            raise DataError(
                f"the shards of source {name} hold no {what}: wanted members {', '.join(sorted(keys))}, "
                f"found {', '.join(sorted(found))}; see data.sources.{name}.captions"
                + ("" if what == "captions" else " and img2dataset's layout")
            )
