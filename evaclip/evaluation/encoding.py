"""From records and words to features, sharded over the ranks.

Item i belongs to rank ``i % world_size``. Every rank gets equally many items, the last one repeated where they do not
divide, and so calls the towers equally often with equally many images: ZeRO-3 needs that, because its modules
communicate. Repeated items are cut off when the ranks' results are put together again.

Communication is what ``Ranks`` offers and nothing else; this module does not know what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from evaclip.config import ImageConfig, ModelConfig
from evaclip.data.batch import PackedText
from evaclip.data.file_tokenizer import AnyTokenizer
from evaclip.data.workers import loader
from evaclip.distributed import Ranks, agreed
from evaclip.errors import DataError
from evaclip.evaluation.datasets import Records, image_of
from evaclip.evaluation.image_folder import EvalRecord
from evaclip.heartbeat import beat

T = TypeVar("T")


@runtime_checkable
class Encoder(Protocol):
    """The two towers; ``models.clip.CLIP``, or an engine around it."""

    def encode_image(self, images: UInt8[Tensor, "batch 3 height width"], *, normalize: bool) -> Tensor:
        """Features [batch, dim]."""
        ...

    def encode_text(self, text: PackedText, *, normalize: bool) -> Tensor:
        """Features [captions, dim], in the caller's order."""
        ...


def share(count: int, ranks: Ranks) -> list[int]:
    """This rank's items of ``count``; equally many on all ranks, so the last item may be given out more than once."""
    per_rank = -(-count // ranks.world_size)
    return [min(ranks.rank + ranks.world_size * turn, count - 1) for turn in range(per_rank)]


def in_order(rows: Shaped[Tensor, "share ..."], count: int, ranks: Ranks) -> Shaped[Tensor, "count ..."]:
    """What the ranks made of their ``share``, in the order of the items; every rank gets all of it.

    Communicates ``count`` rows in all.
    """
    gathered = ranks.gather_rows(rows).unflatten(0, (ranks.world_size, len(rows)))
    return gathered.transpose(0, 1).flatten(0, 1)[:count]


class _Parsed(Dataset[Any]):
    """Images and parsed records by number; an error is a value, because workers wrap what they raise in a trace."""

    def __init__(
        self, records: Records, tower: ImageConfig, max_pixels: int, parse: Callable[[EvalRecord], Any]
    ) -> None:
        self.records, self.tower, self.max_pixels, self.parse = records, tower, max_pixels, parse

    def __getitem__(self, number: int) -> tuple[Tensor, Any] | DataError:
        try:
            record = self.records.read(number)
            return image_of(record, self.tower, self.max_pixels, self.records.dataset), self.parse(record)
        except DataError as error:
            return error


def _collate(items: Sequence[tuple[Tensor, Any] | DataError]) -> tuple[Tensor, list[Any]]:
    images = [item[0] for item in items if not isinstance(item, DataError)]
    values = [item if isinstance(item, DataError) else item[1] for item in items]
    return torch.stack(images) if images else torch.empty(0), values


def in_batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive parts of at most ``size``."""
    return (items[start : start + size] for start in range(0, len(items), size))


@dataclass(frozen=True)
class Bench:
    """A model, the ranks it runs on, and how records are fed to it."""

    encoder: Encoder
    model: ModelConfig
    tokenizer: AnyTokenizer
    ranks: Ranks
    batch: int
    """Images or captions per rank and call; a video of more frames goes alone."""
    workers: int
    """Processes that read and decode; 0: this one does."""
    max_image_pixels: int
    between: Callable[[], None] = lambda: None
    """Called before each batch of images; what it raises on one rank ends the evaluation on all of them."""
    classifiers: dict[Any, Any] = field(default_factory=dict)
    """The classifier that was made last, by what it is made of."""

    def images(
        self, records: Records, parse: Callable[[EvalRecord], T]
    ) -> Iterator[tuple[Float[Tensor, "batch dim"], list[T]]]:
        """Normalised fp32 features of this rank's share, batch by batch, with what ``parse`` makes of each record.

        The feature of a video is the normalised mean of its frames' normalised features.

        Communicates one number per batch: whether every rank could read its records.

        Raises:
            DataError: On every rank, if a record of any rank cannot be used.
        """
        mine = share(len(records), self.ranks)
        size = max(1, self.batch // (records.dataset.frames or 1))
        for images, values in self.batches(records, parse, list(in_batches(mine, size))):
            read: list[T] = []
            with agreed(self.ranks):
                self.between()
                for value in values:
                    if isinstance(value, DataError):
                        raise value
                    read.append(value)
            beat("evaluation")
            yield self.encode_images(images), read

    def batches(
        self, records: Records, parse: Callable[[EvalRecord], T], numbers: Sequence[Sequence[int]]
    ) -> Iterator[tuple[UInt8[Tensor, "readable frames 3 height width"], list[T | DataError]]]:
        """Batches of records, read and decoded ahead by the workers; nothing is communicated.

        Args:
            records: What is read.
            parse: Makes a value of each; one that raises a ``DataError`` becomes that error.
            numbers: Of the records of each batch.

        Yields:
            The images of the records without error, and a value or an error per record.
        """
        yield from loader(
            _Parsed(records, self.model.image, self.max_image_pixels, parse),
            workers=min(self.workers, len(numbers)),
            batch_sampler=numbers,
            collate_fn=_collate,
            pin_memory=self.ranks.device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the training's
        )

    def encode_images(self, images: UInt8[Tensor, "batch frames 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Normalised fp32 features of images, of a video's frames the normalised mean."""
        frames = images.flatten(0, 1).to(self.ranks.device, non_blocking=True)
        # Not inference_mode: what an engine gathers or a module keeps here must stay usable in training.
        with torch.no_grad():
            features = self.encoder.encode_image(frames, normalize=True).float()
        if images.shape[1] > 1:
            features = F.normalize(features.unflatten(0, images.shape[:2]).mean(1), dim=-1)
        return features

    def encode_texts(self, ids: Sequence[Sequence[int]]) -> Float[Tensor, "texts dim"]:
        """Normalised fp32 features of tokenized texts."""
        packed = PackedText.pack(ids).to(self.ranks.device)
        with torch.no_grad():
            return self.encoder.encode_text(packed, normalize=True).float()

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Normalised fp32 features of texts, ``batch`` at a time; every rank must give equally many."""
        features: list[Tensor] = []
        for part in in_batches(texts, self.batch):
            beat("evaluation")
            features.append(self.encode_texts(self.tokenizer(part)))
        return torch.cat(features)
