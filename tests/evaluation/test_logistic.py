"""The regression of the probe against scikit-learn's, on pixels of real handwritten digits."""

import numpy as np
import pytest
import torch
from distributed.spawn import run_on_ranks
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from evaclip.distributed import Ranks
from evaclip.evaluation.logistic import fit, scores

IMAGES, LABELS = load_digits(return_X_y=True)
FEATURES = torch.nn.functional.normalize(torch.tensor(IMAGES), dim=1).float()  # 1797 of 64, a narrow cone
TARGETS = torch.tensor(LABELS)
PENALTIES = [1e4, 100.0, 1.0, 1e-2, 1e-4]


def path(features, targets, classes=10, ranks=Ranks()):  # noqa: B008  an immutable value
    """The models of all penalties, each begun at the one before."""
    model, models = torch.zeros(classes, 65, dtype=torch.float64), {}
    for l2 in PENALTIES:
        model = models[l2] = fit(features, targets, l2, model, ranks)
    return models


@pytest.fixture(scope="module")
def models():
    return path(FEATURES, TARGETS)


def reference(features, targets, c):
    """Newton's method converges quadratically: its minimum is exact for the comparison."""
    peer = LogisticRegression(C=c, solver="newton-cg", tol=1e-9, max_iter=1000)
    return peer.fit(features.double().numpy(), targets.numpy())


@pytest.mark.parametrize("l2", PENALTIES)
def test_weights_probabilities_and_predictions_are_scikit_learns(models, l2):
    peer = reference(FEATURES, TARGETS, 1 / l2)
    theirs = torch.tensor(np.column_stack([peer.coef_, peer.intercept_]))
    # The last step gains 1e-12 nats per sample, and a gap of g nats means squared distances of up to 2 g / l2.
    assert (models[l2] - theirs).norm() < 2e-4 * theirs.norm()
    found = scores(models[l2], FEATURES)
    expected = torch.tensor(peer.predict_proba(FEATURES.double().numpy()))
    assert (found.softmax(1) - expected).abs().max() < 2e-5
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_two_classes_that_can_be_separated_have_a_finite_minimum(models):
    two = TARGETS < 2
    model = path(FEATURES[two], TARGETS[two], classes=2)[1e-4]
    peer = reference(FEATURES[two], TARGETS[two], 2 / 1e-4)  # one vector where we have two of opposite sign
    assert torch.equal(scores(model, FEATURES[two]).argmax(1), TARGETS[two])
    assert (2 * model[1, :-1] - torch.tensor(peer.coef_[0])).norm() < 1e-3 * np.linalg.norm(peer.coef_)
    assert (model[1] + model[0]).norm() < 1e-6 * model.norm()


def on_ranks(ranks, _folder):
    """Samples lie on the ranks in unequal numbers, on the last one there are none."""
    own = (torch.arange(len(FEATURES)) % 3 == 0) == ranks.is_main
    own &= torch.tensor(ranks.rank < 2)
    return {l2: model.numpy() for l2, model in path(FEATURES[own], TARGETS[own], ranks=ranks).items()}


def test_ranks_fit_together_what_one_does(models, tmp_path):
    found = run_on_ranks(3, {"fit": on_ranks}, tmp_path)["fit"]
    for l2, alone in models.items():
        assert all(np.array_equal(other[l2], found[0][l2]) for other in found)
        assert np.linalg.norm(found[0][l2] - alone.numpy()) < 2e-4 * alone.norm(), "as far as they are from the minimum"
