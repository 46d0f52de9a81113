"""Tokenizers of other languages: a Hugging Face ``tokenizer.json`` in place of CLIP's byte pairs.

The ids of a text are those of the file, with what its post-processor puts around them; nothing is cleaned before. Which
token ends a text, and which files cannot be used, is decided where the file is read (``config.tokenizer_file``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evaclip.config import TextTowerConfig
from evaclip.config.tokenizer_file import read_tokenizer
from evaclip.data.tokenizer import Tokenizer
from evaclip.errors import ConfigError


class FileTokenizer:
    """Texts to ids by a ``tokenizer.json``. Pickles as the text tower's section and is read again from the file.

    One text is encoded at a time, in the calling thread: the package starts no threads of its own, which processes that
    are forked later would miss, and says nothing of ``TOKENIZERS_PARALLELISM``.

    Args:
        text: Names the file, its digest and the context length.

    Attributes:
        end: Id behind every text, also behind one that was cut.

    Raises:
        ConfigError: The file is gone, is another one, or cannot be used; or the package is not installed.
    """

    def __init__(self, text: TextTowerConfig) -> None:
        assert text.tokenizer is not None, "CLIP's own needs no file"
        try:
            import tokenizers  # noqa: PLC0415  optional
        except ModuleNotFoundError:
            raise ConfigError(
                f"model.text.tokenizer {text.tokenizer} needs a package that is not installed: "
                f"pip install 'evaclip[languages]'"
            ) from None
        file = read_tokenizer(text.tokenizer, text.tokenizer_digest, text.vocab_size)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(file.content)
        except Exception as error:  # noqa: BLE001  the package raises nothing narrower
            raise ConfigError(
                f"{text.tokenizer} cannot be read by tokenizers {tokenizers.__version__}: {error}; make it anew, or "
                f"install the version that wrote it"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._text = text
        self._before, self._after = ([mark.id for mark in marks] for marks in (file.before, file.after))
        self._room = text.context_length - len(self._before) - len(self._after)
        if self._room < 1:
            raise ConfigError(
                f"model.text.context_length {text.context_length} leaves no room between the tokens that "
                f"{text.tokenizer} puts around a text; give {text.context_length + 1 - self._room} or more"
            )
        self.end = self._after[-1]

    def __reduce__(self) -> tuple[type[FileTokenizer], tuple[TextTowerConfig]]:
        return FileTokenizer, (self._text,)

    def __call__(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of every text, of different lengths."""
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, at most ``context_length``; a longer text keeps its first ids, and the end token."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [*self._before, *ids[: self._room], *self._after]

    def decode(self, ids: Sequence[int]) -> str:
        """The text behind ids, without the tokens around it."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


AnyTokenizer = Tokenizer | FileTokenizer


def tokenizer_of(text: TextTowerConfig) -> AnyTokenizer:
    """The tokenizer of a text tower: CLIP's own, or the one it names.

    Raises:
        ConfigError: As of ``FileTokenizer``.
    """
    return Tokenizer(text.context_length) if text.tokenizer is None else FileTokenizer(text)
