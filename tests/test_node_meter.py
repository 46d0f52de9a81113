import math
import platform
import time
from importlib.util import find_spec

import pytest
import torch
from tiny import tiny_config

from evaclip.distributed import Ranks
from evaclip.history import load_history
from evaclip.metrics import METRICS, check_names
from evaclip.node_meter import Counters, NodeMeter
from evaclip.train import train


def test_rates_are_differences_of_counters_over_time():
    before, after = Counters(10.0, 5e6, 100e6), Counters(14.0, 9e6, 300e6)
    assert after.rates(before) == {"disk_read_mb_per_second": 1.0, "network_received_mb_per_second": 50.0}


def test_a_busy_node_is_seen():
    meter = NodeMeter(Ranks(), ["n1"])
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    found = meter.publish()
    check_names(found)
    assert 0 < found["system/n1/cpu_fraction"] <= 1
    assert 0 < found["system/n1/memory_fraction"] < 1
    assert found["system/n1/network_received_mb_per_second"] >= 0


def test_a_node_is_measured_by_its_first_rank_alone():
    assert NodeMeter(Ranks(), ["n1", "n1"]).publish().keys() == NodeMeter(Ranks(), ["n1"]).publish().keys()
    # as rank 1 would be, were it alone: nothing is measured, and nothing is published
    second = NodeMeter(Ranks(), ["n1"])
    second._leaders = {}
    assert second.publish() == {}


def test_what_a_machine_does_not_tell_is_left_out(monkeypatch):
    monkeypatch.setattr("psutil.disk_io_counters", lambda: None)  # as in some containers
    found = NodeMeter(Ranks(), ["n1"]).publish()
    assert "system/n1/disk_read_mb_per_second" not in found
    assert "system/n1/memory_fraction" in found
    assert not any(math.isnan(value) for value in found.values())


def test_figures_of_the_node_stand_in_every_row(tmp_path):
    train(tiny_config(tmp_path))
    names = {name.split("/")[2] for name in METRICS if name.startswith("system/")}
    for row in load_history(tmp_path / "metrics.jsonl"):
        found = {name: value for name, value in row.items() if name.startswith("system/")}
        assert f"system/{platform.node()}/memory_fraction" in found
        assert {name.rpartition("/")[2] for name in found} <= names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(find_spec("pynvml") is None, reason="needs nvidia-ml-py")
def test_gpus_are_measured_without_waiting_for_them():
    held = torch.zeros(1 << 28, device="cuda")  # a GiB
    meter = NodeMeter(Ranks(), ["n1"])  # ranks on the CPU: what is gathered is not the question
    torch.cuda.synchronize()
    torch.cuda._sleep(4 * 10**9)  # some two seconds
    started = time.monotonic()
    found = meter.publish()
    assert time.monotonic() - started < 1
    torch.cuda.synchronize()
    total = torch.cuda.get_device_properties(0).total_memory
    assert held.nbytes / total / torch.cuda.device_count() <= found["system/n1/gpu_memory_fraction"] <= 1
    assert 0 <= found["system/n1/gpu_fraction"] <= 1
    assert 10 < found["system/n1/gpu_celsius"] < 110
    assert 10 < found["system/n1/gpu_watts"] < 2000
