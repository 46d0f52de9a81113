"""Turn a folder or a table of images and captions into indexed WebDataset shards in img2dataset's layout.

    python tools/make_shards.py photos/ data/photos         # photos/**/NAME.jpg beside NAME.txt, NAME.json or both
    python tools/make_shards.py captions.csv data/photos    # columns filepath and title, others go into the json

Image bytes are copied as they are; what cannot be decoded is found, counted and skipped by the trainer. A record
without an image or without a caption is left out and counted here. The shards appear under their name only when all
of them are complete.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from evaclip.config import IMAGE_KEYS
from evaclip.data.shards import Shard, write_shards
from evaclip.errors import DataError, EvaclipError

Members = dict[str, bytes]
EXAMPLES = 3  # paths that are printed of each kind of record that is left out


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


# ------------------------------------------------------------------------------------------------------------ sources


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


def from_table(table: Path, image_column: str, caption_column: str, left_out: LeftOut) -> Iterator[Members]:
    """Records of a CSV or TSV with a header; relative image paths start at the table's folder.

    Raises:
        DataError: The table cannot be read, has no rows, or lacks a column.
    """
    seen: set[tuple[str, str]] = set()
    for line, row in _rows(table, (image_column, caption_column)):
        name, caption = row[image_column].strip(), row[caption_column].strip()
        where = f"line {line}: {name or 'no path'}"
        path = table.parent / name
        extension = path.suffix[1:].lower()
        if not name or not path.is_file():
            left_out.add("image does not exist", where)
        elif extension not in IMAGE_KEYS:
            left_out.add(f"not one of {', '.join(IMAGE_KEYS)}", where)
        elif not caption:
            left_out.add("image without a caption", where)
        elif (name, caption) in seen:
            left_out.add("duplicate of an earlier line", where)
        else:
            seen.add((name, caption))
            about = {"caption": caption, **{key: row[key] for key in row if key and key != caption_column}}
            yield {extension: path.read_bytes(), "txt": caption.encode(), "json": json.dumps(about).encode()}


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
            for column in columns:
                if column not in header:
                    raise DataError(
                        f"{table} has no column {column!r}, only {', '.join(header)}; "
                        f"name the columns with --image-column and --caption-column"
                    )
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


# ------------------------------------------------------------------------------------------------------------ writing


def keyed(records: Iterable[Members], records_per_shard: int) -> Iterator[tuple[str, Members]]:
    """Records with img2dataset's keys: five digits for the shard, at least four for the place in it."""
    width = max(4, len(str(records_per_shard - 1)))
    for number, members in enumerate(records):
        shard, place = divmod(number, records_per_shard)
        yield f"{shard:05d}{place:0{width}d}", members


def write_folder(out: Path, records: Iterable[Members], records_per_shard: int) -> list[Path]:
    """Write shards into a temporary folder beside ``out`` and rename it when all is written; returns the tars.

    Raises:
        DataError: ``out`` exists and is not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} exists already and is not an empty folder; remove it or give another one")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        progress = tqdm(records, unit=" records", disable=None)  # silent where nobody watches
        paths = write_shards(partial, keyed(progress, records_per_shard), records_per_shard)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [out / path.name for path in paths]


def make_shards(
    source: Path, out: Path, *, image_column: str, caption_column: str, records_per_shard: int
) -> tuple[list[Path], LeftOut]:
    """Turn a folder or a table into shards; returns the tars and what was left out.

    Raises:
        DataError: The source does not exist or gives no record, or ``out`` is taken.
    """
    left_out = LeftOut()
    if source.is_dir():
        records = from_folder(source, left_out)
    elif source.is_file():
        records = from_table(source, image_column, caption_column, left_out)
    else:
        raise DataError(f"{source} does not exist; give a folder of images and captions, or a CSV or TSV file")
    first = next(records, None)
    if first is None:
        raise DataError("\n  ".join([f"{source} holds no image with a caption", *left_out.lines()]))
    return write_folder(out, chain([first], records), records_per_shard), left_out


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, help="folder of images and captions, or a CSV or TSV file with a header")
    parser.add_argument("out", type=Path, help="folder for the shards; must not exist or be empty")
    parser.add_argument("--image-column", default="filepath", help="column of the image paths (default: %(default)s)")
    parser.add_argument("--caption-column", default="title", help="column of the captions (default: %(default)s)")
    parser.add_argument("--records-per-shard", type=_positive, default=10_000, help="default: %(default)s")
    options = vars(parser.parse_args(argv))
    try:
        paths, left_out = make_shards(**options)
    except (EvaclipError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = [Shard(path).num_records for path in paths]
    print("\n".join([*left_out.lines(), f"{sum(counts):,} records in {len(counts):,} shards: {_pattern(paths)}"]))
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _pattern(paths: list[Path]) -> str:
    """The shards as one would write them into ``data.sources``."""
    first, last = paths[0], paths[-1]
    return str(first) if first == last else f"{first.parent}/{{{first.stem}..{last.stem}}}.tar"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
