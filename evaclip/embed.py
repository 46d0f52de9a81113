"""``evaclip embed``: image and text features of whole shard sets, on one rank or, under torchrun, on several.

Shards are dealt to the ranks, and each becomes a part of its own (``features``). Ranks speak to each other before the
first batch and never after: a slow one holds up nobody. Records that training would skip are skipped, and counted.
Pixels are those of evaluation, captions the whole ``txt`` as in training. Workers read, decode and tokenize ahead, a
thread writes; the process itself does nothing but run the towers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor
from tqdm import tqdm

from evaclip.config import DataConfig, EvalDataset
from evaclip.data.captions import BadCaptionError, choose_caption
from evaclip.data.file_tokenizer import AnyTokenizer, tokenizer_of
from evaclip.data.shards import CorruptRecordError, ShardSet
from evaclip.distributed import Ranks, agreed, started
from evaclip.engine.prepare import PreparedTowers
from evaclip.errors import DataError, EvaclipError
from evaclip.evaluation.datasets import EvalRecord, Records, ShardRecords, UnusableRecordError
from evaclip.evaluation.encoding import Bench, in_batches
from evaclip.features import SKIPPED, About, Features, Part, Shard, Skipped, require_pyarrow
from evaclip.models.clip import CLIP
from evaclip.sources import count_shards, expand_shards
from evaclip.weights.stored import find_model, open_model

log = logging.getLogger(__name__)


def embed(
    path: Path,
    shards: Sequence[str],
    out: Path,
    *,
    batch: int,
    workers: int,
    precision: str | None,
    index_dir: str | None,
) -> None:
    """Compute what is missing of the features of some shards, and print what became of their records.

    Args:
        path: Run, checkpoint or export.
        shards: Patterns, as in ``data.sources``.
        out: Folder of the features; parts that are there and whole stay as they are.
        batch: Images, and captions, per rank and forward pass.
        workers: Processes per rank that read and decode; 0: this one does.
        precision: bf16, fp16 or fp32; None: bf16 on a GPU, fp32 elsewhere.
        index_dir: Where shard indexes are kept; None: beside each shard.

    Raises:
        EvaclipError: With a message for the user; on all ranks while they still speak to each other.
    """
    with started(need_group=False) as ranks:
        with agreed(ranks):
            require_pyarrow()
            own = find_model(path) if ranks.is_main else None
        model = ranks.from_main(own)
        assert model is not None
        locations = expand_shards(shards, ranks)
        facts = count_shards("shards", locations, index_dir, ranks)
        damaged = [f"{path}: {fact.damage}" for path, fact in zip(locations, facts, strict=True) if fact.damage]
        for problem in damaged if ranks.is_main else ():
            log.warning("%s; what is left of it is read: restore it, and start again with another OUT", problem)
        precision = precision or ("bf16" if ranks.device.type == "cuda" else "fp32")
        with agreed(ranks):
            clip = open_model(model, ranks.device).clip.eval()
            own_shards = (Shard(path, fact.records, fact.digest) for path, fact in zip(locations, facts, strict=True))
            about = About(digest(clip), str(path), precision, clip.config.embed_dim, tuple(own_shards))
            features = Features(out, about)
            if ranks.is_main:
                features.claim()
        encoder = PreparedTowers(clip, precision, ranks.device)
        most = DataConfig.model_fields["max_image_pixels"].default
        tokenizer = tokenizer_of(clip.config.text)
        # Alone: what a rank finds out about its records concerns no other.
        bench = Bench(encoder, clip.config, tokenizer, Ranks(device=ranks.device), batch, workers, most)
        todo = [n for n in range(ranks.rank, len(about.shards), ranks.world_size) if not features.is_whole(n)]
        embed_shards(bench, features, todo, index_dir, quiet=not ranks.is_main)
        if (todo or ranks.is_main) and features.may_be_complete() and not features.missing():
            print(_summary(features, len(damaged)))  # noqa: T201  what the command is for


def digest(clip: CLIP) -> str:
    """Identity of a model: its configuration and every weight."""
    state = xxhash.xxh3_128(clip.config.model_dump_json().encode())
    for name, value in sorted(clip.state_dict().items()):
        state.update(name.encode())
        state.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def _summary(features: Features, damaged: int) -> str:
    skipped = features.list_skipped()
    records = sum(shard.records for shard in features.about.shards)
    reasons = ", ".join(f"{count:,} {why}" for why, count in sorted(Counter(r.reason for r in skipped).items()))
    text = f"{features.folder}: {records - len(skipped):,} of {records:,} records of {len(features.about.shards):,} "
    text += f"shards, {len(skipped):,} skipped" + (f" ({reasons}; {SKIPPED} names them)" if skipped else "")
    return text + (f"; {damaged:,} of the shards are damaged" if damaged else "")


# ----------------------------------------------------------------------------------------------------------- computing


@dataclass(frozen=True)
class Caption:
    """What is kept of a record beside its image."""

    key: str
    text: str
    ids: list[int]


@dataclass(frozen=True)
class _Captions:
    """Makes the ``Caption`` of a record."""

    tokenizer: AnyTokenizer

    def __call__(self, record: EvalRecord) -> Caption:
        try:
            record.key.encode()
            text = choose_caption(record.members, {"txt": 1.0}, 0)
        except UnicodeEncodeError:  # it could be named neither in parquet nor in a list of keys
            raise UnusableRecordError(f"{record.where}: the key is not UTF-8", "undecodable_key") from None
        except BadCaptionError as error:
            raise UnusableRecordError(f"{record.where}: {error}", error.reason) from error
        return Caption(record.key, text, self.tokenizer.encode(text))


class _Encoded(NamedTuple):
    """A batch's features, still where they were computed."""

    captions: Sequence[Caption]
    image: Tensor
    text: Tensor
    similarity: Tensor


def embed_shards(
    bench: Bench, features: Features, numbers: Sequence[int], index_dir: str | None, *, quiet: bool
) -> None:
    """Compute and write some parts; communicates nothing.

    Args:
        bench: The towers, alone.
        features: What the parts belong to.
        numbers: Of the parts.
        index_dir: Where shard indexes are kept.
        quiet: Show no progress bar; there is none either where stderr is no terminal.

    Raises:
        DataError: A shard cannot be read, or a part not written.
        EvaclipError: A feature is not finite.
    """
    shards = [features.about.shards[number] for number in numbers]
    ends = tuple(accumulate(shard.records for shard in shards))
    places = ShardSet([shard.location for shard in shards], index_dir, [shard.digest for shard in shards])
    plain = EvalDataset.model_construct(frames=None, resize=None)
    records = Records(ShardRecords(places, ends), range(ends[-1] if ends else 0), plain, caption_per_line=False)
    # No batch reaches over the end of a shard: the last one of each is smaller.
    spans = [range(end - shard.records, end) for shard, end in zip(shards, ends, strict=True)]
    order = [numbers for span in spans for numbers in in_batches(span, bench.batch)]
    batches = bench.batches(records, _Captions(bench.tokenizer), order)
    writing: Future[None] | None = None
    bar = tqdm(total=len(records), desc="embedding", unit=" records", disable=quiet or None)
    with bar, ThreadPoolExecutor(1) as writer:
        for place, (number, span) in enumerate(zip(numbers, spans, strict=True)):
            encoded: list[_Encoded] = []
            skipped: list[Skipped] = []
            for own in in_batches(span, bench.batch):
                images, values = next(batches)
                captions = [value for value in values if isinstance(value, Caption)]
                if captions:
                    encoded.append(_encode(bench, images, captions))
                skipped += [
                    Skipped(places.key(place, at - span.start), _reason(value))
                    for at, value in zip(own, values, strict=True)
                    if not isinstance(value, Caption)
                ]
                bar.update(len(values))
            if writing:
                writing.result()
            writing = writer.submit(_write, features, number, encoded, skipped)
        if writing:
            writing.result()


def _encode(bench: Bench, images: Tensor, captions: Sequence[Caption]) -> _Encoded:
    image, text = bench.encode_images(images), bench.encode_texts([caption.ids for caption in captions])
    return _Encoded(captions, image.half(), text.half(), (image * text).sum(dim=1))


def _reason(error: DataError) -> str:
    """Why training would skip a record, too; what it would not is raised."""
    if not isinstance(error, UnusableRecordError | CorruptRecordError):
        raise error
    return error.reason


def _write(features: Features, number: int, encoded: Sequence[_Encoded], skipped: list[Skipped]) -> None:
    """In the writing thread, so that waiting for the device and for the disk holds up no forward pass."""
    about = features.about
    none = torch.empty(0, about.embed_dim, dtype=torch.float16)
    nothing = _Encoded([], none, none, torch.empty(0))
    _, *columns = zip(*(encoded or [nothing]), strict=True)
    image, text, similarity = (torch.cat(column).cpu().numpy() for column in columns)
    if not np.isfinite(similarity).all():
        raise EvaclipError(
            f"{about.shards[number].location}: features of {np.sum(~np.isfinite(similarity))} records are not finite "
            f"in precision {about.precision}; try --precision fp32, or an older checkpoint"
        )
    captions = [caption for batch in encoded for caption in batch.captions]
    texts, keys = [caption.text for caption in captions], [caption.key for caption in captions]
    features.write(number, Part(image, text, keys, texts, similarity, skipped))
