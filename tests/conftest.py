"""Fixtures: a tiny but real detector, real pictures, and one thread for torch so that parallel tests do not fight."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import fcntl
import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from postgres import Postgres, postgres, programs
from sklearn.datasets import load_digits

from anomaly_vae import Detector, DetectorSpec
from anomaly_vae.training import train

torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent

LONGEST = (
    "exporting", "presets", "scores", "experts", "retiring", "objectives", "page", "known_anomalies", "perceptual",
    "service_recalibration", "reporting", "estimator", "training", "object_store", "store_absent", "openapi", "quality",
    "overlaying", "compiled", "recorder", "service_models", "torchrun", "latents_shown", "faces_exercise",
)  # fmt: skip
"""Files of many seconds. Each worker takes a file at a time, and must not be left with one of these at the end."""

TINY = DetectorSpec.parse(
    {
        "preset": "tiny",
        "image": {"height": 16, "width": 16, "channels": 1},
        "model": {"network": {"kind": "conv", "width": 12}, "latent": {"kind": "gaussian", "size": 12}},
        "training": {"steps": 400, "batch_size": 32},
    }
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others as they are."""
    first = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))


def pytest_collection_finish() -> None:
    """What is imported by now stays, and is a million objects that no collection of garbage needs to look at again."""
    gc.freeze()


def write_digits(folder: Path, normal: str = "0123", count: int | None = None) -> Path:
    """scikit-learn's digits as PNGs in `folder`/good and `folder`/<digit>."""
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images[:count], digits.target[:count], strict=True)):
        place = folder / ("good" if str(label) in normal else str(label))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.minimum(pixels * 16, 255).astype(np.uint8)).save(place / f"{i:04}.png")
    return folder


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def tiny_spec() -> DetectorSpec:
    return TINY


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, digits_folder: Path) -> Path:
    """A real bundle: trained for some seconds on the digits 0-3, split-calibrated.

    The first worker of pytest-xdist that wants it trains it for all; each has a copy to itself.
    """
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        train(TINY, digits_folder, path, device="cpu")
        return path
    shared = tmp_path_factory.getbasetemp().parent / "trained-for-all"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "tiny").exists():
            train(TINY, digits_folder, shared / "tiny", device="cpu")
    shutil.copytree(shared / "tiny", path)
    return path


@pytest.fixture
def good(digits_folder: Path) -> list[Path]:
    """Pictures like those that the tiny bundle was trained on."""
    return sorted((digits_folder / "good").iterdir())


@pytest.fixture
def odd(digits_folder: Path) -> list[Path]:
    """Pictures of another kind."""
    return sorted((digits_folder / "7").iterdir())


@pytest.fixture
def tiny_detector(tiny_bundle: Path) -> Detector:
    return Detector.load(tiny_bundle)


@pytest.fixture(scope="session")
def real_images() -> Path:
    """Real pictures kept beside the project; a user's machine has none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real images (MNIST, PIPED, London faces) are not on this machine")
    return folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL server of the tests' own."""
    if programs() is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def store_place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a new store may be: laws hold for both databases."""
    if request.param == "sqlite":
        return str(tmp_path / "store.sqlite")
    url: str = request.getfixturevalue("postgres_server").url()
    return url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium; what drives it is loaded by the tests of the page alone."""
    from browsing import chromium, launched
    from playwright.sync_api import sync_playwright

    if chromium() is None:
        pytest.skip("there is no browser (Debian: apt-get install chromium)")
    with sync_playwright() as play:
        found = launched(play)
        yield found
        found.close()
