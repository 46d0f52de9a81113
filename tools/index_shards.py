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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

from evaclip.data.index import ShardIndex, build_index, ensure_index, index_path, save_index
from evaclip.data.shards import expand
from evaclip.data.storage import is_remote
from evaclip.errors import DataError, EvaclipError

T = TypeVar("T")

_MANY = 160_000  # shards of a LAION-2B in img2dataset's usual size


class Found(NamedTuple):
    """What is told of an indexed shard."""

    location: str
    num_records: int
    tar_size: int
    problems: tuple[str, ...]
    seconds: float


def index_one(location: str, index_dir: str | None, *, rebuild: bool) -> Found | str:
    """Index a shard, where that is missing or always; what was found in it, or why it cannot be indexed."""
    start = time.monotonic()
    try:
        index = _rebuilt_index(location, index_dir) if rebuild else ensure_index(location, index_dir)
    except (DataError, OSError) as error:
        return str(error)
    problems = [f"{location}: {gap.what} at byte {gap.start:,}; restore it" for gap in index.gaps]
    if index.damage and not problems:
        problems = [f"{location}: {index.damage}; remove it from the shards"]
    return Found(location, index.num_records, index.tar_size, tuple(problems), time.monotonic() - start)


def _rebuilt_index(location: str, index_dir: str | None) -> ShardIndex:
    path = index_path(location, index_dir)
    if is_remote(path):
        raise DataError(f"{path} cannot be written there; set --index-dir to a local folder")
    index = build_index(location)
    save_index(index, path)
    return index


def index_all(shards: Sequence[str], index_dir: str | None, *, rebuild: bool, processes: int) -> Iterator[Found | str]:
    """What ``index_one`` says of each shard, as they are done."""
    return over_processes(partial(index_one, index_dir=index_dir, rebuild=rebuild), shards, processes)


def over_processes(work: Callable[[str], T], shards: Sequence[str], processes: int) -> Iterator[T]:
    """What a function says of each shard, as they are done; few wait at a time, whatever their number."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads it leaves behind
    with ProcessPoolExecutor(min(processes, len(shards)), mp_context=context) as pool:
        futures = (pool.submit(work, shard) for shard in shards)
        waiting = set(islice(futures, 4 * processes))
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            waiting |= set(islice(futures, len(done)))
            for future in done:
                yield future.result()


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
    total, size, busy, problems = 0, 0, 0.0, []
    for found in index_all(shards, arguments.index_dir, rebuild=arguments.rebuild, processes=arguments.processes):
        if isinstance(found, str):
            problems.append(found)
            continue
        total, size, busy = total + found.num_records, size + found.tar_size, busy + found.seconds
        print(f"{found.location}: {found.num_records:,} records", flush=True)
        problems += found.problems
    seconds = time.monotonic() - start
    print(
        f"{total:,} records in {len(shards):,} shards, {size / 1e9:.1f} GB, {seconds:.1f} s; "
        f"{_MANY:,} such shards: {_MANY / len(shards) * busy / arguments.processes / 3600:.1f} h on this machine"
    )
    print("".join(f"error: {problem}\n" for problem in sorted(problems)), end="", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
