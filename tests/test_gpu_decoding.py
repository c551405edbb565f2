"""JPEGs that the GPU decodes are judged as those that the cores decode, or the cores decode them after all.

Where there is no GPU, libjpeg stands in for nvJPEG, at full size: all but that call is then the same.
"""

import io
import itertools
from base64 import b64encode

import numpy as np
import pytest
import simplejpeg
import torch
from bad_bytes import bad_bytes, encoded, exif
from PIL import Image
from typer.testing import CliRunner

from anomaly_vae import BadImage, ConfigError, Detector, Engine, ImageSpec, cli, decode, encode_png
from anomaly_vae.gpu_decoding import GpuDecoding, _takes, fitted, torchvision_decoder
from anomaly_vae.images import planned
from anomaly_vae.scan_rows import scored
from anomaly_vae.sources import Folder


def libjpeg(files, channels, device):
    try:
        arrays = [
            simplejpeg.decode_jpeg(one.numpy().tobytes(), "GRAY" if channels == 1 else "RGB", strict=True)
            for one in files
        ]
    except ValueError as error:
        raise RuntimeError(str(error)) from None
    return [torch.from_numpy(one).permute(2, 0, 1).to(device) for one in arrays]


def scene(width, height):
    """Smooth, with edges, and other in every corner and channel."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    planes = [120 + 100 * np.sin(x / width * 5) * np.cos(y / height * 3), 255 * x / width, 200 * y / height]
    planes[0][height // 3 : height // 2, width // 4 : width // 2] = 20
    return Image.fromarray(np.stack(planes, 2).clip(0, 255).astype(np.uint8))


def jpeg(width, height, orientation=1, grey=False):
    picture = scene(width, height)
    return encoded(picture.convert("L") if grey else picture, "JPEG", quality=95, exif=exif(orientation))


def both(data, spec):
    plan = planned(data, spec)
    assert _takes(data, plan)
    pixels = libjpeg([torch.frombuffer(bytearray(data), dtype=torch.uint8)], spec.channels, torch.device("cpu"))[0]
    found, expected = fitted(pixels, plan, spec), decode(data, spec)
    assert found.shape == expected.shape
    assert found.dtype == torch.uint8
    return (found.int() - expected.int()).abs().float(), plan.factor


@pytest.mark.parametrize("fit", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_geometry_is_that_of_the_cores(fit, channels, orientation):
    spec = ImageSpec(height=32, width=48, channels=channels, fit=fit, background=(200, 30, 90))
    factors = set()
    for width, height in [(48, 32), (70, 90), (33, 21), (47, 401), (201, 131), (640, 424), (401, 799)]:
        differ, factor = both(jpeg(width, height, orientation, channels == 1), spec)
        factors.add(factor)
        if factor == 1:
            assert differ.max() <= 1, (width, height)
        else:
            assert differ.mean() < 1, (width, height)
    assert factors >= {1, 2, 4}


def test_a_region_is_kept():
    region = torch.zeros(32, 32, dtype=torch.uint8)
    region[4:20, 6:30] = 255
    spec = ImageSpec(height=32, width=32, channels=3, region=b64encode(encode_png(region)).decode())
    differ, _ = both(jpeg(60, 50), spec)
    assert differ.max() <= 1


@pytest.fixture
def jpegs(tmp_path, digits_folder):
    """Many JPEGs, some other pictures, some bad files."""
    for i, file in enumerate(itertools.islice(sorted(digits_folder.rglob("*.png")), 90)):
        picture = Image.open(file).resize((24, 24), Image.Resampling.BICUBIC)
        kind = "PNG" if i % 10 == 9 else "JPEG"
        (tmp_path / f"{i:03d}.{kind.lower()}").write_bytes(encoded(picture, kind))
    for name, data in bad_bytes().items():
        (tmp_path / f"bad {name}.jpg".replace("/", "_")).write_bytes(data)
    (tmp_path / "ink.jpg").write_bytes(encoded(scene(40, 40).convert("CMYK"), "JPEG"))
    return tmp_path


def rows(engine, folder, decoding=None):
    tables = scored(engine, iter(Folder(folder)), 2, decoding)
    return [row for table in tables for row in table.to_pylist()]


def test_a_scan_tells_the_same(tiny_bundle, jpegs):
    engine = Engine(Detector.load(tiny_bundle), "cpu")
    told = []
    expected, found = rows(engine, jpegs), rows(engine, jpegs, GpuDecoding(engine, libjpeg, told.append))
    assert told == []
    low, high = np.quantile(engine.detector.calibration.scores[0], [0.25, 0.75])
    assert len(found) == len(expected)
    assert sum(row["error"] is not None for row in found) >= 20
    for row, other in zip(found, expected, strict=True):
        for name in ("path", "sha256", "error", "outlier"):
            assert row[name] == other[name], row["path"]
        if row["error"] is None:
            assert abs(row["score"] - other["score"]) <= 0.02 * (high - low), row["path"]


def test_what_is_cut_short_is_for_the_cores_to_tell():
    spec = ImageSpec(height=16, width=16, channels=3)
    whole = jpeg(60, 40)
    small = io.BytesIO()
    tags = Image.Exif()
    tags[0x9286] = whole  # as cameras keep a small picture in the large one's head
    scene(200, 100).save(small, "JPEG", exif=tags)
    for data in (whole, small.getvalue()):
        assert _takes(data, planned(data, spec))
        assert _takes(data + b"more", planned(data, spec))
        assert not _takes(data[:-2], planned(data, spec))
        assert not _takes(data[:-200], planned(data, spec))


def test_one_bad_file_costs_its_batch_nothing(tiny_bundle, tmp_path):
    good = jpeg(40, 40)
    # Whole to the eye, damaged within.
    bad = bytearray(jpeg(400, 400))
    bad[len(bad) // 2 : len(bad) // 2 + 400] = b"\xff\xd0" * 200
    engine = Engine(Detector.load(tiny_bundle), "cpu")
    decoding = GpuDecoding(engine, libjpeg)
    done = decoding.finish([decoding.begin(good), decoding.begin(bytes(bad)), decoding.begin(good)])
    assert isinstance(done[1], BadImage)
    with pytest.raises(BadImage) as expected:
        engine.prepare(bytes(bad))
    assert str(done[1]) == str(expected.value)
    assert torch.equal(done[0], engine.prepare(good))
    assert torch.equal(done[2], engine.prepare(good))


def test_a_decoder_that_would_be_judged_otherwise_is_given_up(tiny_bundle, jpegs):
    engine = Engine(Detector.load(tiny_bundle), "cpu")
    told = []
    decoding = GpuDecoding(engine, lambda *how: [255 - one for one in libjpeg(*how)], told.append)
    assert rows(engine, jpegs, decoding) == rows(engine, jpegs)
    assert len(told) == 1
    assert told[0].startswith("--decode gpu: it moves scores by ")


def test_after_the_first_pictures_those_of_the_gpu_are_taken(tiny_bundle):
    engine = Engine(Detector.load(tiny_bundle), "cpu")
    decoding = GpuDecoding(engine, libjpeg)
    data = jpeg(640, 424)
    batches = [decoding.finish([decoding.begin(data)] * 32)[0] for _ in range(2)]
    plan, spec = planned(data, engine.detector.image), engine.detector.image
    theirs = fitted(libjpeg([torch.frombuffer(bytearray(data), dtype=torch.uint8)], 1, "cpu")[0], plan, spec)
    assert torch.equal(batches[0], engine.prepare(data))
    assert torch.equal(batches[1], theirs)


def test_where_there_is_no_gpu_a_line_says_so(tiny_bundle, digits_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"--decode gpu needs a CUDA device, and this is cpu; leave it out"):
        torchvision_decoder(torch.device("cpu"))
    words = ["scan", str(tiny_bundle), str(digits_folder), "--out", str(tmp_path / "out.csv"), "--device", "cpu"]
    done = CliRunner().invoke(cli.app, [*words, "--decode", "gpu"])
    assert isinstance(done.exception, ConfigError)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_nvjpeg_is_judged_alike(tiny_bundle, jpegs):
    engine = Engine(Detector.load(tiny_bundle), "cuda")
    told = []
    expected, found = rows(engine, jpegs), rows(engine, jpegs, GpuDecoding(engine, tell=told.append))
    assert told == []
    assert [row["outlier"] for row in found] == [row["outlier"] for row in expected]
