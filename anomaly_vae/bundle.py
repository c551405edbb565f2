"""A detector's folder on disk: complete or absent, checked when read, nothing pickled.

`bundle.yaml` describes; `*.safetensors` hold the numbers and are hashed; `metrics.json` informs. A bundle is written to
a temporary folder beside its place, flushed to the disk, and renamed.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from anomaly_vae.errors import BundleError
from anomaly_vae.spec import read_yaml

FORMAT = 1
MANIFEST = "bundle.yaml"
METRICS = "metrics.json"


@dataclass(frozen=True)
class Bundle:
    """What a folder holds: its description, its hashed files, and its metrics."""

    description: dict[str, Any]
    files: dict[str, bytes]
    metrics: dict[str, Any]

    @property
    def content_hash(self) -> str:
        """SHA-256 over the description and the hashes of the files: 64 hex digits."""
        described = {"description": self.description, "files": _hashes(self.files)}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def write_bundle(path: Path, bundle: Bundle, replace: bool = False) -> None:
    """Write `bundle` as the folder `path`; raises `BundleError` where something stands already and `replace` is off."""
    path = path.absolute()
    if path.exists() and not replace:
        raise BundleError(f"{path} exists already; choose another --out, or pass --overwrite to replace it")
    if path.exists() and not (path / MANIFEST).is_file():
        raise BundleError(f"{path} exists and is no bundle, so it is not replaced; choose another --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)
    except OSError as error:
        raise BundleError(f"cannot write beside {path}: {error.strerror}; choose another --out") from None
    try:
        _fill(temporary, bundle)
        _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_bundle(path: Path) -> Bundle:
    """Read and check the folder `path`; raises `BundleError` when missing, damaged, or of a newer format."""
    if not (path / MANIFEST).is_file():
        raise BundleError(f"{path} is no bundle (it has no {MANIFEST}); give the folder that `train --out` wrote")
    manifest = read_yaml(path / MANIFEST)
    number = manifest.get("format")
    if not isinstance(number, int) or number > FORMAT:
        raise BundleError(f"{path} has bundle format {number} and this version reads up to {FORMAT}; upgrade")
    hashes = manifest.get("files")
    description = manifest.get("description")
    if not isinstance(hashes, dict) or not isinstance(description, dict):
        raise BundleError(f"{path}/{MANIFEST} is damaged; restore the bundle from a copy or train again")
    files = {name: _read_checked(path, name, wanted) for name, wanted in hashes.items()}
    bundle = Bundle(description, files, _read_metrics(path / METRICS))
    if manifest.get("content_hash") != bundle.content_hash:
        raise BundleError(f"{path}/{MANIFEST} was changed after training; restore the bundle from a copy")
    return bundle


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that a power cut leaves the old one or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _fill(folder: Path, bundle: Bundle) -> None:
    manifest = {
        "format": FORMAT,
        "content_hash": bundle.content_hash,
        "files": _hashes(bundle.files),
        "description": bundle.description,
    }
    text = yaml.safe_dump(manifest, sort_keys=False, allow_unicode=True)
    for name, data in bundle.files.items():
        write_durably(folder / name, data)
    write_durably(folder / METRICS, json.dumps(bundle.metrics, indent=2).encode())
    write_durably(folder / MANIFEST, text.encode())


def _put_in_place(temporary: Path, path: Path) -> None:
    old = None
    if path.exists():
        old = path.with_name(f".{path.name}.old.{os.getpid()}")
        path.replace(old)
    temporary.replace(path)
    _sync_folder(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _read_checked(folder: Path, name: str, wanted: str) -> bytes:
    if Path(name).name != name:
        raise BundleError(f"{folder}/{MANIFEST} names a file outside the bundle ({name!r}); do not use this bundle")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {folder / name}: {error.strerror}; restore the bundle from a copy") from None
    if hashlib.sha256(data).hexdigest() != wanted:
        raise BundleError(f"{folder / name} is damaged (its hash differs); restore the bundle from a copy")
    return data


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return metrics if isinstance(metrics, dict) else {}


def _hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
