"""A region: outside of it nothing counts, in no place where pictures are read, and no file is needed after training."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY
from forked import command
from PIL import Image
from serving import posted, running
from wide import write_wide

from anomaly_vae import ConfigError, Detector, DetectorSpec, Engine, ImageSpec
from anomaly_vae.data import open_pictures
from anomaly_vae.images import decode, encode_png, inside, masked
from anomaly_vae.layouts import DataSpec
from anomaly_vae.masking import RegionSpec
from anomaly_vae.training import train

LEFT = [[0, 0], [0.5, 0], [0.5, 1], [0, 1]]


def image_spec(height=16, width=16, channels=1, **more):
    return ImageSpec(height=height, width=width, channels=channels, **more)


def pixels(region, image):
    return inside(RegionSpec.parse(region).within(image)).numpy()


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    """White in the upper right quarter of a picture of 40 x 20 px."""
    place = tmp_path_factory.mktemp("mask") / "counts.png"
    drawn = np.zeros((20, 40), np.uint8)
    drawn[:10, 20:] = 255
    Image.fromarray(drawn).save(place)
    return place


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, digits_folder, mask):
    """Digits of which only the upper right quarter counts, by a mask that is gone afterwards."""
    path, gone = tmp_path_factory.mktemp("bundles") / "region", mask.with_name("gone.png")
    gone.write_bytes(mask.read_bytes())
    spec = TINY.with_overrides([f"region.mask={gone}", "training.steps=150", "model.network.width=8"])
    train(spec, digits_folder, path, device="cpu")
    gone.unlink()
    return path


@pytest.fixture(scope="module")
def detector(bundle):
    return Detector.load(bundle)


@pytest.fixture(scope="module")
def images(digits_folder):
    """Whole normal pictures, uint8."""
    pictures = open_pictures(digits_folder, DataSpec(), image_spec())
    return pictures.images([i for i, item in enumerate(pictures.items) if item.normal][::8])


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 100), (101, 33)])
def test_a_polygon_is_the_same_place_at_every_size(height, width):
    half = pixels({"polygon": LEFT}, image_spec(height, width))
    assert half.shape == (height, width)
    assert half[:, : width // 2].all()
    assert not half[:, (width + 1) // 2 :].any()
    triangle = pixels({"polygon": [[0, 0], [1, 0], [0, 1]]}, image_spec(height, width))
    assert triangle.mean() == pytest.approx(0.5, abs=0.04)
    assert triangle[0, 0]
    assert not triangle[-1, -1]
    # A U: what lies between its arms is outside.
    u = pixels(
        {"polygon": [[0, 0], [0.2, 0], [0.2, 0.8], [0.8, 0.8], [0.8, 0], [1, 0], [1, 1], [0, 1]]},
        image_spec(height, width),
    )
    assert not u[: height // 2, width // 2].any()
    assert u[-1].all()
    assert u[:, 0].all()


def test_a_mask_goes_the_way_of_the_picture(mask):
    stretched = pixels({"mask": str(mask)}, image_spec(16, 16))
    assert stretched[:8, 8:].all()
    assert stretched.sum() == 64
    cropped = pixels({"mask": str(mask)}, image_spec(16, 16, fit="crop"))
    assert cropped[:8, 8:].all()
    assert cropped.sum() == 64
    boxed = pixels({"mask": str(mask)}, image_spec(32, 32, fit="letterbox"))
    assert boxed[8:16, 16:].all()
    assert boxed.sum() == 8 * 16


@pytest.mark.parametrize(("channels", "background"), [(1, (7, 7, 7)), (3, (200, 10, 30))])
def test_decoding_makes_the_outside_background_and_touches_nothing_else(channels, background):
    image = image_spec(16, 16, channels, background=background)
    region = RegionSpec.parse({"polygon": LEFT}).within(image)
    picture = np.random.default_rng(0).integers(0, 256, (channels, 16, 16)).astype(np.uint8)
    whole, seen = (decode(encode_png(picture), spec) for spec in (image, region))
    assert torch.equal(seen[:, :, :8], whole[:, :, :8])
    assert (seen[:, :, 8:] == torch.tensor(background[:channels], dtype=torch.uint8)[:, None, None]).all()
    assert torch.equal(masked(whole, region), seen)
    assert masked(whole, image) is whole


@pytest.mark.parametrize(("region", "says"), [
    ({"polygon": [[0, 0], [1, 1]]}, "2 point(s); give at least 3"),
    ({"polygon": [[0, 0], [0.5, 0.5], [1, 1]]}, "has no area"),
    ({"polygon": [[0, 0], [2, 0], [0, 1]]}, "less than or equal to 1"),
    ({}, "either a polygon or a mask"),
    ({"polygon": LEFT, "mask": "m.png"}, "either a polygon or a mask"),
], ids=str)  # fmt: skip
def test_a_wrong_region_dies_when_it_is_read(region, says):
    with pytest.raises(ConfigError) as caught:
        DetectorSpec.parse({"region": region})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_region_that_cannot_be_used_dies_before_training(digits_folder, mask, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    Image.new("L", (20, 20)).save(tmp_path / "black.png")
    for region, says in [
        (f"region.mask={tmp_path / 'none.png'}", "No such file or directory; give the path of a PNG"),
        (f"region.mask={tmp_path / 'notes.png'}", "the bytes are text"),
        (f"region.mask={tmp_path / 'black.png'}", "leaves 0.00% of the picture, less than 1%; draw a larger one"),
        ("region.polygon=[[0, 0], [0.05, 0], [0, 0.05]]", "of the picture, less than 1%; draw a larger one"),
    ]:
        with pytest.raises(ConfigError) as caught:
            train(TINY.with_overrides([region]), digits_folder, tmp_path / "b", device="cpu")
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"give a region\.polygon or a region\.mask instead"):
        TINY.with_overrides([f"image.region={mask}"])
    assert not (tmp_path / "b").exists()


def test_what_lies_outside_changes_nothing(detector, images):
    counts = inside(detector.image).numpy()
    assert counts.sum() == 64
    plain = detector.judge(images, heat=True)
    painted = images.clone()
    painted[:, :, torch.from_numpy(~counts)] = torch.arange(192, dtype=torch.uint8)
    again = detector.judge(painted, heat=True)
    assert again.score == plain.score
    assert again.parts == plain.parts
    np.testing.assert_array_equal(again.heat, plain.heat)
    assert (plain.heat[:, ~counts] == 0).all()
    assert (plain.heat[:, counts] > 0).any()
    odd = images.clone()
    odd[:, :, 1:6, 10:15] = 255 - odd[:, :, 1:6, 10:15]
    assert (np.array(detector.judge(odd).score) > plain.score).mean() > 0.9


def test_bytes_are_judged_as_training_saw_them(detector, images):
    """A file goes through the region when it is decoded; the tensor of the whole picture when it is judged."""
    read = torch.stack([detector.prepare(encode_png(image)) for image in images[:4]])
    assert (read[:, :, 8:] == 255).all()
    assert not torch.equal(read, images[:4])
    assert detector.judge(read).score == detector.judge(images[:4]).score


def test_heat_is_scaled_by_what_counts(detector, images):
    """99.5% of the pixels inside are at most 1, although three quarters of all pixels have no heat to speak of."""
    hot = detector.judge(images, heat=True).heat[:, inside(detector.image).numpy()]
    assert 0.0005 < (hot > 1).mean() < 0.015


def test_the_bundle_needs_no_file_and_names_none(detector, bundle):
    text = (bundle / "bundle.yaml").read_text()
    assert "gone.png" not in text
    assert detector.spec.region is None
    assert DetectorSpec.parse(detector.spec.model_dump(mode="json")) == detector.spec


def test_a_defects_mask_ends_where_the_region_does(tmp_path, detector):
    for place in ("good/0.png", "bad/0.png", "mask/bad/0.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 255).save(tmp_path / place)
    pictures = open_pictures(tmp_path, DataSpec(), detector.image)
    (bad,) = (i for i, item in enumerate(pictures.items) if not item.normal)
    np.testing.assert_array_equal(pictures.mask(bad), inside(detector.image).numpy())


def test_info_scan_and_service_agree_with_tiles_and_region_together(tmp_path):
    folder, bundle = write_wide(tmp_path / "wide", normals=120, dots=3), tmp_path / "both"
    spec = TINY.with_overrides(
        ["image=null", "tiles.side=32", f"region.polygon={LEFT}", "training.steps=20", "model.network.width=8",
         "calibration.few_normals=50"]
    )  # fmt: skip
    detector = train(spec, folder, bundle, device="cpu").detector
    files = sorted((folder / "dot").iterdir())
    scores = [Engine(detector, "cpu").judge(detector.prepare(file.read_bytes())[None]).score[0] for file in files]
    out = tmp_path / "out.jsonl"
    command("scan", bundle, folder / "dot", "--out", out).check_returncode()
    assert [json.loads(line)["score"] for line in out.read_text().splitlines()] == scores
    done = command("info", bundle)
    assert "8 of 32 px a picture, overlapping by 25%" in done.stdout
    assert "50.0% of the picture counts" in done.stdout
    with running(bundle) as server:
        result = posted(f"{server.url}/v1/score?heatmap=png", files[0].read_bytes())["results"][0]
    assert result["score"] == scores[0]
    assert result["heatmap_png"]
