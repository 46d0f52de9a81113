import contextlib
import time

import pytest

from evaclip.metrics import METRICS, Clock, check_names, find_metric, peak_tflops


class HandTime:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["train/loss", "data/passes/laion", "eval/imagenet/top1", "eval/coco/recall@1"])
def test_declared_names_pass(name):
    check_names([name])


@pytest.mark.parametrize("name", ["train/grad_nrom", "loss", "data/passes", "eval/imagenet", "eval//", "train/loss/x"])
def test_an_undeclared_name_is_refused(name):
    with pytest.raises(ValueError, match=f"metric '{name}' is not declared"):
        check_names(["train/loss", name])


def test_a_name_in_capitals_stands_for_any_and_keeps_its_kind():
    assert find_metric("data/skipped/SOURCE") is find_metric("data/skipped/laion/2b en")
    assert find_metric("eval/digits/top1").kind == "last"


def test_every_metric_says_what_it_means():
    assert all(metric.meaning for metric in METRICS.values())


# ------------------------------------------------------------------------------------------------------------- clock


def test_speeds_follow_from_samples_time_and_ranks():
    now = HandTime()
    clock = Clock(samples=1000, num_ranks=4, peak_tflops=100.0, now=now)
    with clock.waiting():
        now.seconds += 1.0
    now.seconds += 3.0
    assert clock.publish(samples=1800, flops_per_sample=2e12) == {
        "speed/samples_per_second": 200.0,
        "speed/samples_per_second_per_rank": 50.0,
        "speed/data_wait_fraction": 0.25,
        "speed/model_tflops": 100.0,
        "speed/mfu": 1.0,
    }


def test_pauses_are_no_training_time_and_windows_are_separate():
    now = HandTime()
    clock = Clock(samples=0, num_ranks=1, peak_tflops=None, now=now)
    now.seconds += 2.0
    with clock.paused():
        now.seconds += 100.0
    assert clock.publish(samples=10, flops_per_sample=1.0)["speed/samples_per_second"] == 5.0
    with clock.paused():
        now.seconds += 50.0
    with clock.waiting():
        now.seconds += 1.0
    second = clock.publish(samples=20, flops_per_sample=1.0)
    assert second["speed/samples_per_second"] == 10.0
    assert second["speed/data_wait_fraction"] == 1.0


def test_a_pause_ended_by_an_error_still_counts_as_a_pause():
    now = HandTime()
    clock = Clock(samples=0, num_ranks=1, peak_tflops=None, now=now)
    now.seconds += 1.0
    with contextlib.suppress(KeyError), clock.paused():
        now.seconds += 9.0
        raise KeyError
    assert clock.publish(samples=5, flops_per_sample=1.0)["speed/samples_per_second"] == 5.0


def test_a_stream_that_sleeps_is_seen_as_waiting():
    def slow_stream():
        while True:
            time.sleep(0.05)
            yield 1

    stream = slow_stream()
    clock = Clock(samples=0, num_ranks=1, peak_tflops=None)
    for _ in range(3):
        with clock.waiting():
            next(stream)
        time.sleep(0.02)
    fraction = clock.publish(samples=3, flops_per_sample=1.0)["speed/data_wait_fraction"]
    # 0.15 s of 0.21 s; sleeps only ever take longer, on a busy machine up to a few times
    assert 0.3 < fraction < 0.95


def test_mfu_is_published_for_known_gpus_only():
    now = HandTime()
    clock = Clock(samples=0, num_ranks=1, peak_tflops=peak_tflops("cpu"), now=now)
    now.seconds = 1.0
    assert "speed/mfu" not in clock.publish(samples=1, flops_per_sample=1.0)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A40", 150.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("Tesla V100-SXM2-32GB", None),
        ("cpu", None),
    ],
)
def test_peaks_by_device_name(device, peak):
    assert peak_tflops(device) == peak


def test_every_published_speed_is_declared():
    clock = Clock(samples=0, num_ranks=1, peak_tflops=1.0)
    check_names(clock.publish(samples=1, flops_per_sample=1.0))
