"""Indexes: identity, damage that is remembered, and which index is believed."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from evaclip.data.index import build_index, ensure_index, index_path, read_index
from evaclip.data.shards import write_shards


def records(count):
    return ((f"{n:09d}", {"jpg": bytes([n % 256]) * (n + 600), "txt": f"caption {n}".encode()}) for n in range(count))


@pytest.fixture
def tar(tmp_path):
    return write_shards(tmp_path / "shards", records(12), 100)[0]


def test_digest_follows_content_and_not_place(tmp_path, tar):
    moved = tmp_path / "moved.tar"
    moved.write_bytes(tar.read_bytes())
    assert build_index(moved).digest == build_index(tar).digest
    other = write_shards(tmp_path / "other", records(11), 100)[0]
    assert build_index(other).digest != build_index(tar).digest


def test_saved_index_equals_a_built_one(tar):
    built, saved = build_index(tar), read_index(index_path(tar, None))
    assert saved is not None
    assert (saved.keys, saved.extensions, saved.digest) == (built.keys, built.extensions, built.digest)
    np.testing.assert_array_equal(saved.offsets, built.offsets)


def test_a_torn_index_is_built_again(tar):
    path = Path(index_path(tar, None))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert ensure_index(tar).num_records == 12
    assert path.read_bytes() == whole


def test_members_of_one_record_are_neighbours_with_one_key(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.jpg", "README", "a.txt", "dir/b.JPG", "__meta__", "a.jpg", "a.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    index = build_index(path)
    assert index.keys == ("a", "dir/b", "a", "a")
    assert [index.extensions[kind] for kind in index.kinds] == ["jpg", "txt", "jpg", "jpg", "jpg"]
    assert index.starts.tolist() == [0, 2, 3, 4, 5]


def test_a_part_of_an_index_reads_as_the_whole(tar):
    index = build_index(tar)
    part = index.records(5, 4)
    assert part.keys == index.keys[5:9]
    for record in range(4):
        own, whole = (slice(*i.starts[n : n + 2]) for i, n in ((part, record), (index, record + 5)))
        assert part.offsets[own].tolist() == index.offsets[whole].tolist()
        assert part.checksums[own].tolist() == index.checksums[whole].tolist()
    assert index.records(10, 64).keys == index.keys[10:]


def test_damage_is_saved_with_the_index(tar):
    whole = build_index(tar)
    at = int(whole.offsets[4]) - 512
    content = tar.read_bytes()
    tar.write_bytes(content[:at] + b"\1" * 512 + content[at + 512 :])
    Path(index_path(tar, None)).unlink()
    built, saved = ensure_index(tar), read_index(index_path(tar, None))
    assert saved.gaps == built.gaps
    assert built.lost_records == 1
    assert "a damaged header" in built.gaps[0].what
    assert built.num_records == 12  # the caption of the third is left
    assert len(built.checksums) == len(whole.checksums) - 1


def test_the_index_of_a_shard_that_was_cut_off_since_is_kept(tar, caplog):
    whole = ensure_index(tar)
    tar.write_bytes(tar.read_bytes()[:9000])
    assert ensure_index(tar).digest == whole.digest
    assert "00000.tar lacks 20 of 24 indexed members: restore it" in caplog.text
    tar.write_bytes(b"nothing is left")
    assert ensure_index(tar).digest == whole.digest


def test_the_index_of_a_shard_that_was_packed_again_with_fewer_records_is_built_again(tar):
    ensure_index(tar)
    path = write_shards(tar.parent / "other", list(records(12))[3:], 100)[0]
    tar.write_bytes(path.read_bytes())
    assert ensure_index(tar).num_records == 9


def test_no_flipped_bit_of_an_index_is_believed(tar):
    path = Path(index_path(tar, None))
    whole, digest = path.read_bytes(), ensure_index(tar).digest
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        index = read_index(path)
        assert index is None or (index.digest, index.tar_size) == (digest, tar.stat().st_size)


def test_the_index_of_a_shard_with_other_records_is_built_again(tar):
    before = ensure_index(tar).digest
    path = write_shards(tar.parent / "other", records(40), 100)[0]
    tar.write_bytes(path.read_bytes())
    assert ensure_index(tar).digest != before
    assert ensure_index(tar).num_records == 40


@pytest.mark.parametrize(
    ("content", "damage"),
    [
        (b"", "the file ends without an end marker at byte 0"),
        (b"this is not a tar" * 100, "a damaged header at byte 0"),
        (bytes(10240), "it holds no records"),
    ],
)
def test_a_file_without_records_has_an_index_that_says_so(tmp_path, content, damage):
    path = tmp_path / "00000.tar"
    path.write_bytes(content)
    for index in (ensure_index(path), read_index(index_path(path, None))):
        assert (index.num_records, index.damage) == (0, damage)
