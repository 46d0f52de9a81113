import json
import time

import pytest
import torch
from tiny import tiny_config

from evaclip.distributed import Ranks
from evaclip.errors import EvaclipError
from evaclip.loss import ContrastiveLoss
from evaclip.pace import Pace, RankPace, Stragglers, write_ranks
from evaclip.train import train

VALUES = {"speed/samples_per_second": 16.0, "speed/data_wait_fraction": 0.25}  # a step of 16 samples takes a second


def paces(*own, step=1.0):
    return [RankPace(rank, f"n{rank // 2}", step, 0.1, seconds) for rank, seconds in enumerate(own)]


def told(rows):
    """Ranks that are named at each publication."""
    stragglers = Stragglers()
    return [[int(text.split()[1]) for text in stragglers.judge(paces(*row))] for row in rows]


def loss_of(tmp_path, device="cpu"):
    return ContrastiveLoss(tiny_config(tmp_path).loss, torch.device(device))


def test_a_slow_rank_is_named_with_node_and_factor_at_its_second_row():
    stragglers = Stragglers()
    assert stragglers.judge(paces(0.2, 0.2, 0.2, 0.5)) == []
    (text,) = stragglers.judge(paces(0.2, 0.2, 0.2, 0.5))
    assert text == (
        "rank 3 on n1 takes 2.5 times as long as usual for what it does alone (0.5 s per step against 0.2 s, 0.1 s of "
        "it waiting for data); all ranks wait for it"
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0.2, 0.2, 0.29)] * 3, [[], [], []]),  # below 1.5 times
        ([(0.2, 0.2, 0.5), (0.2, 0.2, 0.2)] * 2, [[], [], [], []]),  # never two in a row
        ([(0.2, 0.2, 0.5)] * 5, [[], [2], [], [], []]),  # once
        ([(0.2, 0.2, 0.5)] * 2 + [(0.2, 0.2, 0.2)] + [(0.2, 0.2, 0.5)] * 2, [[], [2], [], [], [2]]),
        ([(0.2, 0.5, 0.2, 0.5)] * 2, [[], [1, 3]]),  # half of them
        ([(0.2, 0.5)] * 2, [[], [1]]),  # of two ranks the faster one is the measure
        ([(0.5,)] * 3, [[], [], []]),
        ([(1e-5, 1e-5, 9e-5)] * 3, [[], [], []]),  # far slower, and worth nothing of a step
    ],
)
def test_who_is_told_when(rows, expected):
    assert told(rows) == expected


def test_own_time_is_the_wait_for_data_and_the_forward_pass_up_to_the_loss(tmp_path):
    loss = loss_of(tmp_path)
    pace = Pace(loss, Ranks(), sharded=False)
    features = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    for _ in range(2):
        pace.begin()
        time.sleep(0.1)
        loss(features, features, Ranks())
        time.sleep(0.3)  # behind the loss nothing counts
    loss(features, features, Ranks())  # nor outside of a step
    (row,) = pace.publish(VALUES, 16)
    assert row[2:4] == (1.0, 0.25)
    assert 0.35 <= row.own_seconds < 0.5  # sleeps only ever take longer
    assert pace.publish(VALUES, 16)[0].own_seconds == 0.25, "windows are separate"


def test_under_zero3_own_time_is_the_wait_for_data(tmp_path):
    loss = loss_of(tmp_path)
    pace = Pace(loss, Ranks(), sharded=True)
    pace.begin()
    loss(torch.ones(4, 8), torch.ones(4, 8), Ranks())
    assert pace.publish(VALUES, 16)[0].own_seconds == 0.25


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_own_time_is_the_devices_and_taking_it_waits_for_nothing(tmp_path):
    ranks, loss = Ranks(device=torch.device("cuda")), loss_of(tmp_path, "cuda")
    pace = Pace(loss, ranks, sharded=False)
    features = torch.nn.functional.normalize(torch.randn(4, 8, device="cuda"), dim=1)
    cycles = 2 * 10**8  # a tenth of a second at about 2 GHz
    loss(features, features, ranks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            pace.begin()
            torch.cuda._sleep(cycles)
            loss(features, features, ranks)
            torch.cuda._sleep(3 * cycles)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    (row,) = pace.publish({**VALUES, "speed/data_wait_fraction": 0.0}, 16)
    assert 0.05 < row.own_seconds < 0.25


def test_ranks_are_written_with_each_row(tmp_path):
    before = time.time()
    train(tiny_config(tmp_path))
    written = json.loads((tmp_path / "ranks.json").read_text())
    assert written["step"] == 4
    assert before <= written["time"] <= time.time()
    (row,) = written["ranks"]
    assert row["rank"] == 0
    assert 0 <= row["data_seconds"] <= row["own_seconds"] <= row["step_seconds"] < time.time() - before


def test_a_file_of_ranks_that_cannot_be_written_stops_the_run_as_the_history_does(tmp_path):
    (tmp_path / "ranks.json").mkdir()
    with pytest.raises(EvaclipError, match=r"run_dir .* cannot be written: Is a directory; choose a folder that can"):
        train(tiny_config(tmp_path))


def test_a_file_of_ranks_replaces_the_one_before(tmp_path):
    for step in (1, 2):
        write_ranks(tmp_path / "ranks.json", step, paces(0.1, 0.2))  # of two ranks the faster one is what is usual
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.json"]
    written = json.loads((tmp_path / "ranks.json").read_text())
    assert written["step"] == 2
    assert [(row["node"], row["slow"]) for row in written["ranks"]] == [("n0", False), ("n0", True)]
