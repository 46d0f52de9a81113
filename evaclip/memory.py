"""What a step needs in memory, estimated from shapes alone, and what to change where that is too much.

Sizes are bytes of one rank. Estimates run the towers on tensors without storage, so they take no memory and no GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from evaclip.accumulation import adds_up_in_16_bits, num_micro_batches
from evaclip.config import (
    DeepSpeedEngineConfig,
    Freeze,
    ImageTowerConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from evaclip.config_file import parse_yaml
from evaclip.data.batch import PackedText
from evaclip.engine.prepare import prepare
from evaclip.errors import ConfigError
from evaclip.freezing import freeze
from evaclip.models.clip import CLIP

_GIB = 2**30
_SAFE = 0.9  # share of the memory that is planned with; fragmentation and what no estimate knows take the rest
_BUCKET = 500_000_000  # most numbers in the buffer through which DeepSpeed reduces gradients
_GATHERED = 1_000_000_000  # most parameters that ZeRO-3 holds whole at once


class StateBytes(NamedTuple):
    """What a rank holds whatever its micro-batch, in bytes."""

    weights: float
    """With masters, and with the copies that autocast and ZeRO-3 make of them."""
    gradients: float
    """With DeepSpeed's bucket: 1 or 2 GB."""
    optimizer: float
    """Both moments, and the average where there is one, fp32."""


def state_bytes(num_parameters: int, config: RunConfig, world_size: int, num_frozen: int = 0) -> StateBytes:
    """Weights, gradients and moments on one rank's device during the backward of a step.

    Autocast keeps 16-bit copies of the weights in the graph. The torch engine replicates everything. ZeRO keeps an
    fp32 master of this rank's share at all stages, also of weights that are fp32 already; stage 1 keeps whole
    gradients in the weights' dtype until they are reduced, stages 2 and 3 this rank's share in fp32; stage 3 keeps up
    to 1e9 gathered parameters beside its share. ``engine.offload_optimizer`` moves masters and moments to the host.
    ``num_frozen`` of the parameters do not learn: they are stored, and nothing else; backward gathers none of them.

    Left out: the optimizer's constant buffer; 16-bit gradients of the torch engine, which come as activations go; what
    ZeRO copies for a moment in reduction and step, and ZeRO-2 where it adds up fp32 micro-batches; fragmentation.
    """
    learning, engine = num_parameters - num_frozen, config.engine
    share = learning / world_size
    sixteen_bit = config.train.precision == "bf16_weights"
    stored = 2 if sixteen_bit else 4
    copies = 2 * learning if config.train.precision in ("bf16", "fp16") else 0
    moments = 12 if config.optim.ema_decay else 8
    if not isinstance(engine, DeepSpeedEngineConfig):
        masters = 4 * learning if sixteen_bit else 0
        return StateBytes(stored * num_parameters + masters + copies, 4 * learning, moments * learning)
    stage, here = engine.zero_stage, not engine.offload_optimizer
    held = num_parameters / world_size + min(learning, _GATHERED) if stage == 3 else num_parameters
    weights = stored * held + 4 * share * here + copies
    gradients = stored * learning if stage == 1 else 4 * share * here
    gradients += (4 if stage == 3 else stored) * min(_BUCKET, learning)
    return StateBytes(weights, gradients, moments * share * here)


def activation_bytes(
    model: ModelConfig,
    train: TrainConfig,
    caption_tokens: int | None = None,
    *,
    frozen: tuple[Freeze, Freeze] = (0, 0),
    on_gpu: bool = True,
) -> float:
    """What autograd keeps of one sample between forward and backward, with patches dropped as in training.

    Counted in forwards of towers of which one block learns and of which two do, since the blocks of a tower are alike;
    of a whole image tower if it is timm's. With activation checkpointing the largest block is added, which backward
    computes again. ``train.compile`` is not looked at. Captions have ``caption_tokens``; None: the whole context, the
    worst case. ``frozen`` is how much of the image tower and of the text tower does not learn, of which nothing is
    kept. ``on_gpu`` matters under autocast, which normalises in fp32 there and in 16 bits on CPUs.
    """
    tokens = caption_tokens or model.text.context_length
    own = isinstance(model.image, ImageTowerConfig)
    depths = model.image.depth if isinstance(model.image, ImageTowerConfig) else 1, model.text.depth
    parts = tuple(part if part == "all" else min(part, 1) for part in frozen)  # a frozen block is as good as many
    learning = [0 if part == "all" else depth - part for depth, part in zip(depths, frozen, strict=True)]
    if not own:
        parts, learning[0] = (frozen[0], parts[1]), int(frozen[0] != "all")
    image, text = (1 + (part == 1 and number > 0) for part, number in zip(parts, learning, strict=True))

    def kept(checkpointing: bool) -> tuple[float, list[float]]:
        """Of towers of which one block learns, if any does, and of one more block, image and text."""
        key: Any = (model, parts, train.precision, checkpointing, tokens, on_gpu)  # frozen models are hashable
        all_of, blocks = _per_sample(*key, image, text)
        more = _per_sample(*key, image + 1, text)[0] - all_of if own else max(blocks, default=0.0)
        return all_of, [more, _per_sample(*key, image, text + 1)[0] - all_of]

    least, blocks = kept(train.activation_checkpointing)
    total = least + sum(max(0, number - 1) * size for number, size in zip(learning, blocks, strict=True))
    if not train.activation_checkpointing:
        return total
    return total + max(size if number else 0.0 for number, size in zip(learning, kept(False)[1], strict=True))


@functools.cache
def _per_sample(
    model: ModelConfig,
    frozen: tuple[Freeze, Freeze],
    precision: str,
    checkpointing: bool,
    tokens: int,
    on_gpu: bool,
    *depths: int,
) -> tuple[float, list[float]]:
    """Bytes that autograd keeps of a sample in towers of these depths, and in each image block of one of timm's.

    Copies of weights drop out.
    """
    image, text = depths
    update: dict[str, Any] = {"text": model.text.model_copy(update={"depth": text})}
    if isinstance(model.image, ImageTowerConfig):
        update["image"] = model.image.model_copy(update={"depth": image})
    shallow = model.model_copy(update=update)
    options = {"precision": precision, "activation_checkpointing": checkpointing}
    train = TrainConfig.model_validate({"steps": 1, "global_batch": 2, **options})
    two, four = (_saved_bytes(shallow, frozen, train, tokens, on_gpu, samples) for samples in (2, 4))
    outside, *blocks = ((more - less) / 2 for more, less in zip(four, two, strict=True))
    return outside + sum(blocks), blocks


def _saved_bytes(
    model: ModelConfig, frozen: tuple[Freeze, Freeze], train: TrainConfig, tokens: int, on_gpu: bool, samples: int
) -> list[int]:
    """All that a forward saves for backward, each storage once, without parameters; nothing is allocated.

    First outside of the blocks of an image tower of timm, then in each of them.
    """
    optim = OptimConfig.model_validate({"image": {"freeze": frozen[0]}, "text": {"freeze": frozen[1]}})
    with torch.device("meta"):
        clip = CLIP(model)
    freeze(clip, optim)
    towers = prepare(clip, train, torch.device("cpu"))
    text, side = PackedText.pack([[0] * tokens] * samples), model.image.image_size
    saved: dict[int, tuple[int, Any]] = {}
    place = 0

    def move(number: int) -> None:
        nonlocal place
        place = number

    for number, block in enumerate(towers.clip.image.blocks, 1):
        block.register_forward_pre_hook(lambda *_, number=number: move(number))
        block.register_forward_hook(lambda *_: move(0))

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved.setdefault(storage._cdata, (place, storage))  # held, so that no other takes its address
        return tensor

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        state = dict(towers.named_parameters()) | dict(towers.named_buffers())
        weights = {n: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad) for n, t in state.items()}
        images = torch.empty(samples, 3, side, side, dtype=torch.uint8)
        if on_gpu and towers.autocast_dtype is not None:
            stack.enter_context(_Fp32Norms())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        functional_call(towers, weights, (images, text, torch.empty(samples, dtype=torch.int64)))
    own = {weight.untyped_storage()._cdata for weight in weights.values()}
    found = [0] * (1 + len(towers.clip.image.blocks))
    for address, (number, storage) in saved.items():
        found[number] += 0 if address in own else storage.nbytes()
    return found


class _Fp32Norms(TorchFunctionMode):
    """LayerNorm as CUDA's autocast has it: in fp32, of a copy where the input is not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.layer_norm:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that a device or the host had no memory left."""
    texts = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    refused = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return refused or isinstance(error, torch.OutOfMemoryError | MemoryError)


def advice(config: RunConfig, world_size: int, *, on_gpu: bool = True) -> list[str]:
    """Changes that would make a step smaller, each with what it alone saves on a rank; what saves most comes first."""
    with torch.device("meta"):
        clip = CLIP(config.model)
    freeze(clip, config.optim)
    num_parameters = sum(p.numel() for p in clip.parameters())
    num_frozen = sum(p.numel() for p in clip.parameters() if not p.requires_grad)

    def need(run: RunConfig) -> float:
        per_sample = activation_bytes(run.model, run.train, frozen=run.optim.frozen, on_gpu=on_gpu)
        state = state_bytes(num_parameters, run, world_size, num_frozen)
        return sum(state) + per_sample * _largest(run, world_size)

    now = need(config)
    found: dict[str, tuple[float, str]] = {}
    for change, old, note in _changes(config, world_size, on_gpu=on_gpu):
        key = change.rpartition("=")[0]
        changed = None if key in found else _changed(config, change, world_size)
        saved = 0.0
        with suppress(ConfigError):  # an image tower of timm may refuse it
            saved = (now - need(changed)) / _GIB if changed else 0.0
        if saved >= 0.05:
            found[key] = saved, f"{change} (now {old}) saves about {saved:.1f} GiB{note}"
    return [line for _, line in sorted(found.values(), reverse=True)] or ["a larger machine, or a smaller model"]


def _changes(config: RunConfig, world_size: int, *, on_gpu: bool) -> Iterator[tuple[str, object, str]]:
    """Changes that may help, present values and remarks; of one key the first that saves anything is enough."""
    train, drop, engine = config.train, config.model.image.token_drop, config.engine
    samples = _largest(config, world_size)
    yield f"train.micro_batch={-(-samples // 2)}", samples, ""
    if not train.activation_checkpointing:
        yield "train.activation_checkpointing=true", "false", ""
    if drop < 0.75:
        yield "model.image.token_drop=0.75", drop, "; this one changes the training"
    if train.precision == "fp32" and on_gpu:
        yield "train.precision=bf16", "fp32", ""
    now = engine.zero_stage if isinstance(engine, DeepSpeedEngineConfig) else 0
    for stage in range(now + 1, 4) if world_size > 1 else ():
        yield f"{'' if now else 'engine.name=deepspeed '}engine.zero_stage={stage}", now or "torch", ""
    if on_gpu and not now and world_size == 1:
        yield "engine.name=deepspeed engine.offload_optimizer=true", "torch", "; slower"
    elif on_gpu and not (isinstance(engine, DeepSpeedEngineConfig) and engine.offload_optimizer):
        yield "engine.offload_optimizer=true", "false", "; slower"


def _largest(config: RunConfig, world_size: int) -> int:
    """Samples of the largest micro-batch; one for ``auto``, which takes no more than fit."""
    if config.train.micro_batch == "auto":
        return 1
    return -(-config.train.global_batch // (world_size * num_micro_batches(config.train, world_size)))


def _changed(config: RunConfig, change: str, world_size: int) -> RunConfig | None:
    """The configuration after ``section.key=value ...``; None where that would be refused."""
    tree = config.model_dump()
    for item in change.split():
        dotted, _, value = item.partition("=")
        *parents, leaf = dotted.split(".")
        functools.reduce(lambda place, key: place[key], parents, tree)[leaf] = parse_yaml(value)
    try:
        run = RunConfig.model_validate(tree)
    except ValidationError:
        return None
    return None if adds_up_in_16_bits(run, num_micro_batches(run.train, world_size)) else run
