import functools
import pickle
import random

import ftfy
import open_clip
import pytest

from evaclip.data import tokenizer as module
from evaclip.data.tokenizer import Tokenizer


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
