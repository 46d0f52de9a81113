"""Runs that are killed with SIGKILL end like undisturbed ones, bit for bit."""

import statistics
from collections import Counter
from functools import partial
from random import Random

import pytest
import yaml
from tables import draw, record
from tiny import colour_records, merged, tiny_tree

from evaclip.data.shards import write_shards
from faults.ends import assert_same_end
from faults.killing import (
    EVALUATING,
    EVERYTHING,
    HIT,
    INDEXING,
    OPENING,
    RANK,
    STARTING,
    STEP,
    WORKER,
    WRITING,
    Command,
    Hunt,
    any_time,
    in_evaluation,
    in_index,
    in_opening,
    in_step,
    in_write,
)
from faults.picture import killed_run

STEPS = 120
SHARDS = 12
KILLS = {
    1: {any_time: 16, in_index: 3, in_opening: 3, in_step: 5, in_write: 6, in_evaluation: 4},
    2: {any_time: 12, in_index: 3, in_opening: 3, in_step: 4, in_write: 6, in_evaluation: 3},
    3: {any_time: 8, in_index: 2, in_opening: 2, in_step: 3, in_write: 4, in_evaluation: 2},
}
"""Of all processes; by number of ranks and moment."""
SINGLE = {1: {WORKER: 3}, 2: {RANK: 3, WORKER: 2}, 3: {RANK: 3, WORKER: 2}}
"""Of one process, in a step."""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command of a tiny run with data workers, evaluation and checkpoints, on a number of ranks."""
    folder = tmp_path_factory.mktemp("kills")
    write_shards(folder / "shards", colour_records(8 * SHARDS), 8)

    def make(name, world, steps=STEPS):
        shards = str(folder / "shards" / f"{{00000..{SHARDS - 1:05d}}}.tar")
        held = {"held": {"task": "loss", "path": shards, "limit": 20}}
        options = {
            "train__steps": steps,
            "train__global_batch": 24,
            "optim__name": "lamb",
            "optim__lr": 2.5e-4,
            "data__workers": 1,
        }
        options |= {"eval__datasets": held, "eval__every_steps": 8, "eval__batch": 20, "checkpoint__every_steps": 3}
        path = folder / f"{name}.yaml"
        tree = tiny_tree(folder / name, {"shards": shards})
        path.write_text(yaml.safe_dump(merged(tree, **options)))
        return Command(path, folder / name, world, SHARDS, 8)

    return make


def test_two_ranks_killed_in_a_step_and_in_a_write_end_like_undisturbed_ones(command):
    reference = command("reference", 2, 16)
    reference.finish()
    check = partial(assert_same_end, reference=reference.run_dir)
    hunt = Hunt(command("killed", 2, 16), Random(5), 0.0, check)  # after ten steps
    hunt.kill(in_step)
    hunt.kill(in_write)
    hunt.finish()
    assert hunt.lives[1].first_step > 0, "went on from a checkpoint"
    assert hunt.lives[1].hit == WRITING


@pytest.mark.faults
@pytest.mark.parametrize("world", KILLS)
def test_runs_killed_at_random_moments_end_like_undisturbed_ones(command, world):
    reference = command(f"undisturbed{world}", world)
    duration = reference.finish()
    check = partial(assert_same_end, reference=reference.run_dir)
    hunt = Hunt(command(f"killed{world}", world), Random(world), duration, check)
    planned = [(moment, EVERYTHING) for moment, number in KILLS[world].items() for _ in range(number)]
    planned += [(in_step, victim) for victim, number in SINGLE[world].items() for _ in range(number)]
    hunt.random.shuffle(planned)
    for moment, victim in planned:
        hunt.kill(moment, victim)
    hunt.finish()
    count(hunt)
    if world == 2:
        most = max(range(len(hunt.finished)), key=lambda run: sum(life.run == run for life in hunt.lives))
        lives = [life for life in hunt.lives if life.run == most]
        draw("killed.svg", killed_run(lives, hunt.finished[most], reference.run_dir))


def count(hunt):
    """Write the tables' column of a number of ranks."""
    world = hunt.command.world
    column = f"{world} ranks" if world > 1 else "1 rank"
    hits = Counter(life.hit for life in hunt.lives if life.victim == EVERYTHING)
    assert sum(bool(life.first_step) for life in hunt.lives) > len(hunt.lives) / 4, "went on from checkpoints"
    assert {STARTING, INDEXING, OPENING, STEP, WRITING, EVALUATING} <= set(hits)
    for hit in HIT:
        record("SIGKILL of all processes at once, by what it hit", f"in {hit}", column, hits[hit])
    for victim, number in SINGLE[world].items():
        record("SIGKILL of one process in a step; the others end by themselves", victim, column, number)
    waits = [life.seconds_to_step for life in hunt.lives if life.seconds_to_step]
    outcomes = {
        "kills": len(hunt.lives),
        f"runs of {STEPS} steps that came to their end": len(hunt.finished),
        "other weights, moments, slot states or metrics than undisturbed": 0,
        "starts that failed": 0,
        "median seconds from a start to its first step": statistics.median(waits),
    }
    for outcome, number in outcomes.items():
        record("Outcome of the kills", outcome, column, number)
