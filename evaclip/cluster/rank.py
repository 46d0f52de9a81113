"""A rank before it knows which one it will be: it imports what takes seconds, then waits for its place.

A node keeps such spares beside the ranks that train, so that after a failure nobody waits for imports. One line of JSON
on stdin gives environment and arguments; an end of stdin means that the rank is not needed.
"""

from __future__ import annotations

import json
import os
import resource
import sys

_OPEN_FILES = 65_536


def main() -> None:
    """Wait, then run one command of ``evaclip``."""
    # A rank holds a connection to each of the others (gloo, the store), and 1024 files is the usual limit.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = _OPEN_FILES if limit == resource.RLIM_INFINITY else min(limit, _OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limit))
    import evaclip.train  # noqa: PLC0415, F401  that is what takes seconds
    from evaclip.cli import main as run  # noqa: PLC0415

    line = sys.stdin.readline()
    if not line:
        return
    order = json.loads(line)
    os.environ.update(order["environment"])
    with open(os.devnull, encoding="ascii") as nothing:  # noqa: PTH123  a device
        os.dup2(nothing.fileno(), 0)
    run(order["arguments"])


if __name__ == "__main__":
    main()
