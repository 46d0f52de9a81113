"""``cluster.json`` shows that its supervisor lives, whatever that waits for."""

from __future__ import annotations

import json
import time
from pathlib import Path

from cluster.launched import wait_for

from evaclip.cluster.policy import Sign
from evaclip.cluster.status_file import StatusFile


def test_what_was_told_once_is_written_on_with_new_times_and_ages(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    status = StatusFile(path, "7")
    status.tell(2, "running", [Sign(0, "n1", 100, 5, "forward", 1.0, "S")])
    wait_for(path.exists, seconds=20)
    first = json.loads(path.read_text())
    wait_for(lambda: json.loads(path.read_text())["time"] > first["time"], seconds=20)
    second = json.loads(path.read_text())
    assert (second["job"], second["attempt"], second["state"]) == ("7", 2, "running")
    assert second["nodes"]["n1"][0]["age_seconds"] > first["nodes"]["n1"][0]["age_seconds"] > 1
    status.tell(3, "ended")
    status.close()
    size, last = path.stat().st_size, json.loads(path.read_text())
    assert (last["state"], last["nodes"]) == ("ended", {})
    assert size >= len(json.dumps(first)), "it never becomes shorter"
    time.sleep(1.2)
    assert json.loads(path.read_text()) == last, "and nobody writes any more"
