"""Turn a folder, a table, parquet files or COCO's captions into indexed WebDataset shards in img2dataset's layout.

    python tools/make_shards.py photos/ data/photos         # photos/**/NAME.jpg beside NAME.txt, NAME.json or both
    python tools/make_shards.py captions.csv data/photos    # columns filepath and title, others go into the json
    python tools/make_shards.py parquet/ data/photos        # columns image (bytes or a path) and caption
    python tools/make_shards.py captions_train2017.json data/coco --images train2017

Image bytes are copied as they are; what cannot be decoded is found, counted and skipped by the trainer. A record
without an image or without a caption is left out and counted here. Of several captions the first is ``txt``, and all
of them are ``caption``, ``caption_2`` ... of the json; with ``--retrieval``, ``txt`` holds a caption per line and OUT
becomes a test split in CLIP_benchmark's layout, for evaluation. The shards appear under their name only when all of
them are complete.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from record_sources import LeftOut, Members, from_coco, from_folder, from_parquet, from_table
from tqdm import tqdm

from evaclip.config import IMAGE_KEYS
from evaclip.data.index import index_path
from evaclip.data.shards import Shard, write_shards
from evaclip.errors import DataError, EvaclipError

# ------------------------------------------------------------------------------------------------------------ writing


def keyed(records: Iterable[Members], records_per_shard: int) -> Iterator[tuple[str, Members]]:
    """Records with img2dataset's keys: five digits for the shard, at least four for the place in it."""
    width = max(4, len(str(records_per_shard - 1)))
    for number, members in enumerate(records):
        shard, place = divmod(number, records_per_shard)
        yield f"{shard:05d}{place:0{width}d}", members


def write_folder(
    out: Path, records: Iterable[Members], records_per_shard: int, *, retrieval: bool = False
) -> list[Path]:
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
        folder = partial / "test" if retrieval else partial
        paths = write_shards(folder, keyed(progress, records_per_shard), records_per_shard)
        if retrieval:
            paths = _as_benchmark(paths)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [out / path.relative_to(partial) for path in paths]


def _as_benchmark(paths: list[Path]) -> list[Path]:
    """Name the tars of a split as CLIP_benchmark does."""
    split = paths[0].parent
    renamed = [split / f"{number}.tar" for number in range(len(paths))]
    for old, new in zip(paths, renamed, strict=True):
        Path(index_path(old, None)).rename(index_path(new, None))
        old.rename(new)
    (split / "nshards.txt").write_text(f"{len(paths)}\n", encoding="utf-8")
    (split.parent / "dataset_type.txt").write_text("retrieval\n", encoding="utf-8")
    return renamed


def make_shards(
    source: Path,
    out: Path,
    *,
    images: Path | None,
    image_column: str | None,
    caption_column: str | None,
    retrieval: bool,
    records_per_shard: int,
) -> tuple[list[Path], LeftOut]:
    """Turn a source into shards; returns the tars and what was left out.

    Raises:
        DataError: The source does not exist or gives no record, or ``out`` is taken.
    """
    left_out = LeftOut()
    kind = source.suffix.lower()
    if images and kind != ".json":
        raise DataError(f"--images is for COCO's captions, and {source} is no .json; leave it out")
    if source.is_file() and kind == ".json":
        records = from_coco(source, images or source.parent, left_out, per_line=retrieval)
    elif (source.is_file() and kind == ".parquet") or _holds_parquet_alone(source):
        columns = (image_column or "image", caption_column or "caption")
        records = from_parquet(source, *columns, left_out, per_line=retrieval)
    elif source.is_dir():
        records = from_folder(source, left_out)
    elif source.is_file():
        columns = (image_column or "filepath", caption_column or "title")
        records = from_table(source, *columns, left_out, per_line=retrieval)
    else:
        raise DataError(
            f"{source} does not exist; give a folder of images and captions, a CSV, a TSV, parquet or COCO's captions"
        )
    first = next(records, None)
    if first is None:
        raise DataError("\n  ".join([f"{source} holds no image with a caption", *left_out.lines()]))
    return write_folder(out, chain([first], records), records_per_shard, retrieval=retrieval), left_out


def _holds_parquet_alone(folder: Path) -> bool:
    """Whether parquet files lie in a folder, and no images."""
    found = {path.suffix[1:].lower() for path in folder.rglob("*")}
    return "parquet" in found and found.isdisjoint(IMAGE_KEYS)


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("source", type=Path, help="folder of images and captions or of parquet files; or a CSV, TSV, parquet or JSON")
    add("out", type=Path, help="folder for the shards; must not exist or be empty")
    add("--images", type=Path, metavar="FOLDER", help="where file_name of COCO's JSON begins (default: its folder)")
    add("--image-column", help="column of the images or their paths (default: filepath; of parquet: image)")
    add("--caption-column", help="column of the captions (default: title; of parquet: caption)")
    add("--retrieval", action="store_true", help="write an evaluation set, a caption per line, not a training set")
    add("--records-per-shard", type=_positive, default=10_000, help="default: %(default)s")
    options = vars(parser.parse_args(argv))
    try:
        paths, left_out = make_shards(**options)
    except (EvaclipError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts = [Shard(path).num_records for path in paths]
    where = options["out"] if options["retrieval"] else _pattern(paths)
    print("\n".join([*left_out.lines(), f"{sum(counts):,} records in {len(counts):,} shards: {where}"]))
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
