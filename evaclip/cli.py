"""The command line: ``evaclip COMMAND``; ``evaclip --help`` lists them."""

from __future__ import annotations

import argparse
import math
import os
import re
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaclip import config_file
from evaclip.config import EvalConfig, SuiteConfig
from evaclip.errors import ConfigError, EvaclipError, RunLockedError, TrainingStoppedError
from evaclip.logs import log_error


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; an ``EvaclipError`` is printed without a stack trace and ends with a non-zero code."""
    try:
        try:
            _run(_parser().parse_args(arguments))
        finally:
            sys.stdout.flush()  # at the interpreter's end nothing could be done about a pipe that is closed
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        sys.exit(128 + signal.SIGPIPE)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has gone, as that of ``| head``."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(options: argparse.Namespace) -> None:
    try:
        options.run(options)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except EvaclipError as error:
        if options.debug:
            raise
        rank = os.environ.get("RANK", "0")
        log_error(str(error))
        watched = "EVACLIP_NODE" in os.environ  # by a launcher that tells of one rank what any of them says
        if rank == "0" or watched or not (error.on_all_ranks or isinstance(error, TrainingStoppedError)):
            print(f"{'' if rank == '0' else f'[rank {rank}] '}error: {error}", file=sys.stderr)
        sys.stderr.flush()
        sys.exit(_exit_code(error))


def _exit_code(error: EvaclipError) -> int:
    """What a launcher has to know: whether the same command continues, would fail again, or may be tried again."""
    if isinstance(error, TrainingStoppedError):
        return os.EX_TEMPFAIL if error.can_continue else os.EX_CONFIG
    return os.EX_CONFIG if isinstance(error, ConfigError) and not isinstance(error, RunLockedError) else 1


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    parser = argparse.ArgumentParser("evaclip", description="Train CLIP encoders that start from MIM weights.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_training(commands, shared)
    _add_watching(commands, shared)
    _add_models(commands, shared)
    return parser


def _add_training(commands: Any, shared: argparse.ArgumentParser) -> None:
    options = "every option, to be set in CONFIG or as section.key=value:\n\n" + config_file.help_text()
    train = commands.add_parser(
        "train",
        help="train, or continue the run in run_dir",
        epilog=options,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared],
    )
    show = commands.add_parser("config", help="print the resolved configuration", parents=[shared])
    launch = commands.add_parser("launch", help="train on a cluster: what launch/slurm.sh runs", parents=[shared])
    preflight = commands.add_parser("preflight", help="check the nodes that a launcher started", parents=[shared])
    inspect = commands.add_parser("inspect", help="draw and count what training is fed, from step 1", parents=[shared])
    for command in (train, show, launch, preflight, inspect):
        command.add_argument("config", metavar="CONFIG", help="YAML file")
        command.add_argument("overrides", metavar="section.key=value", nargs="*", help="options that override the file")
    train.set_defaults(run=_train)
    show.set_defaults(run=_show)
    launch.add_argument("--local", type=_positive, metavar="RANKS", help="so many ranks on this machine, no SLURM")
    launch.add_argument("--only-preflight", action="store_true", help="check the nodes, and start nothing else")
    launch.add_argument("--dry-run", action="store_true", help="say what would be started, and start nothing")
    launch.add_argument("--new-code", action="store_true", help="after a requeue, too, run the code as it is then")
    launch.set_defaults(run=_launch)
    preflight.set_defaults(run=_preflight)
    inspect.add_argument("--batches", type=_positive, default=8, help="steps to be read (default: %(default)s)")
    inspect.add_argument("--samples", type=_positive, default=24, help="of them to be drawn (default: %(default)s)")
    inspect.add_argument(
        "--output", metavar="FILE", type=Path, default=Path("inspect.png"), help="PNG (default: %(default)s)"
    )
    inspect.set_defaults(run=_inspect)


def _add_watching(commands: Any, shared: argparse.ArgumentParser) -> None:
    status = commands.add_parser(
        "status", help="how a run is, from its files alone; needs no GPU and no torch", parents=[shared]
    )
    status.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="run directory")
    status.add_argument(
        "--watch",
        metavar="SECONDS",
        type=_seconds,
        nargs="?",
        const=5.0,
        help="show it again every SECONDS (default: 5) until the run has ended; Ctrl-C leaves with code 0",
    )
    status.add_argument("--json", action="store_true", help="one JSON object, whose keys docs/watching.md names")
    status.set_defaults(run=_status)

    plot = commands.add_parser("plot", help="draw the curves of runs into a PNG", parents=[shared])
    plot.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="run directories, one colour each")
    plot.add_argument(
        "--metric",
        metavar="NAME",
        nargs="+",
        action="extend",
        help="only these metrics, a panel each, such as train/loss; default: loss, accuracies, temperature, gradient "
        "norm, learning rates, speed, data wait, evaluation results",
    )
    plot.add_argument(
        "--by",
        choices=("step", "samples", "hours"),
        default="step",
        help="what runs are compared by (default: %(default)s); hours are those of training: samples over "
        "samples/s, so that evaluations, checkpoints and down time do not count",
    )
    plot.add_argument(
        "--output", metavar="FILE", type=Path, default=Path("plot.png"), help="PNG to be written (default: %(default)s)"
    )
    plot.set_defaults(run=_plot)


def _add_models(commands: Any, shared: argparse.ArgumentParser) -> None:
    evaluate = commands.add_parser("evaluate", help="measure a checkpoint", parents=[shared])
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="run directory, checkpoint, or an export")
    evaluate.add_argument("--suite", metavar="FILE", help="YAML file that names many sets, as configs/suites/*.yaml")
    evaluate.add_argument("--dataset", metavar="PATH", help="folder or shards; default: the run's own datasets")
    evaluate.add_argument(
        "--task", choices=("zero_shot", "linear_probe", "retrieval", "loss"), help="default: zero_shot"
    )
    evaluate.add_argument("--split", help="split of a CLIP_benchmark folder (default: test)")
    evaluate.add_argument("--shots", type=_positive, help="linear_probe on so many images per class (default: all)")
    evaluate.add_argument("--class-names", metavar="FILE", help="one class name per line")
    evaluate.add_argument("--templates", metavar="FILE", help="one template per line, {c} stands for the name")
    evaluate.add_argument("--limit", type=_positive, help="only the first records of each dataset")
    evaluate.add_argument("--batch", type=_positive, help="images per rank and forward pass")
    evaluate.add_argument(
        "--precision", choices=("bf16", "fp16", "fp32"), help="default: the run's; fp32 for bf16_weights"
    )
    evaluate.add_argument(
        "--output", metavar="DIR", help="write evaluation.json and predictions there; of a suite, table and plot"
    )
    evaluate.add_argument("--ema", action="store_true", help="measure averaged weights (optim.ema_decay)")
    evaluate.set_defaults(run=_evaluate)

    embed = commands.add_parser(
        "embed", help="image and text features of whole shard sets, as clip-retrieval reads them", parents=[shared]
    )
    embed.add_argument("model", metavar="MODEL", type=Path, help="run directory, checkpoint, or an export")
    embed.add_argument("shards", metavar="SHARDS", nargs="+", help="tars, with brace ranges such as {00000..00099}.tar")
    embed.add_argument(
        "out", metavar="OUT", type=Path, help="folder of the features; the same command adds what is missing there"
    )
    embed.add_argument("--batch", type=_positive, default=256, help="per rank and forward pass (default: %(default)s)")
    embed.add_argument(
        "--workers", type=_positive, default=4, help="processes per rank that read and decode (default: %(default)s)"
    )
    embed.add_argument("--precision", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 without one")
    embed.add_argument("--index-dir", metavar="DIR", help="as data.index_dir (default: indexes lie beside the shards)")
    embed.set_defaults(run=_embed)

    export = commands.add_parser("export", help="write a model for other tools", parents=[shared])
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="run directory, checkpoint, or an export")
    export.add_argument("out", metavar="OUT", help="folder to be made")
    export.add_argument(
        "--format",
        choices=("open_clip", "timm", "hf", "eva", "safetensors"),
        default="open_clip",
        help="whose names and configuration: open_clip; timm and Hugging Face's CLIPModel (hf), as far as they can "
        "express the model; EVA's own code; our names in safetensors (default: %(default)s)",
    )
    export.add_argument("--wandb", action="store_true", help="log it as an artifact of the run's W&B run")
    export.add_argument("--ema", action="store_true", help="take averaged weights (optim.ema_decay)")
    export.set_defaults(run=_export)

    between = commands.add_parser("interpolate", help="write the model between two others (WiSE-FT)", parents=[shared])
    between.add_argument("first", metavar="FIRST", help="run directory, checkpoint, or an export")
    between.add_argument("second", metavar="SECOND", help="another one of the same shape, such as the first fine-tuned")
    between.add_argument("out", metavar="OUT", help="folder to be made; evaclip export takes it, too")
    between.add_argument("--share", type=float, default=0.5, help="of the second, 0 to 1 (default: %(default)s)")
    between.set_defaults(run=_interpolate)

    models = commands.add_parser("models", help="list the named models, their size and their cost", parents=[shared])
    models.add_argument("name", metavar="NAME", nargs="?", help="only this one, or other tools' name of it")
    models.add_argument("--ranks", type=_positive, default=8, help="over which ZeRO shards (default: %(default)s)")
    models.add_argument("--token-drop", type=_share, default=0.5, help="of patches in training (default: %(default)s)")
    models.set_defaults(run=_models)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not an integer above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0; --watch stands behind RUN_DIR")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below 1")
    return value


def _train(options: argparse.Namespace) -> None:
    config = config_file.load(options.config, options.overrides)
    from evaclip.train import train  # noqa: PLC0415  torch takes seconds, mistakes should not

    train(config)


def _launch(options: argparse.Namespace) -> None:
    from evaclip.cluster.machines import ThisMachine  # noqa: PLC0415  needed by this command alone
    from evaclip.cluster.slurm import SlurmJob  # noqa: PLC0415
    from evaclip.cluster.supervisor import plan, supervise  # noqa: PLC0415

    config = config_file.load(options.config, options.overrides)
    if options.dry_run:
        in_a_job = "SLURM_JOB_ID" in os.environ
        print(plan(config, ThisMachine(options.local) if options.local else SlurmJob() if in_a_job else None))
        return
    machines = ThisMachine(options.local) if options.local else SlurmJob()
    sys.exit(supervise(config, machines, renew=options.new_code, only_check=options.only_preflight))


def _preflight(options: argparse.Namespace) -> None:
    config = config_file.load(options.config, options.overrides)
    from evaclip.preflight import preflight  # noqa: PLC0415  as above

    preflight(config)


def _inspect(options: argparse.Namespace) -> None:
    config = config_file.load(options.config, options.overrides)
    from evaclip.inspection import inspect  # noqa: PLC0415  as above

    print(inspect(config, batches=options.batches, samples=options.samples, output=options.output))


def _status(options: argparse.Namespace) -> None:
    from evaclip.status.command import status  # noqa: PLC0415  only here

    try:
        for shown in status(options.run_dir, watch=options.watch, as_json=options.json):
            print(shown.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding), flush=True)
    except KeyboardInterrupt:  # how people leave --watch
        if options.watch is None:
            raise


def _plot(options: argparse.Namespace) -> None:
    from evaclip.plot import plot  # noqa: PLC0415  only here

    print(plot(options.run_dirs, options.output, metrics=options.metric, by=options.by))


def _show(options: argparse.Namespace) -> None:
    print(config_file.dump(config_file.load(options.config, options.overrides)), end="")


def _export(options: argparse.Namespace) -> None:
    from evaclip.tracking import log_export, run_of  # noqa: PLC0415  as above
    from evaclip.weights.export import export, usage  # noqa: PLC0415

    if options.wandb:
        run_of(Path(options.checkpoint))  # refused before anything is written
    for path in export(options.checkpoint, Path(options.out), options.format, ema=options.ema):
        print(f"{path.stat().st_size:15,d}  {path}")
    print(usage(options.out, options.format))
    if options.wandb:
        print(log_export(Path(options.checkpoint), Path(options.out), options.format))


def _interpolate(options: argparse.Namespace) -> None:
    from evaclip.weights.export import usage, write  # noqa: PLC0415  as above
    from evaclip.weights.interpolate import interpolate  # noqa: PLC0415

    write(interpolate(options.first, options.second, options.share), Path(options.out), "safetensors")
    print(usage(options.out, "safetensors"))


def _models(options: argparse.Namespace) -> None:
    from evaclip.listing import listing  # noqa: PLC0415  as above

    print(listing(options.name, ranks=options.ranks, token_drop=options.token_drop))


def _evaluate(options: argparse.Namespace) -> None:
    lists = options.class_names or options.templates
    if not options.dataset and (options.task or options.split or options.shots or lists):
        raise ConfigError(
            "--task, --split, --shots, --class-names and --templates describe a --dataset, which is missing"
        )
    if options.task not in (None, "zero_shot") and lists:
        raise ConfigError(f"--class-names and --templates are for --task zero_shot, not for {options.task}")
    if options.task != "linear_probe" and options.shots:
        raise ConfigError(f"--shots is for --task linear_probe, not for {options.task or 'zero_shot'}")
    if options.suite and options.dataset:
        raise ConfigError("--suite names its datasets itself; leave --dataset out")
    datasets = _datasets(options) if options.dataset else None
    suite = config_file.load(options.suite, section=SuiteConfig) if options.suite else None
    from evaclip.evaluation.command import evaluate_checkpoint, evaluate_suite  # noqa: PLC0415  as above

    shared: dict[str, Any] = {key: getattr(options, key) for key in ("limit", "batch", "precision", "ema")}
    shared["output"] = Path(options.output) if options.output else None
    if suite:
        evaluate_suite(Path(options.checkpoint), suite, **shared)
    else:
        evaluate_checkpoint(Path(options.checkpoint), datasets, **shared)


def _embed(options: argparse.Namespace) -> None:
    from evaclip.embed import embed  # noqa: PLC0415  as above

    embed(
        options.model,
        options.shards,
        options.out,
        batch=options.batch,
        workers=options.workers,
        precision=options.precision,
        index_dir=options.index_dir,
    )


def _datasets(options: argparse.Namespace) -> dict[str, Any]:
    """The one dataset that the command line describes, under its folder's name."""
    fields: dict[str, object] = {"task": options.task or "zero_shot", "path": options.dataset}
    fields |= {"split": options.split} if options.split else {}
    fields |= {"shots": options.shots} if options.shots else {}
    if fields["task"] == "zero_shot":
        fields |= {"class_names": options.class_names, "templates": options.templates}
    name = re.sub(r"[^\w.-]", "_", Path(options.dataset).name.partition(".")[0]).lstrip(".-") or "dataset"
    return config_file.validate({"datasets": {name: fields}}, "evaluate", EvalConfig).datasets
