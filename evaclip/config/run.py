"""Options of a whole run, and the rules between its sections."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from evaclip.checkpoint_names import complete
from evaclip.config.base import FilePath, Section, path_in, tagged
from evaclip.config.data import DataConfig, EvalConfig
from evaclip.config.model import ImageTowerConfig, InfoNceConfig, Loss, ModelConfig
from evaclip.config.optim import LambConfig, Optim, OptimConfig, ScheduleConfig, steps_of
from evaclip.config.tokenizer_file import TOKENIZER
from evaclip.metrics import EVAL_METRICS

# ---------------------------------------------------------------------------------------------- engine, training, logs


class TorchEngineConfig(Section):
    """Plain PyTorch: one process, or data parallel with everything replicated."""

    name: Literal["torch"] = "torch"
    """The engine: torch or deepspeed."""


class DeepSpeedEngineConfig(Section):
    """DeepSpeed ZeRO (arXiv:1910.02054): optimizer state (1), gradients (2) and parameters (3) sharded over ranks."""

    name: Literal["deepspeed"]
    """The engine: torch or deepspeed."""
    zero_stage: Literal[1, 2, 3] = 1
    """What is sharded: 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """Keep masters and moments in the host's memory and update them there; slower, for models that do not fit."""


Engine = Annotated[TorchEngineConfig | DeepSpeedEngineConfig, Field(discriminator="name"), tagged("name", "torch")]


class TrainConfig(Section):
    """How long, how much at once, in which precision."""

    steps: PositiveInt
    """Optimizer updates in the whole run."""
    samples: PositiveInt | None = None
    """Samples in the whole run, instead of steps; the last update takes what it needs beyond them."""
    global_batch: Annotated[int, Field(ge=2)]
    """Samples of one update, over all ranks; the same on any number of ranks."""
    micro_batch: PositiveInt | Literal["auto"] | None = None
    """Most samples a rank takes through the towers at once, which changes nothing but memory and time; a larger share
    is taken in several micro-batches. auto: as many as fit, found by trial steps at each start, so that a continued run
    may round in another order; null: the whole share at once."""
    precision: Literal["bf16", "bf16_weights", "fp16", "fp32"] = "bf16"
    """bf16, fp16: fp32 weights under autocast; bf16_weights: 16-bit weights with an fp32 master; fp32."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in backward instead of storing them."""
    compile: bool = False
    """Compile each block with torch.compile."""
    overfit_one_batch: bool = False
    """Take the samples of step 1 at every step, with the same crops and dropped patches: what can learn drives their
    loss to nearly 0. The first thing to try where nothing learns."""
    max_consecutive_skipped_steps: PositiveInt = 100
    """The run stops after this many updates in a row were skipped for a non-finite loss or gradient. With fp16 give 20
    or more: some are skipped until its loss scale is found."""

    @model_validator(mode="before")
    @classmethod
    def _samples_are_steps(cls, tree: object) -> object:
        """``steps`` where only ``samples`` is given; both, as our own files hold them, have to agree."""
        if not isinstance(tree, dict):
            return tree
        given = cast("dict[str, object]", tree)
        steps, samples, batch = (given.get(name) for name in ("steps", "samples", "global_batch"))
        if not (isinstance(samples, int) and samples > 0 and isinstance(batch, int) and batch > 0):
            return given  # each for itself is told what it should be
        found = steps_of(0, samples, batch)
        if steps not in (None, found):
            raise ValueError(f"train.samples {samples} are {found} steps, but train.steps is {steps}; set it to null")
        return {**given, "steps": found}


WeightFormat = Literal["eva", "open_clip", "openai", "timm", "hf", "evaclip"]
"""Whose names a checkpoint uses."""


class InitConfig(Section):
    """Weights that a new run starts from; a run that is continued does not look at them.

    Files of EVA, EVA-CLIP, open_clip, OpenAI, timm and Hugging Face, as torch.save or safetensors write them, folders
    of such, and runs of ours. The format is told by the keys; a name here insists on one.
    """

    image: FilePath | None = None
    """Of the image tower: a MIM checkpoint, or a CLIP model's; timm:NAME takes what timm has of a model, out of its
    cache or from its hub."""
    image_format: WeightFormat | None = None
    """Format of ``image``: eva, open_clip, openai, timm, hf or evaclip; null: told by the keys."""
    text: FilePath | None = None
    """Of the text tower."""
    text_format: WeightFormat | None = None
    """Format of ``text``."""
    model: FilePath | None = None
    """Of both towers and the temperature: a published CLIP model or another run; instead of ``image`` and ``text``."""
    model_format: WeightFormat | None = None
    """Format of ``model``."""

    @model_validator(mode="after")
    def _is_clear(self) -> InitConfig:
        if self.model and (self.image or self.text):
            raise ValueError("init.model fills both towers; give either it, or init.image and init.text")
        for name in ("image", "text", "model"):
            if getattr(self, name) == "":
                raise ValueError(f"init.{name} is empty; name a file, or null for random weights")
            if getattr(self, f"{name}_format") and not getattr(self, name):
                raise ValueError(f"init.{name}_format is set, but init.{name} is not")
        return self


class CheckpointConfig(Section):
    """When state is saved and what is kept; the newest checkpoint always is."""

    every_steps: PositiveInt = 1000
    """Steps between checkpoints; one is also written at the end and when the run is interrupted."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this are kept for good."""
    keep_best: str | None = None
    """Metric whose best checkpoint is kept, for instance ``eval/imagenet/top1``."""
    best_is: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value of ``keep_best`` is the best."""


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online where an API key is found, offline otherwise; never a prompt."""
    project: str = "evaclip"
    """Project name."""
    entity: str | None = None
    """Team or user; null: the key's default."""
    name: str | None = None
    """Run name; null: the run directory's name."""
    group: str | None = None
    """Group of runs."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    alerts: bool = True
    """Send alerts: skipped updates, unusable records, slow ranks, restarts and the end before the last step."""
    artifacts: bool = False
    """Upload the final and the best checkpoint when the run has ended."""


class LogConfig(Section):
    """What is published, and how often."""

    every_steps: PositiveInt = 10
    """Steps between rows of metrics; each publication waits for the device once."""
    wandb: WandbConfig = WandbConfig()


class ClusterConfig(Section):
    """What the cluster's launcher (launch/slurm.sh) does when something dies or falls silent."""

    start_timeout_seconds: PositiveFloat = 1800.0
    """A rank may give no sign of life for so long before its first update is done (indexes, weights, compilation), and
    when all is done."""
    step_timeout_seconds: PositiveFloat = 600.0
    """The same in between; more than any step or checkpoint takes."""
    node_timeout_seconds: PositiveFloat = 60.0
    """A node may be silent for so long."""
    min_nodes: PositiveInt | None = None
    """Fewest nodes to go on with after others were lost; null: all of them, so that a lost one requeues the job."""
    max_restarts: NonNegativeInt = 10
    """Restarts in a row without a new checkpoint in between; after them the job ends."""
    max_same_step: Annotated[int, Field(ge=2)] = 3
    """The job ends when it has failed so many times in a row at the same step."""

    @property
    def longest_wait_seconds(self) -> float:
        """After which a collective gives up by itself: later than the launcher, which knows who is to blame."""
        return 1.2 * max(self.start_timeout_seconds, self.step_timeout_seconds)


class ProfileConfig(Section):
    """A look at where time and memory go."""

    start_step: PositiveInt | None = None
    """First step, as rows count them, of which rank 0 writes a trace; null: none."""
    num_steps: PositiveInt = 3
    """Steps that are traced."""
    memory_history: bool = False
    """Remember allocations with their stacks, for the snapshot that a GPU which runs out of memory leaves; slower."""


# ----------------------------------------------------------------------------------------------------------------- run


class RunConfig(Section):
    """Everything that defines a run."""

    run_dir: FilePath
    """Folder of the run: config, metrics, log, checkpoints. A run in it is continued."""
    seed: NonNegativeInt = 0
    """Of initial weights, data order, crops and dropped patches."""
    model: ModelConfig = ModelConfig()
    loss: Loss = InfoNceConfig()
    init: InitConfig = InitConfig()
    data: DataConfig
    train: TrainConfig
    optim: Optim = LambConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: Engine = TorchEngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()
    eval: EvalConfig = EvalConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _go_on_with_own_tokenizer(cls, given: Any) -> Any:
        """A run that has a checkpoint goes on with its copy of the tokenizer where the original is gone."""
        text: Any = given
        for key in ("model", "text"):
            text = cast("Mapping[str, Any]", text).get(key) if isinstance(text, Mapping) else None
        path, run_dir = path_in(text, "tokenizer"), path_in(given, "run_dir")
        if path is None or run_dir is None or Path(path).exists():
            return given
        own = Path(run_dir) / TOKENIZER
        if not (own.exists() and complete(own.parent / "checkpoints")):
            return given
        return {**given, "model": {**given["model"], "text": {**text, "tokenizer": str(own)}}}

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        problems = list(_disagreements(self))
        if problems:
            raise ValueError("\n".join(problems))  # reported one by one
        return self


def _disagreements(run: RunConfig) -> list[str]:
    """Rules between sections: what is refused, why, and what to do."""
    found: list[str] = []
    batch, slots = run.train.global_batch, run.data.slots
    if slots is not None and batch % slots:
        found.append(f"data.slots {slots} does not divide train.global_batch {batch}")
    warmup, cooldown = run.schedule.warmup(batch), run.schedule.cooldown(batch)
    if warmup + cooldown >= run.train.steps:
        what = f"schedule.warmup_steps {warmup}" + (f" and cooldown_steps {cooldown}" if cooldown else "")
        found.append(f"{what} {'leave' if cooldown else 'leaves'} nothing of train.steps {run.train.steps}")
    if isinstance(run.optim, LambConfig) and run.optim.trust_ratio == "decayed" and not _decays(run.optim):
        found.append(
            "optim.name lamb with optim.trust_ratio decayed and no weight decay would be plain Adam; "
            "set optim.trust_ratio=all, or optim.name=adamw"
        )
    if isinstance(run.engine, DeepSpeedEngineConfig) and run.engine.zero_stage == 3 and run.train.compile:
        found.append(
            "train.compile breaks ZeRO-3's fetching of parameters block by block; "
            "use engine.zero_stage=2 or train.compile=false"
        )
    found.extend(_freeze_problems(run))
    if run.profile.start_step and run.profile.start_step > run.train.steps:
        found.append(f"profile.start_step {run.profile.start_step} lies behind train.steps {run.train.steps}")
    taken = [name for name in run.eval.datasets if f"{name}.ema" in run.eval.datasets]
    if run.optim.ema_decay and taken:
        found.append(f"eval.datasets has {taken[0]}.ema, the name of {taken[0]} under optim.ema_decay; rename it")
    if run.eval.every_steps and not run.eval.datasets:
        found.append("eval.every_steps is set, but eval.datasets is empty")
    if run.checkpoint.keep_best:
        found.extend(_best_problems(run, run.checkpoint.keep_best))
    return found


def _freeze_problems(run: RunConfig) -> list[str]:
    """What is frozen but is not there, must learn, or would stay random."""
    found: list[str] = []
    image = (
        run.model.image.depth if isinstance(run.model.image, ImageTowerConfig) else None
    )  # timm's is known when built
    towers = (("image", image, run.init.image), ("text", run.model.text.depth, run.init.text))
    for (name, depth, weights), freeze in zip(towers, run.optim.frozen, strict=True):
        if freeze != "all" and depth is not None and freeze > depth:
            found.append(
                f"optim.{name}.freeze {freeze} is more than the {depth} blocks of the {name} tower; "
                f"give at most {depth}, or all"
            )
        if freeze and not (weights or run.init.model):
            found.append(
                f"optim.{name}.freeze {freeze} would freeze weights drawn at random; give init.{name} or init.model"
            )
    if run.optim.frozen == ("all", "all"):
        found.append("optim.image.freeze all and optim.text.freeze all leave nothing to learn; lower one of them")
    return found


def _best_problems(run: RunConfig, best: str) -> list[str]:
    """Why no checkpoint would ever hold a value of the metric ``best``."""
    sets = {name: entry.task for name, entry in run.eval.datasets.items()}
    if run.optim.ema_decay:
        sets |= {f"{name}.ema": task for name, task in sets.items()}
    known = [f"eval/{name}/{value}" for name, task in sets.items() for value in EVAL_METRICS[task]]
    if best not in known:
        return [f"checkpoint.keep_best {best} is no metric of eval.datasets; there are {', '.join(known) or 'none'}"]
    saves, evaluations = run.checkpoint.every_steps, run.eval.every_steps
    if evaluations is None or (saves % evaluations and evaluations % saves):
        return [
            f"checkpoint.keep_best needs checkpoints at steps that are evaluated: one of checkpoint.every_steps "
            f"{saves} and eval.every_steps {evaluations} must be a multiple of the other"
        ]
    return []


def _decays(optim: OptimConfig) -> bool:
    """Whether any tower that learns has weight decay."""
    own = [tower.weight_decay for tower in (optim.image, optim.text) if tower.freeze != "all"]
    return any(optim.weight_decay if decay is None else decay for decay in own)
