"""What a source yields: a place in it becomes an image and its token ids.

Only faults that are a function of the record's bytes are ``BadRecordError``, to be counted and skipped (a checksum
that does not match counts as one: the bytes rotted where they lie); everything else stops the run, because another run
would not repeat the skip. Readers do not know in which order they are asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from evaclip.config import IMAGE_KEYS, AugmentConfig
from evaclip.data import images
from evaclip.data.captions import BadCaptionError, choose_caption
from evaclip.data.file_tokenizer import AnyTokenizer
from evaclip.data.filters import RecordFilter
from evaclip.data.order import hash64
from evaclip.data.shards import CorruptRecordError, ShardSet


class Sample(NamedTuple):
    """One image-text pair, ready for the model."""

    image: Tensor
    """uint8 [3, size, size]."""
    tokens: list[int]


class Pair(NamedTuple):
    """One image-text pair out of a shard."""

    image: bytes
    """Encoded."""
    caption: str


class BadRecordError(Exception):
    """A record that no run can use, with the reason it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class FilteredRecordError(Exception):
    """A record that its source's filter leaves out, with the condition that it fails."""

    def __init__(self, condition: str) -> None:
        super().__init__(condition)
        self.condition = condition


class Reader(Protocol):
    """Turns a place in a source into a sample."""

    def load(self, shard: int, record: int, seed: int) -> Sample:
        """Read, decode, crop and tokenize; raises ``BadRecordError`` or ``FilteredRecordError`` for what is counted."""
        ...

    def stored_size(self, shard: int, record: int) -> tuple[int, int]:
        """Width and height of a usable record's image, as it is stored."""
        ...

    def shard_name(self, shard: int) -> str:
        """Name of a shard for messages."""
        ...

    def record_name(self, shard: int, record: int) -> str:
        """Name of a record for messages: its shard's, a colon, its key."""
        ...


@dataclass
class ShardReader:
    """Image-text pairs out of tars."""

    shards: ShardSet
    captions: Mapping[str, float]
    augment: AugmentConfig
    image_size: int
    max_pixels: int
    tokenizer: AnyTokenizer
    filter: RecordFilter | None = None

    def load(self, shard: int, record: int, seed: int) -> Sample:
        """See ``Reader.load``."""
        pair = self.pair(shard, record, seed)
        image = images.train_crop(self.decode(pair.image), self.image_size, self.augment, seed)
        return Sample(image, self.tokenizer.encode(pair.caption))

    def pair(self, shard: int, record: int, seed: int) -> Pair:
        """A record's image and the caption that the seed draws, as they are stored; raises as ``load``."""
        try:
            if self.filter:
                self._require_pass(self.filter, shard, record)
            members = self.shards.read(shard, record).members
            return Pair(_image_of(members), choose_caption(members, self.captions, seed))
        except (CorruptRecordError, BadCaptionError) as error:
            raise BadRecordError(error.reason) from error

    def decode(self, image: bytes) -> UInt8[np.ndarray, "height width 3"]:
        """Pixels that crops are cut out of; raises as ``load``."""
        try:
            least = images.min_decode_size(self.image_size, self.augment)
            return images.decode(image, max_pixels=self.max_pixels, min_size=least)
        except images.BadImageError as error:
            raise BadRecordError(error.reason) from error

    def stored_size(self, shard: int, record: int) -> tuple[int, int]:
        """See ``Reader.stored_size``."""
        return images.stored_size(_image_of(self.shards.read(shard, record).members))

    def _require_pass(self, conditions: RecordFilter, shard: int, record: int) -> None:
        """Ask the filter: the key lies in the index, and of the record no more is read than its json member."""
        failed = conditions.failed_by_key(self.shards.key(shard, record))
        if failed is None and conditions.reads_json:
            content = self.shards.read(shard, record, only="json").members.get("json")
            try:
                failed = conditions.failed_by_json(content)
            except ValueError as error:
                raise BadRecordError("undecodable_json") from error
        if failed is not None:
            raise FilteredRecordError(failed)

    def shard_name(self, shard: int) -> str:
        """See ``Reader.shard_name``."""
        return self.shards.locations[shard]

    def record_name(self, shard: int, record: int) -> str:
        """See ``Reader.record_name``."""
        return f"{self.shard_name(shard)}:{self.shards.key(shard, record)}"


def _image_of(members: Mapping[str, bytes]) -> bytes:
    for key in IMAGE_KEYS:
        if key in members:
            return members[key]
    raise BadRecordError("no_image")


@dataclass
class SyntheticReader:
    """Noise and random token ids, functions of the record."""

    image_size: int
    context_length: int
    vocabulary: int
    """The last two ids begin and end a caption, as CLIP's do."""

    def load(self, shard: int, record: int, seed: int) -> Sample:
        """See ``Reader.load``."""
        random = np.random.Generator(np.random.Philox(hash64(shard, record)))
        image = torch.from_numpy(random.integers(0, 256, (3, self.image_size, self.image_size), np.uint8))
        length = int(random.integers(1, self.context_length - 1))
        words = random.integers(1, max(2, self.vocabulary - 3), length).tolist()
        return Sample(image, [self.vocabulary - 2, *words, self.vocabulary - 1])

    def stored_size(self, shard: int, record: int) -> tuple[int, int]:
        """See ``Reader.stored_size``."""
        return self.image_size, self.image_size

    def shard_name(self, shard: int) -> str:
        """See ``Reader.shard_name``."""
        return f"synthetic {shard}"

    def record_name(self, shard: int, record: int) -> str:
        """See ``Reader.record_name``."""
        return f"{self.shard_name(shard)}:{record}"


class OpenedSource(NamedTuple):
    """A source with everything counted."""

    reader: Reader
    shard_records: tuple[int, ...]
    digest: str
    """Identity of the content, and of the lists of its filter."""
