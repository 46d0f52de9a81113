"""Features of shard sets on disk, in the layout that clip-retrieval reads: a part per shard.

Part N is ``img_emb/img_emb_N.npy`` and ``text_emb/text_emb_N.npy`` (fp16, rows of length 1) and
``metadata/metadata_N.parquet``, a row each per record that could be used, in the shard's order. The parquet is written
last and says in its footer what the part was made from and which records were skipped, so that rows + skipped = records
can be checked at any time. ``features.json`` holds what all parts are made from. pyarrow is optional, and imported here
alone. This module does not know how features are computed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaclip.errors import ConfigError, DataError, writing
from evaclip.files import replacing, write_json

ABOUT = "features.json"
FORMAT = 1
SKIPPED = "skipped.jsonl"
_FACTS = b"evaclip"
"""Key of our own words in a parquet's footer."""


class Shard(NamedTuple):
    """A shard that features are of."""

    location: str
    records: int
    digest: str
    """Of its index."""


@dataclass(frozen=True)
class About:
    """What features are made from; other parts than of the same are not found beside each other."""

    model: str
    """Digest of weights and configuration."""
    source: str
    """Where the model was read from."""
    precision: str
    embed_dim: int
    shards: tuple[Shard, ...]

    def difference(self, other: About) -> str:
        """In words, what another one is made from; empty if both are made from the same, wherever it lies."""
        if self.model != other.model:
            return f"of other weights ({other.source}, digest {other.model})"
        if self.precision != other.precision:
            return f"in precision {other.precision}"
        if len(self.shards) != len(other.shards):
            return f"of {len(other.shards)} shards, not of {len(self.shards)}"
        pairs = zip(self.shards, other.shards, strict=True)
        changed = [theirs.location for ours, theirs in pairs if ours.digest != theirs.digest]
        return f"of other shards ({len(changed)} differ, the first is {changed[0]})" if changed else ""


class Skipped(NamedTuple):
    """A record that could not be used."""

    key: str
    reason: str


class Part(NamedTuple):
    """Features of a shard."""

    image: NDArray[np.float16]
    """[rows, embed_dim]"""
    text: NDArray[np.float16]
    keys: list[str]
    captions: list[str]
    similarity: NDArray[np.float32]
    """Cosine of image and caption, [rows]."""
    skipped: list[Skipped]


class Account(NamedTuple):
    """What became of a shard's records."""

    rows: int
    skipped: list[Skipped]


class Features:
    """A folder of features.

    Args:
        folder: Where they are.
        about: What they are made from.
    """

    def __init__(self, folder: Path, about: About) -> None:
        self.folder, self.about = folder, about
        self._digits = len(str(len(about.shards)))

    @classmethod
    def open(cls, folder: Path) -> Features:
        """Those of a folder, whether all parts are there or not.

        Raises:
            DataError: There are none, or ``features.json`` cannot be read.
        """
        path = folder / ABOUT
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            known, shards = saved.pop("format"), tuple(Shard(*shard) for shard in saved.pop("shards"))
            about = About(**saved, shards=shards)
        except FileNotFoundError:
            raise DataError(f"{path} does not exist; give a folder that evaclip embed wrote") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}); compute the features again") from None
        if known != FORMAT:
            raise DataError(f"{folder} has format {known}, this version reads {FORMAT}; compute the features again")
        return cls(folder, about)

    def claim(self) -> None:
        """Make the folder, or check that it holds features made from the same.

        Raises:
            DataError: It holds others.
        """
        if (self.folder / ABOUT).exists():
            found = self.about.difference(Features.open(self.folder).about)
            if found:
                raise DataError(f"{self.folder} holds features {found}; choose another folder")
            return
        saved = {"format": FORMAT, **asdict(self.about)}
        with writing(str(self.folder), DataError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / ABOUT, saved, indent=1)

    def is_whole(self, number: int) -> bool:
        """Whether a part is there, with all its rows."""
        account = self.account(number)
        if account is None or account.rows + len(account.skipped) != self.about.shards[number].records:
            return False
        try:
            shapes = {np.load(path, mmap_mode="r").shape for path in self._paths(number)[:2]}
        except (OSError, ValueError):
            return False
        return shapes == {(account.rows, self.about.embed_dim)}

    def may_be_complete(self) -> bool:
        """Whether there are as many files of metadata as parts; cheap, and no proof."""
        return sum(1 for _ in (self.folder / "metadata").glob("metadata_*.parquet")) == len(self.about.shards)

    def missing(self) -> list[int]:
        """Numbers of the parts that are not whole."""
        return [number for number in range(len(self.about.shards)) if not self.is_whole(number)]

    def account(self, number: int) -> Account | None:
        """What a part says about its shard's records; None if there is none, or it is made from something else."""
        pa, parquet = _pyarrow()
        try:
            footer = parquet.read_metadata(self._paths(number)[2])
            facts = json.loads(footer.metadata[_FACTS])
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
            return None  # absent, torn or somebody else's
        skipped = [Skipped(*record) for record in facts["skipped"]]
        return Account(footer.num_rows, skipped) if facts["of"] == self._identity(number) else None

    def write(self, number: int, part: Part) -> None:
        """Write a part, its metadata last.

        Raises:
            DataError: It cannot be written.
        """
        pa, parquet = _pyarrow()
        image, text, metadata = self._paths(number)
        facts = {"of": self._identity(number), "skipped": part.skipped}
        columns = {
            "image_path": pa.array(part.keys, pa.string()),  # clip-retrieval's name of a record of a tar
            "caption": pa.array(part.captions, pa.string()),
            "key": pa.array(part.keys, pa.string()),
            "shard": pa.array([self.about.shards[number].location] * len(part.keys), pa.string()),
            "similarity": pa.array(part.similarity, pa.float32()),
        }
        table = pa.table(columns).replace_schema_metadata({_FACTS: json.dumps(facts).encode()})
        with writing(str(metadata), DataError):
            for path in (image, text, metadata):
                path.parent.mkdir(exist_ok=True)
            metadata.unlink(missing_ok=True)  # of a part that was not whole
            for path, values in ((image, part.image), (text, part.text)):
                with replacing(path) as file:
                    np.save(file, values)
            with replacing(metadata) as file:
                parquet.write_table(table, file, compression="zstd")

    def similarities(self, number: int) -> tuple[list[str], NDArray[np.float32]]:
        """Keys and cosines of a part."""
        _, parquet = _pyarrow()
        table = parquet.read_table(self._paths(number)[2], columns=["key", "similarity"])
        return table["key"].to_pylist(), table["similarity"].to_numpy()

    def list_skipped(self) -> list[Skipped]:
        """Write ``skipped.jsonl``, a line per record that no part has a row of; returns them. All parts are whole."""
        found: list[Skipped] = []
        with writing(str(self.folder / SKIPPED), DataError), replacing(self.folder / SKIPPED) as file:
            for number, shard in enumerate(self.about.shards):
                account = self.account(number)
                assert account is not None
                found += account.skipped
                lines = ({"shard": shard.location, **record._asdict()} for record in account.skipped)
                file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        return found

    def _paths(self, number: int) -> tuple[Path, Path, Path]:
        name = f"{number:0{self._digits}d}"
        return (
            self.folder / "img_emb" / f"img_emb_{name}.npy",
            self.folder / "text_emb" / f"text_emb_{name}.npy",
            self.folder / "metadata" / f"metadata_{name}.parquet",
        )

    def _identity(self, number: int) -> list[str]:
        return [self.about.model, self.about.precision, self.about.shards[number].digest]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text.

    Raises:
        DataError: It cannot be written.
    """
    with writing(str(path), DataError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.writelines(f"{line}\n".encode() for line in lines)


def require_pyarrow() -> None:
    """Raises ``ConfigError`` where pyarrow is not installed."""
    _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa  # noqa: PLC0415  an optional dependency
        from pyarrow import parquet  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError("features need pyarrow, which is missing; pip install 'evaclip[parquet]'") from error
    return pa, parquet
