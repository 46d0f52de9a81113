"""What tests of other languages share: a tokenizer.json of each kind, and pictures with Chinese captions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from tiny import COLOURS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

CHINESE = dict(zip(COLOURS, ("红色", "绿色", "蓝色", "白色"), strict=True))
PAIRS = list(product(COLOURS, COLOURS))
"""Colours of the upper and of the lower half of a picture."""


def caption(above: str, below: str) -> str:
    """What a picture shows."""
    return f"上面是{CHINESE[above]}\uff0c下面是{CHINESE[below]}。"


def picture(above: str, below: str, seed: int) -> bytes:
    """A noisy JPEG of two halves."""
    halves = np.repeat(np.array([COLOURS[above], COLOURS[below]]), 12, 0)[:, None]
    noise = np.random.default_rng(seed).integers(-20, 20, (24, 24, 3))
    return simplejpeg.encode_jpeg(np.clip(halves + noise, 0, 255).astype(np.uint8), colorspace="RGB")


def chinese_records(count: int, seed: int = 0) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Records of pictures of two halves with their captions, all pairs of colours in turn."""
    for number in range(count):
        above, below = PAIRS[number % len(PAIRS)]
        members = {"jpg": picture(above, below, seed + number), "txt": caption(above, below).encode()}
        yield f"{number:06d}", members


_CORPUS = [caption(*pair) for pair in PAIRS] * 3 + ["a red square above a blue one, seen from 3 sides", "Ünïcode 🙂"]


def template(tokenizer: Tokenizer, single: str) -> processors.TemplateProcessing:
    """A post-processor that puts special tokens around a text."""
    names = [piece for piece in single.split() if piece != "$A"]
    return processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )


def _trained(model: Any, trainer: Any, before: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = before
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _of_bytes(*special: str) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))


def _bert(model: Any, trainer: Any) -> Tokenizer:
    trained = trainer(special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    return _trained(model(unk_token="[UNK]"), trained, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())


def _pieces() -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    return _trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())


def make(kind: str) -> Tokenizer:
    """A small tokenizer of a kind, as its family's files are."""
    match kind:
        case "BERT":
            tokenizer = _bert(models.WordLevel, trainers.WordLevelTrainer)
            tokenizer.post_processor = template(tokenizer, "[CLS] $A [SEP]")
        case "BERT, WordPiece":
            tokenizer = _bert(models.WordPiece, trainers.WordPieceTrainer)
            tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        case "RoBERTa":
            tokenizer = _of_bytes("<s>", "<pad>", "</s>", "<unk>")
            tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        case "GPT-2":
            tokenizer = _of_bytes("<|endoftext|>")
            tokenizer.post_processor = processors.ByteLevel()
        case "Llama 3":
            tokenizer = _of_bytes("<|begin_of_text|>", "<|end_of_text|>")
            starts = template(tokenizer, "<|begin_of_text|> $A")
            tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), starts])
        case "T5":
            tokenizer = _pieces()
            tokenizer.post_processor = template(tokenizer, "$A </s>")
        case "XLM-R":
            tokenizer = _pieces()
            tokenizer.post_processor = template(tokenizer, "<s> $A </s>")
        case "SentencePiece alone":
            tokenizer = _pieces()
        case _:
            raise AssertionError(kind)
    return tokenizer


ENDS = {
    "BERT": "[SEP]",
    "BERT, WordPiece": "[SEP]",
    "RoBERTa": "</s>",
    "GPT-2": "<|endoftext|>",
    "Llama 3": "<|end_of_text|>",
    "T5": "</s>",
    "XLM-R": "</s>",
    "SentencePiece alone": "</s>",
}
"""Kind -> the token that ends a text."""
NOT_ENDED = ("GPT-2", "Llama 3", "SentencePiece alone")
"""Kinds whose files put nothing behind a text."""


def save(folder: Path, kind: str = "BERT", **changes: Any) -> Path:
    """A tokenizer.json of a kind, with other values under some keys; ``section__key``."""
    path = folder / "original" / "tokenizer.json"
    path.parent.mkdir(exist_ok=True)
    tree = json.loads(make(kind).to_str())
    for dotted, value in changes.items():
        *parents, leaf = dotted.split("__")
        place = tree
        for parent in parents:
            place = place[parent]
        place[leaf] = value
    path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    return path
