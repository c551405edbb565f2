"""Laws of `check`: what is planted is found, what is clean stays silent, and the report reads as lines."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from anomaly_vae.calibration import normals_needed
from anomaly_vae.checking import CheckReport, check
from anomaly_vae.data import DataSpec
from anomaly_vae.errors import DataError
from anomaly_vae.similarity import near_pairs, unusual


def part(seed: int, side: int = 64) -> Image.Image:
    """An aligned product: the same strong shape every time, with a weak texture of its own."""
    rng = np.random.default_rng(seed)
    texture = gaussian_filter(rng.normal(size=(side, side, 3)), (3, 3, 0))
    y, x = np.mgrid[:side, :side] / side
    shape = 110 + 90 * (np.hypot(x - 0.5, y - 0.5) < 0.35)
    return Image.fromarray(np.clip(shape[..., None] + 130 * texture, 0, 255).astype(np.uint8))


def clean(root: Path, good: int = 60, bad: int = 10) -> Path:
    for name, count, first in (("good", good, 0), ("bad", bad, 1000)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            part(first + i).save(root / name / f"{i:03}.png")
    return root


def checked(root: Path, **data: object) -> CheckReport:
    return check(root, DataSpec.parse(data))


def text(report: CheckReport) -> str:
    return "\n".join(report.lines())


def test_clean_pictures_of_one_part_raise_no_remark(tmp_path: Path) -> None:
    report = checked(clean(tmp_path))
    assert report.pictures == 70
    assert [(label.name, label.normal, label.pictures) for label in report.labels] == [
        ("good", True, 60),
        ("bad", False, 10),
    ]
    found = [report.duplicates, report.near_duplicates, report.leaks, report.suspects, report.unreadable]
    assert not any([*found, report.tell_tales, report.notes])
    assert report.sizes == {"64x64": 70}
    assert report.formats == {"png": 70}
    assert report.modes == {"rgb 8-bit": 70}


@pytest.mark.parametrize("way", ["jpeg", "half", "double", "brighter", "duller"])
def test_a_copy_is_found_however_it_was_saved(tmp_path: Path, way: str) -> None:
    clean(tmp_path)
    original = part(7)
    changed, quality = {
        "jpeg": (original, 70),
        "half": (original.resize((32, 32), Image.Resampling.BOX), 95),
        "double": (original.resize((128, 128), Image.Resampling.BICUBIC), 95),
        "brighter": (original.point(lambda v: min(255, v + 8)), 95),
        "duller": (original.point(lambda v: int(128 + 0.95 * (v - 128))), 95),
    }[way]
    changed.save(tmp_path / "good" / "copy.jpg", quality=quality)
    report = checked(tmp_path)
    assert [(pair.first, pair.second) for pair in report.near_duplicates] == [("good/007.png", "good/copy.jpg")]
    assert report.near_total == 1
    assert not report.duplicates
    assert "good/007.png ~ good/copy.jpg" in text(report)


def test_identical_files_are_one_group_and_no_near_duplicates(tmp_path: Path) -> None:
    clean(tmp_path)
    for name in ("x.png", "y.png"):
        shutil.copy(tmp_path / "good" / "003.png", tmp_path / "good" / name)
    report = checked(tmp_path)
    assert report.duplicates == (("good/003.png", "good/x.png", "good/y.png"),)
    assert not report.near_duplicates
    assert report.near_total == 0
    assert not report.leaks
    assert "good/003.png = good/x.png = good/y.png" in text(report)


def test_a_picture_called_normal_and_abnormal_leaks(tmp_path: Path) -> None:
    clean(tmp_path)
    shutil.copy(tmp_path / "good" / "003.png", tmp_path / "bad" / "x.png")
    part(1002).save(tmp_path / "good" / "y.jpg", quality=80)
    found = {(leak.between, leak.first, leak.second) for leak in checked(tmp_path).leaks}
    assert found == {
        ("normal and abnormal", "bad/x.png", "good/003.png"),
        ("normal and abnormal", "bad/002.png", "good/y.jpg"),
    }


def test_leaks_between_groups_and_between_official_parts(tmp_path: Path) -> None:
    rows = ["path,group,split"]
    for i in range(40):
        part(i).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,g{i // 2},{'test' if i >= 30 else 'train'}")
    shutil.copy(tmp_path / "1.png", tmp_path / "same.png")
    part(4).save(tmp_path / "near.jpg", quality=80)
    (tmp_path / "manifest.csv").write_text("\n".join([*rows, "same.png,g9,train", "near.jpg,g2,test"]) + "\n")
    report = checked(tmp_path)
    assert {(leak.between, leak.first, leak.second) for leak in report.leaks} == {
        ("two groups", "1.png", "same.png"),
        ("train and test", "4.png", "near.jpg"),
    }
    assert "leaks between two groups" in text(report)
    assert "mode guaranteed: not with" in text(report)


@pytest.mark.parametrize("odd", ["black", "white", "foreign", "noise"])
def test_a_normal_unlike_the_others_is_suspect(tmp_path: Path, odd: str) -> None:
    clean(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    picture = {
        "black": Image.new("RGB", (64, 64)),
        "white": Image.new("RGB", (64, 64), "white"),
        "foreign": part(3).transpose(Image.Transpose.ROTATE_90).point(lambda v: 255 - v),
        "noise": Image.fromarray(noise),
    }[odd]
    picture.save(tmp_path / "good" / "odd.png")
    assert [suspect.key for suspect in checked(tmp_path).suspects] == ["good/odd.png"]


def test_unreadable_files_and_mixtures_are_told(tmp_path: Path) -> None:
    clean(tmp_path)
    (tmp_path / "good" / "broken.png").write_bytes(b"x")
    part(500, 48).convert("L").save(tmp_path / "good" / "small.png")
    report = checked(tmp_path)
    assert [key for key, _ in report.unreadable] == ["good/broken.png"]
    assert report.sizes == {"64x64": 70, "48x48": 1}
    assert report.modes == {"rgb 8-bit": 70, "grey 8-bit": 1}
    lines = text(report)
    assert "mixed sizes: 64x64 (70), 48x48 (1)" in lines
    assert "unreadable, skipped: 1" in lines
    assert "good/broken.png: " in lines


def test_a_format_that_gives_the_answer_away_is_told(tmp_path: Path) -> None:
    clean(tmp_path, bad=0)
    for i in range(5):
        part(1000 + i).save(tmp_path / "bad" / f"{i}.jpg")
    report = checked(tmp_path)
    assert report.tell_tales == ("normal and abnormal pictures have different formats: png against jpeg",)


@pytest.mark.parametrize(
    ("normals", "folds", "calibration", "average", "guaranteed"),
    [(20, 5, 16, 0.1, None), (60, 5, 48, 0.05, None), (300, None, 60, 0.05, 0.05), (600, None, 120, 0.01, 0.05)],
)
def test_the_outlook_is_what_the_split_would_support(
    tmp_path: Path, normals: int, folds: int | None, calibration: int, average: float, guaranteed: float | None
) -> None:
    rng = np.random.default_rng(0)
    for i in range(normals):
        Image.fromarray(rng.integers(0, 256, (16, 16)).astype(np.uint8)).save(tmp_path / f"{i}.png")
    outlook = checked(tmp_path).outlook
    assert (outlook.folds, outlook.average, outlook.guaranteed) == (folds, average, guaranteed)
    assert abs(outlook.calibration - calibration) <= 2
    assert outlook.calibration >= normals_needed(average)


def test_too_few_normals_are_reported_not_raised(tmp_path: Path) -> None:
    report = checked(clean(tmp_path, good=9))
    assert report.outlook.problem is not None
    assert "at least 16" in text(report)


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError):
        checked(tmp_path)


def test_the_report_is_plain_lines_and_json(tmp_path: Path) -> None:
    clean(tmp_path)
    for i in range(9):
        (tmp_path / "good" / f"broken{i}.png").write_bytes(b"x")
    report = checked(tmp_path)
    lines = report.lines()
    assert all(line and "\n" not in line for line in lines)
    assert "  and 4 more; --json lists them" in lines
    found = json.loads(json.dumps(report.to_dict()))
    assert found["pictures"] == 70
    assert len(found["unreadable"]) == 9
    assert found["outlook"]["folds"] == 5


def test_similarity_needs_no_particular_number_of_pictures() -> None:
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 3, 5, 6, 7, 30):
        thumbnails = rng.integers(0, 256, (n, 3, 32, 32)).astype(np.uint8)
        assert near_pairs(thumbnails).total == 0
        assert unusual(thumbnails).shape == (n,)
    same = np.full((40, 3, 32, 32), 77, np.uint8)
    assert near_pairs(same).total == 0  # nothing to tell pictures apart by; identical files are found by their bytes
    assert not (unusual(same) > 4).any()


def test_pictures_that_differ_mostly_by_lighting_are_not_the_same() -> None:
    rng = np.random.default_rng(0)
    slope = np.linspace(-1, 1, 32) * rng.normal(0, 40, (200, 1, 1, 1))
    own = gaussian_filter(rng.normal(0, 12, (200, 3, 32, 32)), (0, 0, 1, 1))
    thumbnails = np.clip(128 + slope + own, 0, 255).astype(np.uint8)
    assert near_pairs(thumbnails).total == 0


def test_unusual_is_the_distance_to_the_five_nearest_others() -> None:
    rng = np.random.default_rng(0)
    mixed = rng.standard_t(3, (40, 4)) @ rng.normal(0, 8, (4, 3 * 8 * 8))
    thumbnails = np.clip(128 + mixed, 0, 255).astype(np.uint8).reshape(40, 3, 8, 8)
    flat = thumbnails.reshape(40, -1).astype(float)
    squared = np.square(flat[:, None] - flat[None]).sum(axis=2)
    log = 0.5 * np.log(np.sort(squared, axis=1)[:, 1:6].mean(axis=1) + flat.shape[1])
    expected = (log - np.median(log)) / (1.4826 * np.median(np.abs(log - np.median(log))))
    # What the principal axes leave out is taken as different in every picture, which adds a little.
    assert np.allclose(unusual(thumbnails), expected, atol=0.05)


def test_pairs_are_found_across_blocks() -> None:
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 256, (5000, 1, 16, 16)).astype(np.uint8)
    thumbnails[4900] = thumbnails[10]
    thumbnails[4999] = np.clip(thumbnails[4100].astype(int) + 5, 0, 255)
    found = near_pairs(thumbnails)
    assert sorted(zip(found.first.tolist(), found.second.tolist(), strict=True)) == [(10, 4900), (4100, 4999)]
    assert found.total == 2


def test_real_pictures_have_the_duplicates_they_are_known_for(real_images: Path) -> None:
    """One paper of PIPED has the same crop five times; the faces have no two alike."""
    paper = checked(real_images / "piped" / "PA_BFT01_TL")
    assert [len(group) for group in paper.duplicates] == [5]
    assert not paper.near_duplicates
    faces = checked(real_images / "faces_london", normal=["neutral"], group=r"(\d+)\.jpg")
    assert not any([faces.duplicates, faces.near_duplicates, faces.leaks])
