"""A run that goes on with other ranks, engines, workers and micro-batches is the same run."""

import pytest
from distributed.spawn import run_on_ranks
from tables import record

from evaclip.distributed import Ranks
from faults.elastic import CHAINS, LAMB, STEPS, WORLDS, cases, losses, train
from faults.ends import assert_carried_over

pytestmark = pytest.mark.faults

TOTAL = STEPS * len(WORLDS)
STOPS = range(1, len(WORLDS))
TABLE = "Runs that go on at 4, 2, 1, 4 ranks with other workers and micro-batches, six steps each"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, colour_shards):
    """Losses and batches of one process that is never stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = {"shards": str(colour_shards / "{00000..00002}.tar")}
    seeds = train(Ranks(), folder, run_dir=folder, source=source, options={**LAMB, "train__steps": TOTAL})
    return losses(folder), seeds


@pytest.fixture(scope="module")
def stretches(tmp_path_factory, colour_shards):
    """What each stretch's cases returned, and the folder of the chains' runs."""
    source = {"shards": str(colour_shards / "{00000..00002}.tar")}
    runs = tmp_path_factory.mktemp("chains")
    found = []
    for number, world in enumerate(WORLDS):
        folder = tmp_path_factory.mktemp(f"stretch{number}_")
        found.append(run_on_ranks(world, cases(number, runs, source), folder))
    return found, runs


def of(answers, case):
    for answer in answers[case]:
        if isinstance(answer, RuntimeError):
            raise answer
    return answers[case]


@pytest.mark.parametrize("chain", CHAINS)
def test_batches_and_losses_are_those_of_the_undisturbed_run(stretches, undisturbed, chain):
    found, runs = stretches
    place = list(CHAINS).index(chain)
    batches = []
    for answers in found:
        steps = zip(*of(answers, f"trained{place}"), strict=True)  # [ranks, steps] -> [steps, ranks]
        batches += [[seed for share in step for seed in share] for step in steps]
    expected, seeds = undisturbed
    assert batches == seeds
    got = losses(runs / str(place))
    furthest = max(abs(one - other) / other for one, other in zip(got, expected, strict=True))
    record(TABLE, chain, "other samples", 0)
    record(TABLE, chain, "losses, largest relative difference", furthest)
    assert furthest <= 1e-5  # fp32 sums in another order


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("chain", CHAINS)
def test_weights_and_moments_pass_through_another_layout_bit_for_bit(stretches, chain, stop):
    folder = of(stretches[0][stop], f"resaved{list(CHAINS).index(chain)}")[0]
    assert_carried_over(folder, WORLDS[stop])
    record(TABLE, chain, "tensors that were not carried over exactly", 0)
