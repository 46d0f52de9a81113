"""The benchmarks run, print what they measure, and fail where the two sides do not do the same work."""

import mmap
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import benchmark_accumulation
import benchmark_checkpoint
import benchmark_classifier
import benchmark_embed
import benchmark_loader
import benchmark_loss
import benchmark_optimizer
import pytest
import torch
from tiny import tiny_tree

from evaclip.models.registry import PRESETS


def figures(pattern, text):
    found = re.search(pattern.replace("#", r"\s*(\d[\d.e+-]*)"), text)
    assert found, f"{pattern} is not in\n{text}"
    return [float(figure) for figure in found.groups()]


def test_loss_benchmark_gives_time_and_memory_of_both_losses(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_loss, "own_process", lambda: ThreadPoolExecutor(1))  # saves two imports of torch
    assert benchmark_loss.main(["--batch", "512", "--dim", "64", "--dtype", "fp32", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    for name in ("ours", "open_clip"):
        assert figures(f"{name} # MiB # ms # ms busy # TFLOP/s", out)[1] > 0
    figures("open_clip / ours: memory .*, time #, busy #", out)
    assert max(figures("ours off fp64 #, open_clip off fp64 #, open_clip off ours #", out)) < 1e-5


def test_accumulation_benchmark_gives_times_per_sample_and_memory_of_each_number():
    small = ["--blocks", "1", "--micro-batch", "1", "--pieces", "2", "--rounds", "1", "--memory-of", "1"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, benchmark_accumulation.__file__, *small]
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert all(figures("plain # ms a sample # ms busy\naccumulated # ms a sample # ms busy", out))
    assert all(figures("accumulated / plain: time #, busy #", out))
    assert figures("1 micro-batches: # MiB", out)[0] > 1


def test_loader_benchmark_gives_times_of_both_sides(capsys):
    assert benchmark_loader.main(["--records", "32", "--batch", "16", "--size", "64", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert all(figures("with accounts and determinism # ms a sample\nwithout # ms a sample\nratio #", out))


def test_loader_benchmark_notices_other_pixels(monkeypatch, capsys):
    read = benchmark_loader.PlainShards.read
    monkeypatch.setattr(benchmark_loader.PlainShards, "read", lambda self, shard, n: read(self, shard, (n + 1) % 8))
    assert benchmark_loader.main(["--records", "32", "--batch", "16", "--size", "64", "--rounds", "1"]) == 1
    assert "the two sides do not read the same" in capsys.readouterr().err


EMBED = ["--model", "tiny", "--records", "12", "--batch", "4", "--size", "32", "--rounds", "1", "--precision", "fp32"]


def test_embed_benchmark_gives_rates_of_all_sides_and_their_ratios(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", tiny_tree("unused", {})["model"])
    assert benchmark_embed.main(EMBED) == 0
    out = capsys.readouterr().out
    for name in ("forward", "embed", "evaluate"):
        assert all(figures(rf"{name}\s+# records/s, # ms busy", out))
    for name in ("embed", "evaluate"):
        assert all(figures(f"{name} / forward: rate #, by processor time #", out))


def test_embed_benchmark_notices_other_features(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", tiny_tree("unused", {})["model"])
    right = benchmark_embed.Bench.encode_images
    monkeypatch.setattr(benchmark_embed.Bench, "encode_images", lambda self, images: right(self, images.flip(0)))
    monkeypatch.setattr(
        benchmark_embed.Sides,
        "forward",
        lambda self: [(right(self.bench, images), self.bench.encode_texts(ids)) for images, ids in self.batches],
    )
    assert benchmark_embed.main(EMBED) == 1
    assert "the two do not do the same work" in capsys.readouterr().err


def test_memory_is_that_of_the_peak_above_what_was_held():
    size = 1 << 26

    def peak() -> None:
        with mmap.mmap(-1, size) as fresh:  # not the allocator, which may hold that much since another test
            fresh[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)

    extra, _ = benchmark_loss.extra_memory(peak, torch.device("cpu"))
    assert extra == pytest.approx(size, rel=0.1)


def test_optimizer_benchmark_gives_times_and_distances(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", tiny_tree("unused", {})["model"])
    assert benchmark_optimizer.main(["--model", "tiny", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert all(figures("ours # ms\\ntimm # ms\\ncopy # ms", out))
    assert all(figures("timm / ours: #\nours / copy: #", out))
    assert figures("of the movement: ours #, timm #", out)[0] < 1e-4


def test_loss_benchmark_notices_a_wrong_gradient(monkeypatch, capsys):
    right = benchmark_loss.info_nce

    def wrong(*inputs):
        output = right(*inputs)
        return output._replace(text_grad=1.001 * output.text_grad)

    monkeypatch.setattr(benchmark_loss, "info_nce", wrong)
    assert benchmark_loss.main(["--batch", "64", "--dim", "16", "--dtype", "fp32"]) == 1
    captured = capsys.readouterr()
    assert "ours off fp64 1.0e-03" in captured.out
    assert captured.err == "error: ours off fp64, by more than 1e-05: not all do the same work\n"


def test_accumulation_benchmark_notices_a_wrong_gradient(monkeypatch, capsys):
    def forgetful(engine, loss, micro_batches, ranks):
        return right(engine, loss, micro_batches[:1], ranks)

    right = benchmark_accumulation.forward_backward
    monkeypatch.setattr(benchmark_accumulation, "forward_backward", forgetful)
    assert benchmark_accumulation.main(["--blocks", "1", "--micro-batch", "2", "--pieces", "2"]) == 1
    assert "the two do not do the same work" in capsys.readouterr().err


def test_checkpoint_benchmark_gives_stall_bandwidth_and_the_price_of_checksums(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(PRESETS, "tiny", tiny_tree("unused", {})["model"])
    assert benchmark_checkpoint.main(["--model", "tiny", "--rounds", "1", "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name in ("ours", "torch.save"):
        assert all(
            figures(rf"{name}\s+stall # ms, # ms of it not a step; complete after # ms, # MB/s, # ms busy", out)[2:]
        )
    assert all(figures("torch.save / ours: stall #, without slower steps #, complete #", out))
    assert figures("with / without checksum: #", out)[0] > 0
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_benchmark_notices_other_bytes(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(PRESETS, "tiny", tiny_tree("unused", {})["model"])
    right = torch.save

    def wrong(state, path):
        state["exp_avg"]["image.head.weight"][0, 0] *= -1
        right(state, path)

    monkeypatch.setattr(torch, "save", wrong)
    assert benchmark_checkpoint.main(["--model", "tiny", "--rounds", "1", "--folder", str(tmp_path)]) == 1
    assert "error: exp_avg of image.head.weight differs" in capsys.readouterr().err


CLASSIFIER = ["--classes", "3", "--templates", "2", "--width", "64", "--depth", "1", "--rounds", "1"]


def test_classifier_benchmark_gives_times_of_both_sides_and_their_difference(capsys):
    assert benchmark_classifier.main(CLASSIFIER) == 0
    out = capsys.readouterr().out
    assert all(figures("ours # s, # s busy\nopen_clip # s, # s busy", out))
    assert figures("open_clip / ours: time #, busy #; largest difference #", out)[2] < 1e-5


def test_classifier_benchmark_notices_another_classifier(monkeypatch, capsys):
    names = benchmark_classifier.open_clip.IMAGENET_CLASSNAMES
    right = benchmark_classifier.classifier_of
    monkeypatch.setattr(
        benchmark_classifier, "classifier_of", lambda bench, _, *rest, **kw: right(bench, names[3:6], *rest, **kw)
    )
    assert benchmark_classifier.main(CLASSIFIER) == 1
    assert "the two do not do the same work" in capsys.readouterr().err
