"""DeepSpeed ZeRO (arXiv:1910.02054), stages 1 to 3: the one module that imports deepspeed.

DeepSpeed flattens the parameters of its single group and gives our optimizer this rank's slice; ``_spans`` says which
element of the slice is which parameter's. Gradients are averaged by DeepSpeed, which our optimizer undoes, and clipped
by our optimizer alone. Stages 1 and 2 leave the check for non-finite values to our optimizer, on the device;
stage 3 and the offloaded optimizer make their own before they step, with the same result.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evaclip.engine.loss_scale import LossScale
from evaclip.optim.base import Span

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside DeepSpeed's imports
    import deepspeed

# On CPUs DeepSpeed would compile an all-reduce through shared memory, for minutes and under a lock; nothing uses it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_BUCKET = 500_000_000
"""Numbers in the buffer through which gradients are reduced; DeepSpeed's own default."""

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from evaclip.config import DeepSpeedEngineConfig
    from evaclip.data.batch import Batch
    from evaclip.distributed import Ranks
    from evaclip.engine.prepare import PreparedTowers
    from evaclip.models.clip import Features
    from evaclip.optim.base import TableOptimizer


class DeepSpeedEngine:
    """See ``protocol.Engine``."""

    def __init__(
        self,
        towers: PreparedTowers,
        parameters: Sequence[nn.Parameter],
        optimizer: TableOptimizer,
        ranks: Ranks,
        *,
        config: DeepSpeedEngineConfig,
        sixteen_bit: bool,
        micro_batch: int,
    ) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.towers = towers
        self.optimizer = optimizer
        self._stage = config.zero_stage
        self._loss_scale = LossScale(optimizer, towers.autocast_dtype)
        optimizer.averaged_over = ranks.world_size
        learning = sum(row.numel for row in optimizer.rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DeepSpeed's own uses of deprecated torch calls
            self._engine: Any = deepspeed.initialize(
                model=towers,
                optimizer=optimizer,
                config=_settings(
                    config, ranks.device, sixteen_bit=sixteen_bit, micro_batch=micro_batch, learning=learning
                ),
                dist_init_required=False,
            )[0]
        row_of = {id(parameter): row for row, parameter in enumerate(parameters)}
        optimizer.bind(_spans(self._engine.optimizer, self._stage, row_of, ranks), sharded=True)

    def forward(self, batch: Batch, *, last: bool, known: Features | None = None) -> Features:
        """See ``protocol.Engine.forward``."""
        self._engine.set_gradient_accumulation_boundary(last)
        return self._engine(batch.images, batch.text, batch.seeds, known=known)

    def backward(self, surrogate: Tensor) -> None:
        """See ``protocol.Engine.backward``."""
        self._engine.backward(self._loss_scale.scaled(surrogate), scale_wrt_gas=False)

    def step(self, lr_factor: float, loss: Tensor) -> None:
        """See ``protocol.Engine.step``."""
        optimizer = self.optimizer
        optimizer.factor, optimizer.loss = lr_factor, loss
        self._engine.step()
        if self._engine.optimizer.overflow:  # our optimizer was not called
            optimizer.consecutive_skips += 1
            optimizer.grad_norm = torch.full_like(optimizer.grad_norm, torch.inf)
            if self._stage < 3:  # DeepSpeed 0.19 would add the next gradient to the bad one where it is offloaded
                averaged = self._engine.optimizer.averaged_gradients
                averaged.update(dict.fromkeys(averaged))
        self._loss_scale.adjust()

    def refresh_weights(self) -> None:
        """See ``protocol.Engine.refresh_weights``."""
        zero = self._engine.optimizer
        if self._stage < 3:
            zero.update_lp_params()
            return
        for group, master in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[group].data.copy_(master.data)
        for parameter in zero.persistent_parameters:
            parameter.all_gather(param_list=[parameter])


def sharder(
    config: DeepSpeedEngineConfig, ranks: Ranks, *, sixteen_bit: bool, micro_batch: int
) -> Callable[[nn.Module], None]:
    """What leaves each rank its ZeRO-3 share of a module's parameters, once they are set; rank 0's values are sent."""
    settings = _settings(config, ranks.device, sixteen_bit=sixteen_bit, micro_batch=micro_batch, learning=1)
    dtype = torch.bfloat16 if sixteen_bit else torch.float32
    deepspeed.comm.init_distributed(dist_init_required=False)

    def shard(module: nn.Module) -> None:
        deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=dtype)

    return shard


def _settings(
    config: DeepSpeedEngineConfig, device: torch.device, *, sixteen_bit: bool, micro_batch: int, learning: int
) -> dict[str, Any]:
    """DeepSpeed's configuration; everything that it would do a second time is off.

    Its buffer for gradients takes no more numbers than there are.
    """
    stage = config.zero_stage
    own_check = stage == 3 or config.offload_optimizer
    zero: dict[str, Any] = {"stage": stage, "sub_group_size": 10**15}
    zero["reduce_bucket_size"] = min(_BUCKET, learning)
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    elif stage < 3:
        zero["compute_grad_norm"] = False
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }
    if sixteen_bit:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": own_check}
        settings["communication_data_type"] = "fp32"
        if stage > 1:  # stage 1 keeps its gradients in 16 bits between backward and reduction
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _spans(zero: Any, stage: int, row_of: dict[int, int], ranks: Ranks) -> list[tuple[Tensor, list[Span]]]:
    """For each flat fp32 slice of this rank, where which parameters lie in it."""
    found: list[tuple[Tensor, list[Span]]] = []
    if stage < 3:
        for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
            spans: list[Span] = []
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    high, low = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                    spans.append(Span(row_of[id(parameter)], low.start, high.numel, high.start))
            found.append((flat, spans))
        return found
    for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        spans, offset = [], 0
        for parameter in group:
            size = parameter.partition_numel()
            start = ranks.rank * size
            real = min(size, parameter.ds_numel - start)
            if real > 0:
                spans.append(Span(row_of[id(parameter)], start, real, offset))
            offset += size
        found.append((flat, spans))
    return found
