"""tools/make_shards.py and tools/index_shards.py: what goes into shards, what is left out, what is refused."""

import csv
import io
import json
import pickle
import re
from concurrent.futures import wait
from pathlib import Path

import index_shards
import make_shards
import pytest
from PIL import Image

from evaclip.data.index import index_path
from evaclip.data.shards import Shard, write_shards


def picture(shade: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "b").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(picture(1))
    (folder / "a.txt").write_text("first")
    (folder / "b/c.PNG").write_bytes(picture(2, "PNG"))
    (folder / "b/c.json").write_text('{"caption": "second"}')
    return folder


def read(paths):
    shards = [Shard(path) for path in paths]
    return [shard.read(number) for shard in shards for number in range(shard.num_records)]


def run(*arguments):
    return make_shards.main([str(argument) for argument in arguments])


def table(path, rows, header=("filepath", "title"), separator=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return path


# ------------------------------------------------------------------------------------------------------------- folder


def test_folder_becomes_records_with_the_files_own_bytes(photos, tmp_path, capsys):
    assert run(photos, tmp_path / "out") == 0
    first, second = read([tmp_path / "out/00000.tar"])
    assert first == ("000000000", {"jpg": picture(1), "txt": b"first"})
    assert second == ("000000001", {"png": picture(2, "PNG"), "json": b'{"caption": "second"}'})
    assert capsys.readouterr().out == f"2 records in 1 shards: {tmp_path}/out/00000.tar\n"


def test_what_is_left_out_of_a_folder_is_counted_with_its_reason(photos, tmp_path, capsys):
    for name in ("lonely.jpg", "blank.jpg", "a.png", "anim.gif"):
        (photos / name).write_bytes(picture(3))
    (photos / "blank.txt").write_text(" \n")
    (photos / "orphan.txt").write_text("no image")
    (photos / "A.TXT").write_text("another stem")
    assert run(photos, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert f"left out 2: image without a caption ({photos}/blank.jpg, {photos}/lonely.jpg)" in out
    assert f"left out 2: caption without an image ({photos}/A, {photos}/orphan)" in out
    assert f"left out 1: duplicate, jpg taken instead ({photos}/a.png)" in out
    assert f"left out 1: not one of jpg, jpeg, png, webp, txt, json ({photos}/anim.gif)" in out
    assert "2 records in 1 shards" in out


def test_extensions_that_differ_in_case_are_duplicates(photos, tmp_path, capsys):
    (photos / "a.JPG").write_bytes(picture(9))
    assert run(photos, tmp_path / "out") == 0
    assert (
        f"left out 1: duplicate of a file whose extension differs in case ({photos}/a.jpg)" in capsys.readouterr().out
    )


# -------------------------------------------------------------------------------------------------------------- table


def test_table_rows_become_records_and_other_columns_go_into_the_json(photos, tmp_path):
    rows = [("a.jpg", "Ein Mädchen, lachend", "rot"), ("b/c.PNG", "zwei", "blau")]
    source = table(photos / "list.csv", rows, ("filepath", "title", "colour"))
    assert run(source, tmp_path / "out") == 0
    first, second = read([tmp_path / "out/00000.tar"])
    assert first.members["jpg"] == picture(1)
    assert first.members["txt"].decode() == "Ein Mädchen, lachend"
    assert json.loads(first.members["json"]) == {
        "caption": "Ein Mädchen, lachend",
        "filepath": "a.jpg",
        "colour": "rot",
    }
    assert second.members["png"] == picture(2, "PNG")


def test_table_with_tabs_and_other_column_names_and_an_unnamed_index_column(photos, tmp_path):
    rows = [("0", str(photos / "a.jpg"), "one, with a comma"), ("1", str(photos / "b/c.PNG"), "two")]
    source = table(tmp_path / "list.csv", rows, ("", "image", "text"), "\t")
    assert run(source, tmp_path / "out", "--image-column", "image", "--caption-column", "text") == 0
    first, second = read([tmp_path / "out/00000.tar"])
    assert first.members["txt"] == b"one, with a comma"
    assert json.loads(second.members["json"]) == {"caption": "two", "image": str(photos / "b/c.PNG")}


def test_what_is_left_out_of_a_table_is_counted_with_its_lines(photos, tmp_path, capsys):
    (photos / "d.bmp").write_bytes(picture(1, "BMP"))
    rows = [
        ("a.jpg", "x"),
        ("a.jpg", "y"),
        ("a.jpg", "x"),
        ("gone.jpg", "x"),
        ("b/c.PNG", ""),
        ("", "x"),
        ("d.bmp", "x"),
    ]
    assert run(table(photos / "list.csv", rows), tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "left out 1: duplicate of an earlier line (line 4: a.jpg)" in out
    assert "left out 2: image does not exist (line 5: gone.jpg, line 7: no path)" in out
    assert "left out 1: image without a caption (line 6: b/c.PNG)" in out
    assert "left out 1: not one of jpg, jpeg, png, webp (line 8: d.bmp)" in out
    assert [record.members["txt"] for record in read([tmp_path / "out/00000.tar"])] == [b"x", b"y"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty; it needs a header with the columns filepath and title"),
        (b"filepath,title\n", r"holds no image with a caption$"),
        (b"path,title\na,b\n", r"has no column 'filepath', only path, title; name the columns with --image-column"),
        (
            b"filepath,title\na.jpg,b,c\n",
            r"line 2: more cells than the 2 columns of the header; quote .* a comma",
        ),
        (b"filepath,title\na.jpg,\xff\n", r"is not UTF-8 \(invalid start byte at byte \d+\); convert it"),
        (b"filepath,title\ngone.jpg,b\n", r"holds no image with a caption\n  left out 1: image does not exist"),
    ],
)
def test_unusable_table_is_refused_with_one_message(photos, tmp_path, capsys, content, message):
    (photos / "list.csv").write_bytes(content)
    assert run(photos / "list.csv", tmp_path / "out") == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {photos}/list.csv")
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- output


def test_records_are_split_into_shards_with_img2datasets_keys(photos, tmp_path, capsys):
    rows = [("a.jpg", str(number)) for number in range(5)]
    assert run(table(photos / "list.tsv", rows, separator="\t"), tmp_path / "out", "--records-per-shard", 2) == 0
    paths = sorted((tmp_path / "out").glob("*.tar"))
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [record.key for record in read(paths)] == ["000000000", "000000001", "000010000", "000010001", "000020000"]
    assert f"5 records in 3 shards: {tmp_path}/out/{{00000..00002}}.tar" in capsys.readouterr().out
    assert all(Path(index_path(path, None)).is_file() for path in paths)


def test_keys_stay_distinct_in_shards_of_more_than_10000_records():
    keys = [key for key, _ in make_shards.keyed(({} for _ in range(20_002)), 20_001)]
    assert keys[-2:] == ["0000020000", "0000100000"]
    assert len(set(keys)) == 20_002


@pytest.mark.parametrize("given", ["nowhere", "nowhere.csv"])
def test_missing_source_is_refused(tmp_path, capsys, given):
    assert run(tmp_path / given, tmp_path / "out") == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / given} does not exist; give a folder")


def test_folder_that_holds_something_is_not_written_to(photos, tmp_path, capsys):
    assert run(photos, photos / "b") == 1
    assert f"error: {photos}/b exists already and is not an empty folder" in capsys.readouterr().err
    assert sorted(path.name for path in (photos / "b").iterdir()) == ["c.PNG", "c.json"]


def test_interrupted_writing_leaves_nothing_behind(tmp_path):
    def records():
        yield {"jpg": b"1", "txt": b"x"}
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        make_shards.write_folder(tmp_path / "out", records(), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_records_per_shard_must_be_positive(tmp_path, capsys, number):
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "out", "--records-per-shard", number)
    assert "--records-per-shard" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- indexing


def shards_without_index(folder, count):
    paths = write_shards(folder, ((f"{number:03d}", {"txt": b"x"}) for number in range(2 * count)), 2)
    for path in paths:
        Path(index_path(path, None)).unlink()
    return paths


def test_existing_shards_are_indexed_and_counted(tmp_path, capsys):
    paths = shards_without_index(tmp_path, 3)
    assert index_shards.main([f"{tmp_path}/{{00000..00002}}.tar", str(paths[0]), "--processes", "2"]) == 0
    out = capsys.readouterr().out
    assert sorted(out.splitlines()[:-1]) == [f"{path}: 2 records" for path in paths]
    text = r"6 records in 3 shards, 0\.0 GB, \d+\.\d s; 160,000 such shards: \d+\.\d h on this machine"
    assert re.fullmatch(text, out.splitlines()[-1])
    assert all(Path(index_path(path, None)).is_file() for path in paths)


def test_damaged_shards_are_all_named_and_the_others_indexed(tmp_path, capsys):
    paths = shards_without_index(tmp_path, 3)
    paths[0].write_bytes(paths[0].read_bytes()[:700])
    paths[2].write_bytes(b"not a tar at all")
    assert index_shards.main([str(tmp_path / "{00000..00002}.tar"), "--index-dir", str(tmp_path / "indexes")]) == 1
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    assert first == f"error: {paths[0]}: a damaged header at byte 0; restore it"
    assert second == f"error: {paths[2]}: the file is cut off at byte 0; restore it"
    assert captured.out.splitlines()[-1].startswith("2 records in 3 shards")
    assert Path(index_path(paths[1], str(tmp_path / "indexes"))).is_file()


def test_tasks_of_a_slurm_array_share_the_shards(tmp_path, capsys, monkeypatch):
    paths = shards_without_index(tmp_path, 3)
    task = {"SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
    for number, own in (("2", [paths[0], paths[2]]), ("4", [paths[1]])):
        for name, value in {**task, "SLURM_ARRAY_TASK_ID": number}.items():
            monkeypatch.setenv(name, value)
        assert index_shards.main([str(tmp_path / "{00000..00002}.tar"), "--processes", "1"]) == 0
        assert sorted(capsys.readouterr().out.splitlines()[:-1]) == [f"{path}: 2 records" for path in own]
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "18")
    assert index_shards.main([str(tmp_path / "{00000..00002}.tar")]) == 0
    assert capsys.readouterr().out == "this task of the array has no shards\n"


def test_rebuild_notices_other_content_of_the_same_size(tmp_path):
    (path,) = write_shards(tmp_path, [("a", {"txt": b"old"})], 1)
    before = Shard(path).index.digest
    path.write_bytes(path.read_bytes().replace(b"old", b"new"))
    assert index_shards.main([str(path), "--rebuild"]) == 0
    assert Shard(path).index.digest != before
    assert Shard(path).read(0).members == {"txt": b"new"}


def test_indexes_stay_in_the_workers_and_few_shards_wait_at_a_time(tmp_path, monkeypatch):
    paths = [str(path) for path in shards_without_index(tmp_path, 30)]
    waiting = []
    monkeypatch.setattr(
        index_shards, "wait", lambda some, **options: waiting.append(len(some)) or wait(some, **options)
    )
    found = list(index_shards.index_all(paths, None, rebuild=False, processes=1))
    assert sorted(each.location for each in found) == paths
    assert max(waiting) == 4
    assert {len(pickle.dumps(each)) < 1000 for each in found} == {True}


def test_rebuild_of_urls_needs_a_local_folder_for_the_indexes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert index_shards.main(["s3://bucket/{0..1}.tar", "--rebuild", "--processes", "1"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: s3://bucket/{n}.tar.index.safetensors cannot be written there; set --index-dir to a local folder"
        for n in range(2)
    ]
    assert list(tmp_path.iterdir()) == []


def test_missing_shards_are_refused(tmp_path, capsys):
    assert index_shards.main([str(tmp_path / "{0..1}.tar")]) == 1
    assert "does not exist" in capsys.readouterr().err
