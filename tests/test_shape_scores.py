"""What `unfamiliar_shape` measures: outlines that contrast does not change, and the way to the plane of the nearest."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from anomaly_vae.data import open_pictures
from anomaly_vae.metrics import detection
from anomaly_vae.model import ModelSpec, normalise
from anomaly_vae.observations import Observation
from anomaly_vae.shape_scores import UnfamiliarShape, from_plane, outlines

WIDE = torch.float64


def bar(angle, size=28, channels=1):
    """A soft white bar across the middle at `angle` degrees, (1, C, size, size)."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    turned = np.deg2rad(angle)
    across = np.abs(x * np.sin(turned) - y * np.cos(turned))
    picture = torch.from_numpy(np.clip(4 - across, 0, 1) * (np.hypot(x, y) < size * 0.4))
    return picture.expand(1, channels, -1, -1).clone()


def pictures(count, seed=0, size=28):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [bar(float(angle), size) for angle in torch.randn(count, generator=generator, dtype=WIDE) * 10]
    ) * (0.5 + 0.5 * torch.rand(count, 1, 1, 1, generator=generator, dtype=WIDE))


def seen(x):
    return Observation(ModelSpec().build((x.shape[1], *x.shape[2:]), 0).eval(), x)


def fitted(score, x):
    found = score.fit(score.statistic(seen(x)).numpy())
    return {name: torch.from_numpy(value) for name, value in found.items()}


def test_outlines_have_length_one_and_contrast_and_level_change_little():
    x = pictures(6)
    found = outlines(x, (7, 7), 8)
    assert found.shape == (6, 8 * 49)
    assert found.square().sum(1).sqrt().numpy() == pytest.approx(1.0, abs=0.01)
    fainter = outlines(0.3 * x + 0.4, (7, 7), 8)
    assert (fainter - found).norm(dim=1).max() < 0.1
    other = outlines(bar(60) * torch.ones(6, 1, 1, 1, dtype=WIDE), (7, 7), 8)
    assert (other - found).norm(dim=1).min() > 0.5


def test_a_flat_picture_has_no_outlines():
    assert outlines(torch.full((2, 3, 20, 30), 0.4, dtype=WIDE), (7, 10), 8).abs().max() < 1e-6


@pytest.mark.parametrize(("angle", "strongest"), [(0, {2, 6}), (90, {0, 4}), (45, {3, 7}), (-45, {1, 5})])
def test_gradients_fall_into_the_orientation_they_have(angle, strongest):
    """Orientation k stands for 45 k degrees, from left to right and downwards; a bar's two edges face each other."""
    shares = outlines(bar(angle), (7, 7), 8).square().reshape(8, 49).sum(1)
    assert set(shares.topk(2).indices.tolist()) == strongest


def test_of_colours_the_strongest_counts():
    grey, colour = bar(30), bar(30, channels=3)
    colour[:, 1:] = 0.5
    torch.testing.assert_close(outlines(colour, (7, 7), 8), outlines(grey, (7, 7), 8))


def test_the_way_to_the_plane_is_ridge_regression_on_the_nearest():
    rng = np.random.default_rng(0)
    normals, points = rng.normal(size=(40, 12)), rng.normal(size=(5, 12))
    found = from_plane(torch.from_numpy(points), torch.from_numpy(normals), 6, 0.7).numpy()
    for point, one in zip(points, found, strict=True):
        nearest = normals[np.argsort(((normals - point) ** 2).sum(1))[:6]]
        mean = nearest.mean(0)
        price = 0.7 * ((nearest - mean) ** 2).sum(1).mean()
        model = Ridge(alpha=price, fit_intercept=False).fit((nearest - mean).T, point - mean)
        np.testing.assert_allclose(one, point - mean - model.predict((nearest - mean).T), atol=1e-9)


def test_directions_only_shorten_what_is_kept():
    """With as many directions as the normals span, and across them in full, nothing is lost."""
    x, odd = pictures(30), torch.cat([bar(45), bar(90)])
    whole, short = UnfamiliarShape(neighbours=5), UnfamiliarShape(neighbours=5, directions=4)
    ours, theirs = (whole.statistic(seen(some)).double() for some in (odd, x))
    exact = from_plane(ours, theirs, whole.neighbours, whole.ridge).norm(dim=1)
    torch.testing.assert_close(whole(seen(odd), fitted(whole, x)), exact, rtol=1e-4, atol=0)
    assert fitted(short, x)["codes"].shape == (30, 4)
    torch.testing.assert_close(short(seen(odd), fitted(short, x)), exact, rtol=0.1, atol=0)


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_however_few_normals_there_are(count):
    score = UnfamiliarShape()
    references = fitted(score, pictures(count))
    found = score(seen(torch.cat([pictures(8, seed=1), bar(90), torch.zeros(1, 1, 28, 28, dtype=WIDE)])), references)
    assert torch.isfinite(found).all()
    assert found[:8].max() < found[8:].min()


def test_normals_that_are_all_alike():
    score, x = UnfamiliarShape(), bar(0).expand(20, -1, -1, -1)
    found = score(seen(torch.cat([bar(0), bar(20)])), fitted(score, x))
    assert found[0] < 1e-3 < found[1]


def test_the_map_shows_where_and_its_cells_make_up_the_score():
    score = UnfamiliarShape(cells=7)
    x = torch.cat([bar(0)] * 2)
    x[1, :, 2:6, 20:26] = 1
    references, observation = fitted(score, pictures(30)), seen(x)
    heat = score.map(observation, references)
    assert heat.shape == (2, 28, 28)
    row, column = divmod(int((heat[1] - heat[0]).argmax()), 28)
    assert row < 9
    assert column > 16
    cells = heat[:, 1::4, 1::4] / 2 + heat[:, 2::4, 2::4] / 2
    torch.testing.assert_close(
        cells.square().flatten(1).sum(1).sqrt(), score(observation, references), rtol=0.15, atol=0
    )


def test_wide_pictures_have_more_cells_along_the_longer_side():
    score, x = UnfamiliarShape(cells=5), torch.rand(3, 3, 20, 41, dtype=WIDE)
    assert score.statistic(seen(x)).shape == (3, 8 * 5 * 10)
    assert score.map(seen(x), fitted(score, x)).shape == (3, 20, 41)


def test_at_most_so_many_are_kept():
    rows = UnfamiliarShape().statistic(seen(pictures(40))).numpy()
    assert len(UnfamiliarShape(kept=15).fit(rows)["codes"]) == 15
    assert len(UnfamiliarShape(kept=40).fit(rows)["codes"]) == 40


def test_it_tells_digits_without_any_training(digits_folder, tiny_spec):
    opened = open_pictures(digits_folder, tiny_spec.data, tiny_spec.image)
    normal = np.array([item.normal for item in opened.items])
    ours, others = np.flatnonzero(normal), np.flatnonzero(~normal)

    def of(indices):
        return seen(normalise(opened.images(indices), torch.device("cpu")))

    score = UnfamiliarShape(cells=4)
    references = {
        name: torch.from_numpy(value) for name, value in score.fit(score.statistic(of(ours[::2])).numpy()).items()
    }
    found = [score(of(some), references).numpy() for some in (ours[1::2], others)]
    assert detection(*found).auroc > 0.97
