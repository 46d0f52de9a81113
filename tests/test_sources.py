"""Finding the shards of a run over several ranks: who looks for what, and what all are told."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from tiny import tiny_config

from evaclip.data.shards import write_shards
from evaclip.distributed import Ranks
from evaclip.errors import DataError
from evaclip.sources import open_sources


class Threads(Ranks):
    """Ranks that are threads of this process."""

    barrier, values = Barrier(2, timeout=30), {}

    def gather_objects(self, value):
        self.values[self.rank] = value
        self.barrier.wait()
        values = [self.values[rank] for rank in range(self.world_size)]
        self.barrier.wait()
        return values

    def sum(self, tensor):
        return sum(self.gather_objects(tensor))


def opened_by_two_ranks(config):
    """What each rank gets, or the error it raises."""
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(open_sources, config, Threads(rank, 2)) for rank in range(2)]
    return [future.exception() or future.result() for future in futures]


@pytest.fixture
def paths(tmp_path):
    return write_shards(tmp_path, ((f"{n:03d}", {"jpg": b"1", "txt": b"words"}) for n in range(10)), 2)


def test_each_shard_is_looked_for_by_the_rank_that_counts_it(paths, tmp_path, monkeypatch):
    looked_for, is_file = [], Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: looked_for.append(path) or is_file(path))
    first, second = opened_by_two_ranks(tiny_config(tmp_path, {"shards": f"{tmp_path}/{{00000..00004}}.tar"}))
    assert sorted(path for path in looked_for if path.suffix == ".tar") == paths
    assert first["tiny"].digest == second["tiny"].digest
    assert first["tiny"].shard_records == second["tiny"].shard_records == (2, 2, 2, 2, 2)


@pytest.mark.parametrize("gone", [(3,), (4,), (1, 2)])
def test_a_shard_that_one_rank_misses_is_named_on_all(paths, tmp_path, gone):
    for number in gone:
        paths[number].unlink()
    errors = opened_by_two_ranks(tiny_config(tmp_path, {"shards": f"{tmp_path}/{{00000..00004}}.tar"}))
    text = f"{paths[gone[0]]} does not exist ({len(gone)} of 5 shards cannot be used); check the pattern"
    assert [(type(error), str(error), error.on_all_ranks) for error in errors] == [(DataError, text, True)] * 2
