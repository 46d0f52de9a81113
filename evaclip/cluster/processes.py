"""A rank's process as its node's launcher has it: what it prints, how it is ended, where it hangs."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

from evaclip.cluster.behind import Behind
from evaclip.cluster.protocol import STACKS_SECONDS

_LAST_LINES = 20  # of a rank's output that are looked at when it fails
_WORDS = 300  # bytes that are told of them
_CONSOLE_BYTES = 10 << 20  # of a rank's output in one file; there are two
_PR_SET_PDEATHSIG = 1
_PR_SET_PTRACER = 0x59616D61  # of the Yama security module; refused, and not needed, where there is none
_ANYBODY = ctypes.c_ulong(-1)
_prctl = ctypes.CDLL(None).prctl


class RankProcess:
    """A process that is, or may become, a rank of a training; and what it prints."""

    def __init__(self, command: list[str], files: Behind) -> None:
        self.number = -1
        self._files = files
        self.last: deque[str] = deque(maxlen=_LAST_LINES)
        self._file: IO[bytes] | None = None
        self._torn = b""
        self.process = subprocess.Popen(  # noqa: S603  our own command
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # signals come from here only, and reach its data workers too
            preexec_fn=_prepare,  # noqa: PLW1509  calls one function of libc and takes no lock
        )
        os.set_blocking(self.output.fileno(), False)

    def begin(self, number: int, environment: dict[str, str], arguments: list[str], console: Path) -> None:
        """Give it its place."""
        self.number, self._console = number, console
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it died as a spare; its exit code tells
            self.process.stdin.write(json.dumps({"environment": environment, "arguments": arguments}).encode() + b"\n")
            self.process.stdin.close()

    @property
    def output(self) -> IO[bytes]:
        """What it prints, errors too."""
        assert self.process.stdout
        return self.process.stdout

    def pump(self) -> bool:
        """Pass on what it has printed; False at the end of it."""
        content = self.output.read(1 << 16)
        if content is None:
            return True
        if content and self.number >= 0:  # not of a spare
            self._files.do(partial(self._keep, content))
        *lines, self._torn = (self._torn + content).split(b"\n")
        self.last.extend(line.decode(errors="replace") for line in lines if line.strip())
        if self.number == 0:
            with suppress(OSError):  # the job's output
                os.write(2, content)
        return bool(content)

    def _keep(self, content: bytes) -> None:
        if self._file is None:
            self._file = self._console.open("ab", buffering=0)
        self._file.write(content)
        if self._file.tell() > _CONSOLE_BYTES:
            self._file.close()
            self._console.replace(self._console.with_name(f"{self._console.name}.1"))
            self._file = self._console.open("ab", buffering=0)

    def kill(self) -> None:
        """End it and its children at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def _prepare() -> None:
    """In the new process: it dies with its launcher; py-spy may look at it where Yama asks for leave (on Ubuntu)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_PTRACER, _ANYBODY)


def state(pid: int) -> str:
    """One letter: R running, S sleeping, D waiting for a disk, T stopped, Z ended; X where there is no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def most_telling(lines: Iterable[str]) -> str:
    """The last line that speaks of an error, else the last one; so much of it as a report can carry."""
    lines = list(lines)
    line = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "")
    return line.encode()[:_WORDS].decode(errors="ignore")


def write_stacks(pids: Mapping[int, int], logs: Path) -> None:
    """Where ranks are, each in a file, if py-spy is installed and may look; takes as long as the slowest of them."""
    tool = shutil.which("py-spy")
    if not tool:
        return
    command = [tool, "dump", "--nonblocking", "--pid"]
    deadline = time.monotonic() + STACKS_SECONDS
    with suppress(OSError):
        looking = {
            rank: subprocess.Popen([*command, str(pid)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # noqa: S603
            for rank, pid in pids.items()
        }
        for rank, process in looking.items():
            try:
                text, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
                (logs / f"stack_{rank:05d}.txt").write_bytes(text)
            except subprocess.TimeoutExpired:
                process.kill()
