"""`VAEOutlierDetector` keeps scikit-learn's contract, and the library's: calibrated, and of the row alone."""

import pickle
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.metrics import make_scorer, roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from anomaly_vae import ConfigError, VAEOutlierDetector
from anomaly_vae.latents import LatentSpec

LATENT_KINDS = [spec.model_fields["kind"].default for spec in get_args(get_args(LatentSpec)[0])]
BY_HEART = ["training.select=last", "model.latent.kind=point"]


def quick(**parameters):
    return VAEOutlierDetector(**({"steps": 40, "random_state": 0} | parameters))


def blob(n, d=3, seed=0):
    return 5 + 3 * np.random.default_rng(seed).normal(size=(n, d))


def pictures(n, side, seed=0):
    """Bright discs in random places, uint8."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(side / 3, 2 * side / 3, (n, 2, 1, 1))
    y, x = np.mgrid[:side, :side]
    inside = (y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2 < (side / 4) ** 2
    return (200 * inside + rng.integers(0, 20, inside.shape)).astype(np.uint8)


@pytest.fixture(scope="module", params=[60, 300], ids=["five members", "one member"])
def fitted(request):
    return quick().fit(blob(request.param))


@parametrize_with_checks([VAEOutlierDetector(steps=30)])
def test_scikit_learns_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("d", [2, 10])
def test_far_rows_are_found(d):
    far = np.random.default_rng(1).uniform(-60, 70, (300, d))
    normal = blob(300, d, seed=2)
    truth = np.r_[np.ones(len(normal)), np.zeros(len(far))]
    detector = VAEOutlierDetector(steps=300, random_state=0).fit(blob(300, d))
    assert roc_auc_score(truth, detector.score_samples(np.r_[normal, far])) > 0.95
    assert (detector.predict(far) == -1).mean() > 0.9


@pytest.mark.parametrize("as_pictures", [True, False])
def test_other_digits_are_found(as_pictures):
    digits = load_digits()
    rows = digits.images / 16 if as_pictures else digits.data
    zeros = np.flatnonzero(digits.target == 0)
    test = np.setdiff1d(np.arange(len(rows)), zeros[:120])
    detector = VAEOutlierDetector(steps=300, random_state=0).fit(rows[zeros[:120]])
    assert roc_auc_score(digits.target[test] == 0, detector.score_samples(rows[test])) > 0.98


def test_higher_is_more_normal(fitted):
    rows = np.array([[5.0, 5, 5], [80, -80, 80], [1e12, 0, 0]])
    middle, far, absurd = fitted.score_samples(rows)
    assert middle > far > absurd
    assert fitted.predict(rows).tolist() == [1, -1, -1]
    assert np.array_equal(fitted.decision_function(rows), fitted.score_samples(rows) - fitted.offset_)


def test_the_verdict_is_that_of_the_p_value(fitted):
    rows = blob(3000, seed=3)
    assert np.array_equal(fitted.predict(rows) == -1, fitted.p_values(rows) <= fitted.alpha_ + 1e-12)


@pytest.mark.parametrize(("n", "steps", "low", "high"), [(60, 250, 0.02, 0.1), (300, 100, 0.06, 0.14)])
def test_false_alarms_come_at_the_rate_chosen(n, steps, low, high):
    """Even by models that have learned their rows by heart; by five of them at a lower rate."""
    rates = []
    for seed in range(5):
        detector = quick(alpha=0.1, random_state=seed, steps=steps, learning_rate=0.01, overrides=BY_HEART)
        detector.fit(blob(n, 20, seed=100 + seed))
        assert detector.alpha_ == pytest.approx(0.1, abs=0.02)
        rates.append((detector.predict(blob(1000, 20, seed=200 + seed)) == -1).mean())
    assert low < np.mean(rates) < high


def test_few_rows_raise_alpha_and_say_so():
    detector = quick().fit(blob(10))
    assert detector.alpha_ == pytest.approx(1 / 11)
    with pytest.raises(ValueError, match="minimum of 10"):
        quick().fit(blob(9))


def test_contamination_is_the_share_of_training_rows_below():
    for n in (100, 300):
        rows = blob(n)
        detector = quick(contamination=0.2).fit(rows)
        assert (detector.predict(rows) == -1).mean() == pytest.approx(0.2)
        assert detector.alpha_ is None
    for wrong in (0, 0.6, "some", True):
        with pytest.raises(ConfigError, match="contamination"):
            quick(contamination=wrong).fit(rows)


@pytest.mark.parametrize(
    ("rows", "parameters"),
    [(blob(300, 11), {}), (pictures(60, 9), {}), (pictures(60, 24), {"steps": 10})],
    ids=["features", "mlp", "conv"],
)
def test_a_score_depends_on_the_row_alone(rows, parameters):
    detector = quick(**parameters).fit(rows)
    together = detector.score_samples(rows)
    order = np.random.default_rng(0).permutation(len(rows))
    assert np.array_equal(detector.score_samples(rows[order]), together[order])
    assert np.array_equal([detector.score_samples(row[None])[0] for row in rows[:20]], together[:20])
    assert len(np.unique(together)) > 50


def test_the_seed_decides_and_no_other_chance_is_touched(capfd):
    rows = blob(60)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = quick(overrides=["model.network.dropout=0.1"]).fit(rows).score_samples(rows)
    torch.rand(7)
    torch.set_rng_state(torch_state)
    again = quick(overrides=["model.network.dropout=0.1"]).fit(rows).score_samples(rows)
    assert np.array_equal(first, again)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert not np.array_equal(first, quick(random_state=1).fit(rows).score_samples(rows))
    assert capfd.readouterr() == ("", "")


def test_pictures_are_bytes_or_lie_between_0_and_1():
    rows = pictures(40, 8)
    detector = quick().fit(rows)
    assert np.allclose(detector.score_samples(rows / 255), detector.score_samples(rows), atol=1e-4)
    for wrong in (rows.astype(float), rows / 255 - 0.5, rows.astype(np.int64)):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            detector.score_samples(wrong)
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            quick().fit(wrong)
    with pytest.raises(ValueError, match="shape"):
        detector.score_samples(pictures(3, 9)[:, :8])
    with pytest.raises(ValueError, match="5 dimensions"):
        quick().fit(np.zeros((20, 2, 2, 2, 2)))


def test_colour_is_last_and_counts():
    grey = pictures(60, 16)
    colour = np.stack([grey, grey // 2, 0 * grey], 3)
    detector = quick(steps=200, network="mlp").fit(colour)
    assert detector.members_[0].member.model.shape == (3, 16, 16)
    scores = detector.score_samples(np.r_[colour, colour[..., ::-1]])
    assert roc_auc_score(np.repeat([1, 0], 60), scores) > 0.95


@pytest.mark.parametrize("kind", LATENT_KINDS)
def test_overrides_reach_every_law_of_z(kind):
    overrides = [f"model.latent.kind={kind}", "model.latent.size=2", "training.select=last"]
    detector = quick(steps=10, latents=3, overrides=overrides).fit(blob(40, 4))
    latent = detector.spec_.model.latent
    assert (latent.kind, latent.size) == (kind, 2)
    assert np.isfinite(detector.score_samples(blob(5, 4))).all()


@pytest.mark.parametrize("network", ["mlp", "linear", "conv"])
def test_parameters_become_the_spec(network):
    parameters = {"latents": np.int64(2), "hidden": (9,), "batch_size": np.int64(7), "learning_rate": 0.01}
    spec = quick(network=network, steps=5, verdict="squared_error", **parameters).fit(pictures(20, 8)).spec_
    assert (spec.model.network.kind, spec.model.latent.size, spec.parts) == (network, 2, ("squared_error",))
    assert (spec.training.batch_size, spec.training.learning_rate) == (7, 0.01)
    assert network != "mlp" or spec.model.network.hidden == (9,)
    assert spec.model.likelihood.squash


def test_features_have_no_bounds():
    rows = blob(300)
    standardised = (rows - rows.mean(0)) / rows.std(0)
    model = quick(latents=3, steps=200, overrides=BY_HEART).fit(rows).members_[0].member.model
    with torch.inference_mode():
        x = torch.tensor(standardised[:, None, None], dtype=torch.float32)
        reconstruction = model.likelihood.mean(model.decode(model.encode(x).mu))
    assert reconstruction.min() < -1
    assert reconstruction.max() > 1.5


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"steps": 0}, "training.steps"),
        ({"alpha": 2}, "calibration.alpha"),
        ({"verdict": "beauty"}, "beauty"),
        ({"network": "conv"}, "mlp or linear"),
        ({"device": "abacus"}, "abacus"),
        ({"overrides": ["model.latent.sise=3"]}, "sise"),
        ({"overrides": ["model.likelihood.kind=bernoulli"]}, "gaussian or laplace"),
        ({"overrides": ["objective.loss.kind=bce"]}, "nll, mse or mae"),
        ({"overrides": ["model.condition={}"]}, "model.condition"),
    ],
)
def test_wrong_parameters_get_one_line(parameters, message):
    with pytest.raises(ConfigError, match=message) as caught:
        quick(**parameters).fit(blob(20))
    assert "\n" not in str(caught.value)


def test_a_grid_of_latents_in_a_pipeline():
    rows = np.r_[blob(80), np.random.default_rng(1).uniform(-60, 70, (10, 3))]
    truth = np.r_[np.ones(80), -np.ones(10)]
    search = GridSearchCV(
        make_pipeline(MinMaxScaler(), quick()),
        {"vaeoutlierdetector__latents": np.array([1, 2])},
        scoring=make_scorer(roc_auc_score, response_method="decision_function"),
        cv=StratifiedKFold(2),
        error_score="raise",
    ).fit(rows, truth)
    assert search.best_score_ > 0.9
    assert search.best_estimator_[-1].spec_.model.latent.size in (1, 2)


def test_copies_judge_alike(fitted):
    rows = blob(20, seed=5)
    copy = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(copy.score_samples(rows), fitted.score_samples(rows))
    assert clone(fitted).get_params() == fitted.get_params()
