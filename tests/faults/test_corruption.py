"""Random damage to a run's checkpoints: nothing wrong is ever loaded, and the newest intact one is found.

Three checkpoints of two ranks are damaged in one to three places. Then the run looks for its state as at every start.
What it finds has to hold, bit for bit, what was written at that step; no untouched checkpoint may be passed over; and
every one that is passed over has to be named. A touched file may still be right: nothing reads ``config.yaml``, and a
flipped bit can leave the same number in ``meta.json``.
"""

import random
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import tables
import torch
from tables import record
from tiny import tiny_config

from evaclip.checkpoint import FORMAT, CheckpointReader, Entry, RunState, set_aside
from evaclip.checkpoint_writer import CheckpointWriter
from evaclip.distributed import Ranks

STEPS = (1, 2, 3)
CONFIG = tiny_config("run", checkpoint__keep_last=len(STEPS))
KINDS = ("weight", "exp_avg", "exp_avg_sq")
CUTS = ((0, 30), (30, 41), (41, 64))  # runs of one parameter; the ranks take turns
FILES = ("meta.json", "config.yaml", "part_00000.safetensors", "part_00001.safetensors")


def values(step):
    """What a checkpoint holds, by kind."""
    generator = torch.Generator().manual_seed(step)
    return {kind: torch.randn(64, generator=generator) for kind in KINDS}


def state(step):
    slots = {0: [[[0, step, 2]], [5], []], 1: [[[0, 2, step]], [3], []]}
    return RunState(step, 16 * step, step, 1.0, 16, slots, {"x": "0f"}, {"a": [64]}, {"eval/x/loss": 1e-5}, {}, {})


def write(folder, step):
    """Write a checkpoint as two ranks do, one after the other."""
    temporary = folder / f".step_{step:08d}.0.tmp"
    writers = [CheckpointWriter(folder, CONFIG, Ranks()) for _ in range(2)]
    for rank, writer in enumerate(writers):
        writer._ranks = Ranks(rank, 2)
        entries = [
            Entry(kind, "a", start, values(step)[kind][start:stop])
            for kind in KINDS
            for number, (start, stop) in enumerate(CUTS)
            if number % 2 == rank
        ]
        assert writer._write_part(temporary, writer._staging.fill(entries)) is None
    meta = {"format": FORMAT, **asdict(state(step)), "config": CONFIG.model_dump(mode="json")}
    assert writers[0]._complete(temporary, folder / f"step_{step:08d}", meta, final=False) is None


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin") / "checkpoints"
    for step in STEPS:
        write(folder, step)
    return folder


# ------------------------------------------------------------------------------------------------------------- damage
# Each takes a generator, the folder and the checkpoint to damage, and returns the steps that it has touched.


def flip(rng, folder, path):
    file = path / rng.choice(FILES)
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 5))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(rng, folder, path):
    file = path / rng.choice(FILES)
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def empty(rng, folder, path):
    (path / rng.choice(FILES)).write_bytes(b"")


def extend(rng, folder, path):
    with (path / rng.choice(FILES)).open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 20)))


def zero(rng, folder, path):
    """As after a power failure: a piece of a file holds zeros."""
    file = path / rng.choice(FILES)
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    stop = rng.randrange(start, len(content)) + 1
    content[start:stop] = bytes(stop - start)
    file.write_bytes(content)


def delete(rng, folder, path):
    (path / rng.choice(FILES)).unlink()


def swap(rng, folder, path):
    """Two files of a checkpoint under each other's name."""
    first, second = rng.sample(FILES, 2)
    (path / first).rename(path / "aside")
    (path / second).rename(path / first)
    (path / "aside").rename(path / second)


def borrow(rng, folder, path):
    """Some or all files of another step."""
    other = rng.choice([step for step in STEPS if step != int(path.name[5:])])
    for name in rng.sample(FILES, rng.randrange(1, 5)):
        shutil.copy(folder / f"step_{other:08d}" / name, path / name)


def nonsense(rng, folder, path):
    """Metadata that is JSON, and not ours."""
    (path / "meta.json").write_text(rng.choice(("[]", "null", "{}", "7", f'{{"format": {FORMAT}}}', "[" * 100_000)))


def vanish(rng, folder, path):
    """All files are gone, or the folder is a file."""
    shutil.rmtree(path)
    if rng.random() < 0.5:
        path.mkdir()
    else:
        path.write_bytes(b"")


def latest(rng, folder, path):
    """The name of the newest checkpoint is wrong; nothing depends on it."""
    (folder / "latest").write_text(rng.choice(("", "step_99999999\n", "\0" * 14, path.name)))


def leftover(rng, folder, path):
    """What a kill leaves: a folder that was never renamed, half written or whole, or half deleted."""
    name = rng.choice((".step_00000004.0badf00d.tmp", f".{path.name}.0badf00d.tmp", f".{path.name}.deleted"))
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir()
    for file in rng.sample(FILES, rng.randrange(5)):
        (folder / name / file).write_bytes(rng.randbytes(100))


DAMAGE = (flip, flip, flip, truncate, empty, extend, zero, delete, swap, borrow, nonsense, vanish, latest, leftover)
HARMLESS = (latest, leftover)


def outcome(origin, folder, seed):
    """What one random damage came to, and what it was."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(origin, folder)
    rng = random.Random(seed)
    touched, kinds = set(), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        damage = DAMAGE[seed % len(DAMAGE)] if not kinds else rng.choice(DAMAGE)
        step = rng.choice((1, 2, 3, 3, 3))
        path = folder / f"step_{step:08d}"
        if step in touched or (damage is borrow and touched):  # a file may be missing by now
            continue
        damage(rng, folder, path)
        kinds.append(damage.__name__)
        if damage not in HARMLESS:
            touched.add(step)
    return kinds[0], _judge(folder, touched)


def _judge(folder, touched):
    intact, problems = set_aside(folder)
    assert not [*folder.glob(".step_*.tmp"), *folder.glob(".step_*.deleted")], "leftovers stay"
    found = int(intact.name[5:]) if intact else 0
    passed_over = [step for step in STEPS if step > found]
    if any(step not in touched for step in passed_over):
        return "an intact one was passed over"
    if not all(any(f"step_{step:08d}" in text for text in problems) for step in passed_over):
        return "not named"
    if intact is None:
        return "none is left, and said"
    if not _right(CheckpointReader(intact), found):
        return "silent"
    return "an older one is used, the damage named" if passed_over else "the newest is used"


def _right(reader, step):
    """Whether what a run would continue from is what was written at that step."""
    for kind, expected in values(step).items():
        loaded = torch.full((64,), torch.nan)
        reader.fill(Entry(kind, "a", 0, loaded))
        if not torch.equal(loaded, expected):
            return False
    return (reader.state, reader.config) == (state(step), CONFIG)


GOOD = ("the newest is used", "an older one is used, the damage named", "none is left, and said")
BAD = ("silent", "not named", "an intact one was passed over")


def table(origin, folder, number):
    """Kind of damage -> outcome -> count."""
    counts: dict[str, Counter[str]] = {}
    for seed in range(number):
        kind, result = outcome(origin, folder, seed)
        counts.setdefault(kind, Counter())[result] += 1
    return counts


def test_a_sample_of_random_damage_is_seen_and_named(origin, tmp_path):
    counts = table(origin, tmp_path / "checkpoints", 42)
    assert {result for row in counts.values() for result in row} <= {*GOOD}
    assert set(counts) == {damage.__name__ for damage in DAMAGE}


def tell(counts):
    """Write the table."""
    for kind, row in sorted(counts.items()):
        for result in (*GOOD, *BAD):
            record("Damaged checkpoints: kind of damage, and what a run does", kind, result, row[result])


def test_every_kind_of_damage_stands_in_the_table(monkeypatch):
    monkeypatch.setattr(tables, "FIGURES", [])
    tell({"flip": Counter({"the newest is used": 3}), "cut": Counter({"silent": 1})})
    rows = {figure.row: {} for figure in tables.FIGURES}
    for figure in tables.FIGURES:
        rows[figure.row][figure.column] = figure.value
    assert rows["flip"] == {**dict.fromkeys((*GOOD, *BAD), 0), "the newest is used": 3}
    assert rows["cut"]["silent"] == 1


@pytest.mark.faults
def test_1000_random_damages_load_nothing_wrong(origin, tmp_path):
    counts = table(origin, tmp_path / "checkpoints", 1000)
    tell(counts)
    total = sum((Counter(row) for row in counts.values()), Counter())
    assert set(total) == {*GOOD}
    assert sum(total.values()) == 1000
    assert min(total["an older one is used, the damage named"], total["the newest is used"]) > 100


def test_the_judge_sees_what_is_loaded_wrong(origin, tmp_path):
    folder = Path(shutil.copytree(origin, tmp_path / "checkpoints"))
    shutil.rmtree(folder / "step_00000003")
    (folder / "step_00000002").rename(folder / "step_00000003")
    write(folder, 2)
    assert _judge(folder, {3}) == "an older one is used, the damage named"
    shutil.rmtree(folder)
    shutil.copytree(origin, folder)
    shutil.rmtree(folder / "step_00000003")
    assert _judge(folder, set()) == "an intact one was passed over"
