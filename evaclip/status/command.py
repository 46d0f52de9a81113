"""``evaclip status``: reads, prints, and does so again. Decides nothing."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from evaclip.status.files import read_run
from evaclip.status.finding import find_facts
from evaclip.status.lines import fitting, render

_HOME_AND_CLEAR = "\x1b[H\x1b[J"


def status(run_dir: Path, *, watch: float | None, as_json: bool) -> Iterator[str]:
    """What to print, now and every ``watch`` seconds until the run has ended; once where ``watch`` is None.

    Raises:
        ConfigError: The folder is no run's, or cannot be read.
    """
    terminal = sys.stdout.isatty()
    while True:
        facts = find_facts(read_run(run_dir), time.time())
        if as_json:
            yield json.dumps(asdict(facts), allow_nan=False)
        else:
            lines = render(facts)
            if terminal:
                lines = fitting(lines, shutil.get_terminal_size().columns)
            shown = "\n".join(lines)
            yield (_HOME_AND_CLEAR if terminal else "") + shown if watch else shown
        if not watch or facts.state.name == "ended":
            return
        time.sleep(watch)
