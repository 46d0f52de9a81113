"""What a ``tokenizer.json`` of Hugging Face says of itself: how many ids it has, and which begin and end a text.

Read without their package, so that a wrong file is refused before anything heavy starts. A file whose ids would depend
on chance, that cannot encode every text, or that does not say how a text ends, is refused here. What a text's own ids
are is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import xxhash

from evaclip.errors import ConfigError

TOKENIZER = "tokenizer.json"
"""The name of a tokenizer's file in a run, a checkpoint and an export."""

_ENDS = ("<|endoftext|>", "</s>", "[SEP]", "[EOS]", "<eos>", "<|end_of_text|>", "<end_of_text>")
"""Usual names of the token behind a text, for files that put nothing there themselves."""

_Json = Mapping[str, Any]


class Mark(NamedTuple):
    """A special token."""

    name: str
    id: int


class TokenizerFile(NamedTuple):
    """What a file says."""

    content: bytes
    digest: str
    """xxh3 of the content."""
    vocab_size: int
    """The largest id, and one."""
    before: tuple[Mark, ...]
    """In front of every text."""
    after: tuple[Mark, ...]
    """Behind every text; the last is the end token."""
    ends_texts: bool
    """Whether the file's own post-processor puts ``after`` there, and not only its reader."""


def read_tokenizer(path: str | Path, digest: str | None = None, vocab_size: int | None = None) -> TokenizerFile:
    """Read a file and refuse what cannot be trained with.

    Args:
        path: Of a ``tokenizer.json``.
        digest: That it must have; None: any.
        vocab_size: Rows of the embedding that its ids must fit into; None: any.

    Raises:
        ConfigError: It cannot be read, is no such file, is another one than ``digest`` says, has more ids than
            ``vocab_size``, or cannot be used; the message says why and what to do.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give the path of a tokenizer.json") from None
    found = xxhash.xxh3_64_hexdigest(content)
    if digest not in (None, found):
        raise ConfigError(
            f"{path} is not the tokenizer of this model: its digest is {found}, model.text.tokenizer_digest {digest}; "
            f"restore the file, or leave tokenizer_digest out where a new model is to have this one"
        )
    try:
        tree = json.loads(content)
        size = max([*_model_ids(tree["model"]), *(token["id"] for token in tree.get("added_tokens") or ())]) + 1
        before, after = _added(tree.get("post_processor"))
        ends = bool(after)
        after = after or (_end(tree, str(path)),)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be used as a tokenizer.json ({type(error).__name__}: {error}); give the one file that "
            f"transformers' fast tokenizers save, not vocab.json, tokenizer_config.json or a SentencePiece model"
        ) from None
    if problem := _problem(tree["model"], [*before, *after], size):
        raise ConfigError(f"{path}: {problem}")
    if vocab_size is not None and vocab_size < size:
        raise ConfigError(
            f"model.text.vocab_size {vocab_size} is less than the {size} ids of {path}; leave it out, or give {size} "
            f"or more"
        )
    return TokenizerFile(content, found, size, before, after, ends)


def _model_ids(model: _Json) -> range | list[int]:
    """Ids of the model's vocabulary: a list of pieces, or a mapping."""
    vocab: Any = model["vocab"]
    pieces = isinstance(vocab, list)
    return range(len(cast("list[Any]", vocab))) if pieces else list(cast("Mapping[str, int]", vocab).values())


def _added(processor: _Json | None) -> tuple[tuple[Mark, ...], tuple[Mark, ...]]:
    """What a post-processor puts in front of one text, and behind it."""
    kind = processor["type"] if processor else "ByteLevel"
    if processor is None or kind == "ByteLevel":  # which only moves offsets
        return (), ()
    if kind == "Sequence":
        found = [added for inner in processor["processors"] if any(added := _added(inner))]
        if len(found) > 1:
            raise ValueError("several of its post-processors add tokens, of which their package applies one")
        return found[0] if found else ((), ())
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (Mark(*processor["cls"]),), (Mark(*processor["sep"]),)
    if kind != "TemplateProcessing":
        raise ValueError(f"its post-processor is of the unknown kind {kind}")
    sides: list[list[Mark]] = [[]]
    for piece in processor["single"]:
        if "Sequence" in piece:
            sides.append([])
        else:
            token = processor["special_tokens"][piece["SpecialToken"]["id"]]
            sides[-1] += [Mark(*pair) for pair in zip(token["tokens"], token["ids"], strict=True)]
    before, after = sides  # a template has its text once
    return tuple(before), tuple(after)


def _end(tree: _Json, path: str) -> Mark:
    """The end token of a file that puts nothing behind a text: the one of its special tokens with a usual name."""
    special = {token["content"]: token["id"] for token in tree.get("added_tokens") or () if token.get("special")}
    found = [name for name in _ENDS if name in special]
    if len(found) == 1:
        return Mark(found[0], special[found[0]])
    raise ConfigError(
        f"{path} does not say which token ends a text: its post-processor puts nothing behind it, and "
        f"{' and '.join(found) or 'none of ' + ', '.join(_ENDS)} {'are' if found else 'is'} among its special tokens; "
        f"give it one: t = tokenizers.Tokenizer.from_file({path!r}); t.post_processor = tokenizers.processors."
        f"TemplateProcessing(single='$A END', special_tokens=[('END', t.token_to_id('END'))]); t.save({path!r})"
    )


def _problem(model: _Json, marks: list[Mark], size: int) -> str | None:
    """Why every text has not its ids, and always the same; None where it has."""
    outside = [mark for mark in marks if not 0 <= mark.id < size]
    if outside:
        return (
            f"its post-processor adds {outside[0].name} as id {outside[0].id}, which its vocabulary of {size} has not; "
            f"save the tokenizer again with the ids it has now"
        )
    if model.get("dropout"):
        return f"its model has dropout {model['dropout']}, so that a text's ids are drawn; set model.dropout to null"
    unknown = model.get("unk_token")
    if unknown is not None and unknown not in model["vocab"]:
        return f"its model has no {unknown}, which stands for unknown words; add it to the vocabulary"
    if isinstance(model["vocab"], list) and model.get("unk_id") is None:
        return "its model has no unk_id, which stands for unknown pieces; add one to the vocabulary"
    return None
