"""Evaluation sets on disk: which records there are, and what a label, a caption and a class name is.

Three layouts: CLIP_benchmark's folder (``SPLIT/nshards.txt``, ``SPLIT/0.tar`` ..., ``classnames.txt``,
``zeroshot_classification_templates.txt``), a folder of images per class, and shards as in ``data.sources``. Whatever is
missing or wrong is an error that names the record: an evaluation that skips records measures another set. Nothing here
knows the model.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from evaclip.config import IMAGE_KEYS, EvalDataset, ImageConfig, ZeroShotDataset
from evaclip.data.images import BadImageError, eval_crop, load_eval
from evaclip.data.index import ensure_index
from evaclip.data.shards import ShardSet, expand
from evaclip.distributed import Ranks, agreed
from evaclip.errors import DataError
from evaclip.evaluation.image_folder import EvalRecord, ImageFolder, choose_frames, find_images
from evaclip.heartbeat import beat

# ------------------------------------------------------------------------------------------------------------ records


class UnusableRecordError(DataError):
    """A record that lacks something, or whose image or text cannot be read; a function of its bytes.

    Attributes:
        reason: The kind of fault, as training counts it.
    """

    def __init__(self, message: str, reason: str = "unusable") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ShardRecords:
    """Records of some shards, by number."""

    shards: ShardSet
    ends: tuple[int, ...]
    """Number of the record behind each shard's last."""

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, number: int, *, only_label: bool = False) -> EvalRecord:
        """See ``Records.read``."""
        shard = bisect.bisect_right(self.ends, number)
        start = self.ends[shard - 1] if shard else 0
        key, members = self.shards.read(shard, number - start, "cls" if only_label else None)
        return EvalRecord(f"{self.shards.locations[shard]}: record {key!r}", key, members)


@dataclass(frozen=True)
class Records:
    """Records of a set, counted from 0."""

    source: ShardRecords | ImageFolder
    numbers: Sequence[int]
    """Of these records in the source."""
    dataset: EvalDataset
    """Says how their images are to be looked at."""
    caption_per_line: bool
    """Whether ``txt`` holds several captions (CLIP_benchmark) or one (img2dataset)."""

    def __len__(self) -> int:
        return len(self.numbers)

    def first(self, count: int) -> Records:
        """The first of these records."""
        assert count <= len(self)
        return replace(self, numbers=self.numbers[:count])

    def chosen(self, numbers: Sequence[int]) -> Records:
        """Some of these records."""
        return replace(self, numbers=[self.numbers[number] for number in numbers])

    def read(self, number: int) -> EvalRecord:
        """Read a record.

        Raises:
            DataError: Its bytes are not what was indexed, or are gone.
        """
        return self.source.read(self.numbers[number])

    def label(self, number: int) -> int:
        """The number of a record's class, without reading its image.

        Raises:
            DataError: There is none, or its bytes are not what was indexed, or are gone.
        """
        record = self.source.read(self.numbers[number], only_label=True)
        return label_of(record if record.members else self.read(number))


def open_records(dataset: EvalDataset, index_dir: str | None, ranks: Ranks) -> Records:
    """Find and count the records of a set; missing indexes are built in parallel over the ranks.

    Communicates one gather of a few bytes per shard, or, for a folder of images, of their paths.

    Raises:
        DataError: The folder, the split or a shard is missing or damaged.
    """
    root = Path(dataset.path)
    folder = root.is_dir()
    images: ImageFolder | None = None
    with agreed(ranks):
        if ranks.is_main and folder and not list(root.glob("*/nshards.txt")):
            images = find_images(root, dataset.split, dataset.frames)
    images = ranks.from_main(images)
    source = images or _open_shards(dataset, index_dir, ranks, folder=folder)
    count = len(source) if dataset.limit is None else min(dataset.limit, len(source))
    return Records(source, range(count), dataset, caption_per_line=folder)


def open_splits(dataset: EvalDataset, train_split: str, index_dir: str | None, ranks: Ranks) -> tuple[Records, Records]:
    """Open the split that is learnt from and the set's own, which is measured, as ``open_records``.

    Raises:
        DataError: A split is missing or damaged, or class folders differ, so that a label would mean two classes.
    """
    root = Path(dataset.path)
    with agreed(ranks):
        missing = [root / split for split in (train_split, dataset.split) if not (root / split).is_dir()]
        if missing:
            there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
            raise DataError(
                f"{missing[0]} is not a folder; classes are learnt from the split {train_split} and measured on "
                f"{dataset.split}, two folders of one path; "
                + (f"name two of {', '.join(there[:5])}" if there else "give a path that has them")
            )
    train = open_records(dataset.model_copy(update={"split": train_split}), index_dir, ranks)
    test = open_records(dataset, index_dir, ranks)
    if isinstance(train.source, ImageFolder) and isinstance(test.source, ImageFolder):
        apart = sorted({*train.source.classes} ^ {*test.source.classes})
        if apart:
            raise DataError(
                f"{train.source.root} and {test.source.root} have not the same class folders: {apart[0]} is in one of "
                f"them alone ({len(apart)} such); labels count the folders, so both splits need all of them"
            )
    return train, test


def _open_shards(dataset: EvalDataset, index_dir: str | None, ranks: Ranks, *, folder: bool) -> ShardRecords:
    mine: list[tuple[int, str]] = []
    paths: list[str] = []
    with agreed(ranks):
        paths = _folder_shards(Path(dataset.path), dataset.split) if folder else expand(dataset.path)
        for path in paths[ranks.rank :: ranks.world_size]:
            beat("evaluation")  # the first time they are built
            index = ensure_index(path, index_dir)
            if index.damage:
                raise DataError(f"{path}: {index.damage}; restore it, evaluation skips nothing")
            mine.append((index.num_records, index.digest))
    gathered = ranks.gather_objects(mine)
    counts, digests = zip(
        *(gathered[i % ranks.world_size][i // ranks.world_size] for i in range(len(paths))), strict=True
    )
    return ShardRecords(ShardSet(paths, index_dir, digests), tuple(accumulate(counts)))


def _folder_shards(root: Path, split: str) -> list[str]:
    listing = root / split / "nshards.txt"
    if not listing.is_file():
        splits = ", ".join(sorted(path.parent.name for path in root.glob("*/nshards.txt")))
        raise DataError(
            f"{listing} does not exist; "
            + (
                f"set split to one of {splits}"
                if splits
                else f"{root} is not in CLIP_benchmark's WebDataset layout, nor are there folders with images"
            )
        )
    text = listing.read_text().strip()
    if not text.isascii() or not text.isdigit() or not int(text):
        raise DataError(f"{listing} holds {text!r}; it must hold the number of shards, at least 1")
    return expand([str(root / split / f"{number}.tar") for number in range(int(text))])


# ---------------------------------------------------------------------------------------------------------- meanings


def image_of(
    record: EvalRecord,
    config: ImageConfig,
    max_pixels: int,
    dataset: EvalDataset,
    square: Callable[[bytes], UInt8[Tensor, "3 height width"]] | None = None,
) -> UInt8[Tensor, "frames 3 height width"]:
    """The image, or so many frames as the set asks for, decoded in full and cropped as set and model want it.

    Args:
        record: Holds it.
        config: Side of the square, and the model's way to it.
        max_pixels: Larger images are refused.
        dataset: How many frames, and the set's own way to a square.
        square: Another way from an encoded image to its square, such as that of training.

    Raises:
        UnusableRecordError: There is no image, or it cannot be decoded.
    """
    if dataset.frames is None:
        images = [record.members[key] for key in IMAGE_KEYS if key in record.members][:1]
    else:
        named = (key.partition(".") for key in record.members)
        numbers = {int(stem): f"{stem}.{key}" for stem, _, key in named if stem.isdecimal() and key in IMAGE_KEYS}
        frames = [record.members[numbers[number]] for number in sorted(numbers)]
        images = choose_frames(frames, dataset.frames) if frames else []
    if not images:
        kind = "image" if dataset.frames is None else "numbered frames"
        found = f"{record.where} has no {kind} ({', '.join(IMAGE_KEYS)}), only {', '.join(record.members)}"
        raise UnusableRecordError(found, "no_image")
    size, resize = config.image_size, dataset.resize or config.resize
    square = square or (lambda data: eval_crop(load_eval(data, max_pixels=max_pixels), size, resize))
    try:
        return torch.stack([square(data) for data in images])
    except BadImageError as error:
        raise UnusableRecordError(
            f"{record.where}: the image is unusable ({error}); repair or remove it, nothing is skipped here",
            error.reason,
        ) from error


def label_of(record: EvalRecord, num_classes: int | None = None) -> int:
    """The number of the record's class.

    Args:
        record: Holds ``cls``.
        num_classes: How many class names there are; None: names do not matter.

    Raises:
        DataError: There is none, or no class has it.
    """
    if "cls" not in record.members:
        raise DataError(
            f"{record.where} has no label (cls), only {', '.join(record.members)}; classification needs one"
        )
    text = record.members["cls"].decode(errors="replace").strip()
    try:
        label = int(text)
    except ValueError:
        raise DataError(f"{record.where}: label {text!r} is not a number; labels count from 0") from None
    most = (1 << 31 if num_classes is None else num_classes) - 1
    if not 0 <= label <= most:
        why = "labels count from 0" if num_classes is None else f"{num_classes} class names are given"
        raise DataError(f"{record.where}: label {label} is not in 0..{most}; {why}")
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


def require_classes(records: Records, names: Sequence[str]) -> None:
    """Refuse class names that are not as many as the class folders.

    Raises:
        DataError: They are not.
    """
    if isinstance(records.source, ImageFolder) and len(records.source.classes) != len(names):
        classes = records.source.classes
        raise DataError(
            f"{records.source.root} has {len(classes)} class folders ({', '.join(classes[:3])} ...), but {len(names)} "
            f"class names are given; give one for each folder, in their order, or set split to the folder above them"
        )


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
            f"{path} does not exist; classification needs it, or another file as {option}; "
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
