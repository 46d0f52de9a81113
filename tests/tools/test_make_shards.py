"""tools/make_shards.py: what goes into shards, what is left out, what is refused."""

import csv
import io
import json
import random
import re
import sys
from datetime import date
from pathlib import Path

import make_shards
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from record_sources import LeftOut, from_parquet

from evaclip.config import RetrievalDataset
from evaclip.data.captions import choose_caption
from evaclip.data.index import index_path
from evaclip.data.order import hash64
from evaclip.data.shards import Shard
from evaclip.distributed import Ranks
from evaclip.evaluation.datasets import captions_of, open_records


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


# ------------------------------------------------------------------------------------------------------------ parquet


def write_parquet(path, columns, rows_per_group=2):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_per_group)
    return path


def test_parquet_rows_become_records_and_other_columns_go_into_the_json(photos, tmp_path, capsys):
    columns = {
        "image": [picture(1), picture(2, "PNG"), picture(3, "WEBP"), picture(4, "BMP"), None, picture(5), picture(6)],
        "caption": ["rot", "zwei, größer", "drei", "x", "x", " ", None],
        "similarity": [0.25, None, float("nan"), 1.0, 1.0, 1.0, 1.0],
        "seen": [date(2026, 1, day) for day in range(1, 8)],
        "raw": [b"\0"] * 7,
    }
    source = write_parquet(tmp_path / "a.parquet", columns)
    assert parquet.ParquetFile(source).num_row_groups == 4
    assert run(source, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "left out 1: not one of jpg, jpeg, png, webp (a.parquet, row 4)" in out
    assert "left out 1: image does not exist (a.parquet, row 5)" in out
    assert "left out 2: image without a caption (a.parquet, row 6, a.parquet, row 7)" in out
    records = read([tmp_path / "out/00000.tar"])
    assert [{*record.members} - {"txt", "json"} for record in records] == [{"jpg"}, {"png"}, {"webp"}]
    assert records[1].members["png"] == picture(2, "PNG")
    assert records[1].members["txt"].decode() == "zwei, größer"
    assert [json.loads(record.members["json"]) for record in records] == [
        {"caption": "rot", "image": None, "similarity": 0.25, "seen": "2026-01-01", "raw": None},
        {"caption": "zwei, größer", "image": None, "similarity": None, "seen": "2026-01-02", "raw": None},
        {"caption": "drei", "image": None, "similarity": None, "seen": "2026-01-03", "raw": None},
    ]


def test_folder_of_parquet_files_with_hugging_faces_images_and_lists_of_captions(photos, tmp_path):
    (tmp_path / "set/data").mkdir(parents=True)
    struct = [{"bytes": picture(1), "path": "one.jpg"}, {"bytes": None, "path": str(photos / "b/c.PNG")}]
    for number, image in enumerate(struct):
        columns = {"picture": [image], "texts": [[f"first {number}", "", "second\nline"]]}
        write_parquet(tmp_path / f"set/data/{number}.parquet", columns)
    names = ("--image-column", "picture", "--caption-column", "texts")
    assert run(tmp_path / "set", tmp_path / "out", *names) == 0
    first, second = read([tmp_path / "out/00000.tar"])
    assert first.members["jpg"] == picture(1)
    assert first.members["txt"] == b"first 0"
    assert json.loads(first.members["json"]) == {
        "caption": "first 0", "caption_2": "second\nline", "picture": {"bytes": None, "path": "one.jpg"},
    }  # fmt: skip
    assert second.members["png"] == picture(2, "PNG")


def test_parquet_with_paths_beside_the_images(photos, tmp_path, capsys):
    source = write_parquet(photos / "list.parquet", {"image": ["a.jpg", "gone.jpg", ""], "caption": ["x", "y", "z"]})
    assert run(source, tmp_path / "out") == 0
    assert "left out 2: image does not exist (list.parquet, row 2, list.parquet, row 3)" in capsys.readouterr().out
    (record,) = read([tmp_path / "out/00000.tar"])
    assert record.members["jpg"] == picture(1)
    assert json.loads(record.members["json"]) == {"caption": "x", "image": "a.jpg"}


def test_of_a_parquet_file_no_more_than_a_few_row_groups_are_in_memory(tmp_path):
    image = picture(1) + random.Random(0).randbytes(1 << 20)
    source = write_parquet(
        tmp_path / "a.parquet",
        {"image": [image + bytes([n]) for n in range(40)], "caption": [f"{n}" for n in range(40)]},
    )
    before, most = pyarrow.total_allocated_bytes(), 0
    for _ in from_parquet(source, "image", "caption", LeftOut(), per_line=False):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 12 << 20, "of 40 MiB in groups of two"


def test_a_folder_of_images_stays_one_beside_a_parquet_file(photos, tmp_path, capsys):
    write_parquet(photos / "list.parquet", {"image": ["a.jpg"], "caption": ["x"]})
    assert run(photos, tmp_path / "out") == 0
    assert "left out 1: not one of jpg, jpeg, png, webp, txt, json" in capsys.readouterr().out


def test_unusable_parquet_is_refused_with_one_message(tmp_path, capsys, monkeypatch):
    source = write_parquet(tmp_path / "a.parquet", {"jpg": [picture(1)], "caption": ["x"]})
    assert run(source, tmp_path / "out") == 1
    assert (
        "a.parquet has no column 'image', only jpg, caption; name the columns with --image" in capsys.readouterr().err
    )
    source.write_bytes(source.read_bytes()[:-20])
    assert run(source, tmp_path / "out") == 1
    assert re.search(r"^error: .*a\.parquet: not a readable parquet file \(.*\); fetch it", capsys.readouterr().err)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(source, tmp_path / "out") == 1
    assert capsys.readouterr().err.endswith("need pyarrow, which is missing; pip install 'evaclip[parquet]'\n")


# --------------------------------------------------------------------------------------------------------------- COCO


def coco(folder, **changes):
    """Two images of two and three captions, and all that can be wrong."""
    content = {
        "info": {"year": 2017},
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 8, "license": 3},
            {"id": 9, "file_name": "b/c.PNG"},
            {"id": 7, "file_name": "a.jpg"},
            {"id": 11, "file_name": "gone.jpg"},
            {"id": 12},
            {"id": 13, "file_name": "d.jpg"},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "caption": "three"},
            {"id": 2, "image_id": 7, "caption": "one"},
            {"id": 3, "image_id": 7, "caption": " two\nlines "},
            {"id": 4, "image_id": 9, "caption": "four"},
            {"id": 5, "image_id": 9, "caption": "five"},
            {"id": 6, "image_id": 99, "caption": "orphan"},
            {"id": 8, "image_id": 11, "caption": "of a missing file"},
            {"id": 9, "image_id": 13, "bbox": [0, 0, 1, 1]},
        ],
        **changes,
    }
    (folder / "captions.json").write_text(json.dumps(content))
    return folder / "captions.json"


def test_coco_images_become_records_with_all_their_captions(photos, tmp_path, capsys):
    (photos / "d.jpg").write_bytes(picture(3))
    assert run(coco(tmp_path), tmp_path / "out", "--images", photos) == 0
    first, second = read([tmp_path / "out/00000.tar"])
    assert first.members["jpg"] == picture(1)
    assert first.members["txt"] == b"one"
    assert json.loads(first.members["json"]) == {
        "caption": "one", "caption_2": "two\nlines", "id": 7, "file_name": "a.jpg", "width": 8, "license": 3,
    }  # fmt: skip
    assert [json.loads(second.members["json"])[f"caption{n}"] for n in ("", "_2", "_3")] == ["three", "four", "five"]
    out = capsys.readouterr().out
    assert "left out 1: annotation of an image that is not listed (annotation 6)" in out
    assert "left out 1: annotation without a caption (annotation 9)" in out
    assert "left out 1: duplicate of an image of the same id (image 7: a.jpg)" in out
    assert "left out 2: image does not exist (image 11: gone.jpg, image 12: no file_name)" in out
    assert "left out 1: image without a caption (image 13: d.jpg)" in out


def test_training_draws_from_all_captions_of_an_image(photos, tmp_path):
    assert run(coco(tmp_path), tmp_path / "out", "--images", photos) == 0
    record = read([tmp_path / "out/00000.tar"])[1]
    captions = {"txt": 1.0, "json.caption_2": 1.0, "json.caption_3": 1.0, "json.caption_4": 1.0}
    drawn = {choose_caption(record.members, captions, hash64(seed)) for seed in range(60)}
    assert drawn == {"three", "four", "five"}


def test_retrieval_sets_are_evaluated_as_they_are(photos, tmp_path, capsys):
    source = coco(photos)  # the images lie beside it
    assert run(source, tmp_path / "out", "--retrieval", "--records-per-shard", 1) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"2 records in 2 shards: {tmp_path}/out"
    records = open_records(RetrievalDataset(task="retrieval", path=str(tmp_path / "out")), None, Ranks())
    assert [captions_of(records.read(n), per_line=records.caption_per_line) for n in range(2)] == [
        ["one", "two lines"],
        ["three", "four", "five"],
    ]
    assert (tmp_path / "out/test/nshards.txt").read_text() == "2\n"
    assert sorted(path.name for path in (tmp_path / "out/test").glob("*.tar*")) == [
        *("0.tar", "0.tar.index.safetensors", "1.tar", "1.tar.index.safetensors")
    ]


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"images": []}', '{"images": [1], "annotations": []}', "["])
def test_json_of_another_form_is_refused(tmp_path, capsys, content):
    (tmp_path / "a.json").write_text(content)
    assert run(tmp_path / "a.json", tmp_path / "out") == 1
    assert re.search(r"^error: .*a\.json is not (JSON|in COCO's form; it needs `images` and)", capsys.readouterr().err)


def test_a_folder_of_images_belongs_to_coco_alone(photos, tmp_path, capsys):
    assert run(table(photos / "l.csv", [("a.jpg", "x")]), tmp_path / "out", "--images", photos) == 1
    assert "--images is for COCO's captions, and " in capsys.readouterr().err


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
