"""What the pictures of runs and of samples share: their colours, and how their files are written."""

from __future__ import annotations

from pathlib import Path

from evaclip.errors import ConfigError, writing
from evaclip.files import replacing

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of Okabe and Ito, told apart by the colour-blind too."""


def require_png(output: Path) -> None:
    """Refuse another format, before anything is read."""
    if output.suffix.lower() != ".png":
        raise ConfigError(f"--output {output} is no .png, the one format that is written")


def write_png(output: Path, content: bytes) -> None:
    """Write a picture."""
    with writing(f"--output {output}"), replacing(output, flushed=False) as file:
        file.write(content)
