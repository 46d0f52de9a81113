"""One virtual cluster for all of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm.virtual import VirtualCluster, virtual_cluster, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    """Three nodes; skipped with the reason where SLURM is missing."""
    if reason := why_not():
        pytest.skip(reason)
    with virtual_cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made
