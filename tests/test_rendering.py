"""Heat maps: order is kept, hot places are seen, and the picture under them stays recognisable."""

import io

import numpy as np
import pytest
from PIL import Image

from anomaly_vae.rendering import heatmap, heatmap_png, side_by_side_png


def opened(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def luma(array):
    """(3,H,W) colours to brightness."""
    return np.tensordot([0.299, 0.587, 0.114], array.astype(float), axes=1)


def test_hotter_is_brighter_all_the_way():
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None]
    brightness = luma(heatmap(ramp, 1.0))[0]
    assert (np.diff(brightness) >= 0).all()
    assert brightness[0] < 5
    assert brightness[-1] > 235
    assert len(np.unique(brightness.round(1))) > 200


def test_heat_beyond_the_scale_saturates_and_nan_is_never_normal():
    colours = heatmap(np.array([[1.0, 2.0, 1e30, np.inf, np.nan]], dtype=np.float32), 1.0)
    assert (colours == colours[:, :, :1]).all()


def test_only_the_ratio_of_heat_and_scale_counts():
    heat = np.random.default_rng(0).gamma(2, 1, (12, 9)).astype(np.float32)
    assert (heatmap(heat, 3.0) == heatmap(heat * 8, 24.0)).all()


def test_a_cold_map_shows_the_grey_picture_and_a_hot_one_covers_it():
    image = np.random.default_rng(1).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    cold = heatmap(np.zeros((8, 8), np.float32), 1.0, image)
    assert np.abs(cold - luma(image)).max() <= 0.5 + 1e-3
    hot = heatmap(np.ones((8, 8), np.float32), 1.0, image)
    assert np.ptp(hot.astype(int), axis=(1, 2)).max() <= 0.15 * 255 + 1


def test_grey_pictures_and_no_overlay():
    heat = np.random.default_rng(2).random((8, 8), dtype=np.float32)
    image = np.full((1, 8, 8), 128, dtype=np.uint8)
    assert (heatmap(heat, 1.0, image) == heatmap(heat, 1.0, image.repeat(3, axis=0))).all()
    assert (heatmap(heat, 1.0, image, overlay=False) == heatmap(heat, 1.0)).all()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((28, 28), (280, 280)), ((256, 256), (256, 256)), ((300, 400), (300, 400)), ((16, 512), (64, 2048))],
)
def test_small_maps_grow_by_whole_factors(shape, expected):
    heat = np.random.default_rng(3).random(shape, dtype=np.float32)
    big = opened(heatmap_png(heat, 1.0))
    assert big.shape == (*expected, 3)
    factor = expected[0] // shape[0]
    assert (big == heatmap(heat, 1.0).transpose(1, 2, 0).repeat(factor, 0).repeat(factor, 1)).all()


def test_a_strip_holds_every_picture_in_order():
    grey = np.full((1, 16, 16), 40, dtype=np.uint8)
    colour = np.full((3, 16, 24), 0, dtype=np.uint8)
    colour[0] = 200
    strip = opened(side_by_side_png([grey, colour, grey], gap=4, min_side=32))
    assert strip.shape == (32, (16 + 24 + 16) * 2 + 8, 3)
    assert (strip[:, :32] == 40).all()
    assert (strip[:, 32:36] == 255).all()
    assert (strip[:, 36:84] == [200, 0, 0]).all()
    assert (strip[:, 88:] == 40).all()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_an_error(scale):
    with pytest.raises(ValueError, match="positive number"):
        heatmap_png(np.zeros((4, 4), np.float32), scale)


def test_shapes_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match=r"\(H,W\)"):
        heatmap(np.zeros((1, 4, 4), np.float32), 1.0)
    with pytest.raises(ValueError, match="lies over"):
        heatmap(np.zeros((4, 4), np.float32), 1.0, np.zeros((3, 5, 4), np.uint8))
    with pytest.raises(ValueError, match="one height"):
        side_by_side_png([np.zeros((1, 4, 4), np.uint8), np.zeros((1, 5, 4), np.uint8)])
    with pytest.raises(ValueError, match="nothing"):
        side_by_side_png([])
