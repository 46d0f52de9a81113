"""What a step needs in memory, estimated from shapes alone, and what to change where that is too much.

Sizes are bytes of one rank. Estimates run the towers on tensors without storage, so they take no memory and no GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from evaclip.accumulation import adds_up_in_16_bits, num_micro_batches
from evaclip.config import DeepSpeedEngineConfig, ModelConfig, RunConfig, TrainConfig
from evaclip.config_file import parse_yaml
from evaclip.data.batch import PackedText
from evaclip.engine.prepare import prepare
from evaclip.models.clip import CLIP

_GIB = 2**30
_SAFE = 0.9  # share of the memory that is planned with; fragmentation and what no estimate knows take the rest
_BUCKET = 500_000_000  # numbers in the buffer through which DeepSpeed reduces gradients, whatever the model's size
_GATHERED = 1_000_000_000  # most parameters that ZeRO-3 holds whole at once


class StateBytes(NamedTuple):
    """What a rank holds whatever its micro-batch, in bytes."""

    weights: float
    """With masters, and with the copies that autocast and ZeRO-3 make of them."""
    gradients: float
    """With DeepSpeed's bucket: 1 or 2 GB."""
    optimizer: float
    """Both moments, fp32."""


def state_bytes(num_parameters: int, config: RunConfig, world_size: int) -> StateBytes:
    """Weights, gradients and moments on one rank's device during the backward of a step.

    Autocast keeps 16-bit copies of the weights in the graph. The torch engine replicates everything. ZeRO keeps an
    fp32 master of this rank's share at all stages, also of weights that are fp32 already; stage 1 keeps whole
    gradients in the weights' dtype until they are reduced, stages 2 and 3 this rank's share in fp32; stage 3 keeps up
    to 1e9 gathered parameters beside its share. ``engine.offload_optimizer`` moves masters and moments to the host.

    Left out: the optimizer's constant buffer; 16-bit gradients of the torch engine, which come as activations go; what
    ZeRO copies for a moment in reduction and step, and ZeRO-2 where it adds up fp32 micro-batches; fragmentation.
    """
    whole, share, engine = num_parameters, num_parameters / world_size, config.engine
    sixteen_bit = config.train.precision == "bf16_weights"
    stored = 2 if sixteen_bit else 4
    copies = 2 * whole if config.train.precision in ("bf16", "fp16") else 0
    if not isinstance(engine, DeepSpeedEngineConfig):
        return StateBytes((6 if sixteen_bit else 4) * whole + copies, 4 * whole, 8 * whole)
    stage, here = engine.zero_stage, not engine.offload_optimizer
    weights = stored * (share + min(whole, _GATHERED) if stage == 3 else whole) + 4 * share * here + copies
    gradients = stored * whole if stage == 1 else 4 * share * here
    return StateBytes(weights, gradients + (4 if stage == 3 else stored) * _BUCKET, 8 * share * here)


def activation_bytes(
    model: ModelConfig, train: TrainConfig, caption_tokens: int | None = None, *, on_gpu: bool = True
) -> float:
    """What autograd keeps of one sample between forward and backward, with patches dropped as in training.

    Counted in forwards of towers with one block and with two, since the blocks of a tower are alike. With activation
    checkpointing the largest block is added, which backward computes again. ``train.compile`` is not looked at.
    Captions have ``caption_tokens``; None: the whole context, the worst case. ``on_gpu`` matters under autocast, which
    normalises in fp32 there and in 16 bits on CPUs.
    """
    tokens = caption_tokens or model.text.context_length

    def kept(checkpointing: bool) -> tuple[float, float, float]:
        """Of towers with one block each, of one more image block, of one more text block."""
        key: Any = (model, train.precision, checkpointing, tokens, on_gpu)  # frozen models are hashable
        least = _per_sample(*key, 1, 1)
        return least, _per_sample(*key, 2, 1) - least, _per_sample(*key, 1, 2) - least

    least, image, text = kept(train.activation_checkpointing)
    total = least + (model.image.depth - 1) * image + (model.text.depth - 1) * text
    return total + max(kept(False)[1:]) if train.activation_checkpointing else total


@functools.cache
def _per_sample(
    model: ModelConfig, precision: str, checkpointing: bool, tokens: int, on_gpu: bool, *depths: int
) -> float:
    """Bytes that autograd keeps of a sample in towers of these depths; copies of weights drop out."""
    towers = zip(("image", "text"), (model.image, model.text), depths, strict=True)
    shallow = model.model_copy(update={name: tower.model_copy(update={"depth": n}) for name, tower, n in towers})
    options = {"precision": precision, "activation_checkpointing": checkpointing}
    train = TrainConfig.model_validate({"steps": 1, "global_batch": 2, **options})
    return (_saved_bytes(shallow, train, tokens, on_gpu, 4) - _saved_bytes(shallow, train, tokens, on_gpu, 2)) / 2


def _saved_bytes(model: ModelConfig, train: TrainConfig, tokens: int, on_gpu: bool, samples: int) -> int:
    """All that a forward saves for backward, each storage once, without parameters; nothing is allocated."""
    with torch.device("meta"):
        towers = prepare(CLIP(model), train, torch.device("cpu"))
    text, side = PackedText.pack([[0] * tokens] * samples), model.image.image_size
    saved: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # held, so that no other takes its address
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
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


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
        num_parameters = sum(p.numel() for p in CLIP(config.model).parameters())

    def need(run: RunConfig) -> float:
        per_sample = activation_bytes(run.model, run.train, on_gpu=on_gpu)
        return sum(state_bytes(num_parameters, run, world_size)) + per_sample * _largest(run, world_size)

    now = need(config)
    found: dict[str, tuple[float, str]] = {}
    for change, old, note in _changes(config, world_size, on_gpu=on_gpu):
        key = change.rpartition("=")[0]
        changed = None if key in found else _changed(config, change, world_size)
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
