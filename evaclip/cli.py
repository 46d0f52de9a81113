"""The command line: ``evaclip train | evaluate | config | models``."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaclip import config_file
from evaclip.config import EvalConfig
from evaclip.errors import ConfigError, EvaclipError, TrainingStoppedError
from evaclip.logs import log_error

_STOPPED = 75  # EX_TEMPFAIL: interrupted, saved, to be continued


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; an ``EvaclipError`` is printed without a stack trace and ends with a non-zero code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except EvaclipError as error:
        if options.debug:
            raise
        rank = os.environ.get("RANK", "0")
        log_error(str(error))
        if rank == "0" or not (error.on_all_ranks or isinstance(error, TrainingStoppedError)):
            print(f"{'' if rank == '0' else f'[rank {rank}] '}error: {error}", file=sys.stderr)
        sys.stderr.flush()
        sys.exit(_STOPPED if isinstance(error, TrainingStoppedError) and error.can_continue else 1)


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("evaclip", description="Train CLIP encoders that start from MIM weights.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    options = "every option, to be set in CONFIG or as section.key=value:\n\n" + config_file.help_text()
    train = commands.add_parser(
        "train", help="train, or continue the run in run_dir", epilog=options, formatter_class=shape, parents=[shared]
    )
    show = commands.add_parser("config", help="print the resolved configuration", parents=[shared])
    for command in (train, show):
        command.add_argument("config", metavar="CONFIG", help="YAML file")
        command.add_argument("overrides", metavar="section.key=value", nargs="*", help="options that override the file")
    train.set_defaults(run=_train)
    show.set_defaults(run=_show)

    evaluate = commands.add_parser("evaluate", help="measure a checkpoint", parents=[shared])
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="run directory or checkpoint")
    evaluate.add_argument("--dataset", metavar="PATH", help="folder or shards; default: the run's own datasets")
    evaluate.add_argument("--task", choices=("zero_shot", "retrieval", "loss"), help="default: zero_shot")
    evaluate.add_argument("--split", help="split of a CLIP_benchmark folder (default: test)")
    evaluate.add_argument("--class-names", metavar="FILE", help="one class name per line")
    evaluate.add_argument("--templates", metavar="FILE", help="one template per line, {c} stands for the name")
    evaluate.add_argument("--limit", type=_positive, help="only the first records of each dataset")
    evaluate.add_argument("--batch", type=_positive, help="images per rank and forward pass")
    evaluate.add_argument(
        "--precision", choices=("bf16", "fp16", "fp32"), help="default: the run's; fp32 for bf16_weights"
    )
    evaluate.add_argument("--output", metavar="DIR", help="write evaluation.json and predictions there")
    evaluate.set_defaults(run=_evaluate)

    models = commands.add_parser("models", help="list the named models, their size and their cost", parents=[shared])
    models.add_argument("name", metavar="NAME", nargs="?", help="only this one, or other tools' name of it")
    models.add_argument("--ranks", type=_positive, default=8, help="over which ZeRO shards (default: %(default)s)")
    models.add_argument("--token-drop", type=_share, default=0.5, help="of patches in training (default: %(default)s)")
    models.set_defaults(run=_models)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not an integer above 0")
    return int(text)


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


def _show(options: argparse.Namespace) -> None:
    print(config_file.dump(config_file.load(options.config, options.overrides)), end="")


def _models(options: argparse.Namespace) -> None:
    from evaclip.listing import listing  # noqa: PLC0415  as above

    print(listing(options.name, ranks=options.ranks, token_drop=options.token_drop))


def _evaluate(options: argparse.Namespace) -> None:
    if not options.dataset and (options.task or options.split or options.class_names or options.templates):
        raise ConfigError("--task, --split, --class-names and --templates describe a --dataset, which is missing")
    if options.task in ("retrieval", "loss") and (options.class_names or options.templates):
        raise ConfigError(f"--class-names and --templates are for --task zero_shot, not for {options.task}")
    datasets = _datasets(options) if options.dataset else None
    from evaclip.evaluation.command import evaluate_checkpoint  # noqa: PLC0415  as above

    evaluate_checkpoint(
        Path(options.checkpoint),
        datasets,
        limit=options.limit,
        batch=options.batch,
        precision=options.precision,
        output=Path(options.output) if options.output else None,
    )


def _datasets(options: argparse.Namespace) -> dict[str, Any]:
    """The one dataset that the command line describes, under its folder's name."""
    fields: dict[str, object] = {"task": options.task or "zero_shot", "path": options.dataset}
    fields |= {"split": options.split} if options.split else {}
    if fields["task"] == "zero_shot":
        fields |= {"class_names": options.class_names, "templates": options.templates}
    name = re.sub(r"[^\w.-]", "_", Path(options.dataset).name.partition(".")[0]).lstrip(".-") or "dataset"
    return config_file.validate({"datasets": {name: fields}}, "evaluate", EvalConfig).datasets
