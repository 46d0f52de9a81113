"""What the supervisor, the nodes' launchers and the ranks agree on beside their messages."""

from __future__ import annotations

import os

LEFT_WELL = (0, os.EX_TEMPFAIL)
"""Exit codes of ranks that have not failed: complete, or saved because they were asked to stop."""

ONE_REQUEST_SECONDS = 3.0
"""In which schedulers and launchers may send one signal several times, to several processes."""

REPORT_SECONDS = 0.5
"""Between two reports of a node."""

STACKS_SECONDS = 8.0
"""For py-spy on a node."""

STALLED_SECONDS = 5.0
"""Without a turn of one's own loop: this process itself stood still, and what others said meanwhile lies ready."""
