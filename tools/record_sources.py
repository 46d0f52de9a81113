"""Records out of what people have: a folder of files, a table, parquet files, COCO's captions.

Each source is an iterator of a record's members, read as it goes; what cannot be a record is counted with its reason.
Where the records go, ``make_shards`` decides.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaclip.config import IMAGE_KEYS
from evaclip.errors import DataError

Members = dict[str, bytes]
EXAMPLES = 3  # paths that are printed of each kind of record that is left out
_BATCH = 64  # rows of a parquet file that are in memory as Python's objects
_STARTS = {"jpg": rb"\xff\xd8\xff", "png": rb"\x89PNG\r\n\x1a\n", "webp": rb"RIFF....WEBP"}
"""How the bytes of an image begin."""


class LeftOut:
    """Counts the records that are left out, by reason, and remembers the first few of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, which: object) -> None:
        """Count one record."""
        self.counts[reason] += 1
        if self.counts[reason] <= EXAMPLES:
            self.examples.setdefault(reason, []).append(str(which))

    def lines(self) -> list[str]:
        """A line per reason."""
        return [
            f"left out {count:,}: {reason} ({', '.join(self.examples[reason])}{', ...' if count > EXAMPLES else ''})"
            for reason, count in self.counts.items()
        ]


def record(
    extension: str, image: bytes, captions: Sequence[str], about: Mapping[str, Any], *, per_line: bool
) -> Members:
    """Members of a record: ``txt`` is its first caption, or with ``per_line`` all of them, one in each line.

    The json holds them as ``caption``, ``caption_2`` ..., from which training can draw, beside what is ``about`` them.
    """
    named = {f"caption_{number}" if number > 1 else "caption": text for number, text in enumerate(captions, 1)}
    text = "\n".join(" ".join(caption.split()) for caption in captions) if per_line else captions[0]
    return {
        extension: image,
        "txt": text.encode(errors="replace"),
        "json": json.dumps({**named, **_as_json(about)}).encode(),
    }


def _as_json(value: Any) -> Any:
    """A value as JSON has it: bytes and numbers that are not finite become null, what is unknown its text."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(inner) for inner in value]
    if isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _require_columns(path: Path, found: Sequence[str], wanted: Iterable[str]) -> None:
    for column in wanted:
        if column not in found:
            raise DataError(
                f"{path} has no column {column!r}, only {', '.join(found)}; "
                f"name the columns with --image-column and --caption-column"
            )


def _unusable(path: Path) -> str | None:
    """Why a file is no image that can be taken."""
    if not path.is_file():
        return "image does not exist"
    return None if path.suffix[1:].lower() in IMAGE_KEYS else f"not one of {', '.join(IMAGE_KEYS)}"


# ------------------------------------------------------------------------------------------------------------- folder


def from_folder(folder: Path, left_out: LeftOut) -> Iterator[Members]:
    """Records of a folder and its subfolders, in the order of their paths.

    An image takes the .txt and the .json of the same name; of several images of one name the first of ``IMAGE_KEYS``
    is taken.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    groups: dict[Path, dict[str, Path]] = {}
    for path in files:
        extension = path.suffix[1:].lower()
        if extension not in (*IMAGE_KEYS, "txt", "json"):
            left_out.add(f"not one of {', '.join(IMAGE_KEYS)}, txt, json", path)
            continue
        group = groups.setdefault(path.with_suffix(""), {})
        if extension in group:
            left_out.add("duplicate of a file whose extension differs in case", path)
        else:
            group[extension] = path
    for stem, group in groups.items():
        images = [key for key in IMAGE_KEYS if key in group]
        texts = {key: group[key].read_bytes() for key in ("txt", "json") if key in group}
        if not images:
            left_out.add("caption without an image", stem)
        elif not any(text.strip() for text in texts.values()):
            left_out.add("image without a caption", group[images[0]])
        else:
            for key in images[1:]:
                left_out.add(f"duplicate, {images[0]} taken instead", group[key])
            yield {images[0]: group[images[0]].read_bytes(), **texts}


# -------------------------------------------------------------------------------------------------------------- table


def from_table(
    table: Path, image_column: str, caption_column: str, left_out: LeftOut, *, per_line: bool
) -> Iterator[Members]:
    """Records of a CSV or TSV with a header; relative image paths start at the table's folder.

    Raises:
        DataError: The table cannot be read, has no rows, or lacks a column.
    """
    seen: set[tuple[str, str]] = set()
    for line, row in _rows(table, (image_column, caption_column)):
        name, caption = row[image_column].strip(), row[caption_column].strip()
        where = f"line {line}: {name or 'no path'}"
        path = table.parent / name
        why_not = _unusable(path) if name else "image does not exist"
        if why_not:
            left_out.add(why_not, where)
        elif not caption:
            left_out.add("image without a caption", where)
        elif (name, caption) in seen:
            left_out.add("duplicate of an earlier line", where)
        else:
            seen.add((name, caption))
            about = {key: row[key] for key in row if key and key != caption_column}
            yield record(path.suffix[1:].lower(), path.read_bytes(), [caption], about, per_line=per_line)


def _rows(table: Path, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of each row; the separator is a tab if the header holds one, else a comma."""
    csv.field_size_limit(1 << 30)  # captions have no limit of ours
    with table.open(encoding="utf-8-sig", newline="") as file:
        try:
            separator = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            reader = csv.DictReader(file, delimiter=separator, restval="")
            header = list(reader.fieldnames or ())
            if not header:
                raise DataError(f"{table} is empty; it needs a header with the columns {' and '.join(columns)}")
            _require_columns(table, header, columns)
            for row in reader:
                if None in row:
                    raise DataError(
                        f"{table}, line {reader.line_num}: more cells than the {len(header)} columns of the header; "
                        f"quote cells that contain a {'tab' if separator == chr(9) else 'comma'}"
                    )
                yield reader.line_num, row
        except UnicodeDecodeError as error:
            raise DataError(f"{table} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
        except csv.Error as error:
            raise DataError(f"{table}: not a readable table ({error})") from error


# ------------------------------------------------------------------------------------------------------------ parquet


def from_parquet(
    source: Path, image_column: str, caption_column: str, left_out: LeftOut, *, per_line: bool
) -> Iterator[Members]:
    """Records of a parquet file, or of those in a folder and its subfolders, a batch of rows at a time.

    An image is a column of bytes, Hugging Face's struct of ``bytes`` and ``path``, or a path that starts at the file's
    folder; a caption is a text or a list of them.

    Raises:
        DataError: pyarrow is missing, a file cannot be read, or lacks a column.
    """
    for path in sorted(source.rglob("*.parquet")) if source.is_dir() else [source]:
        for number, row in enumerate(_parquet_rows(path, (image_column, caption_column)), 1):
            cell, captions = row[image_column], _captions(row.pop(caption_column))
            if isinstance(cell, dict):
                cell = cell.get("bytes") or cell.get("path")
            image = _image_in(cell, path.parent)
            if isinstance(image, str):
                left_out.add(image, f"{path.name}, row {number}")
            elif not captions:
                left_out.add("image without a caption", f"{path.name}, row {number}")
            else:
                yield record(*image, captions, row, per_line=per_line)


def _parquet_rows(path: Path, columns: Iterable[str]) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow  # noqa: PLC0415  an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise DataError("parquet files need pyarrow, which is missing; pip install 'evaclip[parquet]'") from error
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:  # the buffer would keep the whole file
            _require_columns(path, file.schema_arrow.names, columns)
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_BATCH, [group]):
                    yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); fetch it again") from error


def _captions(cell: Any) -> list[str]:
    texts = cell if isinstance(cell, list) else [cell]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _image_in(cell: Any, folder: Path) -> tuple[str, bytes] | str:
    """Extension and bytes of a cell's image, or why there is none."""
    if isinstance(cell, bytes):
        kind = next((name for name, start in _STARTS.items() if re.match(start, cell, re.DOTALL)), None)
        return (kind, cell) if kind else f"not one of {', '.join(IMAGE_KEYS)}"
    if not isinstance(cell, str) or not cell.strip():
        return "image does not exist"
    path = folder / cell.strip()
    return _unusable(path) or (path.suffix[1:].lower(), path.read_bytes())


# --------------------------------------------------------------------------------------------------------------- COCO


def from_coco(source: Path, images: Path, left_out: LeftOut, *, per_line: bool) -> Iterator[Members]:
    """Records of COCO's captions: ``images`` with ``id`` and ``file_name``, ``annotations`` with their ``caption``.

    Raises:
        DataError: The file is not of this form.
    """
    entries, annotations = _coco_lists(source)
    captions: dict[str, list[str]] = {str(entry.get("id")): [] for entry in entries}
    for annotation in annotations:
        image, found = str(annotation.get("image_id")), _captions(annotation.get("caption"))
        if image not in captions:
            left_out.add("annotation of an image that is not listed", f"annotation {annotation.get('id')}")
        elif not found:
            left_out.add("annotation without a caption", f"annotation {annotation.get('id')}")
        else:
            captions[image] += found
    seen: set[str] = set()
    for entry in entries:
        number, name = str(entry.get("id")), str(entry.get("file_name", ""))
        path, where = images / name, f"image {number}: {name or 'no file_name'}"
        why_not = _unusable(path)
        if number in seen:
            left_out.add("duplicate of an image of the same id", where)
        elif why_not:
            left_out.add(why_not, where)
        elif not captions[number]:
            left_out.add("image without a caption", where)
        else:
            seen.add(number)
            yield record(path.suffix[1:].lower(), path.read_bytes(), captions[number], entry, per_line=per_line)


def _coco_lists(source: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    try:
        content = json.loads(source.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not JSON ({error}); give COCO's captions, a CSV, a TSV or parquet") from error
    lists: list[Any] = [content.get(name) if isinstance(content, dict) else None for name in ("images", "annotations")]
    if not all(isinstance(some, list) and all(isinstance(entry, dict) for entry in some) for some in lists):
        raise DataError(f"{source} is not in COCO's form; it needs `images` and `annotations`, two lists of objects")
    return lists[0], lists[1]
