"""Overlays: a picture in its own size, as it is where it is normal, marked where it is not, on any ground."""

import io

import numpy as np
import pytest
from PIL import Image

from anomaly_vae import Detector, overlay_png
from anomaly_vae.data import open_pictures
from anomaly_vae.images import ImageSpec, decode, encode_png
from anomaly_vae.overlaying import LONGEST, overlay
from anomaly_vae.training import train

FULL = 4.0


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def noise(width: int, height: int) -> bytes:
    return encode_png(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))


def test_what_is_normal_stays_as_it_is() -> None:
    spec = ImageSpec(height=64, width=64, channels=3)
    data = noise(300, 280)
    shown = pixels_of(overlay_png(np.ones((64, 64), np.float32), FULL, spec, data))
    assert (shown == pixels_of(data)).all()


@pytest.mark.parametrize(("size", "expected"), [
    ((4096, 2048), (LONGEST, LONGEST // 2)), ((300, 280), (300, 280)), ((100, 50), (600, 300)), ((8, 8), (256, 256)),
    ((3000, 4), (LONGEST, 16)),
])  # fmt: skip
def test_it_has_the_pictures_own_size_in_bounds(size: tuple[int, int], expected: tuple[int, int]) -> None:
    spec = ImageSpec(height=64, width=64, channels=1)
    png = overlay_png(np.zeros((64, 64), np.float32), FULL, spec, noise(*size))
    assert Image.open(io.BytesIO(png)).size == expected


@pytest.mark.parametrize("fit", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize("size", [(320, 320), (603, 300), (300, 603)])
def test_heat_lies_on_what_it_is_of(fit: str, size: tuple[int, int]) -> None:
    spec = ImageSpec(height=48, width=64, channels=1, fit=fit)
    width, height = size
    left, top, right, bottom = round(0.4 * width), round(0.4 * height), round(0.6 * width), round(0.6 * height)
    pixels = np.full((height, width), 255, np.uint8)
    pixels[top:bottom, left:right] = 0
    data = encode_png(pixels)
    heat = (decode(data, spec)[0].numpy() < 128) * np.float32(FULL)
    rows, columns = np.nonzero((pixels_of(overlay_png(heat, FULL, spec, data)) != pixels_of(data)).any(2))
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    # Between two of the network's pixels heat fades, and a line runs around it.
    slack = 2 * max(width / 64, height / 48) + 2
    assert np.abs(np.subtract(found, (left, top, right, bottom))).max() <= slack


def test_what_the_network_does_not_see_has_no_heat() -> None:
    spec = ImageSpec(height=64, width=64, channels=1, fit="crop")
    data = noise(600, 300)
    shown, plain = pixels_of(overlay_png(np.full((64, 64), FULL, np.float32), FULL, spec, data)), pixels_of(data)
    assert (shown[:, :140] == plain[:, :140]).all()
    assert (shown[:, 460:] == plain[:, 460:]).all()
    assert (shown[:, 160:440] != plain[:, 160:440]).any(2).mean() > 0.95


@pytest.mark.parametrize("ground", [0, 60, 128, 200, 255])
def test_it_is_seen_on_dark_and_on_light_pictures(ground: int) -> None:
    heat = np.zeros((300, 300), np.float32)
    heat[100:200, 100:200] = FULL
    shown = overlay(heat, FULL, np.full((3, 300, 300), ground, np.uint8)).astype(int)
    middle = shown[:, 150, 150]
    assert np.abs(middle - ground).max() > 90
    # One of the two lines at its edge stands out from whatever is beside it.
    edge = shown[:, 90:110, 150]
    assert np.abs(edge - ground).max() >= 127


def test_hotter_is_covered_more_and_the_same_heat_alike_in_all_pictures() -> None:
    heat = np.tile(np.linspace(0, 6, 201, dtype=np.float32), (201, 1))
    shown = overlay(heat, FULL, np.full((3, 201, 201), 128, np.uint8)).astype(int)[:, 100]
    changed = np.abs(shown - 128).sum(0)
    levels = [changed[np.argmin(np.abs(heat[0] - value))] for value in (0.9, 1.2, 1.7, 2.5, 3.5)]
    assert levels[0] == 0
    assert levels == sorted(set(levels))
    alone = overlay(np.full((20, 20), 3.0, np.float32), FULL, np.full((3, 20, 20), 128, np.uint8))[:, 10, 10]
    assert (alone == shown[:, np.argmin(np.abs(heat[0] - 3.0))]).all()


def test_what_is_no_number_is_shown_as_hottest() -> None:
    spec = ImageSpec(height=64, width=64, channels=1)
    heat = np.full((64, 64), np.nan, np.float32)
    hottest = overlay_png(np.full((64, 64), 9.0, np.float32), FULL, spec, noise(300, 300))
    assert overlay_png(heat, FULL, spec, noise(300, 300)) == hottest


def test_a_reconstruction_is_near_the_normal_and_far_from_the_abnormal(tiny_detector, digits_folder) -> None:
    opened = open_pictures(digits_folder, tiny_detector.spec.data, tiny_detector.image)
    errors = {}
    for label in ("good", "7"):
        images = opened.images([i for i, item in enumerate(opened.items) if item.label == label][:40])
        made = tiny_detector.reconstruct(images)
        assert (made.shape, made.dtype) == (images.shape, images.dtype)
        errors[label] = (made.float() - images.float()).abs().mean().item()
    assert errors["good"] < 0.7 * errors["7"]
    assert (tiny_detector.reconstruct(images[3:4]).float() - made[3:4].float()).abs().max() <= 1, "no batch mates"


@pytest.mark.parametrize(("overrides", "expected"), [
    (["calibration.few_normals=2000", "calibration.folds=2"], (1, 16, 16)),
    (["image={height: 16, width: 48, channels: 1}", "tiles={side: 16}"], (1, 16, 48)),
    (["image={height: 32, width: 32, channels: 1}", "model.side=16"], (1, 16, 16)),
], ids=["folds", "tiles", "side"])  # fmt: skip
def test_every_detector_of_pixels_reconstructs(digits_folder, tiny_spec, tmp_path, overrides, expected) -> None:
    spec = tiny_spec.with_overrides(["training.steps=5", *overrides])
    detector = train(spec, digits_folder, tmp_path / "b", device="cpu").detector
    image = detector.image
    made = detector.reconstruct(decode(noise(100, 40), image)[None])
    assert made.shape == (1, *expected)


def test_one_of_features_makes_no_picture(digits_folder, tmp_path) -> None:
    from anomaly_vae.presets import read_preset

    overrides = ["training.steps=3", "image={height: 32, width: 32, channels: 3}"]
    spec = read_preset("feature-vae", overrides)
    detector: Detector = train(spec, digits_folder, tmp_path / "b", device="cpu").detector
    assert detector.reconstruct(decode(noise(32, 32), detector.image)[None]) is None
