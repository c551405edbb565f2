"""Data sets known by name -> `Listing`s, from files as their authors publish them; nothing is downloaded or unpickled.

`mnist:FOLDER` and its like; `digits` (scikit-learn's) needs no folder. Official parts are kept as `Item.split`.
"""

import gzip
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from anomaly_vae.errors import DataError
from anomaly_vae.layouts import DataSpec, Item, Listing, counted, shown

Pixels: TypeAlias = npt.NDArray[np.uint8]
Labels: TypeAlias = npt.NDArray[np.int64]

_DIGITS = tuple("0123456789")
_IDX = {
    "mnist": ("MNIST", _DIGITS),
    "fashion_mnist": (
        "FashionMNIST",
        ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "kmnist": ("KMNIST", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
}
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_BINARY = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_SVHN = "http://ufldl.stanford.edu/housenumbers/"
_CELEBA = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
NAMES = (*_IDX, "cifar10", "svhn", "celeba", "digits")


def split_name(root: Path | str) -> tuple[str, Path | None] | None:
    """`mnist:FOLDER` -> ("mnist", FOLDER), `digits` -> ("digits", None); None for an ordinary folder."""
    found = re.fullmatch(rf"({'|'.join(NAMES)})(?::(.*))?", str(root), re.DOTALL)
    if not found or (found[2] is None and Path(root).exists()):
        return None
    return found[1], Path(found[2]) if found[2] else None


def list_named(name: str, root: Path | None, data: DataSpec) -> Listing:
    """The data set `name` below `root`; raises `DataError` saying which file is missing and how to get it.

    `data.normal` names classes, by name or number. CelebA: attributes, such as [Smiling, "not Eyeglasses"], all of
    which a normal face has.
    """
    if name == "digits":
        return _digits(data)
    if root is None:
        raise DataError(f"{name} needs the folder of its files: --data {name}:FOLDER")
    if not root.is_dir():
        raise DataError(
            f"{shown(root)} is no folder; give the one that holds the files of {name}: --data {name}:FOLDER"
        )
    if name == "celeba":
        return _celeba(root, data)
    read: Callable[[Path, str], tuple[Pixels, Labels]]
    classes: Sequence[str]
    if name in _IDX:
        folder_name, classes = _IDX[name]
        folder = _home(root, (f"{folder_name}/raw", "raw", folder_name), "*-images[-.]idx3-ubyte*")
        read = _read_idx_part
    elif name == "cifar10":
        folder, classes, read = _cifar_home(root), _CIFAR10, _read_cifar_part
    else:
        folder, classes, read = _home(root, ("SVHN", "svhn"), "*_32x32.mat"), _DIGITS, _read_svhn_part
    return _official(name, classes, {part: read(folder, part) for part in ("train", "test")}, data)


def _official(name: str, classes: Sequence[str], parts: dict[str, tuple[Pixels, Labels]], data: DataSpec) -> Listing:
    """Both official parts one after the other. Abnormal training pictures, of no use, are left out unless asked for."""
    normal = _normal_classes(name, classes, data)
    items: list[Item] = []
    kept: list[Pixels] = []
    left_out = 0
    for part, (pixels, labels) in parts.items():
        if len(pixels) != len(labels) or (len(labels) and not 0 <= labels.min() <= labels.max() < len(classes)):
            raise DataError(f"{name}: pictures and labels of the {part} part do not fit together; get its files again")
        keep = np.isin(labels, list(normal)) | (part == "test") | (data.part == part)
        left_out += int((~keep).sum())
        kept.append(pixels[keep])
        for number in np.flatnonzero(keep):
            label = int(labels[number])
            items.append(Item(None, f"{part}/{number:05d}", classes[label], label in normal, split=part))
    notes = (f"left out {counted(left_out, 'abnormal picture')} of the official training part",) if left_out else ()
    return Listing(tuple(items), notes, np.concatenate(kept))


def _normal_classes(name: str, classes: Sequence[str], data: DataSpec) -> set[int]:
    numbers = {**{str(i): i for i in range(len(classes))}, **{c.casefold(): i for i, c in enumerate(classes)}}
    unknown = [wanted for wanted in data.normal if wanted.casefold() not in numbers]
    if unknown:
        given = "" if data.normal == DataSpec().normal else f", not {unknown[0]}"
        raise DataError(
            f"{name} has the classes {', '.join(classes)}{given}; say which are normal, such as "
            f"-o 'data.normal=[{classes[0]}]'"
        )
    return {numbers[wanted.casefold()] for wanted in data.normal}


def _digits(data: DataSpec) -> Listing:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels (UCI, Alpaydin and Kaynak 1998); no official parts."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    normal = _normal_classes("digits", _DIGITS, data)
    items = (Item(None, f"{i:04d}", str(c), int(c) in normal) for i, c in enumerate(bunch.target))
    return Listing(tuple(items), (), pixels)


def _home(root: Path, below: Sequence[str], pattern: str) -> Path:
    """The folder, of `root` and torchvision's places below it, that holds files like `pattern`; else `root`."""
    folders = [root, *(root / name for name in below)]
    return next((folder for folder in folders if any(folder.glob(pattern))), root)


def _read_idx_part(folder: Path, part: str) -> tuple[Pixels, Labels]:
    prefix = "train" if part == "train" else "t10k"
    images, labels = _read_idx(folder, f"{prefix}-images", 3), _read_idx(folder, f"{prefix}-labels", 1)
    return images, labels.astype(np.int64)


def _read_idx(folder: Path, stem: str, dimensions: int) -> Pixels:
    """An idx file of bytes (http://yann.lecun.com/exdb/mnist), gzip or not."""
    name = f"{stem}-idx{dimensions}-ubyte"
    tried = [folder / f"{stem}{dot}idx{dimensions}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        raise DataError(f"{shown(folder)} has no {name} or {name}.gz; put the four idx files of the data set there")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error):
        raise DataError(f"{shown(path)} cannot be read to its end; get the file again") from None
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start].ljust(4 * dimensions, b"\0"), ">u4").tolist()
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != start + math.prod(shape):
        raise DataError(f"{shown(path)} is no whole idx{dimensions} file of bytes; get the file again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _cifar_home(root: Path) -> Path:
    folder = _home(root, ("cifar-10-batches-bin",), "data_batch_*.bin")
    if any(folder.glob("data_batch_*.bin")):
        return folder
    advice = f"get {_CIFAR10_BINARY} and unpack it in {shown(root)}"
    if any((place / "data_batch_1").exists() for place in (root, root / "cifar-10-batches-py")):
        raise DataError(f"{shown(root)} holds CIFAR-10's Python version, which is pickled and not read here; {advice}")
    raise DataError(f"{shown(root)} has no data_batch_1.bin; {advice}")


def _read_cifar_part(folder: Path, part: str) -> tuple[Pixels, Labels]:
    """Records of one label byte and 3x32x32 pixel bytes (Krizhevsky 2009)."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if part == "train" else ["test_batch.bin"]
    records = []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise DataError(f"{shown(folder)} has no {name}; get {_CIFAR10_BINARY} and unpack it there")
        content = np.fromfile(path, np.uint8)
        if not len(content) or len(content) % 3073:
            raise DataError(f"{shown(path)} is not made of whole records of 3,073 bytes; get {_CIFAR10_BINARY} again")
        records.append(content.reshape(-1, 3073))
    table = np.concatenate(records)
    return np.ascontiguousarray(table[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), table[:, 0].astype(np.int64)


def _read_svhn_part(folder: Path, part: str) -> tuple[Pixels, Labels]:
    """MATLAB files with X (32,32,3,N) and y (N,1), in which 10 stands for the digit 0 (Netzer et al. 2011)."""
    from scipy.io import loadmat

    path = folder / f"{part}_32x32.mat"
    if not path.is_file():
        raise DataError(f"{shown(folder)} has no {path.name}; get it from {_SVHN}")
    try:
        table: dict[str, Any] = loadmat(path, variable_names=["X", "y"])
        pixels, labels = np.asarray(table["X"]), np.asarray(table["y"])
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[2] != 3:
            raise ValueError("X is no array of RGB bytes")
    except Exception:  # loadmat raises a dozen kinds on damaged files
        raise DataError(f"{shown(path)} is no whole SVHN file; get it again from {_SVHN}") from None
    return np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)), labels.ravel().astype(np.int64) % 10


def _celeba(root: Path, data: DataSpec) -> Listing:
    """Faces of CelebA (Liu et al. 2015), grouped by person; a normal face has all the attributes of `data.normal`."""
    home = _home(root, ("celeba", "CelebA"), "list_attr_celeba.txt")
    names, attributes = _celeba_attributes(home / "list_attr_celeba.txt")
    wanted = _celeba_wanted(names, data)
    parts, people = dict(_celeba_pairs(home, "list_eval_partition")), dict(_celeba_pairs(home, "identity_CelebA"))
    items, missing = [], 0
    for file, values in sorted(attributes.items()):
        path = home / "img_align_celeba" / file
        if not path.is_file():
            missing += 1
            continue
        broken = [column for column, value in wanted if values[column] != value]
        label = "good" if not broken else ("not " if values[broken[0]] < 0 else "") + names[broken[0]]
        split = "test" if parts.get(file) == "2" else "train"
        items.append(Item(path, file, label, not broken, group=people.get(file), split=split))
    if not items:
        raise DataError(f"{shown(home / 'img_align_celeba')} holds none of the pictures; get them from {_CELEBA}")
    return Listing(tuple(items), (f"did not find {counted(missing, 'listed picture')}",) if missing else ())


def _celeba_wanted(names: Sequence[str], data: DataSpec) -> list[tuple[int, int]]:
    """Columns and the values, 1 or -1, that a normal face has there."""
    columns = {name.casefold(): i for i, name in enumerate(names)}
    wanted = []
    for text in data.normal:
        name = text.strip().removeprefix("not ").strip()
        if name.casefold() not in columns:
            raise DataError(
                f"celeba has no attribute {name}, but {', '.join(names[:6])}, ...; say what is normal, such as "
                f"-o 'data.normal=[not Eyeglasses]'"
            )
        wanted.append((columns[name.casefold()], -1 if name != text.strip() else 1))
    return wanted


def _celeba_attributes(path: Path) -> tuple[list[str], dict[str, list[int]]]:
    """A count, the attribute names, then a file name and 40 times 1 or -1 a line."""
    lines = _celeba_lines(path)
    names = lines[1].split() if len(lines) > 1 else []
    table = {}
    for number, line in enumerate(lines[2:], 3):
        file, *values = line.split() or [""]
        if file and (len(values) != len(names) or not set(values) <= {"1", "-1"}):
            raise DataError(
                f"{shown(path)} line {number}: not a file name and {len(names)} times 1 or -1; get it again"
            )
        if file:
            table[file] = [int(value) for value in values]
    return names, table


def _celeba_pairs(home: Path, stem: str) -> Iterator[tuple[str, str]]:
    for line in _celeba_lines(home / f"{stem}.txt"):
        words = line.split()
        if len(words) == 2:
            yield words[0], words[1]


def _celeba_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{shown(path)} cannot be read; get it from {_CELEBA}") from None
