"""Scanning tars: every byte belongs to a member, a header, or a gap that is told."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaclip.data.tar import Gap, Member, scan, write_tar

BLOCK = 512


def scanned(content):
    return list(scan(io.BytesIO(content), len(content)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(12):
            info = tarfile.TarInfo(f"{number:03d}.jpg")
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes([number + 1]) * 700))
    return path.read_bytes()


def header_of(number):
    return number * 3 * BLOCK


def test_an_intact_tar_has_no_gaps(whole):
    assert scanned(whole) == [Member(f"{n:03d}.jpg", header_of(n) + BLOCK, 700) for n in range(12)]


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_links_and_folders_are_read_as_tarfile_reads_them(tar_format):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for name, kind in (("a/" + "ü" * 120 + ".jpg", b"0"), ("folder", b"5"), ("link", b"2"), ("b.txt", b"0")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind == b"2" else ""
            info.size = 5 if kind == b"0" else 0
            tar.addfile(info, io.BytesIO(b"12345"))
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        expected = [Member(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    assert scanned(file.getvalue()) == expected
    assert len(expected) == 2


@pytest.mark.parametrize(
    ("header", "what"),
    [(b"\1" * BLOCK, "a damaged header"), (bytes(BLOCK), "an end marker before the end")],
)
def test_members_behind_damage_are_found(whole, header, what):
    at = header_of(4)
    found = scanned(whole[:at] + header + whole[at + BLOCK :])
    assert [member.name for member in found if isinstance(member, Member)] == [
        f"{n:03d}.jpg" for n in range(12) if n != 4
    ]
    assert [gap for gap in found if isinstance(gap, Gap)] == [Gap(at, header_of(5), what)]


@pytest.mark.parametrize(
    ("cut", "members", "gap"),
    [
        (header_of(5), 5, Gap(header_of(5), header_of(5), "the file ends without an end marker")),
        (header_of(5) + 100, 5, Gap(header_of(5), header_of(5) + 100, "the file is cut off")),
        (header_of(5) + 900, 5, Gap(header_of(5), header_of(5) + 900, "the file is cut off within 005.jpg")),
        (header_of(5) + BLOCK + 700, 6, Gap(header_of(5) + 1212, header_of(5) + 1212, "the file is cut off")),
    ],
)
def test_a_file_that_is_cut_off_says_where(whole, cut, members, gap):
    found = scanned(whole[:cut])
    assert [type(entry) for entry in found] == [Member] * members + [Gap]
    assert found[-1].what.startswith("the file")
    if cut != header_of(5) + BLOCK + 700:  # its last block lacks only padding
        assert found[-1] == gap


def test_a_negative_size_and_a_huge_name_do_not_lead_the_scan_astray(whole):
    negative = tarfile.TarInfo("x.jpg")
    negative.size = -1024
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    for info in (negative, name):
        header = info.tobuf(tarfile.GNU_FORMAT)
        found = scanned(whole[: header_of(4)] + header + whole[header_of(4) :])
        assert [gap.what for gap in found if isinstance(gap, Gap)] == ["a damaged header"]
        assert sum(isinstance(member, Member) for member in found) == 12


@given(st.data())
def test_whatever_happens_to_blocks_the_rest_is_found_and_the_loss_is_told(whole, data):
    """Random bytes or zeros over up to four headers: exactly the other members, and as many gaps as runs of headers."""
    hit = data.draw(st.sets(st.integers(0, 11), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 1000))
    content = bytearray(whole)
    for number in hit:
        noise = np.random.default_rng([seed, number]).bytes(BLOCK) if seed % 2 else bytes(BLOCK)
        content[header_of(number) : header_of(number) + BLOCK] = noise
    found = scanned(bytes(content))
    assert [member.name for member in found if isinstance(member, Member)] == [
        f"{n:03d}.jpg" for n in range(12) if n not in hit
    ]
    assert sum(isinstance(gap, Gap) for gap in found) == sum(number - 1 not in hit for number in hit)


@given(st.binary(max_size=4000))
def test_any_bytes_are_scanned_to_their_end(content):
    found = scanned(content)
    covered = 0
    for entry in found:
        start, stop = (entry.offset - BLOCK, entry.offset + entry.size) if isinstance(entry, Member) else entry[:2]
        assert covered <= start + BLOCK
        covered = max(covered, stop)
    assert covered == len(content) or not any(content[covered:])


def test_equal_records_make_equal_bytes(tmp_path):
    for name in "ab":
        write_tar(tmp_path / name, [("1", {"txt": b"x"}), ("2", {"txt": b"y"})])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
