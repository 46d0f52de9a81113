"""Index existing WebDataset shards ahead of training, several at a time, and find the damaged ones.

    python tools/index_shards.py '/data/laion/{00000..00999}.tar'
    sbatch --array=0-63 --wrap "python tools/index_shards.py '/data/laion/{00000..159999}.tar'"

An index that fits its shard's size is kept; ``--rebuild`` reads such shards again. Every shard is tried, and the
problems of all are listed at the end. A task of a SLURM array takes its share of the shards.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from evaclip.data.index import ShardIndex, build_index, ensure_index, index_path, save_index
from evaclip.data.shards import expand
from evaclip.errors import DataError, EvaclipError

_MANY = 160_000  # shards of a LAION-2B in img2dataset's usual size


def index_one(location: str, index_dir: str | None, *, rebuild: bool) -> ShardIndex:
    """A shard's index, read from the shard and saved where it is missing, or always."""
    if not rebuild:
        return ensure_index(location, index_dir)
    index = build_index(location)
    save_index(index, index_path(location, index_dir))
    return index


def index_all(
    shards: Sequence[str], index_dir: str | None, *, rebuild: bool, processes: int
) -> Iterator[tuple[str, ShardIndex | DataError | OSError]]:
    """Each shard with its index or its problem, as they are done."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads it leaves behind
    with ProcessPoolExecutor(min(processes, len(shards)), mp_context=context) as pool:
        done = {pool.submit(index_one, shard, index_dir, rebuild=rebuild): shard for shard in shards}
        for future in as_completed(done):
            try:
                yield done[future], future.result()
            except (DataError, OSError) as error:
                yield done[future], error


def own_share(shards: Sequence[str], environment: Mapping[str, str]) -> Sequence[str]:
    """The shards of this task of a SLURM array; all of them elsewhere."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return shards
    first, number, step = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("MIN", "ID", "STEP"))
    return shards[(number - first) // step :: int(environment["SLURM_ARRAY_TASK_COUNT"])]


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
        shards = own_share(list(dict.fromkeys(expand(arguments.pattern))), os.environ)
    except EvaclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not shards:
        print("this task of the array has no shards")
        return 0
    total, size, problems = 0, 0, []
    for path, found in index_all(shards, arguments.index_dir, rebuild=arguments.rebuild, processes=arguments.processes):
        if not isinstance(found, ShardIndex):
            problems.append(f"error: {found}")
            continue
        total, size = total + found.num_records, size + found.tar_size
        print(f"{path}: {found.num_records:,} records", flush=True)
        problems += [f"error: {path}: {gap.what} at byte {gap.start:,}; restore it" for gap in found.gaps]
        if not found.num_records and not found.gaps:
            problems.append(f"error: {path}: {found.damage}; remove it from the shards")
    seconds = time.monotonic() - start
    print(
        f"{total:,} records in {len(shards):,} shards, {size / 1e9:.1f} GB, {seconds:.1f} s; "
        f"{_MANY:,} such shards: {_MANY / len(shards) * seconds / 3600:.1f} h on this machine"
    )
    print("".join(f"{problem}\n" for problem in sorted(problems)), end="", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
