"""Fixtures of all tests, and the tables that long suites write."""

import logging
import os

import pytest
import tables
from tiny import colour_records

from evaclip.data.shards import write_shards


@pytest.fixture(scope="session")
def colour_shards(tmp_path_factory):
    """Folder with three shards of 70 coloured squares in all."""
    folder = tmp_path_factory.mktemp("colours")
    write_shards(folder, colour_records(70), 30)
    return folder


@pytest.fixture
def run_dir(tmp_path):
    """An empty run directory."""
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def no_wandb_account(tmp_path, monkeypatch):
    """No key, no settings, no home: what a fresh machine knows of W&B."""
    for name in os.environ:
        if name.startswith("WANDB_") and name != "WANDB_SERVICE":  # that is how this process finds its own service
            monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def no_log_handlers_left():
    """What a run set up for its log does not outlive the test."""
    yield
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler).__module__ == "evaclip.logs":
            root.removeHandler(handler)
            handler.close()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Only a whole suite that passed replaces its page's tables."""
    config = session.config
    chosen = config.option.keyword or config.args_source is pytest.Config.ArgsSource.ARGS
    page = tables.PAGES.get(config.option.markexpr)
    if page and tables.FIGURES and exitstatus == 0 and not chosen and os.environ.get("EVACLIP_WRITE_TABLES"):
        tables.write(page)
