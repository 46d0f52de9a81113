"""What reading, decoding, accounts and writing cost around the towers: embed and evaluate against the bare forward.

    python tools/benchmark_embed.py

The bare forward encodes batches of images and captions that lie in memory. ``embed`` and ``evaluate`` (retrieval) do
the same work out of shards, with one decoding worker by default. The sides take turns, so that other work on the
machine meets all of them; a rate is the median over rounds, a ratio the median of each round's ratio. Two clocks: wall
time, and the processor time of the process that runs the towers, which is the shorter one where others use the cores
that its workers need. Towers run on the GPU where there is one; then only wall time says something.

The script fails if the features that ``embed`` wrote are not those of the bare forward.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from benchmark_loader import picture
from torch import Tensor

from evaclip.config import EvalConfig, EvalDataset, ModelConfig
from evaclip.data.shards import Shard as OpenShard
from evaclip.data.shards import write_shards
from evaclip.data.tokenizer import Tokenizer
from evaclip.distributed import Ranks
from evaclip.embed import digest, embed_shards
from evaclip.engine.prepare import PreparedTowers
from evaclip.evaluation import evaluate
from evaclip.evaluation.datasets import EvalRecord, image_of
from evaclip.evaluation.encoding import Bench, in_batches
from evaclip.features import About, Features, Shard
from evaclip.loss import Similarity
from evaclip.models.clip import create_model

_MOST_PIXELS = 1 << 24
_WORDS = ["a", "photo", "of", "smooth", "colours", "and", "some", "noise", "in", "the", "morning", "light"]


class Sides:
    """The same records three ways."""

    def __init__(
        self, folder: Path, config: ModelConfig, *, records: int, size: int, batch: int, workers: int, precision: str
    ) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        clip = create_model(config, device=device).eval()
        captions = [" ".join(_WORDS[: 1 + n % len(_WORDS)]).encode() for n in range(records)]
        pairs = ((f"{n:06d}", {"jpg": picture(n, size), "txt": captions[n]}) for n in range(records))
        self.paths = write_shards(folder / "shards", pairs, max(1, records // 2))
        self.batch, self.folder, self.ranks = batch, folder, Ranks(device=device)
        encoder, tokenizer = PreparedTowers(clip, precision, device), Tokenizer(config.text.context_length)
        self.bench = Bench(encoder, config, tokenizer, self.ranks, batch, workers, _MOST_PIXELS)
        opened = [OpenShard(path) for path in self.paths]
        shards = [Shard(str(p), s.num_records, s.index.digest) for p, s in zip(self.paths, opened, strict=True)]
        self.about = About(digest(clip), "benchmark", precision, config.embed_dim, tuple(shards))
        parts = ((shard, part) for shard in opened for part in in_batches(range(shard.num_records), batch))
        self.batches = [self._in_memory(shard, part) for shard, part in parts]

    def _in_memory(self, shard: OpenShard, numbers: Sequence[int]) -> tuple[Tensor, list[list[int]]]:
        records = [shard.read(number).members for number in numbers]
        image = self.bench.model.image
        plain = EvalDataset.model_construct(frames=None, resize=None)
        images = [image_of(EvalRecord("", "", record), image, _MOST_PIXELS, plain) for record in records]
        return torch.stack(images), [self.bench.tokenizer.encode(record["txt"].decode()) for record in records]

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """Features of all batches, without anything around them."""
        found = [(self.bench.encode_images(images), self.bench.encode_texts(ids)) for images, ids in self.batches]
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return found

    def embed(self) -> Features:
        """Features of all records, on the disk."""
        features = Features(Path(tempfile.mkdtemp(dir=self.folder)), self.about)
        features.claim()
        embed_shards(self.bench, features, range(len(self.paths)), None, quiet=True)
        return features

    def evaluate(self) -> None:
        """Retrieval over all records."""
        shards = [str(path) for path in self.paths]
        datasets = {"own": {"task": "retrieval", "path": shards[0].replace("00000", "{00000..00001}")}}
        config = EvalConfig.model_validate({"batch": self.batch, "datasets": datasets})
        options = {"workers": self.bench.workers, "index_dir": None, "max_image_pixels": _MOST_PIXELS}
        list(evaluate(self.bench.encoder, Similarity(1.0), config, self.bench.model, self.ranks, **options))

    def difference(self) -> float:
        """Largest, of the features on the disk and those of the bare forward."""
        features, found = self.embed(), self.forward()
        images = np.concatenate([np.load(path) for path in sorted((features.folder / "img_emb").iterdir())])
        texts = np.concatenate([np.load(path) for path in sorted((features.folder / "text_emb").iterdir())])
        bare_images, bare_texts = (torch.cat(side).cpu().numpy() for side in zip(*found, strict=True))
        return float(max(np.abs(images - bare_images).max(), np.abs(texts - bare_texts).max()))


class Times(NamedTuple):
    """Seconds that something took."""

    wall: float
    busy: float


def timed(action: Callable[[], object]) -> Times:
    """Time an action."""
    start, busy = time.perf_counter(), time.process_time()
    action()
    return Times(time.perf_counter() - start, time.process_time() - busy)


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="EVA02-CLIP-B-16", help="named model (default: %(default)s)")
    parser.add_argument("--records", type=int, default=256, help="of two shards (default: %(default)s)")
    parser.add_argument("--size", type=int, default=384, help="side of the pictures (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images of a forward pass (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the towers (default: %(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.records < 2 or arguments.records % 2 or arguments.rounds < 1:
        parser.error("--records must be even, and --rounds positive")
    torch.set_num_threads(arguments.threads)
    shape = {name: getattr(arguments, name) for name in ("records", "size", "batch", "workers", "precision")}
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder), ModelConfig.model_validate({"name": arguments.model}), **shape)
        difference = sides.difference()
        if not difference < 2**-11 + 1e-6:  # half a step of fp16 below 1
            print(f"error: features differ by {difference:.1e}: the two do not do the same work", file=sys.stderr)
            return 1
        actions = {"forward": sides.forward, "embed": sides.embed, "evaluate": sides.evaluate}
        rounds = [{name: timed(action) for name, action in actions.items()} for _ in range(arguments.rounds)]
    for name in actions:
        wall, busy = (statistics.median(column) for column in zip(*(times[name] for times in rounds), strict=True))
        print(
            f"{name:8s} {arguments.records / wall:.1f} records/s, {busy / arguments.records * 1e3:.2f} ms busy a record"
        )
    for name in ("embed", "evaluate"):
        pairs = [(times["forward"], times[name]) for times in rounds]
        wall, busy = (statistics.median(bare[clock] / side[clock] for bare, side in pairs) for clock in (0, 1))
        print(f"{name} / forward: rate {wall:.3f}, by processor time {busy:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
