"""Regions: boxes contain what is hot, in the picture's own pixels however it was fitted, the same from every door."""

import json
from pathlib import Path

import numpy as np
import pytest
from forked import command
from PIL import Image
from serving import posted, running

from anomaly_vae import Detector
from anomaly_vae.console import verdict_table
from anomaly_vae.engine import Engine
from anomaly_vae.images import ImageSpec, decode, encode_png
from anomaly_vae.regions import MOST, SEED, find_regions, regions_json
from anomaly_vae.scoring import score_files

SQUARE = ImageSpec(height=64, width=64, channels=1)


def heat_of(*boxes):
    """A map of ordinary heat with boxes (left, top, width, height, heat)."""
    heat = np.full((64, 64), 0.3, np.float32)
    for left, top, width, height, value in boxes:
        heat[top : top + height, left : left + width] = value
    return heat


def test_a_region_is_a_box_around_what_is_hot():
    (region,) = find_regions(heat_of((10, 20, 6, 4, 3.0)), SQUARE, (64, 64))
    assert region[:4] == (10, 20, 6, 4)
    assert region.area == pytest.approx(24 / 64**2)
    assert (region.peak_heat, region.mean_heat) == (3, 3)


def test_a_region_reaches_from_its_core_to_where_heat_is_usual():
    (region,) = find_regions(heat_of((10, 20, 8, 8, 1.5), (12, 22, 2, 2, 2.5)), SQUARE, (64, 64))
    assert region[:4] == (10, 20, 8, 8)


def test_warm_places_without_a_core_and_single_pixels_are_none():
    assert find_regions(heat_of((10, 20, 8, 8, SEED)), SQUARE, (64, 64)) == []
    assert find_regions(heat_of((10, 20, 1, 1, 9.0)), SQUARE, (64, 64)) == []


def test_the_hottest_come_first_and_not_all_come():
    boxes = [(8 * (i % 8), 8 * (i // 8), 4, 4, 3.0 + i) for i in range(30)]
    found = find_regions(heat_of(*boxes), SQUARE, (64, 64))
    assert [region.peak_heat for region in found] == [32.0 - i for i in range(MOST)]


def test_what_is_no_number_is_hot():
    heat = heat_of()
    heat[5:8, 5:8] = np.nan
    (region,) = find_regions(heat, SQUARE, (64, 64))
    assert region[:4] == (5, 5, 3, 3)
    assert np.isfinite(region.peak_heat)


@pytest.mark.parametrize("fit", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize("size", [(64, 64), (201, 77), (77, 201), (31, 20), (640, 480)])
def test_boxes_lie_where_the_thing_is_in_the_picture(fit, size):
    """A black block on white, found by its darkness after decoding, is put back to its place in the file."""
    spec = ImageSpec(height=48, width=64, channels=1, fit=fit)
    width, height = size
    pixels = np.full((height, width), 255, np.uint8)
    left, top, right, bottom = round(0.45 * width), round(0.4 * height), round(0.65 * width), round(0.65 * height)
    pixels[top:bottom, left:right] = 0
    decoded = decode(encode_png(pixels), spec)[0].numpy()
    (region,) = find_regions((decoded < 128) * np.float32(5), spec, size)
    found = (region.x, region.y, region.x + region.width, region.y + region.height)
    # A pixel of the network, half of which may be something else, is so many pixels of the file.
    slack = max(width / 64, height / 48, 1) * 1.01
    assert np.abs(np.subtract(found, (left, top, right, bottom))).max() <= slack


def test_pictures_stored_on_their_side_get_boxes_as_they_are_shown(tmp_path):
    picture = Image.new("L", (120, 60), 255)
    picture.paste(0, (90, 10, 110, 30))
    exif = Image.Exif()
    exif[274] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    data = (tmp_path / "turned.jpg").read_bytes()
    decoded = decode(data, SQUARE)[0].numpy()
    (region,) = regions_json((decoded < 128) * np.float32(5), SQUARE, data)
    # Turned clockwise a picture of 120 x 60 is one of 60 x 120, and (x, y) comes to (60 - y, x).
    assert (region["x"], region["y"]) == pytest.approx((30, 90), abs=2)
    assert (region["width"], region["height"]) == pytest.approx((20, 20), abs=3)


@pytest.fixture(scope="module")
def odd_one(tmp_path_factory, digits_folder) -> Path:
    """A normal digit with a bright block in a corner, three times as large as the detector looks at it."""
    source = sorted((digits_folder / "good").iterdir())[0]
    picture = Image.open(source).resize((48, 48))
    picture.paste(255, (3, 30, 15, 45))
    path = tmp_path_factory.mktemp("odd") / "odd.png"
    picture.save(path)
    return path


def test_a_pasted_block_is_found_and_boxed(tiny_detector, odd_one):
    judged = Engine(tiny_detector, "cpu").judge(tiny_detector.prepare(odd_one.read_bytes())[None], heat=True)
    first = regions_json(judged.heat[0], tiny_detector.image, odd_one.read_bytes())[0]
    left, top = max(first["x"], 3), max(first["y"], 30)
    right, bottom = min(first["x"] + first["width"], 15), min(first["y"] + first["height"], 45)
    common = max(right - left, 0) * max(bottom - top, 0)
    assert common / (first["width"] * first["height"] + 12 * 15 - common) > 0.3


def test_every_door_tells_the_same(tiny_bundle, odd_one, tmp_path):
    (row,) = score_files(Engine(Detector.load(tiny_bundle), "cpu"), [odd_one], tmp_path / "heat")
    assert row["regions"]
    done = command("score", tiny_bundle, odd_one, "--heatmap", tmp_path / "h", "--json")
    assert json.loads(done.stdout)["results"][0]["regions"] == row["regions"]
    assert "regions" not in score_files(Engine(Detector.load(tiny_bundle), "cpu"), [odd_one])[0]
    answers = {}
    with running(tiny_bundle) as server:
        for wanted in ("png", "regions", "none"):
            found = posted(f"{server.url}/v1/score?heatmap={wanted}", odd_one.read_bytes())
            answers[wanted] = found["results"][0]
    assert answers["png"]["regions"] == answers["regions"]["regions"] == row["regions"]
    assert "heatmap_png" in answers["png"]
    assert "heatmap_png" not in answers["regions"]
    assert "regions" not in answers["none"]


def test_the_table_shows_the_first_box():
    box = {"x": 3.2, "y": 30.0, "width": 12.1, "height": 15.0}
    rows = [
        {"path": "a.png", "error": None, "outlier": True, "p_value": 0.01, "score": 3.0, "regions": [box, box]},
        {"path": "b.png", "error": None, "outlier": False, "p_value": 0.5, "score": 0.1, "regions": []},
    ]
    assert list(verdict_table(rows).columns[-1].cells) == ["12 x 15 at 3, 30 and 1 more", "none"]
