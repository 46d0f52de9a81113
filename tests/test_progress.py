import io
import logging
import sys

import pytest

from evaclip.progress import Progress, postfix, summary, time_left

ROW = {
    "step": 100,
    "samples": 25600,
    "train/loss": 2.31459,
    "train/accuracy_image_to_text": 0.5,
    "speed/samples_per_second": 1234.4,
    "speed/data_wait_fraction": 0.031,
    "lr/logit_scale": 1e-3,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_line_shows_what_a_person_follows():
    assert summary(ROW) == "loss 2.3146, i2t 0.500, samples/s 1,234, wait 3%"
    assert summary({"step": 1, "samples": 8, "eval/digits/top1": 0.97}) == "eval/digits/top1 0.9700"


@pytest.mark.parametrize(("rates", "shown"), [(("image", "text"), "0.002"), (("text",), "0.001")])
def test_the_rate_is_that_of_the_image_tower_unless_it_has_none(rates, shown):
    row = {f"lr/{name}": {"image": 2e-3, "text": 1e-3}[name] for name in rates}
    assert summary(row) == f"lr {shown}"


def test_the_bar_shows_loss_and_speed():
    assert postfix(ROW) == "loss 2.3146, samples/s 1,234"


def test_a_loss_that_is_not_finite_is_called_that():
    assert postfix({"train/loss": None}) == "loss not finite"


def test_time_left_follows_from_the_speed_of_the_row():
    assert time_left(ROW, steps=1100) == "0:03:27"  # 1000 steps of 256 samples at 1234.4 per second
    assert time_left(ROW, steps=100) == "0:00:00"


@pytest.mark.parametrize("row", [{"step": 100, "samples": 800}, {"step": 0, "samples": 0, "eval/digits/top1": 0.1}])
def test_without_a_speed_no_time_is_told(row):
    assert time_left(row, steps=10) is None


def test_on_a_terminal_there_is_a_bar_and_no_log_line(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(steps=1000, step=90)
    with caplog.at_level(logging.INFO):
        progress.advance(100)
        progress.publish(ROW)
    progress.close()
    shown = sys.stderr.getvalue()
    assert "100/1000" in shown
    assert "loss 2.3146, samples/s 1,234" in shown
    assert caplog.text == ""


def test_elsewhere_there_are_log_lines_and_no_bar(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = Progress(steps=1000, step=0)
    with caplog.at_level(logging.INFO):
        progress.advance(100)
        progress.publish(ROW)
    progress.close()
    assert sys.stderr.getvalue() == ""
    assert caplog.messages == ["step 100 of 1000: loss 2.3146, i2t 0.500, samples/s 1,234, wait 3%, 0:03:07 left"]
