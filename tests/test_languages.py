"""A model of another language: trained with a tokenizer.json, and whole without the file that it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import languages
import open_clip
import pytest
import torch
from tiny import SYNTHETIC, tiny_config
from transformers import AutoTokenizer, CLIPModel
from weights.stored import stored

import evaclip
from evaclip import checkpoint, cli, config_file
from evaclip.checkpoint import CheckpointReader
from evaclip.config import ModelConfig, RunConfig
from evaclip.data.shards import write_shards
from evaclip.errors import ConfigError, WeightsError
from evaclip.history import load_history
from evaclip.metrics import OF_THE_MACHINE
from evaclip.train import train
from evaclip.weights.export import export

TEXTS = [languages.caption(*pair) for pair in languages.PAIRS] + ["", "红" * 50, "unknown words 🙂"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chinese captions: 320 records to train on, and 16 others, of one picture for each caption."""
    folder = tmp_path_factory.mktemp("chinese")
    write_shards(folder / "train", languages.chinese_records(320), 160)
    write_shards(folder / "held", languages.chinese_records(len(languages.PAIRS), seed=10_000), 16)
    return folder


def chinese_config(run_dir: Path, shards: Path, tokenizer: Path, **changes: Any) -> RunConfig:
    """A tiny ViT, which open_clip and transformers have too, with a tokenizer."""
    model = {"name": "tiny-ViT", "text": {"tokenizer": str(tokenizer), "context_length": 16}}
    return tiny_config(run_dir, {"shards": str(shards / "train" / "{00000..00001}.tar")}, model=model, **changes)


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained to the end, and whose tokenizer's original is gone."""
    folder = tmp_path_factory.mktemp("trained")
    original = languages.save(folder)
    options = {"train__steps": 200, "train__global_batch": 32, "optim__lr": 2e-3, "schedule__warmup_steps": 20}
    options |= {"checkpoint__every_steps": 200, "log__every_steps": 50}
    held = {"task": "retrieval", "path": str(shards / "held/00000.tar")}
    train(chinese_config(folder / "run", shards, original, eval={"datasets": {"held": held}}, **options))
    original.unlink()
    return folder / "run"


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The history without what depends on the machine's speed."""
    history = load_history(run_dir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(OF_THE_MACHINE)} for row in history]


def text_features(path: Path) -> torch.Tensor:
    clip = evaclip.load(path)
    with torch.no_grad():
        return clip.encode_text(clip.tokenize(TEXTS))


def test_chinese_captions_are_learnt_and_find_pictures_that_were_not_trained_on(trained: Path) -> None:
    # 16 pictures, 16 captions: chance finds 1 (0.06). A text tower that reads which colours there are, and not which
    # is above, finds the 4 of one colour and each second of the 12 others, 10 in all (0.63). Found are 16 as a rule.
    found = rows(trained)[-1]
    assert found["eval/held/image_to_text_recall@1"] >= 0.75
    assert found["eval/held/text_to_image_recall@1"] >= 0.75


def test_the_vocabulary_and_the_end_token_are_the_files(trained: Path) -> None:
    config = evaclip.load(trained).config.text
    tokenizer = languages.make("BERT")
    assert config.vocab_size == tokenizer.get_vocab_size() < 49408
    packed = evaclip.load(trained).tokenize(TEXTS)
    ends = packed.ids[packed.cu_seqlens[1:].long() - 1]
    assert set(ends.tolist()) == {tokenizer.token_to_id("[SEP]")}
    assert "28 ids, [SEP] ends a text" in (trained / "log.txt").read_text()


def test_a_checkpoint_alone_is_a_whole_model(trained: Path, tmp_path: Path, shards: Path) -> None:
    expected = text_features(trained)
    shutil.copytree(trained, tmp_path / "run")
    moved = shutil.move(checkpoint.find_checkpoint(tmp_path / "run"), tmp_path / "step_00000200")
    shutil.rmtree(tmp_path / "run")
    assert CheckpointReader(moved).config.model.text.tokenizer == str(moved / "tokenizer.json")
    assert torch.equal(text_features(moved), expected)
    arguments = ["--dataset", str(shards / "held/00000.tar"), "--task", "retrieval", "--output", str(tmp_path / "out")]
    cli.main(["evaluate", str(moved), *arguments])
    measured = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    known = {name.rpartition("/")[2]: v for name, v in rows(trained)[-1].items() if name.startswith("eval/held/")}
    assert known
    assert all(str(value) in json.dumps(measured) for value in known.values())


def test_a_flipped_bit_in_a_checkpoints_tokenizer_is_damage(trained: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(checkpoint.find_checkpoint(trained), tmp_path / "step_00000200")
    assert checkpoint.damage(moved) is None
    content = bytearray((moved / "tokenizer.json").read_bytes())
    content[len(content) // 2] ^= 1
    (moved / "tokenizer.json").write_bytes(content)
    assert checkpoint.damage(moved) == f"{moved / 'tokenizer.json'} differs from its checksum"


@pytest.mark.parametrize("kind", ["open_clip", "hf", "safetensors"])
def test_an_export_alone_is_a_whole_model(trained: Path, tmp_path: Path, kind: Any) -> None:
    export(trained, tmp_path / "out", kind)
    moved = shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    assert torch.equal(text_features(moved), text_features(trained))
    export(moved, tmp_path / "again", "open_clip")
    assert torch.equal(text_features(tmp_path / "again"), text_features(trained))


@pytest.mark.parametrize("kind", languages.ENDS)
def test_open_clip_and_transformers_compute_the_same_from_texts(tmp_path: Path, kind: str) -> None:
    texts = [text.replace("\uff0c", "") for text in TEXTS]  # which open_clip replaces before any tokenizer sees it
    text = {"tokenizer": str(languages.save(tmp_path, kind)), "context_length": 24}
    source = stored(tmp_path, {"name": "tiny-ViT", "text": text})
    shutil.rmtree(tmp_path / "original")
    clip = evaclip.load(source)
    with torch.no_grad():
        mine = clip.encode_text(clip.tokenize(texts))
    export(source, tmp_path / "open_clip", "open_clip")
    peer = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}").eval()
    with torch.no_grad():
        theirs = peer.encode_text(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'open_clip'}")(texts))
    assert (mine - theirs).abs().max() < 1e-5 * max(1, mine.abs().max())
    again = evaclip.load(tmp_path / "open_clip")
    with torch.no_grad():
        assert torch.equal(again.encode_text(again.tokenize(texts)), mine)

    if kind in ("RoBERTa", "T5", "XLM-R", "SentencePiece alone"):
        with pytest.raises(WeightsError, match="CLIPModel cannot express this model: the end token's id is 2, for whi"):
            export(source, tmp_path / "hf", "hf")
        return
    export(source, tmp_path / "hf", "hf")
    words = AutoTokenizer.from_pretrained(tmp_path / "hf")(texts, padding=True, truncation=True, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        found = CLIPModel.from_pretrained(tmp_path / "hf").eval().get_text_features(**{n: words[n] for n in names})
    assert (mine - found.pooler_output).abs().max() < 1e-5 * max(1, mine.abs().max())


def test_what_another_tool_cannot_express_is_refused(tmp_path: Path) -> None:
    tokenizer = languages.save(tmp_path, "GPT-2")
    tree = json.loads(tokenizer.read_text())
    around = languages.template(languages.make("GPT-2"), "<|endoftext|> $A <|endoftext|>")
    tree["post_processor"] = json.loads(around.__getstate__())
    tokenizer.write_text(json.dumps(tree))
    source = stored(tmp_path, {"name": "tiny-ViT", "text": {"tokenizer": str(tokenizer)}})
    for kind in ("open_clip", "hf"):
        with pytest.raises(WeightsError, match=r"first <\|endoftext\|>, which does not only end this tokenizer's text"):
            export(source, tmp_path / "out", kind)  # type: ignore[arg-type]
    with pytest.raises(
        WeightsError, match=r"eva_clip knows CLIP's tokenizer alone, not .*; export it with --format hf"
    ):
        export(source, tmp_path / "out", "eva")
    export(source, tmp_path / "out", "safetensors")
    clip, again = evaclip.load(source), evaclip.load(tmp_path / "out")
    assert again.tokenize(TEXTS).ids.equal(clip.tokenize(TEXTS).ids)


# ---------------------------------------------------------------------------------------------------------- continuing


def test_a_run_goes_on_bit_for_bit_without_the_original(shards: Path, tmp_path: Path) -> None:
    original = languages.save(tmp_path)
    options = {"schedule__final_fraction": 1.0, "train__global_batch": 16}  # the schedule does not know the last step
    train(chinese_config(tmp_path / "straight", shards, original, train__steps=4, **options))
    train(chinese_config(tmp_path / "run", shards, original, train__steps=2, **options))
    original.unlink()
    train(chinese_config(tmp_path / "run", shards, original, train__steps=4, data__workers=2, **options))
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    whole, continued = (
        CheckpointReader(checkpoint.find_checkpoint(tmp_path / name)).weights() for name in ("straight", "run")
    )
    assert all(torch.equal(continued[name], value) for name, value in whole.items())
    train(config_file.load(tmp_path / "run/config.yaml", ["train.steps=5"]))  # what the run wrote names its own copy


def test_a_resolved_configuration_goes_on_without_the_original(shards: Path, tmp_path: Path) -> None:
    """As the launcher of a cluster keeps one for all starts of a job."""
    original = languages.save(tmp_path)
    config = chinese_config(tmp_path / "run", shards, original, train__steps=2)
    (tmp_path / "job.yaml").write_text(config_file.dump(config), encoding="utf-8")
    train(config_file.load(tmp_path / "job.yaml"))
    original.unlink()
    train(config_file.load(tmp_path / "job.yaml", ["train.steps=3"]))
    assert load_history(tmp_path / "run/metrics.jsonl")[-1]["step"] == 3


def test_another_file_is_refused_where_a_run_is_continued(shards: Path, tmp_path: Path) -> None:
    original = languages.save(tmp_path)
    train(chinese_config(tmp_path / "run", shards, original, train__steps=2))
    moved = shutil.copy(original, tmp_path / "moved.json")
    train(chinese_config(tmp_path / "run", shards, moved, train__steps=3))  # the same content
    changed = json.loads((tmp_path / "run/changes.jsonl").read_text().splitlines()[-1])["changed"]
    assert set(changed) == {"train.steps"}
    languages.save(tmp_path, model__unk_token="[CLS]")
    with pytest.raises(
        ConfigError, match=r"(?s)made by another model.*model\.text\.tokenizer_digest: \w{16} -> \w{16}"
    ):
        train(chinese_config(tmp_path / "run", shards, original, train__steps=4))
    with pytest.raises(ConfigError, match=r"model\.text\.tokenizer_digest: \w{16} -> None"):
        train(tiny_config(tmp_path / "run", {"shards": str(shards / "train/{00000..00001}.tar")}, train__steps=4))


def test_a_file_that_changes_after_the_configuration_was_read_is_refused(shards: Path, tmp_path: Path) -> None:
    config = chinese_config(tmp_path / "run", shards, languages.save(tmp_path), train__steps=2)
    languages.save(tmp_path, model__unk_token="[CLS]")
    with pytest.raises(
        ConfigError, match=r"is not the tokenizer of this model: its digest is .*; restore the file, or"
    ):
        train(config)


def test_a_wrong_path_is_refused_where_there_is_nothing_to_continue(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(languages.save(tmp_path), run / "tokenizer.json")  # left by a start that never saved
    with pytest.raises(ConfigError, match=r"nowhere.json cannot be read \(No such file or directory\); give the path"):
        chinese_config(run, shards, tmp_path / "nowhere.json")


def test_weights_of_another_tokenizer_are_refused(shards: Path, tmp_path: Path) -> None:
    original = languages.save(tmp_path)
    train(chinese_config(tmp_path / "first", shards, original, train__steps=2))
    own = tmp_path / "first/tokenizer.json"
    train(chinese_config(tmp_path / "second", shards, own, train__steps=2, init__model=str(tmp_path / "first")))
    languages.save(tmp_path, model__unk_token="[CLS]")
    message = r"first was trained with another tokenizer, .* model.text.tokenizer to the tokenizer.json beside those w"
    with pytest.raises(WeightsError, match=message):
        train(chinese_config(tmp_path / "third", shards, original, init__model=str(tmp_path / "first")))


def test_synthetic_records_stay_within_a_small_vocabulary(tmp_path: Path) -> None:
    tokenizer = str(languages.save(tmp_path))
    train(tiny_config(tmp_path / "run", SYNTHETIC, model__text__tokenizer=tokenizer, train__steps=1))
    assert rows(tmp_path / "run")[-1]["train/loss"] > 0


def test_a_model_without_weights_tokenizes_by_its_file(tmp_path: Path) -> None:
    text = {"tokenizer": str(languages.save(tmp_path)), "context_length": 16}
    clip = evaclip.create_model(ModelConfig.model_validate({"name": "tiny-ViT", "text": text}))
    assert clip.tokenize("红色").ids.tolist() == languages.make("BERT").encode("红色").ids
    assert clip.encode_text(clip.tokenize(TEXTS)).shape == (len(TEXTS), 24)
