"""One process per run directory, with real second processes."""

import errno
import fcntl
import platform
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from evaclip import lock as module
from evaclip.errors import ConfigError
from evaclip.lock import Holder, lock

HOLDER = """
import pathlib, sys, time
from evaclip.lock import lock
lock(pathlib.Path(sys.argv[1]))
print(flush=True)
time.sleep(60)
"""


@contextmanager
def holder(directory):
    """Another process that has the lock."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, directory], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_the_holder_is_named_with_node_job_and_time_and_its_death_frees_the_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with holder(tmp_path) as process:
        who = (
            rf"\(process {process.pid} on {re.escape(platform.node())}, SLURM job 4711, since 20\d\d-.* UTC\); wait for"
        )
        with pytest.raises(ConfigError, match=who):
            lock(tmp_path)
        process.kill()
        process.wait()
        lock(tmp_path)
    lock(tmp_path)  # once more in the same process


def test_a_holder_on_another_node_is_waited_for_as_long_as_its_lease(tmp_path, monkeypatch, caplog):
    with holder(tmp_path) as process:
        # a node whose name begins like ours, seen through a shared file system
        (tmp_path / ".lock").write_text(f"process 1 on {platform.node()}0, since 2026-01-01 00:00 UTC")
        monkeypatch.setattr(module, "_LEASE_SECONDS", 0.0)
        with pytest.raises(ConfigError, match=r"another process trains in run_dir .* \(process 1 on .*0, since 2026"):
            lock(tmp_path)
        monkeypatch.setattr(module, "_LEASE_SECONDS", 60.0)
        threading.Timer(0.2, process.kill).start()
        started = time.monotonic()
        lock(tmp_path)
        assert time.monotonic() - started < 30
    assert "is locked (process 1 on" in caplog.text


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog):
    def refuse(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock(tmp_path)
    assert "has no locks (No locks available): nothing keeps a second process out" in caplog.text
    assert (tmp_path / ".lock").read_text().startswith("process ")


def test_a_folder_that_is_gone_is_an_error_and_leaves_no_lock_behind(tmp_path):
    with pytest.raises(FileNotFoundError):
        lock(tmp_path / "gone")
    assert not module._held.keys() & {tmp_path / "gone"}


def test_who_holds_the_lock_can_be_asked_without_touching_it(tmp_path, monkeypatch):
    assert module.holder(tmp_path) is None
    with holder(tmp_path) as process:
        found = module.holder(tmp_path)
        assert found.alive
        assert found.name.startswith(f"process {process.pid} on {platform.node()},")
        process.kill()
        process.wait()
        assert module.holder(tmp_path) == Holder(found.name, alive=False)
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    assert module.holder(tmp_path) == Holder(found.name, alive=None)  # its node's locks may not reach here


def test_asking_does_not_let_go_of_a_lock_of_ones_own(tmp_path):
    lock(tmp_path)
    assert module.holder(tmp_path).alive
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stderr=subprocess.PIPE, text=True) as process:
        assert "another process trains in run_dir" in process.communicate(timeout=20)[1]


def test_a_file_system_without_locks_does_not_tell_whether_the_holder_lives(tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text("process 1 on here, since then")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    assert module.holder(tmp_path) == Holder("process 1 on here, since then", alive=None)
