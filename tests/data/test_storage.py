"""Reading bytes of this machine and of a web server: ranges, faults that pass, faults that stay, a bounded cache."""

import contextlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from data.range_server import serving

from evaclip.data import storage
from evaclip.data.index import index_path
from evaclip.data.shards import CorruptRecordError, Shard, ShardSet, write_shards
from evaclip.data.storage import Cache, NotThereError, as_stream, open_file
from evaclip.errors import DataError

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(storage, "_WAITS", (0.01, 0.01, 0.01))


@pytest.fixture
def server(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    with serving(tmp_path) as running:
        yield running


def test_local_ranges_end_where_the_file_ends(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    file = open_file(str(tmp_path / "file"))
    assert file.size == len(CONTENT)
    assert file.read(1000, 50) == CONTENT[1000:1050]
    assert file.read(len(CONTENT) - 5, 50) == CONTENT[-5:]
    assert file.read(len(CONTENT) + 5, 50) == b""


def test_a_local_fault_that_passes_is_waited_for(tmp_path, monkeypatch, no_waiting, caplog):
    (tmp_path / "file").write_bytes(CONTENT)
    file = open_file(str(tmp_path / "file"))
    faults, pread = [OSError(5, "Input/output error"), OSError(116, "Stale file handle")], os.pread

    def faulty(*arguments):
        if faults:
            raise faults.pop()
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", faulty)
    assert file.read(7, 100) == CONTENT[7:107]
    assert "cannot be read (Stale file handle), next try in 0.01 s" in caplog.text
    assert "cannot be read (Input/output error), next try in 0.01 s" in caplog.text


def test_a_local_fault_that_stays_stops_the_run(tmp_path, monkeypatch, no_waiting):
    (tmp_path / "file").write_bytes(CONTENT)
    file = open_file(str(tmp_path / "file"))

    def faulty(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", faulty)
    with pytest.raises(DataError, match=r"file cannot be read \(Input/output error\), tried 4 times in 0 s; mend the"):
        file.read(0, 10)


def test_what_is_not_there_is_not_waited_for(tmp_path, server):
    start = time.monotonic()
    for location in (str(tmp_path / "none"), f"{server.url}/none"):
        with pytest.raises(NotThereError, match=r"none cannot be read \(.*\); check the path and its permissions"):
            open_file(location)
    assert time.monotonic() - start < 5


def test_a_server_that_is_down_is_waited_for_and_not_called_empty(server, no_waiting):
    server.server_close()
    server.shutdown()
    with pytest.raises(DataError, match=r"cannot be read \(.*(refused|[Cc]onnect).*\), tried 4 times") as caught:
        open_file(f"{server.url}/bytes")
    assert not isinstance(caught.value, NotThereError)


def test_a_refusal_without_a_reason_is_not_called_missing(monkeypatch):
    class Refusing:
        def info(self, location):
            raise PermissionError("Forbidden")

    monkeypatch.setattr(storage, "_file_system_of", lambda *_: Refusing())
    with pytest.raises(NotThereError, match=r"s3://b/0\.tar cannot be read \(permission denied\); check the path and"):
        open_file("s3://b/0.tar")


def test_remote_ranges_are_asked_for_and_nothing_else(server):
    file = open_file(f"{server.url}/file")
    assert file.size == len(CONTENT)
    assert file.read(1000, 50) == CONTENT[1000:1050]
    assert file.read(len(CONTENT) - 5, 50) == CONTENT[-5:]
    assert file.read(len(CONTENT), 50) == b""
    assert server.ranges == [(1000, 1050), (len(CONTENT) - 5, len(CONTENT))]


@pytest.mark.parametrize("fault", [500, 503, "cut"])
def test_a_remote_fault_that_passes_is_waited_for(server, no_waiting, fault, caplog):
    file = open_file(f"{server.url}/file")
    server.faults = [fault, fault]
    assert file.read(1000, 5000) == CONTENT[1000:6000]
    assert caplog.text.count("next try in") == 2


def test_a_server_that_does_not_answer_is_given_up(server, monkeypatch):
    monkeypatch.setattr(storage, "_WAITS", (0.01,))
    monkeypatch.setattr(storage, "_TIMEOUT", 0.3)
    storage._file_system_of.cache_clear()
    file = open_file(f"{server.url}/file")
    server.faults = ["silent", "silent"]
    start = time.monotonic()
    with pytest.raises(DataError, match="tried 2 times in"):
        file.read(0, 10)
    assert time.monotonic() - start < 3
    storage._file_system_of.cache_clear()


def test_a_remote_fault_that_stays_stops_the_run(server, no_waiting):
    file = open_file(f"{server.url}/file")
    server.faults = [500] * 4
    with pytest.raises(DataError, match=r"cannot be read \(.*500.*\), tried 4 times"):
        file.read(0, 10)


def test_a_server_without_ranges_is_refused(server):
    file = open_file(f"{server.url}/file")
    server.faults = ["whole"]
    with pytest.raises(DataError, match="the server ignores ranges"):
        file.read(0, 10)


def test_a_missing_package_is_named(monkeypatch):
    storage._file_system_of.cache_clear()

    def missing(*_):
        raise ModuleNotFoundError("No module named 's3fs'")

    monkeypatch.setattr(storage, "_file_system_of", missing)
    with pytest.raises(DataError, match=r"s3://b/0.tar: No module named 's3fs'; pip install 'evaclip\[remote\]'"):
        open_file("s3://b/0.tar")


def test_streams_read_ahead(server):
    with as_stream(open_file(f"{server.url}/file"), 10_000) as stream:
        assert b"".join(iter(lambda: stream.read(1000), b"")) == CONTENT
        stream.seek(-5, os.SEEK_END)
        assert stream.read() == CONTENT[-5:]
    assert server.ranges[:2] == [(0, 10_000), (10_000, 20_000)]


# -------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(storage, "_CHUNK", 1000)


def size_of(folder):
    """Bytes of the pieces in a folder from which another process may take files meanwhile."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.name != ".evaclip-cache" else 0
    return total


def test_cached_pieces_are_asked_for_once(server, tmp_path, small_chunks):
    cache = Cache(tmp_path / "cache", 1 << 30)
    for _ in range(3):
        assert open_file(f"{server.url}/file", cache).read(1500, 2000) == CONTENT[1500:3500]
    assert server.ranges == [(1000, 2000), (2000, 3000), (3000, 4000)]


def test_the_cache_never_holds_more_than_its_bound(server, tmp_path, small_chunks):
    cache = Cache(tmp_path / "cache", 5500)
    file = open_file(f"{server.url}/file", cache)
    for number in range(20):
        assert file.read(number * 1000, 10) == CONTENT[number * 1000 :][:10]
        assert size_of(cache.folder) <= 5500
    assert size_of(cache.folder) == 5000


def test_what_was_used_last_stays(server, tmp_path, small_chunks):
    cache = Cache(tmp_path / "cache", 3000)
    file = open_file(f"{server.url}/file", cache)
    for number in (0, 1, 2, 0, 3, 0, 4, 0):
        file.read(number * 1000, 10)
        time.sleep(0.02)  # file times are that coarse
    assert server.ranges == [(n * 1000, n * 1000 + 1000) for n in range(5)]


def test_what_else_lies_in_the_caches_folder_stays_and_does_not_count(server, tmp_path, small_chunks):
    folder = tmp_path / "cache"
    (folder / "shards").mkdir(parents=True)
    others = [
        folder / "00000.tar",
        folder / "0123456789abcdef-00000.tar.index.safetensors",
        folder / "shards" / "00001.tar",
        folder / ".lock",
    ]
    for path in others:
        path.write_bytes(bytes(5000))
        os.utime(path, (0, 0))
    file = open_file(f"{server.url}/file", Cache(folder, 3000))
    for number in (*range(5), 4, 3, 2):
        file.read(number * 1000, 10)
    assert server.ranges == [(n * 1000, n * 1000 + 1000) for n in range(5)]
    assert [path.stat().st_size for path in others] == [5000] * 4


def test_what_a_killed_process_left_half_written_goes_first(server, tmp_path, small_chunks):
    cache = Cache(tmp_path / "cache", 3000)
    file = open_file(f"{server.url}/file", cache)
    file.read(0, 10)
    (piece,) = cache.folder.glob("*-0")
    half = piece.rename(cache.folder / f".{piece.name}.tmp")
    file.read(1000, 3000)
    assert not half.exists()


@pytest.mark.parametrize("length", [0, 999, 1001])
def test_a_piece_of_another_length_is_read_again(server, tmp_path, small_chunks, length):
    cache = Cache(tmp_path / "cache", 1 << 30)
    last = len(CONTENT) // 1000
    for _ in range(2):
        assert open_file(f"{server.url}/file", cache).read(0, len(CONTENT)) == CONTENT
    assert len(server.ranges) == last + 1
    for number in (1, last):
        (piece,) = cache.folder.glob(f"*-{number}")
        piece.write_bytes(bytes(length))
    assert open_file(f"{server.url}/file", cache).read(0, len(CONTENT)) == CONTENT
    assert server.ranges[last + 1 :] == [(1000, 2000), (last * 1000, len(CONTENT))]


def _read_some(url, folder, start):
    storage._CHUNK = 1000
    file = open_file(f"{url}/file", Cache(folder, 10_000))
    for number in range(start, start + 40):
        assert file.read(number % 60 * 1000, 10) == CONTENT[number % 60 * 1000 :][:10]
        assert size_of(folder) <= 10_000 + 1000  # one that is just being renamed may be seen twice


def test_processes_share_a_cache_and_its_bound(server, tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = [(server.url, tmp_path / "cache", start) for start in (0, 20)]
    processes = [context.Process(target=_read_some, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert size_of(tmp_path / "cache") <= 10_000


def test_only_the_range_is_read_out_of_a_piece(server, tmp_path, small_chunks, monkeypatch):
    file = open_file(f"{server.url}/file", Cache(tmp_path / "cache", 1 << 30))
    file.read(0, 4000)
    lengths, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: lengths.append(arguments[1]) or pread(*arguments))
    assert file.read(1990, 30) == CONTENT[1990:2020]
    assert lengths == [10, 20]
    assert file.read(len(CONTENT) + 5, 30) == b""


def test_pieces_are_counted_only_where_the_bound_may_be_reached(server, tmp_path, small_chunks, monkeypatch):
    scans, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scans.append(path) or scandir(path))
    cache = Cache(tmp_path / "cache", 60_000)
    monkeypatch.setattr(storage, "_ROOM", 6)
    file = open_file(f"{server.url}/file", cache)
    file.read(0, 60_000)
    assert len(scans) == 1  # nobody knew what the folder held
    file.read(60_000, 40_000)
    assert len(scans) == 1 + 4  # one in eleven: one piece and a sixth of the bound are made room for
    assert size_of(cache.folder) <= 60_000


def test_a_ledger_that_says_nothing_or_too_much_is_mended_by_counting(server, tmp_path, small_chunks):
    cache = Cache(tmp_path / "cache", 5500)
    file = open_file(f"{server.url}/file", cache)
    for number, text in enumerate(["", "half", "9" * 20, "\0" * 20, "0" * 19 + "x"]):
        file.read(number * 1000, 10)
        (cache.folder / ".evaclip-cache").write_text(text)
    file.read(0, 5000)
    assert server.ranges == [(n * 1000, n * 1000 + 1000) for n in range(5)]
    file.read(5000, 2000)
    assert size_of(cache.folder) == 5000


def test_bytes_are_served_where_the_cache_cannot_be_written(server, tmp_path, small_chunks, caplog):
    (tmp_path / "cache").write_text("a file")
    file = open_file(f"{server.url}/file", Cache(tmp_path / "cache", 1 << 20))
    assert file.read(500, 3000) == CONTENT[500:3500]
    assert caplog.messages == [
        f"{tmp_path}/cache cannot keep pieces of shards (File exists); check data.cache_dir"
    ]  # once, for four pieces


def test_a_full_disk_leaves_no_half_piece(server, tmp_path, small_chunks, monkeypatch, caplog):
    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    file = open_file(f"{server.url}/file", Cache(tmp_path / "cache", 1 << 20))
    assert file.read(0, 10) == CONTENT[:10]
    assert "(No space left on device); check data.cache_dir" in caplog.text
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".evaclip-cache"]


# ------------------------------------------------------------------------------------------------------ remote shards


@pytest.fixture
def shard(tmp_path):
    records = ((f"{n:03d}", {"jpg": bytes([n]) * 900, "txt": b"words"}) for n in range(10))
    return write_shards(tmp_path / "shards", records, 10)[0]


def test_a_remote_shard_reads_as_the_local_one(shard, server, tmp_path):
    location = f"{server.url}/shards/{shard.name}"
    beside = Shard(location)
    assert [beside.read(n) for n in range(10)] == [Shard(shard).read(n) for n in range(10)]
    Path(index_path(shard, None)).unlink()
    with pytest.raises(
        DataError, match=r"index.safetensors does not exist and cannot be written there; set data.index_dir"
    ):
        Shard(location)
    built = Shard(location, str(tmp_path / "indexes"))
    assert built.index.digest == beside.index.digest


def test_a_damaged_piece_in_the_cache_is_read_again(shard, server, tmp_path):
    location = f"{server.url}/shards/{shard.name}"
    cache = Cache(tmp_path / "cache", 1 << 20)
    shard_set = ShardSet([location], None, [Shard(location).index.digest], cache)
    before = shard_set.read(0, 3)
    (piece,) = cache.folder.glob("*-0")
    piece.write_bytes(bytes(piece.stat().st_size))
    assert shard_set.read(0, 3) == before
    content = bytearray(shard.read_bytes())
    content[int(Shard(shard).index.offsets[6])] ^= 1
    shard.write_bytes(content)
    piece.unlink()
    with pytest.raises(CorruptRecordError, match="record '003' differs from its checksum"):
        shard_set.read(0, 3)
