"""A folder of images per class, or of videos as folders of frames: torchvision's ``ImageFolder``.

Classes are the folders in the order of their names as text, images lie anywhere below them in the order of their paths,
files of other kinds do not count. It does not know what the classes are called.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

from evaclip.errors import DataError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What torchvision takes for an image."""

T = TypeVar("T")


class EvalRecord(NamedTuple):
    """A record and the words that lead to it."""

    where: str
    key: str
    members: Mapping[str, bytes]


@dataclass(frozen=True)
class ImageFolder:
    """Which files each record consists of."""

    root: Path
    classes: tuple[str, ...]
    records: tuple[tuple[int, tuple[str, ...]], ...]
    """Class, and paths below ``root``: of one image, or of the frames of a video."""
    videos: bool

    def __len__(self) -> int:
        return len(self.records)

    def read(self, number: int, *, only_label: bool = False) -> EvalRecord:
        """Read a record: ``cls``, and an image as ``jpg`` of whatever kind, which its bytes tell, or ``0.jpg`` ...

        Raises:
            DataError: A file is gone or cannot be read.
        """
        label, paths = self.records[number]
        members = {"cls": str(label).encode()}
        for place, path in enumerate(() if only_label else paths):
            file = self.root / path
            try:
                members[f"{place}.jpg" if self.videos else "jpg"] = file.read_bytes()
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error.strerror}; restore it") from None
        where = self.root / paths[0]
        return EvalRecord(str(where.parent if self.videos else where), paths[0], members)


def find_images(root: Path, split: str, frames: int | None) -> ImageFolder | None:
    """The images of ``root/split``, or of ``root`` if there is none; None if no folder in it holds images.

    Args:
        root: An existing folder.
        split: Name of the split.
        frames: So many evenly spaced images of each folder are a record; None: each image is one.

    Raises:
        DataError: A class has no images, or the order of the classes is not what their names say.
    """
    folder = root / split if (root / split).is_dir() else root
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    records: list[tuple[int, tuple[str, ...]]] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        before = len(records)
        for directory, _, files in sorted(os.walk(folder / name, followlinks=True)):
            images = [file for file in files if file.lower().endswith(_SUFFIXES)]
            paths = [os.path.relpath(Path(directory, file), folder) for file in sorted(images, key=_natural)]
            if frames is None:
                records += [(label, (path,)) for path in sorted(paths)]
            elif paths:
                records.append((label, tuple(choose_frames(paths, frames))))
        if len(records) == before:
            empty.append(name)
    if not records:
        return None
    if empty:
        raise DataError(
            f"{folder / empty[0]} holds no images ({len(empty)} of {len(classes)} class folders); "
            f"restore them, or remove the folders that are no classes"
        )
    if all(name.isdecimal() for name in classes) and classes != sorted(classes, key=int):
        first, second = next((a, b) for a, b in pairwise(classes) if int(a) > int(b))
        raise DataError(
            f"{folder}: the class folders are numbers, but in the order of text {first} comes before {second}; "
            f"rename them with leading zeros (0000, 0001, ...), so that both orders are one"
        )
    return ImageFolder(folder, tuple(classes), tuple(records), videos=frames is not None)


def choose_frames(frames: Sequence[T], count: int) -> list[T]:
    """The middle frames of ``count`` equal parts of a video; one frame is the middle one."""
    return [frames[(2 * part + 1) * len(frames) // (2 * count)] for part in range(count)]


def _natural(name: str) -> list[str | int]:
    """For an order in which frame 9 comes before frame 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
