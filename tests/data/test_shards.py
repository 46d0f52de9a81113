import pickle
from pathlib import Path

import pytest

from evaclip.data import shards, storage
from evaclip.data.index import index_path
from evaclip.data.shards import CorruptRecordError, Shard, expand, write_shards
from evaclip.errors import DataError


def records(count):
    return ((f"{n:09d}", {"jpg": bytes([n % 256]) * (n + 600), "txt": f"caption {n}".encode()}) for n in range(count))


@pytest.fixture
def tar(tmp_path):
    return write_shards(tmp_path / "shards", records(12), 100)[0]


def test_written_records_are_read_back_by_offset(tmp_path):
    paths = write_shards(tmp_path, records(25), 10)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    shard = Shard(paths[2])
    assert shard.num_records == 5
    assert shard.read(4) == ("000000024", {"jpg": bytes([24]) * 624, "txt": b"caption 24"})


def test_equal_records_make_equal_bytes(tmp_path):
    first, second = (write_shards(tmp_path / name, records(5), 10)[0] for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_index_can_lie_elsewhere(tmp_path, tar):
    Path(index_path(tar, None)).unlink()
    assert Shard(tar, str(tmp_path / "indexes")).num_records == 12
    assert not Path(index_path(tar, None)).exists()


def test_shard_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_WAITS", ())
    path = tmp_path / "00000.tar"
    path.symlink_to("/proc/self/mem")  # whose first bytes cannot be read
    with pytest.raises(DataError, match=r"00000\.tar cannot be read \(Input/output error\), tried 1 times"):
        Shard(path)


def test_flipped_byte_is_seen_when_the_record_is_read(tar):
    shard = Shard(tar)
    content = bytearray(tar.read_bytes())
    content[int(shard.index.offsets[6]) + 3] ^= 1
    tar.write_bytes(content)
    with pytest.raises(CorruptRecordError, match="000000003"):
        Shard(tar).read(3)
    assert Shard(tar).read(4).key == "000000004"


def test_records_behind_the_end_of_a_file_that_was_cut_off_are_bad(tar):
    shard = Shard(tar)
    tar.write_bytes(tar.read_bytes()[:9000])
    assert shard.read(1).key == "000000001"
    with pytest.raises(CorruptRecordError, match=r"record '000000011' lies behind the end of the file") as caught:
        shard.read(11)
    assert caught.value.reason == "cut_off"


def test_a_short_answer_is_asked_for_again_before_the_file_counts_as_cut_off(tar):
    shard, asked = Shard(tar), []

    class Short:
        location, size = str(tar), tar.stat().st_size

        def read(self, start, length, *, fresh=False):
            asked.append(fresh)
            return tar.read_bytes()[start:][: length if fresh else length - 1]

    assert shards.read_record(Short(), shard.index, 3) == shard.read(3)
    assert asked == [False, True]


def test_a_record_of_too_many_bytes_is_bad_before_it_is_read(tar, monkeypatch):
    monkeypatch.setattr(shards, "_MOST_BYTES", 3000)
    assert Shard(tar).read(1).key == "000000001"
    tar = write_shards(tar.parent / "large", [("a", {"jpg": bytes(5000), "txt": b"a"})], 1)[0]
    with pytest.raises(CorruptRecordError, match=r"has .* bytes, more than 3,000") as caught:
        Shard(tar).read(0)
    assert caught.value.reason == "too_many_bytes"


def test_a_process_keeps_a_bounded_number_of_files_and_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 2)
    monkeypatch.setattr(shards, "_PAGES", 3)
    paths = write_shards(tmp_path, records(50), 10)
    shard_set = shards.ShardSet(paths, None, [Shard(path).index.digest for path in paths])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(100):
        assert shard_set.read(number % 5, number % 10).key == f"{number % 5 * 10 + number % 10:09d}"
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    assert len(shard_set._pages._kept) == 3


def test_records_of_every_page_are_found(tmp_path):
    (path,) = write_shards(tmp_path, records(200), 1000)
    shard_set = shards.ShardSet([path], None, [Shard(path).index.digest])
    assert [shard_set.read(0, number).key for number in range(200)] == [f"{number:09d}" for number in range(200)]
    assert shard_set.key(0, 130) == "000000130"


def test_shard_that_was_replaced_after_counting_is_refused(tar):
    shard_set = shards.ShardSet([tar], None, [Shard(tar).index.digest])
    assert shard_set.read(0, 3).key == "000000003"
    tar.unlink()
    write_shards(tar.parent, records(5), 10)
    assert shard_set.read(0, 3).key == "000000003"  # the open file is still the old one
    fresh = pickle.loads(pickle.dumps(shard_set))
    with pytest.raises(DataError, match=r"the index of .* was replaced while the run read it; restore it, or use a"):
        fresh.read(0, 3)


def test_repeated_keys_are_records_of_their_own(tmp_path):
    path = write_shards(tmp_path, [("a", {"txt": b"1"}), ("a", {"txt": b"2"})], 10)[0]
    shard = Shard(path)
    assert [shard.read(n).members["txt"] for n in range(shard.num_records)] == [b"1", b"2"]


def test_brace_ranges_and_lists_are_expanded_in_order(tmp_path):
    paths = write_shards(tmp_path, records(25), 10)
    assert expand(str(tmp_path / "{00000..00002}.tar")) == [str(path) for path in paths]
    assert expand([str(paths[1]), str(paths[0])]) == [str(paths[1]), str(paths[0])]
    assert expand("https://host/{0..1}.tar") == ["https://host/0.tar", "https://host/1.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{folder}/{{00000..00003}}.tar", r"00003\.tar does not exist \(1 of 4"),
        ("{folder}", "is a folder, not a shard"),
        ("pipe:cat {folder}/00000.tar", "only paths and http, https, s3, gs URLs"),
        ("ftp://host/00000.tar", "only paths and http, https, s3, gs URLs"),
        ([], "list of shards is empty"),
    ],
)
def test_unusable_patterns_are_refused(tmp_path, pattern, message):
    write_shards(tmp_path, records(25), 10)
    wanted = pattern.format(folder=tmp_path) if isinstance(pattern, str) else pattern
    with pytest.raises(DataError, match=message):
        expand(wanted)


def test_writing_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="there are no records"):
        write_shards(tmp_path, [], 10)
