import io
import logging
import re
import sys

import pytest
from tqdm import tqdm

from evaclip.logs import log_setup


@pytest.fixture(autouse=True)
def logging_as_it_was():
    root, package = logging.getLogger(), logging.getLogger("evaclip")
    handlers, level = root.handlers[:], package.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    package.setLevel(level)


def test_the_main_rank_writes_to_console_and_file(tmp_path, capsys):
    log_setup(tmp_path)
    logging.getLogger("evaclip.train").info("step %d", 10)
    logging.getLogger("evaclip.train").warning("odd")
    assert re.fullmatch(r"\d\d:\d\d:\d\d step 10\n\d\d:\d\d:\d\d WARNING: odd\n", capsys.readouterr().err)
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    written = (tmp_path / "log.txt").read_text()
    assert re.fullmatch(rf"{stamp} INFO evaclip.train: step 10\n{stamp} WARNING evaclip.train: odd\n", written)


def test_other_ranks_print_only_warnings_and_say_who_they_are(tmp_path, capsys):
    log_setup(tmp_path, rank=3)
    logging.getLogger("evaclip.train").info("step 10")
    logging.getLogger("evaclip.train").warning("odd")
    assert re.fullmatch(r"\d\d:\d\d:\d\d rank 3 WARNING: odd\n", capsys.readouterr().err)
    assert not (tmp_path / "log.txt").exists()


def test_a_continued_run_appends_to_its_log(tmp_path):
    for message in ("first", "second"):
        log_setup(tmp_path)
        logging.getLogger("evaclip").info(message)
    assert [line.split(": ")[1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["first", "second"]


def test_a_second_set_up_replaces_the_first(tmp_path, capsys):
    log_setup(tmp_path)
    log_setup(None)
    logging.getLogger("evaclip").info("once")
    assert capsys.readouterr().err.count("once") == 1
    assert (tmp_path / "log.txt").read_text() == ""


def test_other_packages_are_heard_from_warnings_on(capsys):
    log_setup(None)
    logging.getLogger("chatty").info("noise")
    logging.getLogger("chatty").warning("trouble")
    shown = capsys.readouterr().err
    assert "noise" not in shown
    assert "trouble" in shown


def test_a_line_does_not_run_into_the_progress_bar(capsys):
    log_setup(None)
    with tqdm(total=10, file=sys.stderr, ascii=True, ncols=60) as bar:
        bar.update(5)
        bar.refresh()
        logging.getLogger("evaclip").info("hello")
    lines = [re.split(r"\r", line)[-1] for line in capsys.readouterr().err.split("\n")]
    assert any(re.fullmatch(r"\d\d:\d\d:\d\d hello", line) for line in lines)


def test_a_console_that_is_gone_does_not_end_the_run(tmp_path, monkeypatch):
    log_setup(tmp_path)
    gone = io.StringIO()
    gone.close()
    monkeypatch.setattr(sys, "stderr", gone)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    logging.getLogger("evaclip").info("still here")
    assert "still here" in (tmp_path / "log.txt").read_text()
