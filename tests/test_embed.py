"""``evaclip embed``: whose features stand where, what becomes of every record, and what an interruption leaves."""

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from tiny import SYNTHETIC, colour_records, jpeg, save_model, tiny_tree

import evaclip
from evaclip import cli
from evaclip import embed as command
from evaclip.data.shards import write_shards
from evaclip.data.tar import write_tar
from evaclip.embed import embed
from evaclip.errors import ConfigError, DataError, EvaclipError
from evaclip.features import Features
from evaclip.models.clip import create_model

MODEL = tiny_tree("unused", SYNTHETIC)["model"]


def save(folder, seed=1):
    """A checkpoint with random weights."""
    model = evaclip.create_model(evaclip.config.ModelConfig.model_validate(MODEL), seed=seed).model
    return save_model(folder, MODEL, dict(model.named_parameters()) | {"logit_scale": torch.tensor([3.0])})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def shards(colour_shards):
    return [f"{colour_shards}/{{00000..00002}}.tar"]


def run(model, shards, out, **options):
    options = {"batch": 8, "workers": 0, "precision": None, "index_dir": None, **options}
    embed(model, shards, out, **options)


def part(out, number):
    image, text = (np.load(out / f"{kind}/{kind}_{number}.npy") for kind in ("img_emb", "text_emb"))
    return image, text, parquet.read_table(out / f"metadata/metadata_{number}.parquet").to_pydict()


def contents(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_those_of_the_preprocessed_image_and_the_caption_in_the_order_of_the_shard(
    tmp_path, model, shards, workers
):
    run(model, shards, tmp_path, workers=workers)
    clip, records = evaclip.load(model), list(colour_records(70))
    for number, first in enumerate((0, 30, 60)):
        image, text, table = part(tmp_path, number)
        own = records[first : first + 30]
        assert table["key"] == table["image_path"] == [key for key, _ in own]
        assert table["caption"] == [members["txt"].decode() for _, members in own]
        assert {Path(shard).name for shard in table["shard"]} == {f"0000{number}.tar"}
        pictures = [Image.open(io.BytesIO(members["jpg"])) for _, members in own]
        with torch.no_grad():
            images = torch.stack([clip.preprocess(picture) for picture in pictures])
            expected = clip.encode_image(images, normalize=True)
            captions = clip.encode_text(clip.tokenize(table["caption"]), normalize=True)
        assert image.dtype == text.dtype == np.float16
        assert np.abs(image - expected.numpy()).max() < 2**-11 + 1e-6  # fp16 below 1, and other batches
        assert np.abs(text - captions.numpy()).max() < 2**-11 + 1e-6
        assert np.abs(table["similarity"] - (expected * captions).sum(1).numpy()).max() < 1e-6


def test_captions_are_read_as_in_training(tmp_path, model):
    picture = jpeg((200, 30, 30))
    write_shards(tmp_path, [("a", {"jpg": picture, "txt": "\ufeff two\nlines \n".encode()})], 1)
    run(model, [str(tmp_path / "00000.tar")], tmp_path / "out")
    assert part(tmp_path / "out", 0)[2]["caption"] == ["two\nlines"]


def test_every_record_is_a_row_or_is_skipped_with_its_reason(tmp_path, model, capsys):
    picture, long = jpeg((200, 30, 30)), jpeg((30, 30, 200), size=64)
    records = {
        "fine": {"jpg": picture, "txt": b"red"},
        "cut": {"jpg": long[: len(long) // 2], "txt": b"red"},
        "empty": {"jpg": picture, "txt": b" \n"},
        "blind": {"txt": b"red"},
        "mute": {"jpg": picture, "json": b"{}"},
        "latin": {"jpg": picture, "txt": b"caf\xe9"},
        "text": {"jpg": b"<html>", "txt": b"red"},
        "last": {"jpg": picture, "txt": b"blue"},
    }
    (tmp_path / "s").mkdir()
    write_tar(tmp_path / "s/0.tar", records.items())
    write_tar(tmp_path / "s/1.tar", [("bad", {"jpg": b"", "txt": b"red"}), (os.fsdecode(b"\xff"), records["fine"])])
    cli.main(
        ["embed", str(model), f"{tmp_path}/s/{{0..1}}.tar", str(tmp_path / "out"), "--batch", "3", "--workers", "1"]
    )
    assert part(tmp_path / "out", 0)[2]["key"] == ["fine", "last"]
    assert [len(values) for values in part(tmp_path / "out", 1)] == [0, 0, 5]
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [(Path(line["shard"]).name, line["key"], line["reason"]) for line in lines] == [
        ("0.tar", "cut", "undecodable"),
        ("0.tar", "empty", "no_caption"),
        ("0.tar", "blind", "no_image"),
        ("0.tar", "mute", "no_caption"),
        ("0.tar", "latin", "undecodable_caption"),
        ("0.tar", "text", "not_an_image"),
        ("1.tar", "bad", "empty"),
        ("1.tar", "\udcff", "undecodable_key"),
    ]
    summary = capsys.readouterr().out
    assert "2 of 10 records of 2 shards, 8 skipped (1 empty, 2 no_caption, 1 no_image, 1 not_an_image, 1 und" in summary


def test_bytes_that_are_not_those_of_the_index_are_skipped(tmp_path, model):
    (path,) = write_shards(tmp_path, colour_records(4), 4)
    content = bytearray(path.read_bytes())
    at = content.find(b"a green square")
    content[at] = ord("A")
    path.write_bytes(content)
    run(model, [str(path)], tmp_path / "out")
    assert part(tmp_path / "out", 0)[2]["key"] == ["000000", "000002", "000003"]
    assert json.loads((tmp_path / "out/skipped.jsonl").read_text())["reason"] == "checksum"


def test_of_a_damaged_shard_what_is_left_is_read_and_it_is_said(tmp_path, model, capsys, caplog):
    (path,) = write_shards(tmp_path, colour_records(6), 6)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    path.with_name(f"{path.name}.index.safetensors").unlink()
    run(model, [str(path)], tmp_path / "out")
    assert f"{path}: the file is cut off" in caplog.text
    found = len(part(tmp_path / "out", 0)[0])
    assert 2 <= found < 6
    assert "; 1 of the shards are damaged" in capsys.readouterr().out


def test_features_that_are_not_finite_are_refused(tmp_path, shards):
    clip = create_model(evaclip.config.ModelConfig.model_validate(MODEL))
    weights = dict(clip.named_parameters()) | {"logit_scale": torch.tensor([3.0])}
    weights["image.head.weight"] = torch.full((16, 32), torch.nan)
    path = save_model(tmp_path, MODEL, weights)
    with pytest.raises(EvaclipError, match=r"00000\.tar: features of 30 records are not finite in precision fp32; try"):
        run(path, shards, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/*"))


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("damage", ["no image", "no text", "no metadata", "cut", "of another model", "nothing"])
def test_only_parts_that_are_not_whole_are_computed_again(tmp_path, model, shards, damage, monkeypatch):
    out = tmp_path / "out"
    run(model, shards, out)
    expected = contents(out)
    image, text, metadata = (out / f"{kind}/{kind}_1.{end}" for kind, end in _KINDS)
    if damage == "cut":
        image.write_bytes(image.read_bytes()[:-2])
    elif damage == "of another model":
        table = parquet.read_table(metadata)
        facts = json.loads(table.schema.metadata[b"evaclip"])
        facts["of"][0] = "0"
        parquet.write_table(table.replace_schema_metadata({b"evaclip": json.dumps(facts).encode()}), metadata)
    elif damage != "nothing":
        {"no image": image, "no text": text, "no metadata": metadata}[damage].unlink()
    written = []
    write = Features.write
    monkeypatch.setattr(
        Features, "write", lambda self, number, part: (written.append(number), write(self, number, part))
    )
    run(model, shards, out)
    assert written == ([] if damage == "nothing" else [1])
    assert contents(out) == expected


_KINDS = (("img_emb", "npy"), ("text_emb", "npy"), ("metadata", "parquet"))


def test_a_part_that_was_interrupted_is_not_taken_for_whole(tmp_path, model, shards, monkeypatch):
    out, saved, save_array = tmp_path / "out", [], np.save

    def failing(file, values):
        saved.append(file)
        if len(saved) == 4:  # the text of the second part
            raise OSError(28, "No space left on device")
        save_array(file, values)

    monkeypatch.setattr(np, "save", failing)
    with pytest.raises(DataError, match=r"metadata_1\.parquet cannot be written: No space left .*; free some space"):
        run(model, shards, out)
    assert Features.open(out).missing() == [1, 2]
    assert not (out / "skipped.jsonl").exists()
    assert not list(out.rglob("*.tmp"))
    monkeypatch.setattr(np, "save", save_array)
    run(model, shards, out)
    assert Features.open(out).missing() == []


def test_other_weights_precision_or_shards_are_refused_in_the_same_folder(tmp_path, model, shards, colour_shards):
    out = tmp_path / "out"
    run(model, shards, out)
    before = contents(out)
    with pytest.raises(DataError, match=r"out holds features of other weights \(.*, digest \w+\); choose another"):
        run(save(tmp_path / "other", seed=2), shards, out)
    with pytest.raises(DataError, match="holds features in precision fp32; choose another folder"):
        run(model, shards, out, precision="bf16")
    with pytest.raises(DataError, match="holds features of 3 shards, not of 2"):
        run(model, [f"{colour_shards}/{{00000..00001}}.tar"], out)
    with pytest.raises(DataError, match=r"of other shards \(2 differ, the first is .*00000\.tar\)"):
        run(model, [f"{colour_shards}/0000{n}.tar" for n in (1, 0, 2)], out)
    assert contents(out) == before


def test_an_export_gives_the_features_of_its_checkpoint_and_shards_may_move(tmp_path, model, shards, colour_shards):
    out = tmp_path / "out"
    run(model, shards, out)
    cli.main(["export", str(model), str(tmp_path / "export"), "--format", "safetensors"])
    (tmp_path / "moved").symlink_to(colour_shards)
    before = contents(out)
    run(tmp_path / "export", [f"{tmp_path}/moved/{{00000..00002}}.tar"], out)
    assert contents(out).keys() == before.keys()
    assert all(contents(out)[path] == before[path] for path in before if path.name != "skipped.jsonl")


# --------------------------------------------------------------------------------------------------------------- ranks


def test_two_ranks_write_what_one_does(tmp_path, model, shards):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "evaclip", "embed", str(model), *shards, str(tmp_path / "two"), "--batch", "8"]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [*command, "--workers", "1"],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = "".join(rank.communicate(timeout=300)[0] for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "70 of 70 records of 3 shards, 0 skipped" in said
    run(model, shards, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_ranks_take_turns_with_the_shards(tmp_path, model, shards, monkeypatch):
    dealt = []
    monkeypatch.setattr(command, "embed_shards", lambda _b, _f, numbers, _i, quiet: dealt.append(numbers))
    run(model, shards, tmp_path)
    assert dealt == [[0, 1, 2]]
    assert not list(tmp_path.glob("skipped.jsonl")), "nothing is summed up while parts are missing"


# -------------------------------------------------------------------------------------------------------------- errors


def test_without_pyarrow_the_command_says_how_to_get_it(tmp_path, model, shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"features need pyarrow, which is missing; pip install 'evaclip\[parquet\]'"):
        run(model, shards, tmp_path)


def test_what_is_no_model_or_no_shard_is_refused(tmp_path, model, shards):
    with pytest.raises(EvaclipError, match=r"/nowhere does not exist; give a run directory"):
        run("/nowhere", shards, tmp_path)
    with pytest.raises(DataError, match=r"/nowhere\.tar does not exist"):
        run(model, ["/nowhere.tar"], tmp_path)


def test_features_of_a_folder_that_holds_none_cannot_be_opened(tmp_path):
    with pytest.raises(DataError, match=r"features\.json does not exist; give a folder that evaclip embed wrote"):
        Features.open(tmp_path)
    for text, message in (("{", "cannot be read"), ('{"format": 1, "shards": []}', "cannot be read")):
        (tmp_path / "features.json").write_text(text)
        with pytest.raises(DataError, match=message):
            Features.open(tmp_path)
