import numpy as np
import pytest

from anomaly_vae.fusion import FusionSpec, fit_scale, standardise
from anomaly_vae.metrics import detection


@pytest.fixture
def normals():
    return np.random.default_rng(0).lognormal(size=2000)


def test_normals_become_standard_normal_in_the_body(normals):
    z = standardise(normals, fit_scale(normals))
    for level, expected in ((0.1, -1.2816), (0.5, 0.0), (0.9, 1.2816), (0.99, 2.3263)):
        assert np.quantile(z, level) == pytest.approx(expected, abs=0.02)


def test_order_is_kept_and_strong_anomalies_are_not_tied(normals):
    scores = np.linspace(-50, 500, 4001)
    z = standardise(scores, fit_scale(normals))
    assert (np.diff(z) > 0).all()


def test_no_jump_where_rank_gives_way_to_line(normals):
    knots, _ = scale = fit_scale(normals)
    for knot in (knots[0], knots[-1]):
        z = standardise([knot - 1e-9, knot + 1e-9], scale)
        assert abs(z[1] - z[0]) < 1e-6


def test_scores_all_equal_among_normals_do_not_break_it():
    z = standardise([0.0, 1.0, 1.0, 2.0], fit_scale(np.ones(50)))
    assert np.isfinite(z).all()
    assert z[0] < z[1] < z[3]


def test_parts_far_better_than_usual_do_not_hide_one_that_is_bad():
    fusion = FusionSpec(parts=("a", "b", "c"))
    assert fusion.fuse(np.array([[-3000.0, -60.0, 4.0]]))[0] > fusion.fuse(np.array([[0.5, 0.5, 0.5]]))[0]


def test_an_excellent_part_does_not_excuse_a_bad_one():
    fusion = FusionSpec(parts=("a", "b"), leak=0.05)
    bad, excused = fusion.fuse(np.array([[6.0, 0.0], [6.0, -5.0]]))
    assert excused > 0.9 * bad
    assert np.argsort(fusion.fuse(np.array([[-2.0, -1.0], [-1.0, -1.0], [0.5, -1.0], [0.5, 3.0]]))).tolist() == [
        0,
        1,
        2,
        3,
    ]


def test_a_part_that_is_wild_on_normals_and_tells_nothing_hardly_harms():
    """Log-scores with tails as heavy as a Cauchy's beside one that tells normal from abnormal."""
    chance = np.random.default_rng(1)
    wild = [chance.standard_cauchy(n) for n in (600, 1000, 1000)]
    told = [chance.normal(mean, size=n) for n, mean in ((600, 0), (1000, 0), (1000, 3))]

    def fused(i):
        return FusionSpec().fuse(np.stack([standardise(part[i], fit_scale(part[0])) for part in (told, wild)], 1))

    alone = detection(told[1], told[2]).auroc
    assert alone > 0.975
    assert detection(fused(1), fused(2)).auroc > alone - 0.03
