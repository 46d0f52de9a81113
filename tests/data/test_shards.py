import pickle
import tarfile

import numpy as np
import pytest

from evaclip.data import shards
from evaclip.data.shards import (
    CorruptRecordError,
    build_index,
    ensure_index,
    expand,
    index_path,
    open_index,
    write_shards,
)
from evaclip.errors import DataError


def records(count):
    return ((f"{n:09d}", {"jpg": bytes([n % 256]) * (n + 600), "txt": f"caption {n}".encode()}) for n in range(count))


@pytest.fixture
def tar(tmp_path):
    return write_shards(tmp_path / "shards", records(12), 100)[0]


def test_written_records_are_read_back_by_offset(tmp_path):
    paths = write_shards(tmp_path, records(25), 10)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    shard = open_index(paths[2])
    assert shard.num_records == 5
    assert shard.read(4) == ("000000024", {"jpg": bytes([24]) * 624, "txt": b"caption 24"})


def test_equal_records_make_equal_bytes(tmp_path):
    first, second = (write_shards(tmp_path / name, records(5), 10)[0] for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_digest_follows_content_and_not_place(tmp_path, tar):
    moved = tmp_path / "moved.tar"
    moved.write_bytes(tar.read_bytes())
    assert build_index(moved).digest == build_index(tar).digest
    other = write_shards(tmp_path / "other", records(11), 100)[0]
    assert build_index(other).digest != build_index(tar).digest


def test_saved_index_equals_a_built_one(tar):
    built, saved = build_index(tar), shards.read_index(index_path(tar, None), tar.stat().st_size)
    assert saved is not None
    assert (saved.keys, saved.extensions, saved.digest) == (built.keys, built.extensions, built.digest)
    np.testing.assert_array_equal(saved.offsets, built.offsets)


def test_torn_or_stale_index_is_built_again(tar):
    path = index_path(tar, None)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert ensure_index(tar).num_records == 12
    assert path.read_bytes() == whole
    assert shards.read_index(path, tar.stat().st_size + 512) is None


def test_index_can_lie_elsewhere(tmp_path, tar):
    index_path(tar, None).unlink()
    assert open_index(tar, str(tmp_path / "indexes")).num_records == 12
    assert not index_path(tar, None).exists()


@pytest.mark.parametrize("cut", [1024, 5000, 9216, 9728])
def test_truncated_tar_is_refused_wherever_it_ends(tar, cut):
    tar.write_bytes(tar.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"00000\.tar (is not a readable tar|is cut off|is damaged)"):
        build_index(tar)


def test_tar_that_ends_after_a_member_without_end_marker_is_refused(tar):
    index = build_index(tar)
    last = int(index.offsets[-1]) + 512  # the last member fills one block
    tar.write_bytes(tar.read_bytes()[:last])
    with pytest.raises(DataError, match=r"(empty header|cut off)"):
        build_index(tar)


@pytest.mark.parametrize("header", [b"\x01" * 512, b"\0" * 512])
def test_damaged_header_or_early_end_marker_is_refused(tar, header):
    at = int(build_index(tar).offsets[4]) - 512
    content = tar.read_bytes()
    tar.write_bytes(content[:at] + header + content[at + 512 :])
    with pytest.raises(DataError, match=r"(invalid header|end of file header|is damaged at byte)"):
        build_index(tar)


def test_file_that_is_no_tar_is_refused(tmp_path):
    path = tmp_path / "00000.tar"
    path.write_bytes(b"this is not a tar" * 100)
    with pytest.raises(DataError, match="not a readable tar"):
        build_index(path)


def test_tar_without_records_is_refused(tmp_path):
    path = tmp_path / "00000.tar"
    tarfile.open(path, "w").close()
    with pytest.raises(DataError, match="holds no records"):
        build_index(path)


def test_shard_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "00000.tar"
    path.symlink_to("/proc/self/mem")  # whose first bytes cannot be read
    with pytest.raises(DataError, match=r"00000\.tar cannot be read \(Input/output error\); check the storage"):
        open_index(path)


def test_flipped_byte_is_seen_when_the_record_is_read(tar):
    shard = open_index(tar)
    content = bytearray(tar.read_bytes())
    content[int(shard.index.offsets[6]) + 3] ^= 1
    tar.write_bytes(content)
    with pytest.raises(CorruptRecordError, match="000000003"):
        open_index(tar).read(3)
    assert open_index(tar).read(4).key == "000000004"


def test_shard_that_shrank_after_indexing_is_refused(tar):
    index = build_index(tar)
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(DataError, match="changed since it was indexed"):
        shards.Shard(tar, index).read(11)


def test_shard_that_was_replaced_after_counting_is_refused(tar):
    shard_set = shards.ShardSet([tar], None, [open_index(tar).index.digest])
    assert shard_set.read(0, 3).key == "000000003"
    tar.unlink()
    write_shards(tar.parent, records(5), 10)
    assert shard_set.read(0, 3).key == "000000003"  # the open file is still the old one
    fresh = pickle.loads(pickle.dumps(shard_set))
    with pytest.raises(DataError, match=r"was replaced while the run read it; restore it, or use a new run_dir"):
        fresh.read(0, 3)


def test_repeated_keys_are_records_of_their_own(tmp_path):
    path = write_shards(tmp_path, [("a", {"txt": b"1"}), ("a", {"txt": b"2"})], 10)[0]
    shard = open_index(path)
    assert [shard.read(n).members["txt"] for n in range(shard.num_records)] == [b"1", b"2"]


def test_brace_ranges_and_lists_are_expanded_in_order(tmp_path):
    paths = write_shards(tmp_path, records(25), 10)
    assert expand(str(tmp_path / "{00000..00002}.tar")) == paths
    assert expand([str(paths[1]), str(paths[0])]) == [paths[1], paths[0]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{folder}/{{00000..00003}}.tar", r"00003\.tar does not exist \(1 of 4"),
        ("{folder}", "is a folder, not a shard"),
        ("pipe:cat {folder}/00000.tar", "only local paths"),
        ("http://host/00000.tar", "only local paths"),
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
