"""Index existing WebDataset shards ahead of training, several at a time, and find the damaged ones.

    python tools/index_shards.py '/data/laion/{00000..00999}.tar'

An index that fits its shard's size is kept; ``--rebuild`` reads such shards again. Every shard is tried, and the
problems of all are listed at the end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from evaclip.data.shards import ShardIndex, build_index, ensure_index, expand, index_path, save_index
from evaclip.errors import DataError, EvaclipError


def rebuild_index(shard: Path, index_dir: str | None) -> ShardIndex:
    """A shard's index, read from the shard and saved even where there is one."""
    index = build_index(shard)
    save_index(index, index_path(shard, index_dir))
    return index


def index_all(
    shards: Sequence[Path], index_dir: str | None, *, rebuild: bool, processes: int
) -> Iterator[tuple[Path, int | DataError | OSError]]:
    """Each shard with its number of records or its problem, as they are done."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads it leaves behind
    with ProcessPoolExecutor(min(processes, len(shards)), mp_context=context) as pool:
        build = rebuild_index if rebuild else ensure_index
        done = {pool.submit(build, shard, index_dir): shard for shard in shards}
        for future in as_completed(done):
            try:
                yield done[future], future.result().num_records
            except (DataError, OSError) as error:
                yield done[future], error


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("pattern", nargs="+", help="tars, with brace ranges such as '/data/{00000..00099}.tar'")
    parser.add_argument("--index-dir", help="where the indexes go, as data.index_dir (default: beside each shard)")
    parser.add_argument("--rebuild", action="store_true", help="read shards again whose index exists")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one per core, %(default)s here")
    arguments = parser.parse_args(argv)
    if arguments.processes < 1:
        parser.error(f"--processes {arguments.processes} is not positive")
    start = time.monotonic()
    try:
        shards = list(dict.fromkeys(expand(arguments.pattern)))
    except EvaclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    total, problems = 0, []
    for path, result in index_all(
        shards, arguments.index_dir, rebuild=arguments.rebuild, processes=arguments.processes
    ):
        if isinstance(result, int):
            total += result
            print(f"{path}: {result:,} records", flush=True)
        else:
            problems.append(f"error: {result}")
    indexed = len(shards) - len(problems)
    print(f"{total:,} records in {indexed:,} of {len(shards):,} shards, {time.monotonic() - start:.1f} s")
    print("".join(f"{problem}\n" for problem in sorted(problems)), end="", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
