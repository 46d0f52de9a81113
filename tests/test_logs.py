import io
import logging
import re
import sys

import pytest
from tqdm import tqdm

from evaclip.logs import END, LINE, log_error, log_setup


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
    (tmp_path / "logs").mkdir()
    log_setup(tmp_path, rank=3)
    logging.getLogger("evaclip.train").info("step 10")
    logging.getLogger("evaclip.train").warning("odd")
    assert re.fullmatch(r"\d\d:\d\d:\d\d rank 3 WARNING: odd\n", capsys.readouterr().err)
    assert not (tmp_path / "log.txt").exists()


def test_other_ranks_write_everything_to_a_file_of_their_own(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    log_setup(tmp_path, rank=3)
    logging.getLogger("evaclip.train").info("step 10")
    logging.getLogger("evaclip.train").warning("odd")
    log_error("the end")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["rank_00003.txt"]
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    lines = (tmp_path / "logs/rank_00003.txt").read_text().splitlines()
    said = ["INFO evaclip.train: step 10", "WARNING evaclip.train: odd", "ERROR evaclip: the end"]
    assert all(re.fullmatch(f"{stamp} {text}", line) for text, line in zip(said, lines, strict=True))
    assert re.fullmatch(r"\d\d:\d\d:\d\d rank 3 WARNING: odd\n", capsys.readouterr().err)


def test_a_rank_whose_file_cannot_be_opened_goes_on_with_the_console(tmp_path, capsys):
    log_setup(tmp_path, rank=3)
    logging.getLogger("evaclip.train").warning("odd")
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r".* rank 3 WARNING: no log of this rank is written: .*No such file.*rank_00003\.txt'", first)
    assert re.fullmatch(r".* rank 3 WARNING: odd", second)


@pytest.mark.parametrize(
    ("rank", "name", "limit", "old"), [(0, "log.txt", 50 * 2**20, 3), (2, "logs/rank_00002.txt", 10 * 2**20, 2)]
)
def test_a_file_is_rotated_between_two_lines_and_the_oldest_one_goes(tmp_path, rank, name, limit, old, capsys):
    (tmp_path / "logs").mkdir()
    file = tmp_path / name
    for number in range(old + 2):
        log_setup(tmp_path, rank=rank)
        logging.getLogger("evaclip").info("number %d", number)
        assert file.read_text().endswith(f"number {number}\n"), "written at once"
        size = file.stat().st_size
        with file.open("ab") as stream:
            stream.write(b"x" * (limit - size - 10) + b"\n")  # the next line does not fit
    kept = [file, *(file.with_name(f"{file.name}.{number}") for number in range(1, old + 1))]
    numbers = [path.read_text().splitlines()[0][-1] for path in kept]
    assert numbers == [str(number) for number in range(old + 1, 0, -1)]
    assert set(file.parent.glob(f"{file.name}*")) == set(kept)
    assert all(path.stat().st_size <= limit for path in kept)


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


def test_records_of_the_file_can_be_told_apart_and_the_error_that_ends_a_run_from_others(tmp_path):
    log_setup(tmp_path)
    logging.getLogger("evaclip.checkpoint_writer").error("a disk: full\nsecond line")
    log_error("stopped: by hand")
    found = [LINE.fullmatch(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [match and (match["level"], match["name"], match["message"]) for match in found] == [
        ("ERROR", "evaclip.checkpoint_writer", "a disk: full"),
        None,
        ("ERROR", END, "stopped: by hand"),
    ]
