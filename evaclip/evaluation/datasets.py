"""Evaluation sets on disk: which records there are, and what a label, a caption and a class name is.

Two layouts: CLIP_benchmark's folder (``SPLIT/nshards.txt``, ``SPLIT/0.tar`` ..., ``classnames.txt``,
``zeroshot_classification_templates.txt``) and shards as in ``data.sources``. Whatever is missing or wrong is an error
that names the record: an evaluation that skips records measures another set. Nothing here knows the model.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from jaxtyping import UInt8
from torch import Tensor

from evaclip.config import IMAGE_KEYS, EvalDataset, ImageConfig, ZeroShotDataset
from evaclip.data.images import BadImageError, eval_crop, load_eval
from evaclip.data.index import ensure_index
from evaclip.data.shards import ShardSet, expand
from evaclip.distributed import Ranks, agreed
from evaclip.errors import DataError

# ------------------------------------------------------------------------------------------------------------ records


class EvalRecord(NamedTuple):
    """A record and the words that lead to it."""

    where: str
    key: str
    members: Mapping[str, bytes]


class UnusableRecordError(DataError):
    """A record that lacks something, or whose image or text cannot be read; a function of its bytes.

    Attributes:
        reason: The kind of fault, as training counts it.
    """

    def __init__(self, message: str, reason: str = "unusable") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Records:
    """The first ``count`` records of some shards, by number."""

    shards: ShardSet
    ends: tuple[int, ...]
    """Number of the record behind each shard's last."""
    count: int
    caption_per_line: bool
    """Whether ``txt`` holds several captions (CLIP_benchmark) or one (img2dataset)."""

    def __len__(self) -> int:
        return self.count

    def first(self, count: int) -> Records:
        """The first of these records."""
        assert count <= self.count
        return Records(self.shards, self.ends, count, self.caption_per_line)

    def read(self, number: int) -> EvalRecord:
        """Read a record.

        Raises:
            DataError: Its bytes are not what was indexed.
        """
        shard = bisect.bisect_right(self.ends, number)
        start = self.ends[shard - 1] if shard else 0
        key, members = self.shards.read(shard, number - start)
        return EvalRecord(f"{self.shards.locations[shard]}: record {key!r}", key, members)


def open_records(dataset: EvalDataset, index_dir: str | None, ranks: Ranks) -> Records:
    """Find and count the records of a set; missing indexes are built in parallel over the ranks.

    Communicates one gather of a few bytes per shard.

    Raises:
        DataError: The folder, the split or a shard is missing or damaged.
    """
    folder = Path(dataset.path).is_dir()
    mine: list[tuple[int, str]] = []
    paths: list[str] = []
    with agreed(ranks):
        paths = _folder_shards(Path(dataset.path), dataset.split) if folder else expand(dataset.path)
        for path in paths[ranks.rank :: ranks.world_size]:
            index = ensure_index(path, index_dir)
            if index.damage:
                raise DataError(f"{path}: {index.damage}; restore it, evaluation skips nothing")
            mine.append((index.num_records, index.digest))
    gathered = ranks.gather_objects(mine)
    counts, digests = zip(
        *(gathered[i % ranks.world_size][i // ranks.world_size] for i in range(len(paths))), strict=True
    )
    ends = tuple(accumulate(counts))
    count = ends[-1] if dataset.limit is None else min(dataset.limit, ends[-1])
    return Records(ShardSet(paths, index_dir, digests), ends, count, caption_per_line=folder)


def _folder_shards(root: Path, split: str) -> list[str]:
    listing = root / split / "nshards.txt"
    if not listing.is_file():
        splits = ", ".join(sorted(path.parent.name for path in root.glob("*/nshards.txt")))
        raise DataError(
            f"{listing} does not exist; "
            + (f"set split to one of {splits}" if splits else f"{root} is not in CLIP_benchmark's WebDataset layout")
        )
    text = listing.read_text().strip()
    if not text.isascii() or not text.isdigit() or not int(text):
        raise DataError(f"{listing} holds {text!r}; it must hold the number of shards, at least 1")
    return expand([str(root / split / f"{number}.tar") for number in range(int(text))])


# ---------------------------------------------------------------------------------------------------------- meanings


def image_of(record: EvalRecord, config: ImageConfig, max_pixels: int) -> UInt8[Tensor, "3 height width"]:
    """The image, decoded in full and cropped as the model wants it.

    Raises:
        UnusableRecordError: There is no image, or it cannot be decoded.
    """
    data = next((record.members[key] for key in IMAGE_KEYS if key in record.members), None)
    if data is None:
        found = f"{record.where} has no image ({', '.join(IMAGE_KEYS)}), only {', '.join(record.members)}"
        raise UnusableRecordError(found, "no_image")
    try:
        return eval_crop(load_eval(data, max_pixels=max_pixels), config.image_size, config.resize)
    except BadImageError as error:
        raise UnusableRecordError(
            f"{record.where}: the image is unusable ({error}); repair or remove it, evaluation skips nothing",
            error.reason,
        ) from error


def label_of(record: EvalRecord, num_classes: int) -> int:
    """The number of the record's class.

    Raises:
        DataError: There is none, or no class has it.
    """
    if "cls" not in record.members:
        raise DataError(
            f"{record.where} has no label (cls), only {', '.join(record.members)}; zero-shot classification needs one"
        )
    text = record.members["cls"].decode(errors="replace").strip()
    try:
        label = int(text)
    except ValueError:
        raise DataError(f"{record.where}: label {text!r} is not a number; labels count from 0") from None
    if not 0 <= label < num_classes:
        raise DataError(
            f"{record.where}: label {label} is not in 0..{num_classes - 1}; {num_classes} class names are given"
        )
    return label


def captions_of(record: EvalRecord, *, per_line: bool) -> list[str]:
    """The captions, without empty ones.

    Args:
        record: Holds ``txt``.
        per_line: Each line is a caption; else the whole text is one.

    Raises:
        DataError: There is none, or it is not UTF-8.
    """
    if "txt" not in record.members:
        raise DataError(f"{record.where} has no caption (txt), only {', '.join(record.members)}")
    try:
        text = record.members["txt"].decode()
    except UnicodeDecodeError:
        raise DataError(f"{record.where}: txt is not UTF-8; convert it") from None
    captions = [caption.strip() for caption in (text.splitlines() if per_line else [text]) if caption.strip()]
    if not captions:
        raise DataError(f"{record.where}: txt is empty; give it a caption or remove the record")
    return captions


def class_names_of(dataset: ZeroShotDataset) -> list[str]:
    """A name per class, in the order of the labels.

    Raises:
        DataError: There is no such file, or a line is empty.
    """
    path = _list_file(dataset, dataset.class_names, "classnames.txt", "class_names")
    names = _lines(path)
    if "" in names:
        raise DataError(f"{path}: line {names.index('') + 1} is empty; class names and labels would not match")
    return names


def templates_of(dataset: ZeroShotDataset) -> list[str]:
    """Prompt templates in which ``{c}`` stands for the class name.

    Raises:
        DataError: There is no such file, or a template does not hold ``{c}``.
    """
    path = _list_file(dataset, dataset.templates, "zeroshot_classification_templates.txt", "templates")
    templates = _lines(path)
    for number, template in enumerate(templates, 1):
        if "{c}" not in template:
            raise DataError(f"{path}: line {number}, {template!r}, lacks {{c}}, which stands for the class name")
    return templates


def _list_file(dataset: ZeroShotDataset, given: str | None, usual: str, option: str) -> Path:
    path = Path(given) if given else Path(dataset.path) / usual
    if not path.is_file():
        if not given and not Path(dataset.path).exists():
            raise DataError(f"{dataset.path} does not exist (seen from {Path.cwd()}); check the dataset's path")
        raise DataError(
            f"{path} does not exist; zero-shot classification needs it, or another file as {option}; "
            f"for sets without classes the task is retrieval or loss"
        )
    return path


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip()
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; convert it") from None
    if not text:
        raise DataError(f"{path} is empty; it must hold an entry per line")
    return [line.strip() for line in text.splitlines()]
