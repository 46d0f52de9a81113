import gzip
import json
import pickle
import re

import pytest
import torch
from tiny import tiny_config

from evaclip.config import ProfileConfig
from evaclip.distributed import Ranks
from evaclip.errors import OutOfMemoryError, TrainingStoppedError
from evaclip.history import load_history
from evaclip.preemption import StopRequest
from evaclip.profiler import Profiler
from evaclip.run import open_run
from evaclip.train import _loop, _out_of_memory, _reporting, train, train_on

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def traced_updates(path):
    """How many updates a trace holds."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::addmm" for event in events)
    return len([event for event in events if event.get("name", "").startswith("Optimizer.step#")])


def traces(run_dir):
    return {path.name: traced_updates(path) for path in sorted((run_dir / "profile").glob("*"))}


@pytest.mark.parametrize(
    ("start", "steps", "name", "updates"),
    [(2, 2, "step_00000002_rank_0.json.gz", 2), (4, 3, "step_00000004_rank_0.json.gz", 1)],
)
def test_a_window_of_steps_is_traced_and_told_and_changes_no_number(tmp_path, start, steps, name, updates):
    train(tiny_config(tmp_path / "plain"))
    train(tiny_config(tmp_path / "traced", profile={"start_step": start, "num_steps": steps}))
    assert traces(tmp_path / "traced") == {name: updates}
    plain, traced = (load_history(tmp_path / run / "metrics.jsonl") for run in ("plain", "traced"))
    assert [row["train/loss"] for row in traced] == [row["train/loss"] for row in plain]
    log = (tmp_path / "traced/log.txt").read_text()
    last = start + updates - 1
    (event,) = re.findall(
        rf"operations of steps {start} to {last} by their own time; trace: (.*)\n((?:(?!\d{{4}}-).*\n)*)", log
    )
    assert event[0] == str(tmp_path / "traced/profile" / name)
    head, *rows = event[1].splitlines()
    assert head.split() == ["operation", "calls", "CPU", "ms", "share"]
    assert len(rows) == 15
    shares = [float(row.split()[-1].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert 50 < sum(shares) <= 100.5


def stopped_at(step, config):
    """Train, and be asked to stop after a step."""

    class Stop(StopRequest):
        calls = 0

        def agreed(self):
            self.calls += 1
            return 15 if self.calls == step else 0

    run = open_run(config, Ranks())
    with pytest.raises(TrainingStoppedError), _reporting(run) as report:
        _loop(run, report, Stop(Ranks()))


def test_a_window_that_a_continued_run_enters_in_the_middle_is_traced_from_there(tmp_path):
    config = tiny_config(tmp_path, train__steps=6, profile={"start_step": 2, "num_steps": 4})
    stopped_at(3, config)
    assert not (tmp_path / "profile").exists(), "half a trace is none"
    train(config)
    assert traces(tmp_path) == {"step_00000004_rank_0.json.gz": 2}


def test_a_window_that_lies_behind_is_not_repeated(tmp_path):
    config = tiny_config(tmp_path, train__steps=6, profile={"start_step": 2, "num_steps": 1})
    stopped_at(3, config)
    (tmp_path / "profile/step_00000002_rank_0.json.gz").unlink()
    train(config)
    assert traces(tmp_path) == {}


def test_a_trace_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    train(tiny_config(tmp_path, profile={"start_step": 2}))
    assert "trace: not written: [Errno 17] File exists" in (tmp_path / "log.txt").read_text()
    assert load_history(tmp_path / "metrics.jsonl")[-1]["step"] == 4


def test_other_ranks_trace_nothing(tmp_path):
    profiler = Profiler(ProfileConfig(start_step=1), tmp_path, 4, Ranks(rank=1, world_size=2))
    for step in (1, 2, 3):
        profiler.begin(step)
        profiler.end(step)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------- memory


def out_of_memory(config, rank=3):
    """The error of a GPU that is full; torch can tell what lies in memory where there is no GPU too: nothing."""
    ranks = Ranks(rank=rank, world_size=4, device=torch.device("cuda"))
    return str(_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried"), config, None, ranks))


def test_a_gpu_that_runs_out_of_memory_leaves_a_snapshot_that_its_error_names(tmp_path):
    message = out_of_memory(tiny_config(tmp_path))
    snapshot = tmp_path / "profile/out_of_memory_rank_3.pickle"
    assert (
        message.splitlines()[-1] == f"what lay in its memory then is in {snapshot}, which pytorch.org/memory_viz shows"
    )
    assert "segments" in pickle.loads(snapshot.read_bytes())
    assert [path.name for path in snapshot.parent.iterdir()] == [snapshot.name]


def test_a_snapshot_that_cannot_be_written_hides_no_error(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    message = out_of_memory(tiny_config(tmp_path))
    assert message.startswith("rank 3 ran out of memory (CUDA out of memory. Tried); change one of these:")
    assert "snapshot" not in message
    assert message.splitlines()[-1] == "  eval.batch, if this was an evaluation"


@pytest.mark.gpu
@gpu
def test_a_real_gpu_out_of_memory_has_its_history_in_the_snapshot(tmp_path, monkeypatch):
    def full(config, ranks):
        held = torch.zeros(1 << 20, device="cuda")
        return held, torch.empty(1 << 45, device="cuda")

    monkeypatch.setattr("evaclip.train.open_run", full)
    config = tiny_config(tmp_path, profile={"memory_history": True})
    try:
        with pytest.raises(OutOfMemoryError, match=r"what lay in its memory then is in .*out_of_memory_rank_0\.pickle"):
            train_on(Ranks(device=torch.device("cuda")), config)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    snapshot = pickle.loads((tmp_path / "profile/out_of_memory_rank_0.pickle").read_bytes())
    blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    (held,) = [block for block in blocks if block["size"] == 4 << 20 and block["state"] == "active_allocated"]
    assert any("test_profiler.py" in frame["filename"] for frame in held["frames"])


@pytest.mark.gpu
@gpu
def test_a_trace_on_a_gpu_has_its_kernels_and_the_table_its_time(tmp_path):
    ranks = Ranks(device=torch.device("cuda"))
    train_on(ranks, tiny_config(tmp_path, profile={"start_step": 2, "num_steps": 2}))
    (path,) = (tmp_path / "profile").iterdir()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    log = (tmp_path / "log.txt").read_text()
    rows = log[log.index("operation ") :].splitlines()
    assert rows[0].split() == ["operation", "calls", "CPU", "ms", "GPU", "ms", "share"]
    assert float(rows[1].split()[-2].replace(",", "")) > 0
