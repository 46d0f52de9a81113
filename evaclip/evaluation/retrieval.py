"""Image-text retrieval with several captions per image: recall at 1, 5 and 10 in both directions.

As CLIP_benchmark and the CLIP papers define it: an image is found if any of its captions is among the k nearest of all
captions, a caption is found if its image is among the k nearest of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from evaclip.config import RetrievalDataset
from evaclip.distributed import Ranks
from evaclip.evaluation.datasets import captions_of, open_records
from evaclip.evaluation.encoding import Bench, in_order
from evaclip.evaluation.results import Result
from evaclip.metrics import EVAL_METRICS, RECALL_AT

_TILE_NUMBERS = 1 << 24  # of one tile of similarities: 64 MiB in fp32


def retrieve(name: str, dataset: RetrievalDataset, bench: Bench, index_dir: str | None) -> Result:
    """Match every image with every caption of a set.

    Candidates of equal similarity rank by number; a similarity that is not finite is never a hit.

    Communicates all features once, padded to the largest number of captions of an image, and six counts.

    Raises:
        DataError: On every rank, if an image or its captions are missing or wrong.
    """
    records = open_records(dataset, index_dir, bench.ranks)
    features: list[Tensor] = []
    captions: list[list[str]] = []
    for batch, read in bench.images(records, partial(captions_of, per_line=True)):
        features.append(batch)
        captions += read
    images = in_order(torch.cat(features), len(records), bench.ranks)
    texts, counts = _encode_captions(captions, len(records), bench)

    starts = counts.cumsum(0) - counts
    places = torch.arange(int(counts.max()), device=counts.device)
    captions_of_image = starts[:, None] + torch.minimum(places, counts[:, None] - 1)  # the last one fills up
    image_of_caption = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)[:, None]
    image_hits = count_hits(images, texts, captions_of_image, bench.ranks)
    text_hits = count_hits(texts, images, image_of_caption, bench.ranks)
    values = [*(hits / len(images) for hits in image_hits), *(hits / len(texts) for hits in text_hits)]
    return Result(name, "retrieval", dict(zip(EVAL_METRICS["retrieval"], values, strict=True)), len(records))


def _encode_captions(
    captions: Sequence[Sequence[str]], num_images: int, bench: Bench
) -> tuple[Float[Tensor, "captions dim"], Int[Tensor, " images"]]:
    """Features of all ranks' captions, image by image, and the number of captions of each image.

    Ranks with fewer captions repeat their last one, so that all call the text tower equally often.
    """
    device = bench.ranks.device
    own_counts = torch.tensor([len(texts) for texts in captions], device=device)
    texts = [text for image in captions for text in image]
    most_of_rank = int(bench.ranks.gather_rows(own_counts.sum()[None]).max())
    features = bench.texts(texts + texts[-1:] * (most_of_rank - len(texts)))[: len(texts)]

    counts = in_order(own_counts, num_images, bench.ranks)
    places = torch.arange(int(counts.max()), device=device)
    padded = features.new_zeros(len(captions), len(places), features.shape[1])
    padded[places < own_counts[:, None]] = features
    return in_order(padded, num_images, bench.ranks)[places < counts[:, None]], counts


def count_hits(
    queries: Float[Tensor, "queries dim"],
    candidates: Float[Tensor, "candidates dim"],
    matches: Int[Tensor, "queries matches"],
    ranks: Ranks,
) -> list[int]:
    """How many queries have a match among their 1, 5 and 10 nearest candidates.

    The best match's place is the number of candidates before it: those of higher similarity, and those of equal
    similarity and lower number. Rows of the similarity matrix are formed a tile at a time, tiles are split over the
    ranks; communicates three integers.

    Args:
        queries: Equal on all ranks.
        candidates: Equal on all ranks.
        matches: Which candidates belong to each query; may repeat one.
        ranks: The peers.
    """
    ks = torch.tensor(RECALL_AT, device=queries.device)
    numbers = torch.arange(len(candidates), device=queries.device)
    hits = torch.zeros(len(ks), dtype=torch.int64, device=queries.device)
    rows = max(1, _TILE_NUMBERS // len(candidates))
    for start in range(ranks.rank * rows, len(queries), ranks.world_size * rows):
        tile = slice(start, start + rows)
        similarity = queries[tile] @ candidates.T
        matched = similarity.gather(1, matches[tile])
        best = matched.amax(1, keepdim=True)
        first = torch.where(matched == best, matches[tile], len(candidates)).amin(1, keepdim=True)
        before = ~(similarity <= best) | ((similarity == best) & (numbers < first))
        hits += ((before.sum(1, keepdim=True) < ks) & best.isfinite()).sum(0)
    return ranks.sum(hits).tolist()
