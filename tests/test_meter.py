import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evaclip.meter import Meter, peak_memory_gib


class CountedOps(TorchDispatchMode):
    """Names of the operators that ran inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def cpu_meter():
    return Meter(torch.device("cpu"))


def test_kinds_decide_how_steps_become_one_number():
    meter = cpu_meter()
    for loss, scale, skipped in [(1.0, 14.0, 0), (2.0, 15.0, 1), (6.0, 16.0, 1)]:
        meter.update({"train/loss": torch.tensor(loss), "train/logit_scale": torch.tensor([scale])})
        meter.update({"train/skipped_steps": torch.tensor(skipped)})
    assert meter.publish() == {"train/loss": 3.0, "train/logit_scale": 16.0, "train/skipped_steps": 2.0}


def test_publication_starts_anew():
    meter = cpu_meter()
    meter.update({"train/loss": torch.tensor(8.0)})
    meter.publish()
    assert meter.publish() == {}
    meter.update({"train/loss": torch.tensor(2.0)})
    assert meter.publish() == {"train/loss": 2.0}


def test_a_metric_published_in_some_steps_is_averaged_over_these():
    meter = cpu_meter()
    meter.update({"train/loss": torch.tensor(1.0), "train/grad_norm": torch.tensor(5.0)})
    meter.update({"train/loss": torch.tensor(3.0)})
    assert meter.publish() == {"train/loss": 2.0, "train/grad_norm": 5.0}


def test_update_never_reads_from_the_device_and_publish_does_once(monkeypatch):
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or tolist(tensor))
    meter = cpu_meter()
    with CountedOps() as ops:
        for step in range(5):
            meter.update({"train/loss": torch.tensor(1.0 + step), "train/grad_norm": torch.tensor(2.0)})
    assert "_local_scalar_dense" not in ops.names
    assert "item" not in ops.names
    assert reads == []
    assert "add_" in ops.names  # the counter sees operators at all
    with CountedOps() as ops:
        published = meter.publish()
    assert ops.names.count("stack") == 1
    assert "_local_scalar_dense" not in ops.names
    assert reads == [torch.Size([2])]
    assert published == {"train/loss": 3.0, "train/grad_norm": 2.0}


def test_update_runs_where_nothing_can_be_read():
    meter = Meter(torch.device("meta"))  # any .item() raises here
    for _ in range(3):
        meter.update({"train/loss": torch.empty((), device="meta")})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_update_does_not_synchronise_a_gpu():
    meter = Meter(torch.device("cuda"))
    losses = torch.arange(4.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4):
            meter.update({"train/loss": losses[step], "train/skipped_steps": losses[step] > 2})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.publish() == {"train/loss": 1.5, "train/skipped_steps": 1.0}
    assert peak_memory_gib(torch.device("cuda"))["memory/peak_gib"] > 0


def test_the_meter_keeps_no_graph_and_does_not_follow_later_changes():
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    meter = cpu_meter()
    meter.update({"train/logit_scale": scale})
    with torch.no_grad():
        scale.fill_(9.0)
    assert meter.publish() == {"train/logit_scale": 3.0}


def test_a_step_that_is_not_finite_is_not_hidden_by_the_mean():
    meter = cpu_meter()
    meter.update({"train/loss": torch.tensor(1.0)})
    meter.update({"train/loss": torch.tensor(float("nan"))})
    assert math.isnan(meter.publish()["train/loss"])


def test_a_restored_meter_publishes_what_the_first_would_have():
    values = torch.rand(7, generator=torch.Generator().manual_seed(0))
    straight, first, second = cpu_meter(), cpu_meter(), cpu_meter()
    for meter, part in ((straight, values), (first, values[:3])):
        for value in part:
            meter.update({"train/loss": value, "train/logit_scale": value})
    second.restore(first.state())
    for value in values[3:]:
        second.update({"train/loss": value, "train/logit_scale": value})
    assert second.publish() == straight.publish()


def test_the_meter_refuses_undeclared_names():
    with pytest.raises(ValueError, match="metric 'train/grad_nrom' is not declared"):
        cpu_meter().update({"train/grad_nrom": torch.tensor(1.0)})


def test_peak_memory_is_not_published_for_the_cpu():
    assert peak_memory_gib(torch.device("cpu")) == {}
