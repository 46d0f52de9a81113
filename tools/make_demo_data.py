"""Make the demo's data on the spot: handwritten digits and rendered scenes, as shards and evaluation sets.

    python tools/make_demo_data.py data/demo

Writes ``digits/train`` and ``scenes/train`` for training, and under ``eval`` held-out digits (beside labelled training
digits, for classifiers), scenes of never trained combinations, a retrieval set (all in CLIP_benchmark's layout) and
pairs for the validation loss. Equal arguments make equal bytes. What is in the pictures, ``demo_pictures`` decides.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from demo_pictures import (
    DIGIT_TEMPLATES,
    DIGITS,
    SCENE_TEMPLATES,
    all_scenes,
    labelled_digits,
    load_handwriting,
    retrieval_scenes,
    test_scenes,
    training_digits,
    training_scenes,
    unseen_scenes,
    validation_pairs,
)

from evaclip.data.index import index_path
from evaclip.data.shards import Shard, write_shards
from evaclip.errors import DataError, EvaclipError

NUM_SCENES = 12_000
"""Training scenes."""
RENDERINGS = 6
"""Training renderings of each handwritten digit."""
TEST_RENDERINGS = 2
"""Test renderings of each held-out one."""
UNSEEN_PER_COMBINATION = 8
"""Test images of each combination that is never trained on."""
NUM_RETRIEVAL = 300
"""Retrieval images with several captions each, all of different combinations."""
NUM_VALIDATION = 512
"""Pairs for the validation loss: three scenes to one held-out digit."""
RECORDS_PER_SHARD = 3000


def write_training(folder: Path, records: Iterable[dict[str, bytes]]) -> int:
    """Write shards with img2dataset's keys; returns the number of records."""

    def keyed() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number, members in enumerate(records):
            shard, place = divmod(number, RECORDS_PER_SHARD)
            yield f"{shard:05d}{place:04d}", members

    return sum(Shard(path).num_records for path in write_shards(folder, keyed(), RECORDS_PER_SHARD))


def write_split(split: Path, records: Iterable[dict[str, bytes]]) -> int:
    """Write a split in CLIP_benchmark's WebDataset layout, in one shard; returns the number of records."""
    keyed = [(f"s{number:07d}", members) for number, members in enumerate(records)]
    (tar,) = write_shards(split, keyed, len(keyed))
    Path(index_path(tar, None)).rename(index_path(split / "0.tar", None))
    tar.rename(split / "0.tar")
    (split / "nshards.txt").write_text("1\n", encoding="utf-8")
    return len(keyed)


def write_benchmark(
    folder: Path, records: Iterable[dict[str, bytes]], *, classes: Sequence[str] = (), templates: Sequence[str] = ()
) -> int:
    """Write a set of a test split in that layout; returns the number of records."""
    count = write_split(folder / "test", records)
    texts = {"classnames.txt": classes, "zeroshot_classification_templates.txt": templates}
    for name, lines in (texts if classes else {"dataset_type.txt": ["retrieval"]}).items():
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return count


def write_all(out: Path, scale: float) -> dict[str, int]:
    """Write training shards and evaluation sets, ``scale`` times their size; returns the records of each folder."""

    def share(count: int) -> int:
        return max(1, round(count * scale))

    training, held_out = load_handwriting()
    training, held_out = training[: share(len(training))], held_out[: share(len(held_out))]
    names = [scene.class_name for scene in all_scenes()]
    unseen = itertools.islice(test_scenes(UNSEEN_PER_COMBINATION), share(UNSEEN_PER_COMBINATION * len(unseen_scenes())))
    evaluation = out / "eval"
    return {
        "digits/train": write_training(out / "digits/train", training_digits(training, RENDERINGS)),
        "scenes/train": write_training(out / "scenes/train", training_scenes(share(NUM_SCENES))),
        "eval/digits": write_benchmark(
            evaluation / "digits",
            labelled_digits(held_out, TEST_RENDERINGS, "test"),
            classes=DIGITS,
            templates=DIGIT_TEMPLATES,
        ),
        "eval/digits/train": write_split(evaluation / "digits/train", labelled_digits(training, 1, "train")),
        "eval/scenes_unseen": write_benchmark(
            evaluation / "scenes_unseen", unseen, classes=names, templates=SCENE_TEMPLATES
        ),
        "eval/scenes_retrieval": write_benchmark(
            evaluation / "scenes_retrieval", retrieval_scenes(share(NUM_RETRIEVAL))
        ),
        "eval/validation": write_training(evaluation / "validation", validation_pairs(held_out, share(NUM_VALIDATION))),
    }


def make_demo_data(out: Path, scale: float) -> dict[str, int]:
    """Write everything into a temporary folder beside ``out`` and rename it when it is complete.

    A folder that an earlier call made is replaced; ``contents.json`` tells.

    Raises:
        DataError: ``out`` holds something else.
    """
    if out.exists() and not (out / "contents.json").is_file():
        raise DataError(f"{out} exists and holds no demo data; remove it or give another folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        records = write_all(partial, scale)
        (partial / "contents.json").write_text(json.dumps({"scale": scale, "records": records}, indent=2) + "\n")
        if out.exists():
            shutil.rmtree(out)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return records


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, help="folder to write; demo data in it is replaced")
    parser.add_argument("--scale", type=_positive, default=1.0, help="factor on the number of records, for tests")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    try:
        records = make_demo_data(arguments.out, arguments.scale)
    except (EvaclipError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, count in records.items():
        size = sum(path.stat().st_size for path in (arguments.out / name).rglob("*.tar"))
        print(f"{arguments.out / name}: {count:,} records, {size / 1e6:.1f} MB")
    print(f"made in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
