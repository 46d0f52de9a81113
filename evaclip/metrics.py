"""What is measured: the names of all metrics, and speed.

Every name that a run publishes is declared here, once, with its meaning and unit; ``check_names`` refuses all others.
A ``Clock`` divides wall time into training, waiting for data, and what is neither. What the training step computes is
added up by ``meter``. Where the numbers go (``history``, ``tracking``, ``progress``), and when (``train``), is not
decided here, and no torch is imported.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A declared metric: what it means, and how the steps between two rows become one number."""

    meaning: str
    kind: Literal["mean", "sum", "last"]


METRICS: dict[str, Metric] = {
    "train/loss": Metric("contrastive loss of the global batch, in nats", "mean"),
    "train/accuracy_image_to_text": Metric("share of images whose own caption is the nearest in the batch", "mean"),
    "train/accuracy_text_to_image": Metric("share of captions whose own image is the nearest in the batch", "mean"),
    "train/logit_scale": Metric("multiplier of the cosine similarities (1 / temperature)", "last"),
    "train/logit_bias": Metric("summand of the sigmoid loss's logits", "last"),
    "train/grad_norm": Metric("global gradient norm before clipping", "mean"),
    "train/skipped_steps": Metric("updates skipped for a non-finite loss or gradient, since the row before", "sum"),
    "train/consecutive_skips": Metric("updates skipped in a row, up to now", "last"),
    "train/trust_ratio_p5": Metric("5 % quantile of LAMB's trust ratios over the parameters that adapt", "last"),
    "train/trust_ratio_p50": Metric("median of LAMB's trust ratios over the parameters that adapt", "last"),
    "train/trust_ratio_p95": Metric("95 % quantile of LAMB's trust ratios over the parameters that adapt", "last"),
    "lr/image": Metric(
        "learning rate of the image tower's last layer; left out where the tower is frozen whole", "last"
    ),
    "lr/text": Metric("learning rate of the text tower's last layer; left out where the tower is frozen whole", "last"),
    "lr/logit_scale": Metric("learning rate of the loss's scalars", "last"),
    "speed/samples_per_second": Metric("training samples per second, all ranks", "mean"),
    "speed/samples_per_second_per_rank": Metric("training samples per second and rank", "mean"),
    "speed/data_wait_fraction": Metric("share of training time that the main rank waited for data", "mean"),
    "speed/model_tflops": Metric("10^12 model FLOP per second and rank, recomputation not counted", "mean"),
    "speed/mfu": Metric("model FLOP per second over the GPU's dense bf16 peak; only for GPUs of known peak", "mean"),
    "memory/peak_gib": Metric(
        "most GPU memory in use by tensors on the main rank since the row before, in GiB", "last"
    ),
    "data/text_tokens": Metric("tokens per caption, start and end included, of the main rank's share", "mean"),
    "data/passes/SOURCE": Metric("passes over the source so far, the current one as a fraction", "last"),
    "data/delivered/SOURCE": Metric("samples of the source trained on so far", "last"),
    "data/skipped/SOURCE": Metric("unusable records of the source passed over so far", "last"),
    "data/filtered/SOURCE": Metric(
        "records that the source's filter left out so far; left out where there is none", "last"
    ),
    "system/NODE/cpu_fraction": Metric("share of the node's processors that was busy since the row before", "mean"),
    "system/NODE/memory_fraction": Metric("share of the node's memory that is not available", "last"),
    "system/NODE/gpu_fraction": Metric(
        "share of the last moments in which the node's GPUs computed, their mean", "last"
    ),
    "system/NODE/gpu_memory_fraction": Metric("share of the GPUs' memory in use by any process, their mean", "last"),
    "system/NODE/gpu_celsius": Metric("temperature of the node's GPUs, their mean", "last"),
    "system/NODE/gpu_watts": Metric("power that the node's GPUs draw, their mean", "last"),
    "system/NODE/disk_read_mb_per_second": Metric("10^6 bytes per second read from the node's own disks", "mean"),
    "system/NODE/network_received_mb_per_second": Metric(
        "10^6 bytes per second that the node's system received, loopback and InfiniBand left out", "mean"
    ),
    "eval/DATASET/METRIC": Metric("result on an evaluation dataset at this step", "last"),
}
"""Every metric of a run; a word in capitals stands for a name from the configuration or the evaluation."""

OF_THE_MACHINE = ("speed/", "memory/", "system/")
"""How the names of those metrics begin that two equal runs need not have in common."""

RECALL_AT = (1, 5, 10)
"""Among how many nearest candidates retrieval looks for a match."""

EVAL_METRICS: dict[str, tuple[str, ...]] = {
    "zero_shot": ("top1", "top5", "mean_per_class"),
    "linear_probe": ("top1", "top5", "mean_per_class", "log10_l2"),
    "retrieval": tuple(
        f"{direction}_recall@{k}" for direction in ("image_to_text", "text_to_image") for k in RECALL_AT
    ),
    "loss": ("loss",),
}
"""Evaluation task -> the METRIC of ``eval/DATASET/METRIC``, in the order they are published."""

TEMPLATE_METRICS = tuple(f"template_top1_{what}" for what in ("min", "median", "max", "std"))
"""Of a zero-shot set with ``per_template``: top1 of each template alone, over the templates."""

AVERAGE_METRICS = ("mean", "gap")
"""Of a suite's average: its value, and with ``gap_from`` how far that set is above it."""

SHOTS_METRICS = ("top1_std",)
"""Of a linear probe with ``shots``: the standard deviation of top1 over the draws."""

_PATTERNS = {re.compile(re.sub("[A-Z]+", ".+", name)): metric for name, metric in METRICS.items()}


def find_metric(name: str) -> Metric:
    """Return the declaration of a metric.

    Raises:
        ValueError: The name is not declared.
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, metric in _PATTERNS.items():
        if pattern.fullmatch(name):
            return metric
    raise ValueError(f"metric {name!r} is not declared; add it to METRICS in evaclip/metrics.py")


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError if any of the names is not declared."""
    for name in names:
        find_metric(name)


# -------------------------------------------------------------------------------------------------------------- time

_PEAK_TFLOPS = (  # dense bf16 with fp32 accumulation, from NVIDIA's and AMD's data sheets; the first match counts
    (r"B200", 2250.0),
    (r"H[12]00 NVL", 835.0),
    (r"H100 PCIe", 756.0),
    (r"G?H[12]00|H800", 989.0),
    (r"H20", 148.0),
    (r"A[18]00", 312.0),
    (r"L40S", 362.0),
    (r"L40", 181.0),
    (r"L4", 121.0),
    (r"A40", 150.0),
    (r"A10", 125.0),
    (r"RTX 4090", 165.0),
    (r"RTX 3090", 71.0),
    (r"MI300X", 1307.0),
)


def peak_tflops(device_name: str) -> float | None:
    """Return a GPU's dense bf16 peak in TFLOP/s by the name its driver reports; None where it is not known."""
    for pattern, peak in _PEAK_TFLOPS:
        if re.search(rf"\b{pattern}\b", device_name):
            return peak
    return None


class Clock:
    """Wall time between publications: training, of it waiting for data, and what does not count as training.

    The device runs behind the host. A publication waits for the device, so the time between two of them is right; a
    pause that begins between publications counts the work still queued on the device as its own.

    Args:
        samples: Samples trained on before the clock starts.
        num_ranks: Ranks that share the samples.
        peak_tflops: Dense bf16 peak of one rank's device in TFLOP/s, if known.
        now: Source of time in seconds.
    """

    def __init__(
        self,
        *,
        samples: int,
        num_ranks: int,
        peak_tflops: float | None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._num_ranks = num_ranks
        self._peak_tflops = peak_tflops
        self._now = now
        self._samples = samples
        self._started = now()
        self._waited = 0.0
        self._paused = 0.0
        self._inside = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what happens inside as training time spent waiting for data."""
        started = self._enter()
        try:
            yield
        finally:
            self._waited += self._leave(started)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside (evaluation, checkpoints) as training time."""
        started = self._enter()
        try:
            yield
        finally:
            self._paused += self._leave(started)

    def publish(self, *, samples: int, flops_per_sample: float) -> dict[str, float]:
        """Return the ``speed/`` metrics since the previous publication, and start anew.

        Args:
            samples: Samples trained on so far, over all ranks.
            flops_per_sample: Model FLOP of one sample's forward and backward pass, recomputation not counted.
        """
        assert not self._inside, "publish outside of waiting() and paused()"
        assert samples > self._samples, f"no sample was trained on since the last publication, at {samples}"
        now = self._now()
        training = max(now - self._started - self._paused, 1e-9)  # clocks may tick slower than an empty window
        per_second = (samples - self._samples) / training
        tflops = per_second * flops_per_sample / self._num_ranks / 1e12
        published = {
            "speed/samples_per_second": per_second,
            "speed/samples_per_second_per_rank": per_second / self._num_ranks,
            "speed/data_wait_fraction": self._waited / training,
            "speed/model_tflops": tflops,
        }
        if self._peak_tflops is not None:
            published["speed/mfu"] = tflops / self._peak_tflops
        self._samples, self._started, self._waited, self._paused = samples, now, 0.0, 0.0
        return published

    def _enter(self) -> float:
        assert not self._inside, "waiting() and paused() do not nest"
        self._inside = True
        return self._now()

    def _leave(self, started: float) -> float:
        self._inside = False
        return self._now() - started
