"""Fixtures of all tests."""

import logging

import pytest
from tiny import colour_records

from evaclip.data.shards import write_shards


@pytest.fixture(scope="session")
def colour_shards(tmp_path_factory):
    """Folder with three shards of 70 coloured squares in all."""
    folder = tmp_path_factory.mktemp("colours")
    write_shards(folder, colour_records(70), 30)
    return folder


@pytest.fixture(autouse=True)
def no_log_handlers_left():
    """What a run set up for its log does not outlive the test."""
    yield
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler).__module__ == "evaclip.logs":
            root.removeHandler(handler)
            handler.close()
