"""Choose records by how well image and caption agree: a list of keys out of the features that ``evaclip embed`` wrote.

    python tools/select_keys.py features --min-similarity 0.28 --output keys.txt
    python tools/select_keys.py features --top-fraction 0.3 --output keys.txt

The filter of CapFilt (arXiv:2201.12086, by similarity) and the CLIP-score filter of DataComp (arXiv:2304.14108). The
list holds a key per line, in the order of the shards. Records that could not be used have no similarity and are left
out; a fraction is one of those that have. Of records that are equally similar, all are kept or none.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaclip.errors import DataError, EvaclipError
from evaclip.features import Features, write_lines

_QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def read(folder: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Keys and similarities of all parts.

    Raises:
        DataError: A part is missing, or the keys do not name records: there are none, or some occur twice.
    """
    features = Features.open(folder)
    missing, count = features.missing(), len(features.about.shards)
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of {count} parts, the first is that of "
            f"{features.about.shards[missing[0]].location}; run evaclip embed again, it adds what is missing"
        )
    keys: list[str] = []
    similarities = [np.empty(0, np.float32)]
    for number in range(count):
        own, values = features.similarities(number)
        keys += own
        similarities.append(values)
    if not keys:
        raise DataError(f"{folder} has features of no record; its skipped.jsonl says why")
    repeated = len(keys) - len(set(keys))
    if repeated:
        raise DataError(
            f"{folder}: {repeated:,} keys occur more than once, such as {Counter(keys).most_common(1)[0][0]!r}, so a "
            f"list of keys cannot tell their records apart; give every record a key of its own"
        )
    broken = next((key for key in keys if len(key.splitlines()) != 1), None)
    if broken is not None:
        raise DataError(f"{folder}: the key {broken!r} has a line break and cannot stand in a list; rename the record")
    return keys, np.concatenate(similarities)


def threshold(similarity: NDArray[np.float32], fraction: float) -> float:
    """The smallest similarity among the given fraction, at least one record, of the most similar."""
    count = max(1, round(fraction * len(similarity)))
    return float(np.partition(similarity, len(similarity) - count)[len(similarity) - count])


def main(argv: Sequence[str]) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("features", type=Path, help="folder that evaclip embed wrote")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--min-similarity", type=float, metavar="X", help="keep records of at least this cosine")
    rule.add_argument("--top-fraction", type=float, metavar="X", help="keep this fraction, of the most similar")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="list to be written")
    arguments = parser.parse_args(argv)
    if arguments.top_fraction is not None and not 0 < arguments.top_fraction <= 1:
        parser.error(f"--top-fraction {arguments.top_fraction} is not above 0 and at most 1")
    if arguments.min_similarity is not None and not -1 <= arguments.min_similarity <= 1:
        parser.error(f"--min-similarity {arguments.min_similarity} is no cosine: -1 to 1")
    try:
        keys, similarity = read(arguments.features)
        least, fraction = arguments.min_similarity, arguments.top_fraction
        if fraction is not None:
            least = threshold(similarity, fraction)
        chosen = np.flatnonzero(similarity >= np.float32(least))
        write_lines(arguments.output, (keys[number] for number in chosen))
    except EvaclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("similarity " + ", ".join(f"{100 * q:g} %: {np.quantile(similarity, q):.4f}" for q in _QUANTILES))
    print(f"{arguments.output}: {len(chosen):,} of {len(keys):,} records, those of similarity {least:.4f} and more")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
