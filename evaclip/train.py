"""The training loop: read it top to bottom."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaclip.accounting import Accounting
from evaclip.accumulation import forward_backward
from evaclip.alerts import Alarms, Alert, ending
from evaclip.anomalies import Anomalies
from evaclip.config import DeepSpeedEngineConfig, RunConfig
from evaclip.distributed import Ranks, agreed, started
from evaclip.errors import (
    DataError,
    EvaclipError,
    InterruptedEvaluationError,
    OutOfMemoryError,
    TrainingStoppedError,
    writing,
)
from evaclip.evaluation import Result, evaluate, format_table, write_results
from evaclip.heartbeat import beat
from evaclip.history import History, append_rows, cut_rows
from evaclip.memory import advice, is_out_of_memory
from evaclip.meter import Meter, peak_memory_gib
from evaclip.metrics import Clock, peak_tflops
from evaclip.models.flops import training_flops
from evaclip.node_meter import NodeMeter
from evaclip.optim.schedule import Schedule, learning_rates
from evaclip.pace import Pace, RankPace, Stragglers, write_ranks
from evaclip.preemption import StopRequest, listening
from evaclip.profiler import Profiler, dump_memory, record_memory
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
    beat("start")
    need_group = isinstance(config.engine, DeepSpeedEngineConfig)
    with started(need_group=need_group, timeout_seconds=config.cluster.longest_wait_seconds) as ranks:
        train_on(ranks, config)


def train_on(ranks: Ranks, config: RunConfig) -> None:
    """The same on ranks that have met already."""
    run = None
    beat("start")
    try:
        record_memory(config.profile, ranks.device)
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
    text = "\n  ".join([f"rank {ranks.rank} ran out of memory ({what[0]}); change one of these:", *lines])
    if on_gpu and (snapshot := dump_memory(Path(config.run_dir), ranks)):
        text += f"\nwhat lay in its memory then is in {snapshot}, which pytorch.org/memory_viz shows"
    return OutOfMemoryError(text)


def _loop(run: Run, report: Report, stop: StopRequest) -> None:
    config, engine, ranks = run.config, run.engine, run.ranks
    steps, schedule = config.train.steps, Schedule.of(config)
    if run.step >= steps:
        log.info("%s is complete at step %d; raise train.steps to go on", run.directory, run.step)
    if run.step == 0 and config.eval.at_start and config.eval.datasets:
        report.evaluation(run, stop)
    batches = iter(run.stream())
    while run.step < steps:
        beat("data", run.step)
        report.profiler.begin(run.step + 1)
        with report.clock.waiting():
            delivery = next(batches)
        report.pace.begin()
        micro_batches = [batch.to(ranks.device, non_blocking=True) for batch in delivery.micro_batches]
        factor = schedule.factor(run.step)

        beat("forward")
        output = forward_backward(engine, run.loss, micro_batches, ranks)
        beat("update")
        engine.step(factor, output.loss)

        run.step += 1
        beat("metrics", run.step)
        run.slot_states = delivery.states
        run.skipped += delivery.skipped
        report.step(run, micro_batches, output)
        asked = stop.agreed()
        last = run.step == steps
        if run.step % config.log.every_steps == 0 or last:
            report.publish(run, factor)
        due = config.eval.datasets and (last or run.step % (config.eval.every_steps or steps) == 0)
        if due:
            try:
                report.evaluation(run, None if last else stop)  # nothing would make up for the last one
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
    pace: Pace
    node: NodeMeter
    alarms: Alarms
    profiler: Profiler
    stragglers: Stragglers = field(default_factory=Stragglers)
    progress: Progress | None = None
    history: History | None = None
    tracker: Tracker | None = None
    evaluated: dict[str, float] = field(default_factory=dict)
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
        with self.clock.paused():
            self.profiler.end(run.step)

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
        flops = training_flops(config.model, values["data/text_tokens"], frozen=config.optim.frozen)
        values |= self.clock.publish(samples=run.samples, flops_per_sample=flops)
        values |= peak_memory_gib(run.ranks.device)
        values |= learning_rates(config.optim, factor)
        values |= self.accounting.metrics()
        values |= self.node.publish()
        paces = self.pace.publish(values, config.train.global_batch)
        with agreed(run.ranks), writing(f"run_dir {run.directory}"):
            if self.history and self.progress:
                self.progress.publish(self.history.write(run.step, run.samples, values))
                write_ranks(run.directory / "ranks.json", run.step, paces)
                self.commit(run)
        self._warn(run, values["train/consecutive_skips"], paces)
        self._tell_anomalies(run)
        try:
            self.accounting.require_few_bad(config.data.max_bad_fraction)
        except DataError as error:  # on all ranks, after a step that is complete: a higher limit goes on from here
            self.checkpoint(run, final=True)
            raise TrainingStoppedError(str(error)) from error  # and no launcher may try again
        most = config.train.max_consecutive_skipped_steps
        if values["train/consecutive_skips"] >= most:
            raise TrainingStoppedError(
                f"the last {values['train/consecutive_skips']:.0f} updates were skipped because loss or gradient was "
                f"not finite (train.max_consecutive_skipped_steps {most}); weights are those of the last one that was "
                f"applied; lower the learning rate or look at the data (skipped_steps.jsonl); if that update broke "
                f"them, remove the newest checkpoints of {run.directory}, and the run goes on from the one before"
            )

    def _warn(self, run: Run, consecutive_skips: float, paces: Sequence[RankPace]) -> None:
        """Name ranks that have become slow, and alert whoever does not look."""
        if not self.tracker:
            return
        for alert in self.alarms.row(run.step, consecutive_skips, self.accounting.accounts):
            self.tracker.alert(alert)
        for text in self.stragglers.judge(paces):
            log.warning("%s", text)
            self.tracker.alert(Alert("a rank is slow", text))

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

    def evaluation(self, run: Run, stop: StopRequest | None) -> None:
        """Evaluate on all ranks and publish the results; give way to a request to stop, if there may be one."""
        beat("evaluation")
        try:
            self._evaluate(run, stop.give_way if stop else lambda: None)
        except InterruptedEvaluationError:  # whoever asks may not wait for minutes before all is saved
            log.info("asked to stop: the evaluation at step %d is left out; evaclip evaluate does it", run.step)

    def _evaluate(self, run: Run, give_way: Callable[[], None]) -> None:
        with self.clock.paused():
            with agreed(run.ranks):
                give_way()
            results = _measure(run, give_way)
            if run.config.optim.ema_decay and run.step:  # before the first step it is the weights
                with _averaged(run):
                    found = _measure(run, give_way)
                results += [replace(result, name=f"{result.name}.ema") for result in found]
            self.evaluated = {name: value for result in results for name, value in result}
            with agreed(run.ranks), writing("evaluation results"):
                if self.history:
                    self.history.write(run.step, run.samples, self.evaluated)
                    write_results(run.directory, results)
                    log.info("evaluation at step %d\n%s", run.step, format_table(results))

    def checkpoint(self, run: Run, *, final: bool) -> None:
        """Save behind the next steps; the rows up to here are final. The final one is waited for."""
        beat("checkpoint")
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


def _measure(run: Run, give_way: Callable[[], None]) -> list[Result]:
    config = run.config
    results = evaluate(
        run.engine.towers,
        run.loss.similarity,
        config.eval,
        config.model,
        run.ranks,
        workers=config.data.workers,
        index_dir=config.data.index_dir,
        max_image_pixels=config.data.max_image_pixels,
        between=give_way,
    )
    return list(results)


@contextmanager
def _averaged(run: Run) -> Generator[None]:
    """With the averaged weights in the place of the weights; they stay there where one rank alone fails."""

    def swap() -> None:
        run.engine.optimizer.swap_ema()
        run.engine.refresh_weights()  # under ZeRO-3 all ranks take part

    swap()
    try:
        yield
    except BaseException as error:
        if run.ranks.world_size == 1 or (isinstance(error, EvaclipError) and error.on_all_ranks):
            swap()
        raise
    swap()


@contextmanager
def _reporting(run: Run) -> Generator[Report]:
    """Open history, W&B and progress on the main rank, cut to the restored step, and close them whatever happens."""
    config, ranks = run.config, run.ranks
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""
    meter, anomalies = Meter(ranks.device), Anomalies(run.engine.towers.clip, run.engine.optimizer)
    meter.restore(run.meter_state or {})
    clock = Clock(samples=run.samples, num_ranks=ranks.world_size, peak_tflops=peak_tflops(gpu))
    sharded = isinstance(config.engine, DeepSpeedEngineConfig) and config.engine.zero_stage == 3
    pace = Pace(run.loss, ranks, sharded=sharded)
    with ExitStack() as cleanup:
        node, alarms = NodeMeter(ranks, pace.nodes), Alarms(config, continued=run.step > 0)
        profiler = Profiler(config.profile, run.directory, config.train.steps, ranks)
        cleanup.callback(profiler.close)
        report = Report(meter, anomalies, Accounting(run), clock, pace, node, alarms, profiler)
        with agreed(ranks), writing(f"run_dir {run.directory}"):
            if ranks.is_main:
                report.history = History(run.directory / "metrics.jsonl")
                cleanup.callback(report.history.close)
                restored = -1 if run.meter_state is None else run.step
                report.history.truncate(restored)
                cut_rows(run.directory / "skipped_steps.jsonl", restored)
                resolved = config.model_dump(mode="json")
                report.tracker = Tracker(run.directory, config.log.wandb, resolved, report.history)
                report.tracker.alert_restarts()
                report.progress = Progress(steps=config.train.steps, step=run.step)
                cleanup.callback(report.progress.close)
        exit_code = 1
        try:
            yield report
            for line in report.accounting.lines() if ranks.is_main else ():
                log.info("%s", line)
            exit_code = 0
        except EvaclipError as error:
            exit_code = int(not (isinstance(error, TrainingStoppedError) and error.can_continue))
            if report.tracker:
                report.tracker.alert(ending(error))
            raise
        finally:
            if exit_code == 0:  # else the last sign of life tells where it failed
                beat("end")
            run.writer.leave()
            report.commit(run)
            if report.tracker:
                if run.step == config.train.steps and exit_code == 0:
                    report.tracker.log_checkpoints(run.directory / "checkpoints", config.checkpoint)
                report.tracker.finish(exit_code)
