"""Laws of data sets known by name, on files in their authors' formats, and of the door to torchvision."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.io import savemat

from anomaly_vae.data import DataSpec, open_pictures, split
from anomaly_vae.errors import DataError
from anomaly_vae.images import ImageSpec
from anomaly_vae.layouts import Listing
from anomaly_vae.listing import list_pictures
from anomaly_vae.torchvision_compat import import_torchvision

Bytes = npt.NDArray[np.uint8]


def idx(array: Bytes) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder: Path, zipped: bool = False) -> dict[str, tuple[Bytes, Bytes]]:
    rng = np.random.default_rng(0)
    parts = {}
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, n in (("train", 30), ("t10k", 20)):
        images = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        parts[prefix] = images, labels
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            path = folder / (name + ".gz" * zipped)
            path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return parts


def named(text: str, **data: object) -> Listing:
    return list_pictures(text, DataSpec.parse(data))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("name", "below"), [("mnist", ""), ("mnist", "MNIST/raw"), ("kmnist", "KMNIST/raw")])
def test_idx_files_are_read_where_they_lie(tmp_path: Path, name: str, below: str, zipped: bool) -> None:
    parts = write_idx(tmp_path / below, zipped)
    listing = named(f"{name}:{tmp_path}", normal=[1, 2])
    kept = np.isin(parts["train"][1], [1, 2])
    assert listing.pixels is not None
    assert np.array_equal(listing.pixels, np.concatenate([parts["train"][0][kept], parts["t10k"][0]]))
    train = [item for item in listing.items if item.split == "train"]
    test = [item for item in listing.items if item.split == "test"]
    assert (len(train), len(test)) == (6, 20)
    assert all(item.normal for item in train)
    assert sum(item.normal for item in test) == 4
    assert listing.notes == ("left out 24 abnormal pictures of the official training part",)
    assert len({item.key for item in listing.items}) == 26


def test_the_training_part_alone_has_its_abnormal_pictures(tmp_path: Path) -> None:
    parts = write_idx(tmp_path)
    listing = named(f"mnist:{tmp_path}", normal=[0], part="train")
    assert listing.pixels is not None
    assert np.array_equal(listing.pixels, parts["train"][0])
    assert {item.split for item in listing.items} == {None}


def test_array_pictures_decode_to_what_their_png_would(tmp_path: Path) -> None:
    parts = write_idx(tmp_path)
    pictures = open_pictures(
        f"mnist:{tmp_path}",
        DataSpec(normal=("0",), part="test"),
        ImageSpec.parse({"height": 28, "width": 28, "channels": 1}),
    )
    assert np.array_equal(pictures.images(np.arange(20))[:, 0].numpy(), parts["t10k"][0])
    assert pictures.read(0)[:4] == b"\x89PNG"


@pytest.mark.parametrize("damage", ["cut", "not gzip", "missing", "longer", "labels too few"])
def test_damaged_idx_files_are_one_line(tmp_path: Path, damage: str) -> None:
    write_idx(tmp_path, zipped=damage == "not gzip")
    path = tmp_path / ("t10k-images-idx3-ubyte" + ".gz" * (damage == "not gzip"))
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "labels too few":
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    else:
        path.write_bytes({"cut": content[:-5], "not gzip": content[:40], "longer": content + b"x"}[damage])
    with pytest.raises(DataError) as caught:
        named(f"mnist:{tmp_path}", normal=[0])
    assert "\n" not in str(caught.value)
    assert "again" in str(caught.value) or "put the four" in str(caught.value)


@pytest.mark.parametrize("below", ["", "cifar-10-batches-bin"])
def test_cifar10_is_read_from_its_binary_version(tmp_path: Path, below: str) -> None:
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (60, 3, 32, 32)).astype(np.uint8)
    labels = np.arange(60) % 10
    records = np.concatenate([labels[:, None].astype(np.uint8), planes.reshape(60, -1)], axis=1)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, part in zip(names, np.split(records, 6), strict=True):
        (folder / name).write_bytes(part.tobytes())
    listing = named(f"cifar10:{tmp_path}", normal=["cat", "9"])
    assert listing.pixels is not None
    kept = np.concatenate([np.isin(labels[:50], [3, 9]), np.ones(10, bool)])
    assert np.array_equal(listing.pixels, planes.transpose(0, 2, 3, 1)[kept])
    assert {item.label for item in listing.items if item.normal} == {"cat", "truck"}
    (folder / "test_batch.bin").write_bytes(b"x" * 3000)
    with pytest.raises(DataError, match="whole records"):
        named(f"cifar10:{tmp_path}", normal=["cat"])


def test_the_pickled_cifar10_is_refused_with_the_address_of_the_other(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"\x80\x02}.")
    with pytest.raises(DataError, match=r"pickled.*cifar-10-binary\.tar\.gz"):
        named(f"cifar10:{tmp_path}", normal=["cat"])


def test_svhn_is_read_from_matlab_files_and_ten_is_zero(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 3, 10)).astype(np.uint8)
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": np.arange(1, 11)[:, None]})
    listing = named(f"svhn:{tmp_path}", normal=[0])
    assert listing.pixels is not None
    assert [item.key for item in listing.items if item.normal] == ["train/00009", "test/00009"]
    assert np.array_equal(listing.pixels[0], pixels[..., 9])
    (tmp_path / "test_32x32.mat").write_bytes(b"no matlab")
    with pytest.raises(DataError, match="no whole SVHN file"):
        named(f"svhn:{tmp_path}", normal=[0])


def write_celeba(folder: Path) -> None:
    (folder / "img_align_celeba").mkdir(parents=True)
    rows = {"1.jpg": "-1  1", "2.jpg": " 1  1", "3.jpg": " 1 -1", "4.jpg": "-1 -1"}
    for name in list(rows)[:3]:
        (folder / "img_align_celeba" / name).write_bytes(b"x")
    lines = ["4", "Eyeglasses Smiling", *(f"{name} {values}" for name, values in rows.items())]
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    (folder / "identity_CelebA.txt").write_text("1.jpg 7\n2.jpg 7\n3.jpg 8\n4.jpg 9\n")
    (folder / "list_eval_partition.txt").write_text("1.jpg 0\n2.jpg 2\n3.jpg 1\n4.jpg 2\n")


def test_celeba_is_normal_by_attribute_and_grouped_by_person(tmp_path: Path) -> None:
    write_celeba(tmp_path / "celeba")
    listing = named(f"celeba:{tmp_path}", normal=["Smiling", "not Eyeglasses"])
    found = [(item.key, item.label, item.normal, item.group, item.split) for item in listing.items]
    assert found == [
        ("1.jpg", "good", True, "7", "train"),
        ("2.jpg", "Eyeglasses", False, "7", "test"),
        ("3.jpg", "not Smiling", False, "8", "train"),
    ]
    assert "did not find 1 listed picture" in listing.notes
    with pytest.raises(DataError, match="no attribute Hat"):
        named(f"celeba:{tmp_path}", normal=["Hat"])


def test_digits_need_no_folder() -> None:
    listing = named("digits", normal=[0, 1])
    assert listing.pixels is not None
    assert listing.pixels.shape == (1797, 8, 8)
    assert listing.pixels.max() == 255
    assert {item.label for item in listing.items if item.normal} == {"0", "1"}


@pytest.mark.parametrize(
    ("text", "normal", "message"),
    [
        ("digits", ["good", "normal"], r"classes 0, 1, 2.*data.normal=\[0\]"),
        ("digits", ["eleven"], "not eleven"),
        ("mnist", ["0"], "--data mnist:FOLDER"),
        ("mnist:/nowhere", ["0"], "is no folder"),
        ("mnits:/nowhere", ["0"], "does not exist.*mnist, fashion_mnist"),
    ],
)
def test_mistakes_of_names_are_one_line(text: str, normal: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        named(text, normal=normal)
    assert "\n" not in str(caught.value)


def test_a_folder_of_idx_files_without_a_name_is_told_which_name(tmp_path: Path) -> None:
    write_idx(tmp_path)
    with pytest.raises(DataError, match="--data mnist:"):
        named(str(tmp_path))


def test_the_real_mnist(real_images: Path) -> None:
    listing = named(f"mnist:{real_images / 'mnist'}", normal=[0])
    assert listing.pixels is not None
    assert listing.pixels.shape == (5923 + 10000, 28, 28)
    assert sum(item.normal for item in listing.items if item.split == "test") == 980


def test_official_parts_of_a_named_set_are_its_split(tmp_path: Path) -> None:
    write_idx(tmp_path)
    pictures = open_pictures(
        f"mnist:{tmp_path}", DataSpec(normal=tuple("012345")), ImageSpec(height=16, width=16, channels=1)
    )
    parts = split(pictures, seed=0)
    assert {pictures.items[i].split for i in parts.pool} == {"train"}
    assert [pictures.items[i].split for i in parts.test_normal] == ["test"] * 12
    assert [pictures.items[i].label for i in parts.test_abnormal] == ["6", "7", "8", "9"] * 2


def test_torchvision_imports_and_works_whatever_its_build() -> None:
    torchvision = import_torchvision()
    assert import_torchvision() is torchvision
    assert sum(p.numel() for p in torchvision.models.squeezenet1_1(weights=None).parameters()) > 1e6


@pytest.mark.parametrize(("reason", "says"), [("something else", "RuntimeError"), ("", "ConfigError")])
def test_other_failures_of_torchvision_are_not_hidden(tmp_path: Path, reason: str, says: str) -> None:
    (tmp_path / "torchvision").mkdir()
    source = (
        f"raise RuntimeError({reason!r})" if reason else "raise ModuleNotFoundError('No module', name='torchvision')"
    )
    (tmp_path / "torchvision" / "__init__.py").write_text(f"print('tried')\n{source}")
    code = "from anomaly_vae.torchvision_compat import import_torchvision; import_torchvision()"
    path = os.pathsep.join((str(tmp_path), str(Path(__file__).parent.parent)))
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stdout == "tried\n"
    assert says in run.stderr.splitlines()[-1]
