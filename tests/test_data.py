"""Laws of opened pictures: decoded as everywhere else, in the order asked for; and surveys of them."""

import io
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anomaly_vae.data import (
    DataSpec,
    Pictures,
    Survey,
    in_order,
    open_listing,
    open_pictures,
    suggest_image_spec,
    survey,
)
from anomaly_vae.errors import DataError
from anomaly_vae.images import ImageSpec, decode, encode_png
from anomaly_vae.layouts import Item, Listing
from anomaly_vae.masking import RegionSpec

SMALL = ImageSpec(height=16, width=24, channels=3)


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 good and 6 bad pictures of several formats, and three files that cannot be read."""
    root = tmp_path_factory.mktemp("pictures")
    for name in ("good", "bad"):
        (root / name).mkdir()
    for i in range(30):
        noise(i).save(root / "good" / f"{i:02}.{('png', 'jpg', 'bmp')[i % 3]}")
    for i in range(6):
        noise(100 + i).save(root / "bad" / f"{i}.png")
    whole = (root / "good" / "00.png").read_bytes()
    (root / "good" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "good" / "empty.jpg").write_bytes(b"")
    (root / "bad" / "text.png").write_text("no picture")
    return root


def opened(root: Path, cache_mib: int = 64, image: ImageSpec = SMALL, workers: int = 2) -> Pictures:
    return open_pictures(root, DataSpec(cache_mib=cache_mib, workers=workers), image)


@pytest.mark.parametrize("cache_mib", [64, 0])
def test_every_picture_is_what_decode_makes_of_its_bytes(folder: Path, cache_mib: int) -> None:
    pictures = opened(folder, cache_mib)
    assert pictures.cached == (cache_mib > 0)
    images = pictures.images(np.arange(len(pictures)))
    assert images.dtype == torch.uint8
    assert images.shape == (36, 3, 16, 24)
    for i, item in enumerate(pictures.items):
        assert item.path is not None
        content = item.path.read_bytes()
        assert pictures.read(i) == content
        assert torch.equal(images[i], decode(content, SMALL))
        assert pictures.fingerprints[i] == int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


@pytest.mark.parametrize("cache_mib", [64, 0])
@pytest.mark.parametrize("batch_size", [1, 7, 36, 50])
def test_batches_keep_exactly_the_order_asked_for(folder: Path, cache_mib: int, batch_size: int) -> None:
    pictures = opened(folder, cache_mib)
    order = np.random.default_rng(batch_size).integers(0, len(pictures), 61)
    whole = pictures.images(np.arange(len(pictures)))
    for drop_last in (False, True):
        batches = list(pictures.batches(batch_size, order, drop_last))
        kept = len(order) // batch_size * batch_size if drop_last else len(order)
        seen = np.concatenate([indices for indices, _ in batches])
        assert np.array_equal(seen, order[:kept])
        assert torch.equal(torch.cat([images for _, images in batches]), whole[torch.from_numpy(order[:kept])])
        assert all(len(images) == batch_size for _, images in batches[:-1])


@pytest.mark.parametrize("cache_mib", [64, 0])
def test_a_selection_is_the_same_pictures_at_other_indices(folder: Path, cache_mib: int) -> None:
    pictures = opened(folder, cache_mib)
    chosen = np.array([5, 2, 30, 2])
    part = pictures.select(chosen)
    assert [item.key for item in part.items] == [pictures.items[i].key for i in chosen]
    assert torch.equal(part.images(range(4)), pictures.images(chosen))
    assert np.array_equal(part.fingerprints, pictures.fingerprints[chosen])
    assert part.read(2) == pictures.read(30)
    again = part.select([3, 0])
    assert torch.equal(again.images([0, 1]), pictures.images([2, 5]))
    assert len(pictures.images([])) == 0


def test_streaming_can_be_left_half_way(folder: Path) -> None:
    batches = opened(folder, cache_mib=0).batches(4)
    next(batches)
    batches.close()  # type: ignore[attr-defined]


def test_unreadable_pictures_are_listed_with_reasons_and_skipped(folder: Path) -> None:
    pictures = opened(folder)
    assert [key for key, _ in pictures.unreadable] == ["bad/text.png", "good/cut.png", "good/empty.jpg"]
    assert all(reason and "\n" not in reason for _, reason in pictures.unreadable)
    assert not {key for key, _ in pictures.unreadable} & {item.key for item in pictures.items}


def test_a_broken_link_and_a_file_too_large_are_unreadable(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("gone.png")
    noise(1, (90, 90)).save(tmp_path / "c.bmp")
    pictures = opened(tmp_path, image=SMALL.model_copy(update={"max_bytes": 8000}))
    assert [key for key, _ in pictures.unreadable] == ["b.png", "c.bmp"]
    assert "No such file" in pictures.unreadable[0][1]


def test_nothing_normal_to_read_is_an_error(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    noise(0).save(tmp_path / "bad" / "a.png")
    for i in range(3):
        (tmp_path / "good" / f"{i}.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"none of the 3 normal pictures can be read; the first, good/0\.png: "):
        opened(tmp_path)


def test_a_file_that_changes_while_streaming_is_named(tmp_path: Path) -> None:
    for i in range(4):
        noise(i).save(tmp_path / f"{i}.png")
    pictures = opened(tmp_path, cache_mib=0)
    (tmp_path / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png has changed since it was first read"):
        pictures.images(range(4))


def test_progress_ends_at_the_whole(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    open_pictures(folder, DataSpec(), SMALL, lambda done, of: calls.append((done, of)))
    assert calls[-1] == (39, 39)


def masked(root: Path, mask: Image.Image, suffix: str = "png") -> Pictures:
    for name in ("good", "bad", "mask"):
        (root / name).mkdir()
    noise(0, (64, 48)).save(root / "good" / "a.png")
    noise(1, (64, 48)).save(root / "bad" / "b.png")
    noise(2, (64, 48)).save(root / "bad" / "c.png")
    mask.save(root / "mask" / f"b_mask.{suffix}", quality=80)
    return opened(root, image=ImageSpec(height=24, width=32, channels=3))


@pytest.mark.parametrize(("level", "suffix"), [(1, "png"), (255, "png"), (255, "jpg"), (255, "bmp")])
def test_a_mask_lies_where_its_picture_shows_it(tmp_path: Path, level: int, suffix: str) -> None:
    array = np.zeros((48, 64), np.uint8)
    array[10:20, 40:60] = level
    pictures = masked(tmp_path, Image.fromarray(array), suffix)
    by_key = {item.key: i for i, item in enumerate(pictures.items)}
    expected = np.zeros((24, 32), bool)
    expected[5:10, 20:30] = True
    found = pictures.mask(by_key["bad/b.png"])
    assert found is not None
    assert found.dtype == bool
    assert np.array_equal(found, expected)
    assert pictures.mask(by_key["bad/c.png"]) is None
    normal = pictures.mask(by_key["good/a.png"])
    assert normal is not None
    assert normal.shape == (24, 32)
    assert not normal.any()


def test_a_scratch_thinner_than_a_pixel_does_not_vanish(tmp_path: Path) -> None:
    array = np.zeros((480, 640), np.uint8)
    array[100, 50:600] = 255
    found = masked(tmp_path, Image.fromarray(array)).mask(0)
    assert found is not None
    rows = np.flatnonzero(found.any(axis=1))
    assert set(rows) <= {4, 5}
    assert found.any(axis=0).sum() >= 26


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_a_mask_is_cropped_and_framed_as_its_picture(tmp_path: Path, fit: str) -> None:
    """A picture that is its own mask: bright exactly where it is abnormal."""
    for name in ("good", "bad", "mask"):
        (tmp_path / name).mkdir()
    array = np.zeros((60, 90), np.uint8)
    array[20:40, 30:70] = 255
    noise(0).save(tmp_path / "good" / "a.png")
    Image.fromarray(array).save(tmp_path / "bad" / "b.png")
    Image.fromarray(array).save(tmp_path / "mask" / "b.png")
    black = ImageSpec.parse({"height": 32, "width": 32, "channels": 1, "fit": fit, "background": (0, 0, 0)})
    white = black.model_copy(update={"background": (255, 255, 255)})
    expected = opened(tmp_path, image=black).images([0])[0, 0].numpy() > 127
    assert 0 < expected.sum() < 32 * 32
    for image in (black, white):
        assert np.array_equal(opened(tmp_path, image=image).mask(0), expected)


def test_an_unreadable_mask_is_dropped_and_said_at_opening(tmp_path: Path) -> None:
    masked(tmp_path, Image.new("L", (64, 48)))
    (tmp_path / "mask" / "b_mask.png").write_bytes(b"x")
    pictures = opened(tmp_path)
    assert pictures.items[0].mask is None
    assert pictures.mask(0) is None
    assert "could not read 1 mask, such as that of bad/b.png" in pictures.notes[-1]


@pytest.mark.parametrize("workers", [1, 3])
def test_in_order_gives_all_in_order_and_passes_errors_on(workers: int) -> None:
    assert list(in_order(lambda row: row * row, range(100), workers)) == [row * row for row in range(100)]

    def fail(row: int) -> int:
        return 1 // (50 - row)

    results = in_order(fail, range(100), workers)
    with pytest.raises(ZeroDivisionError):
        list(results)


# --- surveys --------------------------------------------------------------------------------------------------------


def save_all(root: Path, make: Callable[[int], Image.Image], suffix: str = "png", n: int = 5) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        make(i).save(root / f"{i}.{suffix}")
    return root


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((8, 8), (16, 16)),
        ((28, 28), (28, 28)),
        ((63, 63), (63, 63)),
        ((64, 70), (64, 64)),
        ((100, 110), (64, 64)),
        ((128, 128), (128, 128)),
        ((256, 256), (128, 128)),
        ((640, 480), (144, 112)),
        ((480, 640), (112, 144)),
        ((400, 100), (128, 32)),
    ],
)
def test_the_suggested_size_suits_the_pictures(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    found = survey(save_all(tmp_path, lambda i: noise(i, size)), DataSpec())
    image = suggest_image_spec(found)
    assert (found.width, found.height) == size
    assert (image.width, image.height) == expected
    assert image.fit == "stretch"


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("fit", ["stretch", "crop", "letterbox"])
def test_an_array_s_picture_is_what_its_png_decodes_to(colour: bool, fit: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, *((3,) if colour else ()))).astype(np.uint8)
    listing = Listing(tuple(Item(None, f"{i}", "good", True) for i in range(3)), pixels=pixels)
    region = RegionSpec(polygon=[(0.0, 0.1), (0.8, 0.1), (0.8, 1.0)])
    for size in ((20, 24), (24, 20), (16, 16)):
        for channels in (1, 3):
            image = ImageSpec(height=size[0], width=size[1], channels=channels, fit=fit)
            for spec in (image, region.within(image)):
                opened = open_listing(listing, DataSpec(), spec).images([0, 1, 2])
                for row in range(3):
                    png = encode_png(pixels[row].transpose(2, 0, 1) if colour else pixels[row])
                    assert torch.equal(opened[row], decode(png, spec))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9000), st.integers(1, 9000))
def test_any_survey_suggests_a_legal_spec(width: int, height: int) -> None:
    found = Survey({"good": 1}, 1, 1, width, height, width / height, True, {}, {}, {})
    image = suggest_image_spec(found)
    ratio = image.width / image.height
    if max(width / height, height / width) <= 8:
        assert 0.5 <= ratio / (width / height) <= 2


@pytest.mark.parametrize(
    ("make", "suffix", "channels"),
    [
        (lambda i: noise(i).convert("L"), "png", 1),
        (lambda i: noise(i).convert("L").convert("RGB"), "png", 1),
        (lambda i: noise(i).convert("L").convert("RGB"), "jpg", 1),
        (lambda i: noise(i).convert("L").convert("RGBA"), "png", 1),
        (lambda i: noise(i), "png", 3),
        (lambda i: noise(i, (300, 300)), "jpg", 3),
    ],
)
def test_colour_is_judged_by_pixels(
    tmp_path: Path, make: Callable[[int], Image.Image], suffix: str, channels: int
) -> None:
    assert suggest_image_spec(survey(save_all(tmp_path, make, suffix), DataSpec())).channels == channels


def test_a_survey_counts_labels_and_outlives_bad_files(folder: Path) -> None:
    found = survey(folder, DataSpec())
    assert found.counts == {"bad": 7, "good": 32}
    assert found.normals == 32
    assert 30 <= found.looked_at <= 31  # the cut file may still have its header
    assert {**found.formats, "png": 10} == {"png": 10, "jpeg": 10, "bmp": 10}


def test_a_header_behind_a_long_profile_is_found(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise(0).save(buffer, "JPEG", icc_profile=bytes(200_000))
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert survey(tmp_path, DataSpec()).sizes == {(40, 30): 1}


def test_groups_are_none_unless_given(folder: Path) -> None:
    assert opened(folder).groups is None
    grouped = open_pictures(folder, DataSpec(group=r"(\d)\."), SMALL)
    assert grouped.groups is not None
    assert len(np.unique(grouped.groups)) == 10
