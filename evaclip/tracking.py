"""Weights & Biases: what is sent, when, and what happens after a kill. The only module that imports wandb.

``metrics.jsonl`` is the history of a run; W&B shows a copy. W&B's history can only grow, while ``metrics.jsonl`` is cut
to the restored step when a run is continued. So a row is sent when it can no longer be cut: **a row goes to W&B once a
checkpoint at or after its step is complete** (``commit``), and nothing is sent before. At every start, the rows of
``metrics.jsonl`` that W&B lacks are sent, each exactly once:

- Online, the server tells the first step that it does not have. The run keeps its id (``run_dir/wandb_run_id``, written
  before W&B first hears of it; of a trial of a W&B sweep it is the one that the sweep's agent gives).
- Offline, a killed process may leave its run file torn, so every start writes a new one with the same id and the whole
  history, and then deletes the older ones: the one ``run_dir/wandb/offline-run-*`` is what ``wandb sync`` uploads.

Where the history of an id cannot become that of the file, the run goes on under a new id with the whole history, and a
warning names both. There are two such cases: the server is ahead of the restored step, because a committed checkpoint
was damaged or deleted; or the run continues offline although the server has the id (it was online, or was synced), and
``wandb sync`` would append the whole history to what is there.

A value that is not finite is ``null`` in the file and NaN in W&B. ``_step`` is the row's step; ``_runtime`` and
``_timestamp`` are W&B's own. Results of ``evaclip evaluate --follow`` are sent with the rows, each once, too; where
they stand among them is decided by ``followed``.

Tracking never stops training, and never asks anything. When the server cannot be reached at the start, the session is
recorded offline, or not at all if the server has the id; when W&B fails later, it is given up for the session. A
warning says so, and the next start sends what is missing, also that of a run that has ended. Not sent: code, git state,
the environment, the command line's arguments, console output, W&B's own system metrics; of the run, the resolved
configuration only, and checkpoints and exports where they are asked for.

Alerts and artifacts go with the session: online at once, offline into its run file. Rows of ``restarts.jsonl`` are told
once: how many were is noted before they are sent; offline, each new run file tells those that no server was told.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evaclip.alerts import Alert, restarts
from evaclip.checkpoint import CheckpointReader, best, complete, find_checkpoint
from evaclip.errors import CheckpointError, ConfigError
from evaclip.files import write_text
from evaclip.followed import Places, Sent, values_of
from evaclip.history import History, whole_rows
from evaclip.lock import lock
from evaclip.wandb_id import agents_id, is_on_server, new_id, online_mark, stored_id

if TYPE_CHECKING:
    from wandb import Run

    from evaclip.config import CheckpointConfig, WandbConfig

_log = logging.getLogger(__name__)

_INIT_SECONDS = 60.0
_EXPORT_MARK = "evaclip_export"  # in the folder of an offline run file that holds an export, which no start repeats
_UPLOAD_SECONDS = 850  # of one artifact; two take less than a launcher waits for a rank that is at its end
_FINISH_SECONDS = 30.0  # well within the grace of a preemption; the next start sends what did not make it


class Tracker:
    """A run at W&B. Without a mode that tracks (``off``), every method does nothing and wandb is not imported.

    Construct it on rank 0, when ``history`` has been cut to the restored step: its rows are sent at once.

    Args:
        run_dir: Existing folder of the run; W&B's files go to ``run_dir/wandb``.
        config: ``log.wandb``.
        resolved: The whole configuration as plain data; no secrets.
        history: The run's ``metrics.jsonl``.

    Raises:
        ConfigError: ``log.wandb.mode`` is ``online`` and there is no API key.
    """

    def __init__(self, run_dir: Path, config: WandbConfig, resolved: Mapping[str, Any], history: History) -> None:
        self._run_dir = run_dir
        self._config = config
        self._resolved = dict(resolved)
        self._run: Run | None = None
        self._sent = Sent()
        self._restarts_told = 0
        mode = _choose_mode(config.mode)
        if mode != "off":
            self._start(mode, history)

    def commit(self, history: History, upto_step: int) -> None:
        """Send the rows up to a step, which a complete checkpoint has made final, and results from outside."""
        if self._run is None:
            return
        try:
            for row in history.rows(self._sent.next_step):
                step = int(row["step"] or 0)
                if step > upto_step:
                    break
                self._send_results(self._run, before=step)
                self._send(self._run, row, self._sent.row(step))
            self._places.add(upto_step)
            self._send_results(self._run, before=upto_step + 1)
        except _failures() as error:
            self._give_up(error)

    def _send(self, run: Run, row: Mapping[str, float | None], sent: Sent) -> None:
        run.log({n: math.nan if v is None else v for n, v in row.items()}, step=sent.wandb_step, commit=True)
        self._sent = sent

    def _send_results(self, run: Run, before: int) -> None:
        for row in self._places.rows[self._sent.results :]:
            if row["behind"] >= before:
                break
            self._send(run, values_of(row), self._sent.result())

    def alert(self, alert: Alert) -> None:
        """Tell whoever has asked W&B for alerts."""
        if self._run is None or not self._config.alerts:
            return
        try:
            self._run.alert(alert.title[:63], alert.text, level="WARN", wait_duration=timedelta(milliseconds=1))
        except _failures() as error:
            self._give_up(error)

    def alert_restarts(self) -> None:
        """Tell the restarts that the launcher has listed since the last call, in this session or an earlier one."""
        if self._run is None or not self._config.alerts:
            return
        path = self._run_dir / "wandb" / "restarts_told"
        try:
            told = max(self._restarts_told, int(path.read_text(encoding="utf-8")) if path.exists() else 0)
            rows = whole_rows(self._run_dir / "restarts.jsonl")
            if not self._run.offline:
                write_text(path, str(len(rows)))
        except (OSError, ValueError) as error:
            _log.warning("restarts are not told to W&B: %s", error)
            return
        self._restarts_told = len(rows)
        for alert in restarts(rows[told:]):
            self.alert(alert)

    def log_checkpoints(self, folder: Path, config: CheckpointConfig) -> None:
        """Upload the newest checkpoint of a run that has ended, and the best one, as artifacts."""
        if self._run is None or not self._config.artifacts:
            return
        try:
            newest, best_one = complete(folder)[-1], best(folder, config)
            for path in dict.fromkeys([best_one or newest, newest]):  # W&B's "latest" is what was logged last
                step = int(path.name.removeprefix("step_"))
                aliases = [f"step-{step}", "latest", *(["best"] if path == best_one else [])]
                _log_folder(self._run, path, f"{self._run.id}-checkpoint", "checkpoint", aliases, {"step": step})
        except CheckpointError as error:
            _log.warning("the best checkpoint is not uploaded: %s", error)
        except (*_failures(), ValueError) as error:  # ValueError: what the server says of an upload that failed
            self._give_up(error)

    def finish(self, exit_code: int = 0) -> None:
        """Upload what is left, for at most half a minute, and close the run; anything but 0 marks it as failed."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code)
            self._run = None
        except _failures() as error:
            self._give_up(error)

    def _start(self, mode: Literal["online", "offline"], history: History) -> None:
        try:
            self._places = Places(self._run_dir, history.sealed)
            self._run = self._open(mode, history)
            self._places.settle()
        except _failures() as error:
            self._give_up(error)
            if mode == "online" and not is_on_server(self._run_dir, stored_id(self._run_dir)):
                _log.warning("W&B's server cannot be reached, this session is recorded offline")
                self._start("offline", history)
            return
        self._sent = self._places.sent(history.steps, self._run.starting_step)
        _log.info("W&B run %s: %s", self._run.id, self._run.url or self._run.settings.sync_dir)
        self.commit(history, history.sealed)
        if self._run is not None:
            _delete_older(self._run_dir, self._run)

    def _open(self, mode: Literal["online", "offline"], history: History) -> Run:
        """Open the stored W&B run, or a new one where its history cannot become ours."""
        run_id = stored_id(self._run_dir)
        if mode == "offline":
            if is_on_server(self._run_dir, run_id):
                run_id = self._renew_id(run_id, "is on the server, and an offline run holds the whole history")
            return _init(self._run_dir, self._config, self._resolved, mode, run_id)
        run = _init(self._run_dir, self._config, self._resolved, mode, run_id)
        reason = ""
        if run.starting_step - 1 > self._places.sent(history.steps).wandb_step:
            reason = f"reaches step {run.starting_step - 1}, metrics.jsonl only {history.last_step}"
        elif self._places.went_back and run.starting_step:
            reason = f"may have results of steps behind {history.sealed}, where the run goes on"
        if reason:
            run.finish()
            run = _init(self._run_dir, self._config, self._resolved, mode, self._renew_id(run_id, reason))
        online_mark(self._run_dir, run.id).touch()
        return run

    def _renew_id(self, old: str, reason: str) -> str:
        run_id = new_id(self._run_dir)
        _log.warning(
            "W&B run %s %s; W&B cannot replace a history, so this run goes on as W&B run %s", old, reason, run_id
        )
        return run_id

    def _give_up(self, error: Exception) -> None:
        """Stop tracking in this session, and stop the service, so that it neither blocks nor complains at exit."""
        import wandb  # noqa: PLC0415

        self._run = None
        _log.warning(
            "W&B stopped recording (%s: %s); metrics.jsonl goes on, and the next start sends the rest",
            type(error).__name__,
            error,
        )
        try:
            wandb.teardown()
        except _failures() as second:
            _log.debug("W&B's service did not shut down: %s", second)


def _init(
    run_dir: Path, config: WandbConfig, resolved: Mapping[str, Any], mode: Literal["online", "offline"], run_id: str
) -> Run:
    """Open a session of a W&B run."""
    import wandb  # noqa: PLC0415  takes a second, and mode off does without
    from wandb.errors import UsageError  # noqa: PLC0415

    try:
        settings = wandb.Settings(
            mode=mode,
            root_dir=str(run_dir),
            run_id=run_id,
            resume="allow",
            project=config.project,
            entity=config.entity,
            run_name=config.name or run_dir.resolve().name,
            run_group=config.group,
            run_tags=config.tags,
            reinit="create_new",
            init_timeout=_INIT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
            finish_timeout_raises=True,
            silent=True,
            console="off",
            symlink=False,
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,  # it would see one node; ours are rows of the history
            x_save_requirements=False,
            x_transaction_log_flush_interval=1.0,  # what a kill may take from an offline file that no start renews
        )
    except UsageError as error:
        raise ConfigError(f"log.wandb: {error}") from error
    if run_id != agents_id():  # in a sweep, wandb takes the agent's id and no other
        wandb.setup().settings.sweep_id = None
    run = wandb.init(settings=settings, config=dict(resolved))
    run.define_metric("eval/*", step_metric="step")  # results from outside come late
    return run


def _log_folder(
    run: Run, folder: Path, name: str, kind: str, aliases: Sequence[str], metadata: Mapping[str, Any]
) -> None:
    """Log a folder that nobody changes as an artifact: nothing is copied, and online the upload is waited for."""
    import wandb  # noqa: PLC0415

    artifact = wandb.Artifact(name, kind, metadata=dict(metadata))
    artifact.add_dir(str(folder.resolve()), skip_cache=True, policy="immutable")
    logged = run.log_artifact(artifact, aliases=list(aliases))
    if not run.offline:
        logged.wait(_UPLOAD_SECONDS)
    _log.info("W&B artifact %s (%s): %s", name, ", ".join(aliases), folder)


def send_rest(run_dir: Path) -> None:
    """Send what W&B lacks of a run that is trained to its end, as its next start would, to where the run is.

    Raises:
        RunLockedError: A process still trains there.
        OSError: The run directory cannot be read or written.
    """
    if not (run_dir / "wandb_run_id").is_file():
        return
    reader = CheckpointReader(complete(run_dir / "checkpoints")[-1])
    config = reader.config.log.wandb
    if config.mode == "off":
        return
    lock(run_dir)
    mode = "online" if is_on_server(run_dir, stored_id(run_dir)) else "offline"
    history = History(run_dir / "metrics.jsonl")
    history.truncate(reader.state.step)
    try:
        resolved = reader.config.model_dump(mode="json")
        Tracker(run_dir, config.model_copy(update={"mode": mode}), resolved, history).finish()
    except ConfigError as error:
        _log.warning("results are not told to W&B: %s; the next start of the training sends them", error)
    history.close()


def run_of(checkpoint: Path) -> Path:
    """The directory of a run that W&B knows, given it or one of its checkpoints.

    Raises:
        ConfigError: There is none.
    """
    for folder in (checkpoint, checkpoint.resolve().parent.parent):
        if (folder / "wandb_run_id").is_file():
            return folder
    raise ConfigError(
        f"--wandb logs an export to the W&B run of what is exported, and {checkpoint} has none; give a run directory "
        f"(or a checkpoint in one) that was trained with W&B, or leave --wandb out"
    )


def log_export(checkpoint: Path, out: Path, kind: str) -> str:
    """Log an export as artifact of its run: to the server if that has the run, else to be synced with it.

    Args:
        checkpoint: What was exported: a run directory or one of its checkpoints.
        out: The export.
        kind: Its format.

    Returns:
        Where it went, in words.

    Raises:
        ConfigError: The run is being trained, or there is no API key.
        CheckpointError: W&B failed; the export is there.
    """
    run_dir = run_of(checkpoint)
    lock(run_dir)
    reader = CheckpointReader(find_checkpoint(checkpoint))
    run_id = stored_id(run_dir)
    mode = "online" if is_on_server(run_dir, run_id) else "offline"
    _choose_mode(mode)
    try:
        run = _init(run_dir, reader.config.log.wandb, reader.config.model_dump(mode="json"), mode, run_id)
        folder = Path(run.settings.sync_dir)
        if mode == "offline":
            (folder / _EXPORT_MARK).touch()
        step = reader.state.step
        name = f"{run_id}-{kind}"
        _log_folder(run, out, name, "model", [f"step-{step}", "latest"], {"step": step, "format": kind})
        run.finish()
    except (*_failures(), ValueError) as error:
        raise CheckpointError(f"{out} is written, but W&B could not take it: {error}; log it again later") from error
    where = f"upload it with: wandb sync {folder}" if mode == "offline" else "uploaded"
    return f"artifact {name} of W&B run {run_id}; {where}"


def _choose_mode(mode: Literal["auto", "online", "offline", "off"]) -> Literal["online", "offline", "off"]:
    """Turn the configured mode into what happens.

    ``auto`` is online with an API key and offline without one; WANDB_MODE (offline, disabled) has its way then.
    """
    if mode == "off":
        return "off"
    import wandb  # noqa: PLC0415

    setup = wandb.setup(wandb.Settings(silent=True) if mode == "auto" else wandb.Settings(silent=True, mode=mode))
    if mode == "auto" and setup.settings.mode == "disabled":
        return "off"
    if mode == "offline":
        return "offline"
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        if mode == "online":
            raise ConfigError(f"log.wandb.mode is online, but the W&B credentials cannot be used: {error}") from error
        _log.warning("the W&B credentials cannot be used, this session is recorded offline: %s", error)
        has_key = False
    if mode == "online" and not has_key:
        raise ConfigError(
            "log.wandb.mode is online, but there is no W&B API key; set WANDB_API_KEY, run `wandb login`, or use "
            "log.wandb.mode=auto"
        )
    return "online" if has_key else "offline"


def _failures() -> tuple[type[Exception], ...]:
    """What wandb raises when it, its service or its server fails; mistakes in calling it are not among these."""
    from wandb import Error  # noqa: PLC0415
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError  # noqa: PLC0415
    from wandb.sdk.mailbox.mailbox_handle import ServerResponseError  # noqa: PLC0415

    return Error, OSError, HandleAbandonedError, MailboxClosedError, ServerResponseError


def _delete_older(run_dir: Path, run: Run) -> None:
    """Delete the offline run files that the current run, offline or online, has made superfluous."""
    for folder in (run_dir / "wandb").glob("offline-run-*"):
        if folder.name != Path(run.settings.sync_dir).name and not (folder / _EXPORT_MARK).exists():
            shutil.rmtree(folder, ignore_errors=True)
