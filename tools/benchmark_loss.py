"""Time and memory of the contrastive loss with its gradients: ours, open_clip's ClipLoss, and on a GPU inf_cl.

    python tools/benchmark_loss.py --threads 2

All give the loss and its gradients by both feature sets and by the logarithm of the scale. Each is compared with
autograd in fp64 on a part of the batch, and with ours on the whole one; the script fails where they differ. Every loss
has a process of its own, which waits while the others take their turns: rounds are interleaved, figures are medians,
ratios medians of each round's ratio. Memory is the peak of the first call above the inputs, after a small warm-up; the
returned gradients are part of it.

On a CPU, processor time is given beside wall time, which other work on the machine changes. TFLOP/s count four matrix
products, 4 x 2 B^2 D, whatever a loss really computes.
"""

from __future__ import annotations

import argparse
import functools
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from evaclip.distributed import Ranks
from evaclip.loss import info_nce

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGREEMENT = {"fp32": 1e-5, "bf16": 2e-2}
"""Most relative distance of the loss and of each gradient: fp32 sums; the roundings of bf16 logits and gradients."""
CHECKED = 2048
"""Samples that are compared with fp64: the reference stores its logits."""
SCALE = 1 / 0.07

T = TypeVar("T")


class Settings(NamedTuple):
    """What all processes agree on."""

    batch: int
    dim: int
    dtype: str
    threads: int


class Result(NamedTuple):
    """The loss and its gradients."""

    loss: Tensor
    image_grad: Tensor
    text_grad: Tensor
    scale_grad: Tensor


def ours(image: Tensor, text: Tensor, log_scale: Tensor) -> Result:
    """The loss of this package."""
    output = info_nce(image, text, log_scale.exp(), Ranks(device=image.device))
    return Result(output.loss, output.image_grad, output.text_grad, output.scale_grad)


def open_clip(image: Tensor, text: Tensor, log_scale: Tensor) -> Result:
    """open_clip's loss of one process."""
    from open_clip.loss import ClipLoss  # noqa: PLC0415  its memory belongs to its own process only

    return _differentiated(ClipLoss(), image, text, log_scale)


def inf_cl(image: Tensor, text: Tensor, log_scale: Tensor) -> Result:
    """Inf-CL (arXiv:2410.17243): one call per direction, GPU only."""
    from inf_cl import cal_flash_loss  # noqa: PLC0415  # pyright: ignore[reportMissingImports]  optional

    def both(first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
        head = min(256, first.shape[1])
        ways = [cal_flash_loss(q, k, scale=scale, head_dim=head) for q, k in ((first, second), (second, first))]
        return torch.cat(ways).mean()

    return _differentiated(both, image, text, log_scale)


def reference(image: Tensor, text: Tensor, log_scale: Tensor) -> Result:
    """The loss as it is defined, in fp64."""

    def naive(first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
        logits = scale * first @ second.T
        places = torch.arange(len(first), device=first.device)
        return (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2

    return _differentiated(naive, image.double(), text.double(), log_scale.double())


def _differentiated(loss: Callable[..., Tensor], image: Tensor, text: Tensor, log_scale: Tensor) -> Result:
    inputs = [tensor.detach().requires_grad_() for tensor in (image, text, log_scale)]
    value = loss(inputs[0], inputs[1], inputs[2].exp())
    return Result(value.detach(), *torch.autograd.grad(value, inputs))


def _losses() -> dict[str, Callable[[Tensor, Tensor, Tensor], Result]]:
    losses = {"ours": ours, "open_clip": open_clip}
    if not torch.cuda.is_available():
        return losses
    try:
        import inf_cl as _  # noqa: F401, PLC0415  # pyright: ignore[reportMissingImports]  optional
    except ModuleNotFoundError:
        return losses
    return {**losses, "inf_cl": inf_cl}


def extra_memory(run: Callable[[], T], device: torch.device) -> tuple[int, T]:
    """Bytes that ``run`` held at its peak beyond those held before, and its result."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return torch.cuda.max_memory_allocated() - before, result
    # Not ru_maxrss: a process inherits that of the one that started it.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is held now
    before = _status("VmRSS")
    result = run()
    return _status("VmHWM") - before, result


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def timed(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of wall and of processor time; on a GPU until it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start, busy = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - busy


def own_process() -> ProcessPoolExecutor:
    """A fresh process that takes calls one after another."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


@functools.cache
def _inputs(settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    both = torch.randn(2, settings.batch, settings.dim, device=device, generator=generator)
    image, noise = F.normalize(both, dim=2)
    text = F.normalize(image + 2 * noise)
    dtype = DTYPES[settings.dtype]
    return image.to(dtype), text.to(dtype), torch.tensor(SCALE, device=device).log()


def _off_fp64(name: str, settings: Settings) -> float:
    """Distance of a loss from autograd in fp64, on a part of the batch."""
    inputs = _inputs(settings._replace(batch=min(CHECKED, settings.batch)))
    return _distance(_losses()[name](*inputs), reference(*inputs))


def _measure(name: str, settings: Settings) -> tuple[int, list[Any]]:
    """In a loss's own process: extra bytes of one call, and its result as arrays."""
    loss, (image, text, log_scale) = _losses()[name], _inputs(settings)
    loss(image[:256], text[:256], log_scale)
    extra, result = extra_memory(lambda: loss(image, text, log_scale), image.device)
    return extra, [tensor.float().cpu().numpy() for tensor in result]


def _round(name: str, settings: Settings) -> tuple[float, float]:
    """In a loss's own process: seconds of one more call."""
    loss, inputs = _losses()[name], _inputs(settings)
    return timed(lambda: loss(*inputs), inputs[0].device)


def _distance(result: Result, expected: Result) -> float:
    """Largest relative distance of the loss and the three gradients."""
    pairs = zip(result, expected, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=65_536 if on_gpu else 16_384, help="pairs (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=1024 if on_gpu else 512, help="channels (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    settings = Settings(arguments.batch, arguments.dim, arguments.dtype, arguments.threads)
    names = list(_losses())

    off = {"ours off fp64": _off_fp64("ours", settings)}
    if off["ours off fp64"] <= AGREEMENT[settings.dtype]:
        with ExitStack() as stack:
            processes = {name: stack.enter_context(own_process()) for name in names}
            extra, results = {}, {}
            for name, process in processes.items():
                extra[name], arrays = process.submit(_measure, name, settings).result()
                results[name] = Result(*map(torch.from_numpy, arrays))
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
            for _ in range(arguments.rounds):
                for name, process in processes.items():
                    taken[name].append(process.submit(_round, name, settings).result())
            for name in names[1:]:
                off[f"{name} off fp64"] = processes[name].submit(_off_fp64, name, settings).result()
                off[f"{name} off ours"] = _distance(results[name], results["ours"])
        _print(settings, extra, taken)
    print(", ".join(f"{name} {distance:.1e}" for name, distance in off.items()))
    limit = AGREEMENT[settings.dtype]
    wrong = [name for name, distance in off.items() if not distance <= limit]
    if wrong:
        print(f"error: {', '.join(wrong)}, by more than {limit}: not all do the same work", file=sys.stderr)
    return int(bool(wrong))


def _print(settings: Settings, extra: dict[str, int], taken: dict[str, list[tuple[float, float]]]) -> None:
    batch, dim, dtype, threads = settings
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu with {threads} threads"
    print(f"{batch} pairs of {dim} channels in {dtype}, {place}, torch {torch.__version__}")
    for name, seconds in taken.items():
        wall, busy = (statistics.median(column) for column in zip(*seconds, strict=True))
        rate = 8 * batch**2 * dim / wall / 1e12
        times = f"{wall * 1e3:9.1f} ms {busy * 1e3:9.1f} ms busy"
        print(f"{name:9s} {extra[name] / 2**20:8.1f} MiB {times} {rate:8.3f} TFLOP/s")
    for name in [name for name in extra if name != "ours"]:
        rounds = list(zip(taken[name], taken["ours"], strict=True))
        wall, busy = (statistics.median(a[clock] / b[clock] for a, b in rounds) for clock in (0, 1))
        print(f"{name} / ours: memory {extra[name] / max(1, extra['ours']):.1f}, time {wall:.2f}, busy {busy:.2f}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
