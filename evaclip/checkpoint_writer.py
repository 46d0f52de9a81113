"""Writing checkpoints behind the training, which waits for a copy to host memory, and not for the disk.

It waits for the checkpoint before as well, where that is still under way, and for two small collectives.

``CheckpointWriter.save`` copies this rank's entries into buffers that are allocated once (pinned where there is a GPU).
One thread per rank then writes ``part_RRRRR.safetensors`` into a hidden folder of this step and this start of the run,
checksums the same bytes while they are written, flushes, and leaves a small ``part_RRRRR.json`` with size and
checksum, or with what went wrong. Rank 0's thread waits for those of all ranks, writes ``config.yaml``, ``meta.json``
and the tokenizer's file, flushes, renames the folder, and applies the retention rule. Nothing is read back.

The threads talk through files, because a collective of theirs would get between those of the training. Ranks agree
when the next checkpoint is due, or at once if it is the final one: one gather and one broadcast of a few hundred bytes.
So at most one checkpoint is under way, and an older one is touched only after a newer one is complete.

What a file system refuses is tried again for three minutes, or for seconds where training waits for it. A checkpoint
that fails for good is told in the log, and the run goes on to the next one; the final one raises, and so do three in a
row. Memory: 12 bytes of host memory per parameter (16 with an average), 4 per frozen one, over all ranks.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor

from evaclip.checkpoint import FORMAT, Entry, RunState, delete_old, meta_checksum
from evaclip.checkpoint_names import complete, step_name
from evaclip.config import RunConfig
from evaclip.config.tokenizer_file import TOKENIZER, read_tokenizer
from evaclip.config_file import dump
from evaclip.distributed import Ranks, agreed
from evaclip.errors import CheckpointError
from evaclip.files import flush, write_json, write_text

log = logging.getLogger(__name__)

_BLOCK = 1 << 18
"""Bytes of one write, few enough to be in the processor's cache when they are checksummed."""
_FLUSHED = 1 << 22
"""Bytes after which the system is told to write them out."""
_CHUNK = 1 << 26
"""Elements of one staging buffer: torch rounds pinned memory up to a power of two, so one buffer might waste half."""
_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0)
"""Before each new try to write."""
_WAITED_FOR_SECONDS = (1.0, 2.0, 4.0)
"""The same from when training, or whoever stops it, waits for the checkpoint."""
_MOST_FAILED = 3
"""Checkpoints in a row that cannot be written, after which the run stops."""
_PATIENCE_SECONDS = 600.0
"""How long rank 0 waits for a rank whose part does not grow, where ``cluster.step_timeout_seconds`` is longer."""
_LEAVING_SECONDS = 20.0
"""The same when the run ends with an error, of which the other ranks may have died."""

T = TypeVar("T")


class CheckpointWriter:
    """Writes a run's checkpoints; every rank has one, and every rank calls ``save``.

    Attributes:
        newest: Step of the newest checkpoint that this object has completed; on rank 0.
    """

    def __init__(self, folder: Path, config: RunConfig, ranks: Ranks) -> None:
        self.newest: int | None = None
        self._folder = folder
        self._config = config
        self._ranks = ranks
        self._start = ranks.from_main(secrets.token_hex(4))  # a dead run's leftovers have other names
        self._staging = Staging(pinned=ranks.device.type == "cuda")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._part: Future[str | None] | None = None
        self._commit: Future[str | None] | None = None
        self._failed_part: str | None = None
        self._patience = min(_PATIENCE_SECONDS, 0.8 * config.cluster.step_timeout_seconds)
        self._waited_for = threading.Event()
        self._num_failed = 0
        self._intact = max(complete(folder), default=None)
        text = config.model.text
        needed = ranks.is_main and text.tokenizer
        self._tokenizer = read_tokenizer(needed, text.tokenizer_digest) if needed else None

    def save(self, state: RunState, entries: Iterable[Entry], *, final: bool) -> Path:
        """Start to write ``folder/step_N``; returns where it will be.

        Waits for the checkpoint before, and for the copy of the entries to host memory.

        Args:
            state: The same on every rank.
            entries: What this rank owns.
            final: No step follows: wait until the checkpoint is complete.

        Raises:
            CheckpointError: It is the final one and could not be written, or three before it could not, on every rank;
                nothing of them is left, older ones are untouched.
        """
        started = time.monotonic()
        error = self._settle()
        self._num_failed = self._num_failed + 1 if error else 0
        if self._num_failed == _MOST_FAILED and not final:
            with agreed(self._ranks):
                raise CheckpointError(
                    f"the last {_MOST_FAILED} checkpoints could not be written; {error}, and start the run again: "
                    f"it goes on from {self._intact or 'its first step'}"
                )
        if (waited := time.monotonic() - started) > 1 and self._ranks.is_main:
            log.info("training waited %.0f s until the checkpoint before was written or given up", waited)
        path = self._folder / step_name(state.step)
        temporary = self._folder / f".{path.name}.{self._start}.tmp"
        header = self._staging.fill(entries)
        self._failed_part = None
        if self._ranks.is_main:
            self._thread.submit(self._remove_leftovers, temporary)
        self._part = self._thread.submit(self._write_part, temporary, header)
        if self._ranks.is_main:
            meta = {"format": FORMAT, **asdict(state), "config": self._config.model_dump(mode="json")}
            self._commit = self._thread.submit(self._complete, temporary, path, meta, final=final)
        if final:
            error = self._settle()
            with agreed(self._ranks):
                if error:
                    raise CheckpointError(f"{error}, and start the run again (older checkpoints are intact)")
        return path

    def leave(self) -> None:
        """Wait for what is under way, without the other ranks: the way out, also of an error that they do not share."""
        self._patience = _LEAVING_SECONDS
        self._waited_for.set()
        under_way = [job for job in (self._part, self._commit) if job]
        for job in wait(under_way).done:
            if error := job.exception():
                log.error("a checkpoint could not be written", exc_info=error)
        self._thread.shutdown()

    def _settle(self) -> str | None:
        """Wait for the checkpoint under way; what is wrong with it, the same on every rank."""
        if self._part is None:
            return None
        self._waited_for.set()
        failed = [error for error in self._ranks.gather_objects(self._part.result()) if error]
        outcome = None
        if self._commit:
            self._failed_part = failed[0] if failed else None  # where its rank could not leave word of it
            outcome = self._commit.result()
        self._part = self._commit = None
        self._waited_for.clear()
        return self._ranks.from_main(outcome)

    # ------------------------------------------------------------------------------------------- in the rank's thread

    def _write_part(self, temporary: Path, header: bytes) -> str | None:
        """Write this rank's part and leave word of it; what went wrong, if it did for good."""
        path = temporary / f"{_part_name(self._ranks.rank)}.safetensors"
        name = f"rank {self._ranks.rank}"
        try:
            self._persistently(f"{name}: {temporary}", partial(temporary.mkdir, parents=True, exist_ok=True))
            self._persistently(f"{name}: {path}", lambda: _leave_word(path, write_part(path, header, self._staging)))
        except CheckpointError as error:
            text = self._failed_part = f"{name}: {error}"
            with suppress(OSError):
                path.unlink(missing_ok=True)
                _leave_word(path, {"error": text})
            return text
        return None

    def _complete(self, temporary: Path, path: Path, meta: dict[str, Any], *, final: bool) -> str | None:
        """Wait for all parts and make them a checkpoint; what went wrong, if it did for good."""
        try:
            meta["parts"] = self._await_parts(temporary)
            if self._tokenizer:
                size = len(self._tokenizer.content)
                meta["parts"][TOKENIZER] = {"size": size, "xxh3": self._tokenizer.digest}
            self._persistently(f"checkpoint {path}", partial(self._publish, temporary, path, meta))
        except CheckpointError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            text = f"the checkpoint of step {meta['step']} could not be written: {error}"
            if not final:
                log.error("%s; training goes on without it until the next one", text)  # noqa: TRY400  no stack trace
            return text
        try:
            self._persistently(f"the name of {path}", partial(_point_to, path))
            if not meta["consecutive_skips"]:  # what was saved before a streak of bad steps stays
                delete_old(self._folder, self._config.checkpoint, meta["step"])
        except CheckpointError as error:
            log.warning("%s is complete, but older checkpoints stay: %s", path, error)
        self.newest, self._intact = meta["step"], path
        log.info("saved %s", path)
        return None

    def _remove_leftovers(self, temporary: Path) -> None:
        """Remove what parts left that came too late for their checkpoint."""
        with suppress(OSError):  # where this is refused, writing is refused, and says why
            for leftover in self._folder.glob(".step_*.tmp"):
                if leftover != temporary:
                    shutil.rmtree(leftover, ignore_errors=True)

    def _persistently(self, what: str, work: Callable[[], T]) -> T:
        """Try again, later each time, what the file system refuses.

        Raises:
            CheckpointError: It still does, or the folder is gone, because another rank gave up; the message says what
                a person can do.
        """
        pauses, hurried = iter(_RETRY_SECONDS), False
        while True:
            try:
                return work()
            except OSError as error:
                if self._waited_for.is_set() and not hurried:
                    pauses, hurried = iter(_WAITED_FOR_SECONDS), True
                seconds = next(pauses, None)
                full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                remedy = "free disk space or lower checkpoint.keep_last" if full else "check run_dir"
                if seconds is None or isinstance(error, FileNotFoundError):
                    raise CheckpointError(f"{error}; {remedy}") from error
                log.warning("%s could not be written: %s; %s; trying again in %g s", what, error, remedy, seconds)
                if hurried:
                    time.sleep(seconds)
                else:
                    self._waited_for.wait(seconds)

    def _await_parts(self, temporary: Path) -> dict[str, Any]:
        """Size and checksum of every rank's part, once all are written.

        Raises:
            CheckpointError: A rank could not write, or is not heard of.
        """
        missing = dict.fromkeys(range(self._ranks.world_size), -1)  # rank -> bytes when its part last grew
        parts: dict[str, Any] = {}
        heard, pause = time.monotonic(), 0.01
        while True:
            for rank in list(missing):
                part = temporary / f"{_part_name(rank)}.safetensors"
                word = _read_word(part)
                if word and "error" in word:
                    raise CheckpointError(word["error"])
                size = _size(part)
                if word or size != missing[rank]:
                    heard, missing[rank] = time.monotonic(), size
                if word:
                    parts[part.name] = word
                    del missing[rank]
            if not missing:
                return dict(sorted(parts.items()))
            if self._failed_part:
                raise CheckpointError(self._failed_part)
            if time.monotonic() - heard > self._patience:
                names = ", ".join(map(str, missing))
                raise CheckpointError(
                    f"ranks {names} have written nothing for {self._patience:.0f} s; look for processes that hang or "
                    f"do not see {self._folder}"
                )
            time.sleep(pause)
            pause = min(1.0, 2 * pause)

    def _publish(self, temporary: Path, path: Path, meta: dict[str, Any]) -> None:
        """Write what is not tensors, and give the folder its name."""
        if self._tokenizer:
            (temporary / TOKENIZER).write_bytes(self._tokenizer.content)
            flush(temporary / TOKENIZER)
        write_text(temporary / "config.yaml", dump(self._config))
        write_text(temporary / "meta.json", json.dumps({**meta, "xxh3": meta_checksum(meta)}))
        for word in temporary.glob("part_*.json"):
            word.unlink()
        flush(temporary)
        replaced = path.with_name(f".{path.name}.replaced")
        if path.exists():  # a run that was cut back may write a step again
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        try:
            temporary.rename(path)  # a kill before this leaves the old one, which set_aside brings back
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


class Staging:
    """A rank's share of the state in host memory, laid out as the data of its file."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._buffers: list[Tensor] = []
        self._size = 0

    def fill(self, entries: Iterable[Entry]) -> bytes:
        """Copy entries as fp32, and wait for it; returns the file's header, as the safetensors format has it."""
        entries = list(entries)
        self._size = sum(entry.values.numel() for entry in entries)
        if sum(map(len, self._buffers)) < self._size:
            self._buffers.clear()
            for start in range(0, self._size, _CHUNK):
                size = min(_CHUNK, self._size - start)
                self._buffers.append(torch.empty(size, dtype=torch.float32, pin_memory=self._pinned))
        header: dict[str, Any] = {}
        start = 0
        for entry in entries:
            values = entry.values.detach().reshape(-1)
            stop = start + len(values)
            for target in self._views(start, stop):
                target.copy_(values[: len(target)], non_blocking=True)
                values = values[len(target) :]
            key = f"{entry.kind}/{entry.name}@{entry.start}"
            header[key] = {"dtype": "F32", "shape": [stop - start], "data_offsets": [4 * start, 4 * stop]}
            start = stop
        if self._pinned:
            torch.cuda.synchronize()
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _views(self, start: int, stop: int) -> Iterator[Tensor]:
        """The buffers' elements from ``start`` to ``stop``."""
        while start < stop:
            number, offset = divmod(start, _CHUNK)
            size = min(_CHUNK - offset, stop - start)
            yield self._buffers[number][offset : offset + size]
            start += size

    def blocks(self) -> Iterator[memoryview]:
        """The bytes of the file's data, in pieces."""
        for view in self._views(0, self._size):
            data = view.numpy().data.cast("B")
            for start in range(0, len(data), _BLOCK):
                yield data[start : start + _BLOCK]


def write_part(path: Path, header: bytes, staging: Staging) -> dict[str, Any]:
    """Write a safetensors file and flush it; returns its size and checksum, computed while blocks are in the cache."""
    state = xxhash.xxh3_64()
    size = write_blocks(path, header, staging, state.update)
    return {"size": size, "xxh3": state.hexdigest()}


def write_blocks(
    path: Path, header: bytes, staging: Staging, written: Callable[[memoryview], object] | None = None
) -> int:
    """Write a safetensors file and flush it; returns its size. ``written`` is given every block, behind its write."""
    size = told = 0
    with path.open("wb", buffering=0) as file:
        for block in (memoryview(header), *staging.blocks()):
            rest = block
            while rest:  # a disk that is almost full takes a part
                rest = rest[file.write(rest) :]
            if written:
                written(block)
            size += len(block)
            if size - told >= _FLUSHED:  # the disk starts at once, not at the flush: that doubles the bandwidth
                os.posix_fadvise(file.fileno(), told, size - told, os.POSIX_FADV_DONTNEED)
                told = size
        os.fsync(file.fileno())
    return size


def _part_name(rank: int) -> str:
    return f"part_{rank:05d}"


def _leave_word(part: Path, word: dict[str, Any]) -> None:
    """Tell rank 0 about a part."""
    write_json(part.with_suffix(".json"), word, flushed=False)


def _size(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _read_word(part: Path) -> dict[str, Any] | None:
    try:
        return json.loads(part.with_suffix(".json").read_text(encoding="utf-8"))
    except OSError:  # not there yet
        return None


def _point_to(path: Path) -> None:
    """Make a checkpoint's name last, and write it into ``latest``."""
    flush(path.parent)
    write_text(path.with_name("latest"), path.name + "\n")
    flush(path.parent)
