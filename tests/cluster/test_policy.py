"""What is decided after an attempt, with which nodes the next one starts, and who is to blame for silence."""

from __future__ import annotations

import pytest

from evaclip.cluster.policy import Attempt, Sign, choose_nodes, decide, silent_ranks, unfit_nodes
from evaclip.config import ClusterConfig

CONFIG = ClusterConfig(start_timeout_seconds=100, step_timeout_seconds=10, max_restarts=4, max_same_step=3)


def attempt(cause="a rank died", step: int | None = 10, saved: int | None = 5, **changes) -> Attempt:
    return Attempt(**{"nodes": ("n1", "n2"), "cause": cause, "detail": "what", "step": step, "saved": saved, **changes})


@pytest.mark.parametrize(
    ("cause", "may_requeue", "action"),
    [
        ("complete", True, "done"),
        ("refused", True, "stop"),
        ("asked to stop", True, "requeue"),
        ("asked to stop", False, "stop"),
        ("a rank died", False, "restart"),
        ("a rank hangs", True, "restart"),
        ("a node is gone", True, "restart"),
    ],
)
def test_first_ending_decides_by_its_cause(cause, may_requeue, action):
    decision = decide([attempt(cause)], CONFIG, may_requeue=may_requeue)
    assert (decision.action, decision.wait_seconds) == (action, 0)


def test_third_failure_at_the_same_step_stops_with_the_evidence():
    attempts = [attempt(detail="first"), attempt(), attempt(detail="rank 3 on n2 ended with code 1: no")]
    assert decide(attempts[:2], CONFIG, may_requeue=True).action == "restart"
    decision = decide(attempts, CONFIG, may_requeue=True)
    assert decision == ("stop", "the last 3 attempts failed at step 10: rank 3 on n2 ended with code 1: no", 0)


@pytest.mark.parametrize(
    "other", [attempt(step=11), attempt(saved=9), attempt("a rank hangs"), attempt("a node is gone")]
)
def test_failures_that_differ_do_not_count_as_the_same(other):
    assert decide([attempt(), other, attempt()], CONFIG, may_requeue=True).action == "restart"
    lost = [attempt("a node is gone")] * 3
    assert decide(lost, CONFIG, may_requeue=True).action == "restart"


def test_failures_before_the_first_step_count_too():
    decision = decide([attempt(step=None, saved=None)] * 3, CONFIG, may_requeue=True)
    assert decision.reason == "the last 3 attempts failed at the start: what"


def test_restarts_without_a_new_checkpoint_wait_longer_and_longer_and_end():
    attempts = [attempt(step=step) for step in range(10, 15)]
    waits = [decide(attempts[:n], CONFIG, may_requeue=True).wait_seconds for n in range(1, 5)]
    assert waits == [0, 5, 10, 20]
    decision = decide(attempts, CONFIG, may_requeue=True)
    assert decision.action == "stop"
    assert decision.reason == "5 attempts in a row did not come to a checkpoint after step 5"
    assert decide([*attempts, attempt(step=20, saved=18)], CONFIG, may_requeue=True) == ("restart", "what", 0)


def test_waits_are_bounded():
    many = ClusterConfig(max_restarts=100)
    attempts = [attempt(step=step) for step in range(50)]
    assert decide(attempts, many, may_requeue=True).wait_seconds == 300


@pytest.mark.parametrize(
    ("there", "slots", "wanted", "least", "chosen"),
    [
        (4, 256, 4, None, 4),
        (3, 256, 4, None, 0),  # a lost node requeues
        (3, 256, 4, 1, 2),  # 3 x 2 ranks do not divide 256 slots: one is spare
        (3, 252, 4, 1, 3),
        (1, 256, 4, 2, 0),
        (6, 256, 4, 1, 4),
        (0, 256, 4, 1, 0),
        (3, 252, 3, 5, 3),  # more than were asked for cannot be needed
    ],
)
def test_largest_number_of_nodes_that_divides_the_slots_is_chosen(there, slots, wanted, least, chosen):
    nodes = [f"n{number}" for number in range(there)]
    assert choose_nodes(nodes, 2, slots=slots, wanted=wanted, min_nodes=least) == tuple(nodes[:chosen])


def sign(rank, step=7, phase="forward", age=1.0, state="S") -> Sign:
    return Sign(rank, f"n{rank}", 100 + rank, step, phase, age, state)


def test_nobody_is_blamed_before_the_time_is_over():
    assert not silent_ranks([sign(0, age=9.9), sign(1, age=0.1)], CONFIG)
    assert not silent_ranks([sign(0, phase="start", age=99.0)], CONFIG)
    assert silent_ranks([sign(0, phase="start", age=101.0)], CONFIG)
    assert not silent_ranks([], CONFIG)


def test_who_is_stopped_or_behind_is_blamed_else_all():
    others = [sign(0, age=11), sign(2, age=11)]
    stopped, behind = sign(1, age=11, state="T"), sign(1, phase="data", age=11)
    assert silent_ranks([*others, stopped], CONFIG) == [stopped]
    assert silent_ranks([*others, behind], CONFIG) == [behind]
    assert silent_ranks([*others, sign(1, step=6, phase="update", age=11)], CONFIG)[0].rank == 1
    assert len(silent_ranks([*others, sign(1, age=11)], CONFIG)) == 3


def test_a_sign_names_rank_node_step_phase_and_process():
    assert str(sign(1, state="T")) == "rank 1 on n1 (in forward of step 8, process 101, stopped by a signal)"
    assert str(sign(1, phase="start")) == "rank 1 on n1 (in its start, process 101)"


def test_before_the_first_step_one_busy_rank_is_enough():
    done, busy = sign(0, phase="start", age=1000), sign(1, phase="start", age=1)
    assert not silent_ranks([done, busy], CONFIG)  # it waits for the other's indexes
    assert silent_ranks([done, sign(1, phase="start", age=101)], CONFIG) == [done, sign(1, phase="start", age=101)]
    assert silent_ranks([sign(0, age=11), busy], CONFIG) == [busy]


def test_too_few_nodes_requeue_until_the_limit():
    few = attempt("too few nodes", step=None)
    assert decide([few], CONFIG, may_requeue=True).action == "requeue"
    assert decide([few], CONFIG, may_requeue=False).action == "stop"
    assert decide([few] * 5, CONFIG, may_requeue=True) == (
        "stop",
        "5 attempts in a row did not come to a checkpoint after step 5",
        0,
    )


def test_being_asked_to_stop_does_not_count_as_a_failure():
    attempts = [attempt(step=10), *[attempt("asked to stop")] * 9, attempt(step=11)]
    assert decide(attempts, CONFIG, may_requeue=True) == ("restart", "what", 5)


def test_starts_that_are_asked_to_stop_before_they_save_end_too():
    asked = attempt("asked to stop", step=None)
    assert decide([attempt("asked to stop", saved=4), *[asked] * 4], CONFIG, may_requeue=True).action == "requeue"
    decision = decide([asked] * 5, CONFIG, may_requeue=True)
    assert decision.action == "stop"
    assert decision.reason.startswith("5 starts in a row ended without a new checkpoint: ")
    progress = [attempt("asked to stop", saved=step) for step in range(20)]
    assert decide(progress, CONFIG, may_requeue=True).action == "requeue"


def test_a_node_that_was_to_blame_twice_in_a_row_is_unfit():
    first, other = attempt(blamed="n7"), attempt(blamed="n3")
    assert unfit_nodes([first]) == set()
    assert unfit_nodes([first, first]) == {"n7"}
    assert unfit_nodes([first, other]) == set()
    assert unfit_nodes([attempt(), attempt()]) == set()
