"""A CSV manifest -> `Item`s: one line a picture, mistakes named by line."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from anomaly_vae.errors import DataError
from anomaly_vae.layouts import KNOWN_ANOMALIES, DataSpec, Item, Listing, set_aside, shown

_COLUMNS = ("path", "label", "mask", "group", "split")
_KNOWN = "known"
_SPLITS = {"": None, _KNOWN: None, "train": "train", "val": "train", "validation": "train", "test": "test"}


def find_manifest(root: Path, data: DataSpec) -> Path | None:
    """The CSV file that lists the pictures: `root` itself, its manifest.csv or, with layout=manifest, its only CSV."""
    if root.is_file():
        if root.suffix.casefold() != ".csv":
            raise DataError(f"{shown(root)} is a file; give the folder that holds the pictures, or a .csv manifest")
        return root
    if data.layout == "auto":
        return root / "manifest.csv" if (root / "manifest.csv").is_file() else None
    if data.layout != "manifest":
        return None
    found = sorted(path for path in root.iterdir() if path.suffix.casefold() == ".csv" and path.name[0] != ".")
    if root / "manifest.csv" in found:
        return root / "manifest.csv"
    if len(found) != 1:
        raise DataError(f"{shown(root)} holds {len(found)} CSV files; give the one that is the manifest by its name")
    return found[0]


def list_manifest(path: Path, data: DataSpec) -> Listing:
    """Items of a CSV file with the column `path` and, if wanted, `label`, `mask`, `group`, `split`.

    Paths are relative to the file's folder; the split `known` is that of known anomalies. Raises `DataError` with the
    number of the wrong line.
    """
    columns, rows = _rows(path)
    lines: dict[str, int] = {}
    items: list[Item] = []
    known: list[Item] = []
    for line, row in rows:
        item = _item(path, line, row, data, "label" in columns)
        if (first := lines.setdefault(item.key, line)) != line:
            raise DataError(f"{shown(path)} line {line}: {item.key} is listed on line {first} already; remove one")
        (known if _is_known(row) else items).append(item)
    _check_labels(path, items, data)
    spare = ", ".join(name for name in columns if name not in _COLUMNS)
    notes = [f"columns of the manifest that are not used: {shown(spare)}"] if spare else []
    return Listing(tuple(items), (*notes, *set_aside(known)), known=tuple(known))


def _check_labels(path: Path, items: Sequence[Item], data: DataSpec) -> None:
    if not items:
        raise DataError(f"{shown(path)} lists no pictures; write one line a picture below the column names")
    if not any(item.normal for item in items):
        labels = sorted({item.label for item in items})
        raise DataError(
            f"{shown(path)} has the labels {', '.join(labels[:8])}, none of them {' or '.join(data.normal)}; "
            f"say which is normal, such as -o 'data.normal=[{labels[0]}]'"
        )


def _rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The column names and the rows with their line numbers; comma or semicolon, as spreadsheets write them."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(f"cannot read the manifest {shown(path)}: {error.strerror}; check its permissions") from None
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=";" if header.count(";") > header.count(",") else ",")
    try:
        columns = [name.strip().casefold() for name in next(reader, [])]
        if "path" not in columns:
            raise DataError(
                f"{shown(path)} line 1: no column `path`; the first line must name columns: {','.join(_COLUMNS)}"
            )
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise DataError(f"{shown(path)} line {reader.line_num}: {error}; mend the CSV there") from None
    return columns, [(line, dict(zip(columns, row, strict=False))) for line, row in rows if any(row)]


def _item(path: Path, line: int, row: Mapping[str, str], data: DataSpec, labelled: bool) -> Item:
    where = f"{shown(path)} line {line}"
    files = {name: path.parent / row[name] for name in ("path", "mask") if row.get(name)}
    if "path" not in files:
        raise DataError(f"{where}: the path is empty; write a file name relative to the manifest")
    for file in files.values():
        if not _is_file(file):
            raise DataError(f"{where}: no such file {shown(file)}; paths are relative to the manifest's folder")
    unlabelled = KNOWN_ANOMALIES if _is_known(row) else "good"
    label = row.get("label", "") if labelled else unlabelled
    if not label:
        raise DataError(f"{where}: the label is empty; write {data.normal[0]} or the kind of anomaly")
    split = row.get("split", "").casefold()
    if split not in _SPLITS:
        raise DataError(f"{where}: the split is {split!r}; write train, test, {_KNOWN} or nothing")
    normal = data.is_normal(label) if labelled else not _is_known(row)
    if normal and _is_known(row):
        raise DataError(f"{where}: a known anomaly of the normal label {label!r}; write its kind, or another split")
    return Item(
        files["path"],
        shown(row["path"]),
        shown(label),
        normal,
        files.get("mask"),
        row.get("group") or None,
        _SPLITS[split],
    )


def _is_known(row: Mapping[str, str]) -> bool:
    return row.get("split", "").casefold() == _KNOWN


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a zero byte in it
        return False
