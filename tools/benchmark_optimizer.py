"""Time one LAMB step on a model's shapes: ours, timm's, and the memory traffic that no LAMB can avoid.

    python tools/benchmark_optimizer.py --model EVA02-CLIP-B-16

Both take the same steps on the same gradients, and the script fails if our weights differ from timm's LAMB in fp64 by
more than fp32 roundings; timm's own fp32 weights differ more, because its norms of large tensors are single fp32 sums.
Rounds are interleaved; the figures are medians, the ratios medians of each round's ratio.

The floor is a copy of as many bytes as LAMB has to move: on the CPU nine fp32 words per parameter (read gradient,
weight and moments, write moments and update; read update and weight, write weight), on a GPU 46 bytes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from timm.optim.lamb import Lamb as TimmLamb
from torch import Tensor

from evaclip.config import InfoNceConfig, LambConfig, ModelConfig
from evaclip.distributed import Ranks
from evaclip.models.clip import CLIP
from evaclip.optim.base import Span
from evaclip.optim.lamb import Lamb
from evaclip.optim.table import Row, parameter_table

BYTES = {"cpu": 36, "cuda": 46}
"""Per parameter, of the floor."""
AGREEMENT = 1e-4
"""Most distance from LAMB in fp64, of the movement: weights are rounded to 6e-8 of themselves and move by 1e-3."""


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="EVA02-CLIP-B-16", help="named model (default: EVA02-CLIP-B-16)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    model = ModelConfig.model_validate({"name": arguments.model})
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in CLIP(model).named_parameters()}
    config = LambConfig(lr=1e-3)
    rows = parameter_table(shapes, config, model, InfoNceConfig())
    generator = torch.Generator(device).manual_seed(0)
    start = [torch.randn(shape, device=device, generator=generator) * 0.02 for shape in shapes.values()]
    grads = [torch.randn(shape, device=device, generator=generator) * 1e-4 for shape in shapes.values()]

    weights = [tensor.clone() for tensor in start]
    ours = Lamb(weights, rows, config, Ranks(device=device))
    ours.bind([(tensor, [Span(row, 0, tensor.numel())]) for row, tensor in enumerate(weights)], sharded=False)
    theirs, exact = [tensor.clone() for tensor in start], [tensor.double() for tensor in start]
    timms, timms_fp64 = _timm(theirs, rows, config), _timm(exact, rows, config)
    number = sum(tensor.numel() for tensor in start)
    source = torch.ones(number * BYTES[device.type] // 8, device=device)
    target = torch.empty_like(source)

    def step(optimizer: torch.optim.Optimizer, tensors: list[Tensor]) -> Callable[[], object]:
        def run() -> None:
            optimizer.step()

        for tensor in tensors:
            tensor.grad = torch.empty_like(tensor)
        return run

    runs = {"ours": step(ours, weights), "timm": step(timms, theirs), "copy": lambda: target.copy_(source)}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number_of_round in range(arguments.rounds + 1):
        for name, run in runs.items():
            for tensor, grad in zip({"ours": weights, "timm": theirs}.get(name, []), grads, strict=False):
                assert tensor.grad is not None
                tensor.grad.copy_(grad)  # our step leaves its update there
            seconds = _timed(run, device)
            if number_of_round:  # the first one warms up
                taken[name].append(seconds)

    for tensor, grad in zip(exact, grads, strict=True):
        tensor.grad = grad.double()
    for _ in range(arguments.rounds + 1):
        timms_fp64.step()
    moved = _distance(weights, start)
    apart = _distance(weights, exact) / moved
    size = f"{number / 1e6:.1f} M parameters in {len(shapes)} tensors"
    print(f"{arguments.model}, {size}, {device}, torch {torch.__version__}")
    _print(taken)
    print(f"off LAMB in fp64, of the movement: ours {apart:.1e}, timm {_distance(theirs, exact) / moved:.1e}")
    if apart > AGREEMENT:
        print(f"error: that is more than {AGREEMENT}: the two do not do the same work", file=sys.stderr)
        return 1
    return 0


def _print(taken: dict[str, list[float]]) -> None:
    for name, seconds in taken.items():
        print(f"{name:5s} {statistics.median(seconds) * 1e3:9.2f} ms")
    for name in ("timm", "copy"):
        ratio = statistics.median(a / b for a, b in zip(taken[name], taken["ours"], strict=True))
        print(f"{name} / ours: {ratio:.2f}" if name == "timm" else f"ours / {name}: {1 / ratio:.2f}")


def _timm(tensors: list[Tensor], rows: Sequence[Row], config: LambConfig) -> TimmLamb:
    decayed = [tensor for tensor, row in zip(tensors, rows, strict=True) if row.weight_decay > 0]
    others = [tensor for tensor, row in zip(tensors, rows, strict=True) if row.weight_decay == 0]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return TimmLamb(groups, lr=config.lr, betas=config.betas, eps=config.eps, max_grad_norm=None)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _distance(first: list[Tensor], second: list[Tensor]) -> float:
    return sum(float((a - b).double().square().sum()) for a, b in zip(first, second, strict=True)) ** 0.5


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
