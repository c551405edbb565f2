"""What `unfamiliar_texture` measures: patches that normals have nowhere, wherever in the picture they are."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from test_shape_scores import WIDE, fitted, seen

from anomaly_vae import expert
from anomaly_vae.expert import Sample
from anomaly_vae.metrics import detection
from anomaly_vae.texture_scores import UnfamiliarTexture, described, from_memory, patches, patches_at

SCORE = UnfamiliarTexture(cells=8)


def stripes(count, seed=0, angle=0.0, size=64, channels=1):
    """Soft stripes at an angle in degrees, every picture with a phase and a contrast of its own, (n, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    phase, contrast = torch.rand(2, count, 1, 1, generator=generator, dtype=WIDE)
    rows, columns = torch.meshgrid(*[torch.arange(size, dtype=WIDE)] * 2, indexing="ij")
    turned = np.deg2rad(angle)
    across = columns * np.cos(turned) + rows * np.sin(turned)
    noise = 0.01 * torch.randn(count, size, size, generator=generator, dtype=WIDE)
    picture = 0.5 + (0.2 + 0.1 * contrast) * torch.sin(across / 2 + 6.3 * phase) + noise
    return picture[:, None].expand(-1, channels, -1, -1).clamp(0, 1).clone()


def patched(x, row, column, size=14):
    """The same with a square of stripes that run the other way."""
    other = stripes(len(x), seed=9, angle=90, channels=x.shape[1])
    x = x.clone()
    x[:, :, row : row + size, column : column + size] = other[:, :, row : row + size, column : column + size]
    return x


@pytest.mark.parametrize(("row", "column"), [(2, 2), (40, 20), (25, 48)])
def test_a_spot_of_another_texture_is_found_wherever_it_is(row, column):
    references = fitted(SCORE, stripes(12))
    normal, odd = stripes(30, seed=1), patched(stripes(30, seed=2), row, column)
    quality = detection(SCORE(seen(normal), references).numpy(), SCORE(seen(odd), references).numpy())
    assert quality.auroc > 0.99
    heat = SCORE.map(seen(odd), references)
    assert heat.shape == (30, 64, 64)
    hottest = heat.flatten(1).argmax(1)
    assert ((hottest // 64 - row - 7).abs() <= 12).all()
    assert ((hottest % 64 - column - 7).abs() <= 12).all()


def test_another_colour_of_the_same_pattern_is_found():
    x = stripes(12, channels=3)
    tinted = stripes(20, seed=1, channels=3)
    tinted[:, 0] = (tinted[:, 0] + 0.15).clamp(0, 1)
    references = fitted(SCORE, x)
    normal = SCORE(seen(stripes(20, seed=2, channels=3)), references)
    assert detection(normal.numpy(), SCORE(seen(tinted), references).numpy()).auroc > 0.99


def test_where_a_patch_lies_does_not_matter():
    x = stripes(12)
    references = fitted(SCORE, x)
    whole = SCORE(seen(torch.roll(x, (8, 16), (2, 3))), references)
    # Rolled round a border, the two edges that meet there are all that is new.
    unlike = SCORE(seen(stripes(12, angle=90)), references)
    assert whole.max() < unlike.min()


def test_the_score_is_the_mean_of_the_largest_of_the_map():
    x, references = patched(stripes(3), 10, 10), fitted(SCORE, stripes(12))
    cells = SCORE._distances(seen(x), references).flatten(1)
    assert cells.shape == (3, 64)
    expected = cells.sort(1, descending=True).values[:, :6].mean(1)
    torch.testing.assert_close(SCORE(seen(x), references), expected)


def test_cells_tell_gradients_and_colour():
    flat = torch.full((2, 3, 32, 48), 0.25, dtype=WIDE)
    flat[:, 1] = 0.5
    cells = described(flat, 8)
    assert cells.shape == (2, 11, 8, 12)
    assert cells[:, :8].max() < 0.01
    torch.testing.assert_close(cells[:, 8:].mean((0, 2, 3)), torch.tensor([0.25, 0.5, 0.25], dtype=WIDE))
    upright = described(stripes(2), 8)[:, :8].mean((0, 2, 3))
    assert set(upright.topk(2).indices.tolist()) == {0, 4}


def test_patches_by_number_are_those_of_all():
    cells = torch.rand(3, 5, 4, 6, dtype=WIDE)
    every = patches(cells)
    assert every.shape == (3 * 4 * 6, 9 * 5)
    chosen = np.array([0, 5, 23, 24, 71])
    np.testing.assert_array_equal(patches_at(cells.numpy(), chosen), every[chosen].numpy())
    centre = every.reshape(72, 5, 9)[:, :, 4].reshape(3, 4, 6, 5)
    torch.testing.assert_close(centre.permute(0, 3, 1, 2), cells)


def test_distances_are_those_of_the_nearest():
    rng = np.random.default_rng(0)
    memory, points = rng.normal(size=(50, 7)), rng.normal(size=(9, 7))
    points[0] = memory[0]
    memory[:20] = memory[0] + 1e-4 * memory[:20]
    exact = NearestNeighbors(n_neighbors=4).fit(memory).kneighbors(points)[0].mean(1)
    found = from_memory(torch.from_numpy(points), torch.from_numpy(memory), 4)
    np.testing.assert_allclose(found, exact)
    assert from_memory(torch.from_numpy(points), torch.from_numpy(memory[:2]), 4).shape == (9,)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_however_few_normals_there_are(count):
    references = fitted(SCORE, stripes(count))
    normal = SCORE(seen(stripes(20, seed=1)), references)
    odd = SCORE(seen(stripes(20, seed=1, angle=90)), references)
    assert torch.isfinite(normal).all()
    assert detection(normal.numpy(), odd.numpy()).auroc > 0.99


def test_normals_that_are_blank():
    blank = torch.zeros(6, 1, 64, 64, dtype=WIDE)
    references = fitted(SCORE, blank)
    assert SCORE(seen(blank), references).max() < 0.01
    assert SCORE(seen(stripes(3)), references).min() > 1


def test_what_is_kept_is_bounded_and_drawn_by_the_seed():
    rows = SCORE.statistic(seen(stripes(6))).numpy()
    first, again, other = (UnfamiliarTexture(cells=8, kept=50, seed=seed).fit(rows)["memory"] for seed in (0, 0, 1))
    assert first.shape == (50, 20)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_sample_of_any_number_of_pictures_stays_small_and_spread():
    sample = Sample(10)
    for start in range(0, 1000, 7):
        numbers = np.arange(start, min(start + 7, 1000))
        sample.add(numbers, numbers[:, None] * [1.0, 2.0])
    kept = sample.rows(None)[:, 0].astype(int)
    assert 8 <= len(kept) <= 20
    assert np.diff(kept).max() < 250
    left = sample.rows(2)[:, 0].astype(int)
    assert set(kept) - set(left) == {number for number in kept if number % 5 == 2}
    whole = Sample(None)
    whole.add(np.arange(100), np.arange(100.0))
    assert len(whole.rows(None)) == 100
    assert len(whole.rows(0)) == 80


@pytest.mark.parametrize("tiles", [64, 3969])
def test_a_sample_of_tiles_has_all_pictures_and_all_places(tiles):
    sample = Sample(500)
    for picture in range(20):
        sample.add(np.full(tiles, picture), np.stack([np.full(tiles, picture), np.arange(tiles)], 1).astype(float))
    kept = sample.rows(None)
    assert 400 <= len(kept) <= 1000
    assert set(kept[:, 0]) == set(range(20))
    assert len(set(kept[:, 1])) > 0.9 * min(tiles, len(kept))
    assert set(sample.rows(3)[:, 0]) == set(range(20)) - {3, 8, 13, 18}


def test_a_sample_of_wide_rows_fits_in_memory(monkeypatch):
    monkeypatch.setattr(expert, "_SAMPLE_BYTES", 8000)
    sample = Sample(1_000_000)
    for start in range(0, 500, 50):
        sample.add(np.arange(start, start + 50), np.zeros((50, 100)))
    assert sample.rows(None).nbytes <= 16_000
