"""A tiny model, real shards, and ranks that are threads."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from evaclip.config import EvalConfig, ModelConfig
from evaclip.data.shards import write_shards
from evaclip.data.tokenizer import Tokenizer
from evaclip.distributed import Ranks
from evaclip.evaluation import Result, evaluate
from evaclip.loss import Similarity
from evaclip.models.clip import CLIP, create_model

Records = Sequence[tuple[str, Mapping[str, bytes]]]


def _png(seed: int) -> bytes:
    random = np.random.default_rng(seed)
    height, width = random.integers(12, 30, 2)
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def png() -> Callable[[int], bytes]:
    """Noise of a size of its own."""
    return _png


@pytest.fixture(scope="session")
def clip() -> CLIP:
    tower = {"width": 32, "depth": 1, "heads": 2, "mlp_width": 64}
    image = {**tower, "image_size": 16, "patch_size": 8}
    text = {**tower, "context_length": 16}
    return create_model(ModelConfig.model_validate({"embed_dim": 16, "image": image, "text": text}), seed=3)


@pytest.fixture(scope="session")
def tokens(clip: CLIP) -> Tokenizer:
    return Tokenizer(clip.config.text.context_length)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes CLIP_benchmark's layout."""

    def write(
        records: Records, *, names: Sequence[str] = (), templates: Sequence[str] = (), split: str = "test"
    ) -> Path:
        place = tmp_path / "set" / split
        for number, path in enumerate(write_shards(place, records, 8)):
            path.rename(place / f"{number}.tar")
        (place / "nshards.txt").write_text(f"{number + 1}\n")
        for file, lines in (("classnames.txt", names), ("zeroshot_classification_templates.txt", templates)):
            if lines:
                (place.parent / file).write_text("\n".join(lines) + "\n")
        return place.parent

    return write


@dataclass
class Exchange:
    """What the threads of one world leave for each other."""

    barrier: threading.Barrier
    values: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Ranks that are threads of this process."""

    exchange: Exchange | None = None

    def _all(self, value: Any) -> list[Any]:
        assert self.exchange
        self.exchange.values[self.rank] = value
        self.exchange.barrier.wait()
        values = [self.exchange.values[rank] for rank in range(self.world_size)]
        self.exchange.barrier.wait()
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self._all(tensor.clone())).sum(0))

    def gather_rows(self, tensor: Tensor) -> Tensor:
        parts = self._all(tensor.clone())
        assert len({part.shape for part in parts}) == 1, "a collective needs equal shapes"
        return torch.cat(parts)

    def gather_objects(self, value: Any) -> list[Any]:
        return self._all(value)

    def from_main(self, value: Any) -> Any:
        return self._all(value)[0]


def on_threads(world_size: int, action: Callable[[Ranks], Any]) -> list[Any]:
    """What ``action`` returns, or the error it raises, on every rank of a world."""
    exchange = Exchange(threading.Barrier(world_size, timeout=60))
    outcomes: dict[int, Any] = {}

    def run(rank: int) -> None:
        try:
            outcomes[rank] = action(ThreadRanks(rank, world_size, exchange=exchange))
        except Exception as error:  # noqa: BLE001  handed to the test
            outcomes[rank] = error
            if isinstance(error, AssertionError):
                exchange.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[rank] for rank in range(world_size)]


@pytest.fixture
def measure(clip: CLIP) -> Callable[..., Result]:
    """Evaluates one set, called ``set``, on some ranks; fails where they disagree, raises what they raise."""

    def run(
        dataset: Mapping[str, Any],
        *,
        world_size: int = 1,
        batch: int = 4,
        workers: int = 0,
        encoder: Callable[[int], Any] = lambda _: clip,
        similarity: Similarity = Similarity(10.0),  # noqa: B008  an immutable value
    ) -> Result:
        config = EvalConfig.model_validate({"batch": batch, "datasets": {"set": dataset}})

        def action(ranks: Ranks) -> Result:
            options = {"workers": workers, "index_dir": None, "max_image_pixels": 10_000}
            (result,) = evaluate(encoder(ranks.rank), similarity, config, clip.config, ranks, **options)
            return result

        if world_size == 1:
            return action(Ranks())
        outcomes = on_threads(world_size, action)
        first = outcomes[0]
        if isinstance(first, Exception):
            assert {(type(outcome), str(outcome)) for outcome in outcomes} == {(type(first), str(first))}
            raise first
        assert all(outcome == first for outcome in outcomes), outcomes
        return first

    return run


@dataclass
class CountingEncoder:
    """Passes calls on and notes them."""

    clip: CLIP
    calls: list[tuple[str, int]] = field(default_factory=list)

    def encode_image(self, images: Tensor, *, normalize: bool) -> Tensor:
        assert normalize
        assert images.dtype == torch.uint8
        self.calls.append(("images", len(images)))
        return self.clip.encode_image(images, normalize=True)

    def encode_text(self, text: Any, *, normalize: bool) -> Tensor:
        assert normalize
        self.calls.append(("text", text.num_captions))
        return self.clip.encode_text(text, normalize=True)


@pytest.fixture
def counting(clip: CLIP) -> Callable[[], CountingEncoder]:
    return lambda: CountingEncoder(clip)
