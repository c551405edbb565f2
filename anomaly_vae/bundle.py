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

from anomaly_vae.errors import BundleError, ConfigError
from anomaly_vae.spec import dump_yaml, read_yaml

FORMAT = 1
MANIFEST = "bundle.yaml"
METRICS = "metrics.json"
_LARGEST_MANIFEST = 2**20


@dataclass(frozen=True)
class Bundle:
    """What a folder holds: its description, its hashed files, and its metrics."""

    description: dict[str, Any]
    files: dict[str, bytes]
    metrics: dict[str, Any]

    @property
    def content_hash(self) -> str:
        """SHA-256 over the description and the hashes of the files: 64 hex digits."""
        return _content_hash(self.description, _hashes(self.files))


@dataclass(frozen=True)
class Glance:
    """What a bundle's manifest says: its version, its description, and how many bytes its files have."""

    version: str
    description: dict[str, Any]
    size: int


def glance(path: Path) -> Glance:
    """Read the manifest of the bundle `path` and no more; raises `BundleError` where it contradicts itself."""
    if not (path / MANIFEST).is_file():
        raise _no_bundle(path)
    manifest = _read_manifest(path)
    files = [path / name for name in manifest["files"] if Path(name).name == name]
    size = sum(file.stat().st_size for file in files if file.is_file())
    if not isinstance(manifest["description"].get("spec"), dict):
        raise BundleError(f"{path / MANIFEST} describes no detector; give the folder that `train --out` wrote")
    return Glance(_checked_hash(path, manifest)[:12], manifest["description"], size)


def write_bundle(path: Path, bundle: Bundle, replace: bool = False) -> None:
    """Write `bundle` as the folder `path`; raises `BundleError` where something stands already and `replace` is off."""
    check_place(path, replace)
    path = path.resolve()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)
        _fill(temporary, bundle)
        read_bundle(temporary)
        _put_in_place(temporary, path)
    except OSError as error:
        raise BundleError(f"cannot write {path}: {error.strerror}; make room or choose another --out") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_place(path: Path, replace: bool) -> None:
    """Refuse, before any work is done, a place that a bundle must not be written to."""
    if path.exists() and not replace:
        raise BundleError(f"{path} exists already; choose another --out, or pass --overwrite to replace it")
    if path.exists() and not (path / MANIFEST).is_file():
        raise BundleError(f"{path} exists and is no bundle, so it is not replaced; choose another --out")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BundleError(f"cannot write into {parent}; choose another --out")


def read_bundle(path: Path) -> Bundle:
    """Read and check the folder `path`; raises `BundleError` when missing, damaged, or of a newer format."""
    if not (path / MANIFEST).is_file():
        raise _no_bundle(path)
    manifest = _read_manifest(path)
    files = {name: _read_checked(path, name, wanted) for name, wanted in manifest["files"].items()}
    _checked_hash(path, manifest)
    return Bundle(manifest["description"], files, _read_metrics(path / METRICS))


def write_durably(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file so that a power cut leaves the old one or the new one, never half of it.

    `mode`: who may read and write it, less what the umask forbids.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _no_bundle(path: Path) -> BundleError:
    return BundleError(f"{path} is no bundle (it has no {MANIFEST}); give the folder that `train --out` wrote")


def _checked_hash(path: Path, manifest: dict[str, Any]) -> str:
    """The content hash, which is of what the manifest says and of the hashes of the files that it lists."""
    try:
        found = _content_hash(manifest["description"], manifest["files"])
    except (TypeError, ValueError):
        found = ""
    if manifest.get("content_hash") != found:
        raise BundleError(f"{path}/{MANIFEST} was changed after training; restore the bundle from a copy")
    return found


def _content_hash(description: dict[str, Any], hashes: Mapping[str, str]) -> str:
    described = {"description": description, "files": dict(sorted(hashes.items()))}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    damaged = BundleError(f"{path / MANIFEST} is damaged; restore the bundle from a copy or train again")
    if (path / MANIFEST).stat().st_size > _LARGEST_MANIFEST:
        raise damaged
    try:
        manifest = read_yaml(path / MANIFEST)
    except ConfigError:
        raise damaged from None
    number, hashes = manifest.get("format"), manifest.get("files")
    if isinstance(number, int) and number > FORMAT:
        raise BundleError(f"{path} has bundle format {number} and this version reads up to {FORMAT}; upgrade")
    if number not in range(1, FORMAT + 1) or not isinstance(manifest.get("description"), dict):
        raise damaged
    if not isinstance(hashes, dict) or not all(isinstance(part, str) for pair in hashes.items() for part in pair):
        raise damaged
    return manifest


def _fill(folder: Path, bundle: Bundle) -> None:
    manifest = {
        "format": FORMAT,
        "content_hash": bundle.content_hash,
        "files": _hashes(bundle.files),
        "description": bundle.description,
    }
    text = dump_yaml(manifest)
    for name, data in bundle.files.items():
        write_durably(folder / name, data)
    write_durably(folder / METRICS, json.dumps(bundle.metrics, indent=2, allow_nan=False).encode())
    write_durably(folder / MANIFEST, text.encode())


def _put_in_place(temporary: Path, path: Path) -> None:
    old = None
    if path.exists():
        old = path.with_name(f".{path.name}.old.{os.getpid()}")
        path.replace(old)
    try:
        temporary.replace(path)
    except OSError:
        if old is not None:
            old.replace(path)
        raise
    sync_folder(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _read_checked(folder: Path, name: str, wanted: str) -> bytes:
    if Path(name).name != name:
        raise BundleError(f"{folder}/{MANIFEST} names a file outside the bundle ({name!r}); do not use this bundle")
    if not (folder / name).is_file() or (folder / name).is_symlink():
        raise BundleError(f"{folder / name} is missing or no plain file; restore the bundle from a copy")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {folder / name}: {error.strerror}; restore the bundle from a copy") from None
    if hashlib.sha256(data).hexdigest() != wanted:
        raise BundleError(f"{folder / name} is damaged (its hash differs); restore the bundle from a copy")
    return data


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        # What is no plain file may be a pipe that never ends, or something outside of the bundle.
        plain = path.is_file() and not path.is_symlink()
        metrics = json.loads(path.read_text(encoding="utf-8")) if plain else {}
    except (OSError, ValueError):
        return {}
    return metrics if isinstance(metrics, dict) else {}


def _hashes(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
