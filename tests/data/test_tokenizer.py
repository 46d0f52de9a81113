import functools
import json
import os
import pickle
import random
import subprocess
import sys

import ftfy
import languages
import open_clip
import pytest
import transformers
from tiny import tiny_config

from evaclip.config import TextTowerConfig
from evaclip.data import tokenizer as module
from evaclip.data.file_tokenizer import FileTokenizer
from evaclip.data.tokenizer import Tokenizer
from evaclip.errors import ConfigError


@functools.cache
def tokenizer_for(context_length: int) -> Tokenizer:
    return Tokenizer(context_length)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_for(77)


@pytest.fixture(scope="module")
def reference():
    return open_clip.tokenizer.SimpleTokenizer()


def reference_ids(reference, text: str, context_length: int = 77) -> list[int]:
    """open_clip's ids without its padding: it pads with 0, which is also the id of "!", so the rows are rebuilt."""
    ids = [reference.sot_token_id, *reference.encode(text), reference.eot_token_id]
    row = reference([text], context_length=context_length)[0].tolist()
    kept = row[: len(ids)]
    assert row[len(kept) :] == [0] * (context_length - len(kept))
    return kept


LETTERS = random.Random(7)

HARD = {
    "plain": "a photo of a cat",
    "empty": "",
    "only spaces": " \t \n  \r\n ",
    "mixed case": "A PhOtO Of The EIFFEL Tower",
    "digits": "Route 66, 1984, 3.14159 and 1,000,000",
    "contractions": "I'm sure they've said we'll go, it's what she'd want, don't you're CAN'T",
    "contraction by case folding": "it'\u017f \u212aelvin",
    "accents": "d\u00e9j\u00e0 vu cr\u00e8me br\u00fbl\u00e9e \u00c5ngstr\u00f6m",
    "combining accents": "cafe\u0301 n\u0303",
    "chinese": "\u4e00\u53ea\u5728\u8349\u5730\u4e0a\u5954\u8dd1\u7684\u72d7",
    "japanese": "\u6771\u4eac\u30bf\u30ef\u30fc\u3068\u3072\u3089\u304c\u306a \uff76\uff9e",
    "korean": "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
    "emoji": "party \U0001f389\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "right to left": "\u200f\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627\u200e abc",
    "zero width": "zero\u200bwidth\u200cjoin\u200der \ufeffmark",
    "turkish i": "\u0130stanbul \u0131",
    "ligatures and wide letters": "\ufb01ne \uff26\uff35\uff2c\uff2c \u3000 width",
    "quotes": "\u201ccurly\u201d \u2018quotes\u2019 \u2013 \u2014 \u2026",
    "mojibake": "\u00e2\u20ac\u0153quoted\u00e2\u20ac\x9d caf\u00c3\u00a9 \u00e2\u0153\u201d",
    "html": "fish &amp; chips &lt;b&gt;bold&lt;/b&gt; &eacute; &#233; &#x1F600; &nbsp; &QUOT;",
    "escaped twice": "fish &amp;amp; chips &amp;lt;b&amp;gt; &amp;#39;",
    "escaped three times": "&amp;amp;amp; &amp;amp;lt;",
    "ampersands": "R&B &notanentity; a&b & &",
    "html and tags": "<b>bold</b> &amp; <i>\nnext line &amp;",
    "control characters": "a\x00b\x01c\x0bd\x0ce\x1bf\x7fg \x1b[31mred\x1b[0m \x1c\x1d\x1e\x1f\x85\x9f",
    "line breaks": "one\rtwo\r\nthree\u2028four\u2029five\x85six",
    "surrogates": "\ud83d\ude00 \ud800 alone",
    "special tokens": "a <start_of_text> b <end_of_text> <START_OF_TEXT>c<|endoftext|>",
    "word end marker": "a</w> b </w>c",
    "punctuation": "!!! ??? ... -- ___ *** ((())) [#hash] @at $5 100% c++ 'quoted'",
    "url": "https://example.com/a_b-c?d=e&f=g#h",
    "private and unassigned": "\ue000 \U0010ffff \u0378",
    "long word": "Donaudampfschifffahrtsgesellschaftskapitaen" * 8,
    "10,000 letters": "".join(LETTERS.choice("abcdefghij ") for _ in range(10_000)),
    "10,000 equal letters": "a" * 10_000,
    "2,000 letters in one word": "".join(LETTERS.choice("etaoinshrdlu") for _ in range(2000)),
    "exactly the context": "cat " * 75,
    "one more than the context": "cat " * 76,
}


@pytest.mark.parametrize("text", HARD.values(), ids=HARD.keys())
@pytest.mark.parametrize("context_length", [77, 16])
def test_ids_equal_open_clips(reference, text, context_length):
    assert tokenizer_for(context_length).encode(text) == reference_ids(reference, text, context_length)


def test_ids_equal_open_clips_on_random_unicode(tokenizer, reference):
    ranges = [(0, 0x80), (0x80, 0x250), (0x370, 0x700), (0x2000, 0x2C00), (0x4E00, 0x5000), (0xFB00, 0x10000)]
    ranges += [(0x1F300, 0x1F700), (0, 0x110000)]
    draw = random.Random(2024)
    for _ in range(600):
        chosen = draw.sample(ranges, draw.randint(1, 3))
        text = "".join(chr(draw.randrange(*draw.choice(chosen))) for _ in range(draw.randint(1, 60)))
        assert tokenizer.encode(text) == reference_ids(reference, text), ascii(text)


def test_ids_equal_open_clips_on_pieces_that_interact(tokenizer, reference):
    pieces = [
        "&",
        "amp;",
        "lt;",
        "#39;",
        "#x",
        "<",
        ">",
        "'s",
        "'",
        "S",
        "\u017f",
        " ",
        "\n",
        "\r",
        "\x1b[",
        "\x0b",
        "e\u0301",
    ]
    draw = random.Random(5)
    for _ in range(600):
        text = "".join(draw.choice(pieces) for _ in range(draw.randint(1, 12)))
        assert tokenizer.encode(text) == reference_ids(reference, text), ascii(text)


def test_text_that_skips_ftfy_is_text_that_ftfy_only_changes_in_white_space():
    skipped = {first + second for first in map(chr, range(256)) for second in map(chr, range(128))}
    skipped = {f"a{pair}b" for pair in skipped if module._PLAIN.fullmatch(pair)}
    assert len(skipped) == (128 - 32 - 1 - 1 + 4) ** 2  # all pairs of ASCII without controls, DEL and &, with \t\n\f\r
    assert all(ftfy.fix_text(text).split() == text.split() for text in skipped)


def test_vocabulary_is_clips(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.start, tokenizer.end) == (49408, 49406, 49407)
    assert tokenizer.encode("a photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_heap_order_is_rank_order(tokenizer):
    # A merge never comes before the merges of its parts: so pairs that a merge creates rank behind it.
    assert all(merged > max(pair) for pair, merged in tokenizer._merges.items())
    assert len(set(tokenizer.symbols)) == len(tokenizer.symbols)


@pytest.mark.parametrize("context_length", [2, 3, 8, 77])
def test_truncation_keeps_the_end_token_last(context_length):
    tokenizer = Tokenizer(context_length)
    ids = tokenizer.encode("many words " * 50)
    assert len(ids) == context_length
    assert ids[0] == tokenizer.start
    assert ids[-1] == tokenizer.end
    assert tokenizer.end not in ids[:-1]


def test_call_encodes_every_text_without_padding(tokenizer):
    assert tokenizer(["a", "a cat"]) == [[49406, 320, 49407], [49406, 320, 2368, 49407]]


def test_ids_do_not_depend_on_what_was_encoded_before(monkeypatch, tokenizer):
    monkeypatch.setattr(module, "_CACHED_WORDS", 16)
    small = Tokenizer()
    texts = [f"word{number} tokenization <end_of_text> fl{number}oor" for number in range(200)] * 2
    assert [small.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]


def test_cache_is_bounded_in_words_and_in_length(monkeypatch):
    monkeypatch.setattr(module, "_CACHED_WORDS", 50)
    tokenizer = Tokenizer()
    for number in range(150):
        tokenizer.encode("".join("etaoinshrd"[int(digit)] for digit in str(number)) + " " + "x" * 100 + "y" * number)
        assert len(tokenizer._words) <= 50
        assert max(map(len, tokenizer._words)) <= module._CACHED_WORD_LENGTH


def test_pickles_small_and_gives_the_same_ids():
    tokenizer = Tokenizer(context_length=9)
    packed = pickle.dumps(tokenizer)
    assert len(packed) < 200
    text = "a caption of more than nine tokens, to be cut"
    assert pickle.loads(packed).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("name", ["plain", "mixed case", "accents", "chinese", "emoji", "html", "punctuation"])
def test_decode_gives_open_clips_text_without_the_special_tokens(tokenizer, reference, name):
    ids = tokenizer.encode(HARD[name])
    assert tokenizer.decode(ids) == reference.decode(ids[1:-1]).strip()


def test_decode_returns_the_cleaned_text(tokenizer):
    assert (
        tokenizer.decode(tokenizer.encode("  A  photo of\nCaf\u00e9 &amp; \u72d7 ")) == "a photo of caf\u00e9 & \u72d7"
    )
    assert tokenizer.decode(tokenizer.encode("a </w> b")) == "a </ w > b"


def test_decode_marks_bytes_that_are_no_text(tokenizer):
    assert tokenizer.decode(tokenizer.encode("\u72d7")[1:2]) == "\ufffd"


@pytest.mark.parametrize("outside", [-1, 49408])
def test_decode_refuses_ids_outside_the_vocabulary(tokenizer, outside):
    with pytest.raises(ValueError, match=rf"ids \[{outside}\] are outside the vocabulary of 49408"):
        tokenizer.decode([320, outside])


# ---------------------------------------------------------------------------------------------------- tokenizer.json

OF_FILES = [
    "",
    " ",
    "红",
    "上面是红色\uff0c下面是蓝色。",
    "a red square, seen from 3 sides",
    "Ünïcode 🙂 [SEP] </s>",
    "红 " * 60,
]


def of_file(path, **options) -> FileTokenizer:
    return FileTokenizer(TextTowerConfig.model_validate({"tokenizer": str(path), **options}))


@pytest.mark.parametrize("kind", languages.ENDS)
@pytest.mark.parametrize("context_length", [77, 6])
def test_ids_equal_transformers_with_the_end_token_behind_them(tmp_path, kind, context_length):
    path, end = languages.save(tmp_path, kind), languages.make(kind).token_to_id(languages.ENDS[kind])
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    tokenizer = of_file(path, context_length=context_length)
    missing = [end] * (kind in languages.NOT_ENDED)
    for text in OF_FILES:
        cut = reference(text, truncation=True, max_length=context_length - len(missing))
        assert tokenizer.encode(text) == cut["input_ids"] + missing, text
        assert tokenizer.encode(text)[-1] == end == tokenizer.end
        assert len(tokenizer.encode(text)) <= context_length
    assert tokenizer(OF_FILES) == [tokenizer.encode(text) for text in OF_FILES]


@pytest.mark.parametrize("kind", languages.ENDS)
def test_vocabulary_of_a_file_is_that_of_its_package(tmp_path, kind):
    path = languages.save(tmp_path, kind)
    assert TextTowerConfig(tokenizer=str(path)).vocab_size == languages.make(kind).get_vocab_size()
    assert TextTowerConfig(tokenizer=str(path), vocab_size=512).vocab_size == 512  # a multiple, for the tensor cores


def test_a_path_is_expanded_and_a_missing_name_is_an_error(tmp_path, monkeypatch):
    path = languages.save(tmp_path)
    monkeypatch.setenv("WORDS", str(path.parent))
    assert tiny_config(tmp_path, model__text__tokenizer="${WORDS}/tokenizer.json").model.text.tokenizer == str(path)
    with pytest.raises(ConfigError, match=r"model\.text\.tokenizer: environment variable GONE_ is not set"):
        tiny_config(tmp_path, model__text__tokenizer="${GONE_}/tokenizer.json")


def test_added_tokens_count_as_ids(tmp_path):
    tokenizer = languages.make("GPT-2")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert TextTowerConfig(tokenizer=str(tmp_path / "tokenizer.json")).vocab_size == tokenizer.get_vocab_size() == 301


def test_padding_and_truncation_of_a_file_do_not_count(tmp_path):
    tokenizer = languages.make("BERT")
    expected = of_file(languages.save(tmp_path)).encode("红色 蓝色")
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert of_file(tmp_path / "tokenizer.json").encode("红色 蓝色") == expected


WRONG = {
    "no end": (
        {"post_processor": None, "added_tokens": []},
        r"does not say which token ends a text: .* none of <\|endoftext\|>, .*TemplateProcessing\(single='\$A END'",
    ),
    "two ends": (
        {
            "post_processor": None,
            "added_tokens": [
                {"id": 2, "content": "</s>", "special": True},
                {"id": 3, "content": "[SEP]", "special": True},
            ],
        },
        r"puts nothing behind it, and </s> and \[SEP\] are among its special tokens",
    ),
    "dropout": (
        {"model__dropout": 0.1},
        r"has dropout 0\.1, so that a text's ids are drawn; set model\.dropout to null",
    ),
    "no unknown word": ({"model__unk_token": "[GONE]"}, r"has no \[GONE\], which stands for unknown words; add it"),
    "end outside": (
        {"post_processor__special_tokens__[SEP]__ids": [102]},
        r"adds \[SEP\] as id 102, which its vocabulary of 28 has not; save the tokenizer again",
    ),
    "two templates": (
        {
            "post_processor": {
                "type": "Sequence",
                "processors": 2 * [{"type": "BertProcessing", "cls": ["a", 1], "sep": ["b", 2]}],
            }
        },
        r"several of its post-processors add tokens, of which their package applies one\); give the one file",
    ),
    "unknown processor": ({"post_processor": {"type": "New"}}, r"of the unknown kind New\); give the one file"),
    "no vocabulary": (
        {"model": {"type": "WordLevel"}},
        r"cannot be used as a tokenizer\.json \(KeyError: 'vocab'\); give",
    ),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_files_that_cannot_be_used_are_refused_with_the_configuration(tmp_path, changes, message):
    path = languages.save(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, model__text__tokenizer=str(path))


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"class_name": "Tokenizer"}', "\x00\xff"])
def test_other_files_are_refused_with_the_configuration(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(
        ConfigError, match=r"cannot be used as a tokenizer\.json \(.*\); give the one file that transform"
    ):
        tiny_config(tmp_path, model__text__tokenizer=str(tmp_path / "tokenizer.json"))


def test_pieces_without_an_unknown_one_are_refused(tmp_path):
    path = languages.save(tmp_path, "T5", model__unk_id=None)
    with pytest.raises(ConfigError, match="its model has no unk_id, which stands for unknown pieces; add one"):
        tiny_config(tmp_path, model__text__tokenizer=str(path))


def test_what_its_package_cannot_read_is_refused(tmp_path):
    path = languages.save(tmp_path, pre_tokenizer={"type": "New"})
    with pytest.raises(ConfigError, match=rf"{path} cannot be read by tokenizers [\d.]+: .*; make it anew, or install"):
        of_file(path)


def test_fewer_rows_than_ids_are_refused_with_both_numbers(tmp_path):
    path = languages.save(tmp_path)
    message = rf"model\.text\.vocab_size 27 is less than the 28 ids of {path}; leave it out, or give 28 or more"
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, model__text__tokenizer=str(path), model__text__vocab_size=27)
    digest = TextTowerConfig(tokenizer=str(path)).tokenizer_digest
    with pytest.raises(ConfigError, match=message):  # where the configuration has no need to look into the file
        of_file(path, tokenizer_digest=digest, vocab_size=27)


def test_fewer_rows_than_clips_own_ids_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="vocab_size 100 is less than the 49408 ids of CLIP's tokenizer; leave it out"
    ):
        tiny_config(tmp_path, model__text__vocab_size=100)
    with pytest.raises(ConfigError, match="tokenizer_digest 12 belongs to a tokenizer; name its file too"):
        tiny_config(tmp_path, model__text__tokenizer_digest="12")


def test_no_room_between_the_tokens_around_a_text_is_refused(tmp_path):
    template = languages.template(languages.make("BERT"), "[CLS] [CLS] $A [SEP]")
    path = languages.save(tmp_path, post_processor=json.loads(template.__getstate__()))
    assert len(of_file(path, context_length=4).encode("红色")) == 4
    with pytest.raises(ConfigError, match=r"context_length 3 leaves no room .* puts around a text; give 4 or more"):
        of_file(path, context_length=3)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = languages.save(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"needs a package that is not installed: pip install 'evaclip\[languages\]'"):
        of_file(path)


def test_a_file_is_pickled_by_name_and_read_again(tmp_path):
    tokenizer = of_file(languages.save(tmp_path), context_length=9)
    packed = pickle.dumps(tokenizer)
    assert len(packed) < 2000
    assert pickle.loads(packed).encode(OF_FILES[-1]) == tokenizer.encode(OF_FILES[-1])
    languages.save(tmp_path, model__unk_token="[CLS]")
    with pytest.raises(ConfigError, match="is not the tokenizer of this model"):
        pickle.loads(packed)


def test_forked_processes_give_the_same_ids_and_say_nothing(tmp_path):
    code = """
import os, sys
from evaclip.config import TextTowerConfig
from evaclip.data.file_tokenizer import FileTokenizer
tokenizer = FileTokenizer(TextTowerConfig(tokenizer=sys.argv[1]))
texts = [f"a red square {number}" for number in range(2000)]
before = tokenizer(texts)
if os.fork():
    assert len(os.listdir("/proc/self/task")) == 1, "the package has started threads"
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
os._exit(tokenizer(texts) != before)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    command = [sys.executable, "-c", code, str(languages.save(tmp_path, "GPT-2"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
