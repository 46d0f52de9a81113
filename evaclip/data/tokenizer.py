"""CLIP's byte-pair tokenizer (arXiv:2103.00020, section 2.4; arXiv:1508.07909): text to ids and back.

This module decides how a caption is cleaned, split into words and cut to the context length. Its ids are those of
OpenAI's CLIP and open_clip; the merges are a data file beside it. It knows neither tensors nor padding.
"""

from __future__ import annotations

import gzip
import heapq
import html
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from itertools import pairwise

import ftfy
import regex

_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_NUM_MERGES = 48894  # the file holds more; CLIP's vocabulary stops here

_CACHED_WORDS = 1 << 16
"""Words whose ids are remembered, about 15 MB; a full cache is emptied, and frequent words soon return."""

_CACHED_WORD_LENGTH = 64
"""Longer words are rare and large, so they are not remembered."""

_PLAIN = re.compile(r"[\t\n\f\r -%'-~]*")
"""Text that ftfy and html.unescape leave alone, up to kinds of white space: ASCII without control characters and &."""

_SPECIAL = ("<start_of_text>", "<end_of_text>")
"""Also in captions, where they are written out, these become the special tokens, as in open_clip."""

_WORD = regex.compile(
    "|".join((*_SPECIAL, r"'s|'t|'re|'ve|'m|'ll|'d", r"\p{L}+", r"\p{N}", r"[^\s\p{L}\p{N}]+")), regex.IGNORECASE
)
"""A special token, an English contraction, letters, one digit, or other signs."""

_PLAIN_WORD = re.compile("|".join((*_SPECIAL, r"'s|'t|'re|'ve|'m|'ll|'d", "[a-z]+", "[0-9]", r"[^\sa-z0-9]+")))
"""The same for lower-case ASCII, where it is cheaper."""


class Tokenizer:
    """Captions to ids: start, byte pairs, end. Pickles as its context length and is rebuilt from the merges.

    Attributes:
        context_length: Most ids of a caption, start and end included.
        symbols: What each id stands for, without the special ones: bytes as letters, ``</w>`` at the end of a word.
        vocab_size: Number of ids.
        start: Id before every caption.
        end: Id behind every caption, also behind one that was cut.
    """

    def __init__(self, context_length: int = 77) -> None:
        assert context_length >= 2, "start and end need two places"
        self.context_length = context_length
        letters = _byte_letters()
        # Ids: 256 bytes, the same 256 as the last of a word, then every merge in the order of its rank.
        self.symbols = [*letters.values(), *(f"{letter}</w>" for letter in letters.values())]
        ids = {symbol: id_ for id_, symbol in enumerate(self.symbols)}
        self._merges: dict[tuple[int, int], int] = {}
        for left, right in read_merges():
            self._merges[ids[left], ids[right]] = ids[left + right] = len(self.symbols)
            self.symbols.append(left + right)
        self._byte_ids = [ids[letters[byte]] for byte in range(256)]
        self._letter_bytes = {letter: byte for byte, letter in letters.items()}
        self.start, self.end = len(self.symbols), len(self.symbols) + 1
        self.vocab_size = len(self.symbols) + len(_SPECIAL)
        self._special_words: dict[str, tuple[int, ...]] = {_SPECIAL[0]: (self.start,), _SPECIAL[1]: (self.end,)}
        self._words = dict(self._special_words)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[int]]:
        return Tokenizer, (self.context_length,)

    def __call__(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of every text, of different lengths."""
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, from start to end, at most ``context_length``; a longer text keeps its first words."""
        ids, room = [self.start], self.context_length - 1
        for word in _words(text):
            known = self._words.get(word)
            ids += self._word_ids(word) if known is None else known
            if len(ids) > room:
                del ids[room:]
                break
        ids.append(self.end)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The cleaned text behind ids, without start and end; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: An id is outside the vocabulary.
        """
        outside = [id_ for id_ in ids if not 0 <= id_ < self.vocab_size]
        if outside:
            raise ValueError(f"ids {outside[:5]} are outside the vocabulary of {self.vocab_size}")
        spelled = bytearray()
        for symbol in (self.symbols[id_] for id_ in ids if id_ < self.start):
            spelled += bytes(self._letter_bytes[letter] for letter in symbol.removesuffix("</w>"))
            spelled += b" " * symbol.endswith("</w>")
        return spelled.decode("utf-8", errors="replace").strip()

    def _word_ids(self, word: str) -> tuple[int, ...]:
        """The ids of a word that is not remembered yet."""
        ids = tuple(self._merge([self._byte_ids[byte] for byte in word.encode()]))
        if len(word) <= _CACHED_WORD_LENGTH:
            if len(self._words) >= _CACHED_WORDS:
                self._words = dict(self._special_words)
            self._words[word] = ids
        return ids

    def _merge(self, ids: list[int]) -> list[int]:
        """Merge a word's bytes: always the pair of the lowest rank, the leftmost first, until no pair is known.

        A heap of pairs and a linked list of symbols take n log n steps, where searching the whole word takes n squared.
        """
        ids[-1] += 256
        merges, size = self._merges, len(ids)
        before, after = list(range(-1, size - 1)), list(range(1, size + 1))
        heap = [(merges[pair], at) for at, pair in enumerate(pairwise(ids)) if pair in merges]
        heapq.heapify(heap)
        while heap:
            merged, at = heapq.heappop(heap)
            right = after[at]
            if right == size or merges.get((ids[at], ids[right])) != merged:
                continue  # one of the two has gone into another pair since
            ids[at], ids[right] = merged, -1
            after[at] = after[right]
            if after[at] < size:
                before[after[at]] = at
            for left in (before[at], at):
                if left >= 0 and after[left] < size:
                    found = merges.get((ids[left], ids[after[left]]))
                    if found is not None:
                        heapq.heappush(heap, (found, left))
        return [id_ for id_ in ids if id_ >= 0]


def _words(text: str) -> Iterator[str]:
    """Clean a text as open_clip does (repair encodings, undo HTML escapes twice, lower case) and split it."""
    if _PLAIN.fullmatch(text):
        return (match[0] for match in _PLAIN_WORD.finditer(text.lower()))
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return (match[0] for match in _WORD.finditer(" ".join(text.split()).lower()))


def read_merges() -> Iterator[tuple[str, str]]:
    """Pairs of symbols in the order of their rank."""
    packed = resources.files("evaclip.data").joinpath(_MERGES_FILE).read_bytes()
    for line in gzip.decompress(packed).decode().split("\n")[1 : 1 + _NUM_MERGES]:
        left, right = line.split()
        yield left, right


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in the merges: itself where it is visible in Latin-1, else from U+0100 on.

    In the order of the vocabulary: first the visible ones.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + place) for place, byte in enumerate(others)}
