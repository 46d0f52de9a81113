"""The training loop: read it top to bottom."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaclip.accounting import Accounting
from evaclip.accumulation import forward_backward
from evaclip.anomalies import Anomalies
from evaclip.config import DeepSpeedEngineConfig, RunConfig
from evaclip.distributed import Ranks, agreed, started
from evaclip.errors import DataError, EvaclipError, OutOfMemoryError, TrainingStoppedError, writing
from evaclip.evaluation import evaluate, format_table, write_results
from evaclip.history import History, append_rows, cut_rows
from evaclip.memory import advice, is_out_of_memory
from evaclip.meter import Meter, peak_memory_gib
from evaclip.metrics import Clock, peak_tflops
from evaclip.models.flops import forward_flops
from evaclip.optim.schedule import learning_rate_factor, learning_rates
from evaclip.preemption import StopRequest, listening
from evaclip.progress import Progress
from evaclip.run import Run, open_run
from evaclip.tracking import Tracker

if TYPE_CHECKING:
    from evaclip.data.batch import Batch
    from evaclip.loss import LossOutput

log = logging.getLogger(__name__)

_MOST_NAMES = 16  # samples of a skipped step that are named


def train(config: RunConfig) -> None:
    """Train from the configuration's first step, or from the newest checkpoint in its run directory.

    Raises:
        EvaclipError: With a message for the user.
    """
    with started(need_group=isinstance(config.engine, DeepSpeedEngineConfig)) as ranks:
        train_on(ranks, config)


def train_on(ranks: Ranks, config: RunConfig) -> None:
    """The same on ranks that have met already."""
    run = None
    try:
        with listening(ranks) as stop:
            run = open_run(config, ranks)
            with _reporting(run) as report:
                _loop(run, report, stop)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _out_of_memory(error, config, run, ranks) from error


def _out_of_memory(error: BaseException, config: RunConfig, run: Run | None, ranks: Ranks) -> OutOfMemoryError:
    """What to change; a micro-batch that ``auto`` found counts as if it had been given."""
    if run:
        found = -(-config.train.global_batch // (ranks.world_size * run.num_micro_batches))
        config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": found})})
    what = str(error).strip().splitlines() or [type(error).__name__]
    on_gpu = ranks.device.type == "cuda"
    if on_gpu and (isinstance(error, MemoryError) or "DefaultCPUAllocator" in what[0]):
        lines = [
            "data.workers to fewer, each of which holds batches",
            "engine.offload_optimizer to false, if it is true",
        ]
        return OutOfMemoryError("\n  ".join([f"the host ran out of memory ({what[0]}); change one of these:", *lines]))
    lines = [*advice(config, ranks.world_size, on_gpu=on_gpu), "eval.batch, if this was an evaluation"]
    text = f"rank {ranks.rank} ran out of memory ({what[0]}); change one of these:"
    return OutOfMemoryError("\n  ".join([text, *lines]))


def _loop(run: Run, report: Report, stop: StopRequest) -> None:
    config, engine, ranks = run.config, run.engine, run.ranks
    steps, schedule = config.train.steps, config.schedule
    if run.step >= steps:
        log.info("%s is complete at step %d; raise train.steps to go on", run.directory, run.step)
    if run.step == 0 and config.eval.at_start and config.eval.datasets:
        report.evaluation(run)
    batches = iter(run.stream())
    while run.step < steps:
        with report.clock.waiting():
            delivery = next(batches)
        micro_batches = [batch.to(ranks.device, non_blocking=True) for batch in delivery.micro_batches]
        factor = learning_rate_factor(
            run.step, steps=steps, warmup_steps=schedule.warmup_steps, final_fraction=schedule.final_fraction
        )

        output = forward_backward(engine, run.loss, micro_batches, ranks)
        engine.step(factor, output.loss)

        run.step += 1
        run.slot_states = delivery.states
        run.skipped += delivery.skipped
        report.step(run, micro_batches, output)
        asked = stop.agreed()
        last = run.step == steps
        if run.step % config.log.every_steps == 0 or last:
            report.publish(run, factor)
        due = config.eval.datasets and (last or run.step % (config.eval.every_steps or steps) == 0)
        if due and asked and not last:  # whoever asks may not wait for minutes before all is saved
            log.info("asked to stop: the evaluation at step %d is left out; evaclip evaluate does it", run.step)
        elif due:
            try:
                report.evaluation(run)
            except EvaclipError:
                report.checkpoint(run, final=True)  # an evaluation set that is gone costs no training
                raise
        if run.step % config.checkpoint.every_steps == 0 or last or asked:
            report.checkpoint(run, final=last or asked > 0)
        if asked and not last:
            raise TrainingStoppedError(
                f"stopped by {signal.Signals(asked).name} after step {run.step}, which is saved; "
                f"the same command continues from there",
                can_continue=True,
            )


# ------------------------------------------------------------------------------------------------------------ reporting


@dataclass
class Report:
    """What the loop tells the world: metrics, results, checkpoints. Files and W&B are the main rank's alone."""

    meter: Meter
    anomalies: Anomalies
    accounting: Accounting
    clock: Clock
    progress: Progress | None
    history: History | None
    tracker: Tracker | None
    evaluated: dict[str, float]
    """Results at the current step, for the checkpoint."""
    committed: int | None = None
    """Step up to which W&B was told the rows of this session."""

    def step(self, run: Run, micro_batches: Sequence[Batch], output: LossOutput) -> None:
        """Count one step; nothing here waits for the device."""
        tokens = sum(batch.text.tokens_per_caption * len(batch.images) for batch in micro_batches)
        tokens /= sum(len(batch.images) for batch in micro_batches)
        optimizer = run.engine.optimizer
        self.evaluated = {}
        self.anomalies.step(run.step, micro_batches, output)
        self.meter.update(
            {
                "train/loss": output.loss,
                "train/accuracy_image_to_text": output.image_to_text,
                "train/accuracy_text_to_image": output.text_to_image,
                "train/grad_norm": optimizer.grad_norm,
                "train/skipped_steps": (optimizer.consecutive_skips > 0).long(),
                "train/consecutive_skips": optimizer.consecutive_skips,
                "data/text_tokens": output.loss.new_full((), tokens),
            }
        )
        if self.progress:
            self.progress.advance(run.step)

    def publish(self, run: Run, factor: float) -> None:
        """Publish a row: the one place in the loop that waits for the device."""
        config, optimizer = run.config, run.engine.optimizer
        scalars: dict[str, Tensor] = {"train/logit_scale": run.loss.logit_scale.detach().exp()}
        if run.loss.logit_bias is not None:
            scalars["train/logit_bias"] = run.loss.logit_bias.detach()
        if len(optimizer.trust_ratios):
            levels = torch.tensor([0.05, 0.5, 0.95], device=run.ranks.device)
            quantiles = optimizer.trust_ratios.quantile(levels)
            scalars |= dict(zip((f"train/trust_ratio_p{p}" for p in (5, 50, 95)), quantiles, strict=True))
        self.meter.update(scalars)
        values = self.meter.publish()
        self.accounting.collect(run)
        kept = config.model.image.kept_patches
        flops = 3 * forward_flops(config.model, values["data/text_tokens"], kept=kept)
        values |= self.clock.publish(samples=run.samples, flops_per_sample=flops)
        values |= peak_memory_gib(run.ranks.device)
        values |= learning_rates(config.optim, factor)
        values |= self.accounting.metrics()
        with agreed(run.ranks), writing(f"run_dir {run.directory}"):
            if self.history and self.progress:
                self.progress.publish(self.history.write(run.step, run.samples, values))
                self.commit(run)
        self._tell_anomalies(run)
        try:
            self.accounting.require_few_bad(config.data.max_bad_fraction)
        except DataError:  # on all ranks, after a step that is complete: a higher limit goes on from here
            self.checkpoint(run, final=True)
            raise
        most = config.train.max_consecutive_skipped_steps
        if values["train/consecutive_skips"] >= most:
            raise TrainingStoppedError(
                f"the last {values['train/consecutive_skips']:.0f} updates were skipped because loss or gradient was "
                f"not finite (train.max_consecutive_skipped_steps {most}); weights are those of the last one that was "
                f"applied; lower the learning rate or look at the data (skipped_steps.jsonl); if that update broke "
                f"them, remove the newest checkpoints of {run.directory}, and the run goes on from the one before"
            )

    def _tell_anomalies(self, run: Run) -> None:
        """Name samples of skipped steps and tensors that spiked, in the log and in ``skipped_steps.jsonl``."""
        scaled = run.config.train.precision == "fp16"
        rows: list[dict[str, object]] = []
        skipped = self.anomalies.skipped_steps(run.ranks)  # equal on all ranks
        for step in skipped if run.ranks.is_main else ():
            if scaled and step.cause != "feature" and math.isfinite(step.loss):
                log.info(
                    "step %d was skipped: its gradient overflowed in fp16, and the loss scale was halved", step.step
                )
                continue
            names = run.record_names(step.places[:_MOST_NAMES])
            more = f" and {len(step.places) - 3} more" if len(step.places) > 3 else ""
            where = (
                f"the {step.cause} of {', '.join(names[:3])}{more} is not finite" if names else "no sample stands out"
            )
            log.warning("step %d was skipped: loss %.4g, gradient norm %.4g; %s", *step[:3], where)
            row = {"step": step.step, "loss": str(step.loss), "cause": step.cause, "samples": len(step.places)}
            rows.append({**row, "records": names})
        if skipped:
            with agreed(run.ranks), writing(f"run_dir {run.directory}"):
                if rows:
                    append_rows(run.directory / "skipped_steps.jsonl", rows)
        for name, multiple in self.anomalies.spikes().items() if run.ranks.is_main else ():
            what = "loss" if name == "loss" else f"update of {name}"
            log.warning("up to step %d the %s was %.1f times its running value", run.step, what, multiple)

    def evaluation(self, run: Run) -> None:
        """Evaluate on all ranks and publish the results."""
        config = run.config
        with self.clock.paused():
            results = list(
                evaluate(
                    run.engine.towers,
                    run.loss.similarity,
                    config.eval,
                    config.model,
                    run.ranks,
                    workers=config.data.workers,
                    index_dir=config.data.index_dir,
                    max_image_pixels=config.data.max_image_pixels,
                )
            )
            self.evaluated = {name: value for result in results for name, value in result}
            with agreed(run.ranks), writing("evaluation results"):
                if self.history:
                    self.history.write(run.step, run.samples, self.evaluated)
                    write_results(run.directory, results)
                    log.info("evaluation at step %d\n%s", run.step, format_table(results))

    def checkpoint(self, run: Run, *, final: bool) -> None:
        """Save behind the next steps; the rows up to here are final. The final one is waited for."""
        self._tell_anomalies(run)
        self.accounting.collect(run)
        with self.clock.paused():
            with agreed(run.ranks), writing("metrics.jsonl"):
                if self.history:
                    self.history.seal(run.step)
            run.save(self.evaluated, self.meter.state(), final=final)

    def commit(self, run: Run) -> None:
        """Send W&B the rows that a complete checkpoint has made final since the last call."""
        saved = run.writer.newest
        if self.history and self.tracker and saved != self.committed:
            self.tracker.commit(self.history, saved or 0)
            self.committed = saved


@contextmanager
def _reporting(run: Run) -> Generator[Report]:
    """Open history, W&B and progress on the main rank, cut to the restored step, and close them whatever happens."""
    config, ranks = run.config, run.ranks
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""
    meter, anomalies = Meter(ranks.device), Anomalies(run.engine.towers.clip, run.engine.optimizer)
    meter.restore(run.meter_state or {})
    clock = Clock(samples=run.samples, num_ranks=ranks.world_size, peak_tflops=peak_tflops(gpu))
    with ExitStack() as cleanup:
        report = Report(meter, anomalies, Accounting(run), clock, None, None, None, {})
        with agreed(ranks), writing(f"run_dir {run.directory}"):
            if ranks.is_main:
                report.history = History(run.directory / "metrics.jsonl")
                cleanup.callback(report.history.close)
                restored = -1 if run.meter_state is None else run.step
                report.history.truncate(restored)
                cut_rows(run.directory / "skipped_steps.jsonl", restored)
                resolved = config.model_dump(mode="json")
                report.tracker = Tracker(run.directory, config.log.wandb, resolved, report.history)
                report.progress = Progress(steps=config.train.steps, step=run.step)
                cleanup.callback(report.progress.close)
        exit_code = 1
        try:
            yield report
            for line in report.accounting.lines() if ranks.is_main else ():
                log.info("%s", line)
            exit_code = 0
        except TrainingStoppedError as stopped:
            exit_code = int(not stopped.can_continue)
            raise
        finally:
            run.writer.leave()
            report.commit(run)
            if report.tracker:
                report.tracker.finish(exit_code)
