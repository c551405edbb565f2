"""The verb `score`: single picture files, with heat maps beside them."""

from collections import Counter
from pathlib import Path
from typing import Any

from anomaly_vae.engine import Engine
from anomaly_vae.errors import BadImage, DataError
from anomaly_vae.paths import printable, read_file
from anomaly_vae.regions import regions_json
from anomaly_vae.rendering import heatmap_png


def score_files(
    engine: Engine, paths: list[Path], heatmaps: Path | None = None, class_name: str | None = None
) -> list[dict[str, Any]]:
    """One row a file: verdict, or `error` in one line. Heat maps go to `heatmaps`/NAME.heatmap.png, boxes to `regions`.

    `class_name`: that of all the pictures, for a conditional detector that must be told it.
    """
    # A class that is unknown, missing or not wanted is the command's mistake, not that of a picture.
    engine.detector.numbers_of(None if class_name is None else [class_name])
    if heatmaps is not None:
        try:
            heatmaps.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the folder {heatmaps}: {error.strerror}; choose another --heatmap") from None
    names = _names(paths)
    return [
        _score_file(engine, path, heatmaps and heatmaps / name, class_name)
        for path, name in zip(paths, names, strict=True)
    ]


def _names(paths: list[Path]) -> list[str]:
    """One file name a picture; those of equal name are numbered."""
    seen: Counter[str] = Counter()
    names = []
    for path in paths:
        seen[path.name] += 1
        number = f".{seen[path.name]}" if seen[path.name] > 1 else ""
        names.append(f"{path.name}{number}.heatmap.png")
    return names


def _score_file(engine: Engine, path: Path, place: Path | None, class_name: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"path": printable(path), "error": None}
    if path.is_dir():
        return row | {"error": "it is a folder; use: anomaly-vae scan"}
    if not path.exists():
        return row | {"error": "it does not exist; look for a misspelling"}
    try:
        data = read_file(path, engine.detector.image.max_bytes + 1)
        image = engine.prepare(data)
    except BadImage as error:
        return row | {"error": str(error)}
    except OSError as error:
        return row | {"error": f"cannot be read: {error.strerror}"}
    judged = engine.judge(image[None], place is not None, None if class_name is None else [class_name])
    row |= judged.row(0) | {"version": judged.version}
    if place is not None and judged.heat is not None:
        row["regions"] = regions_json(judged.heat[0], engine.detector.image, data)
        try:
            place.write_bytes(heatmap_png(judged.heat[0], judged.heat_scale, image.numpy()))
        except OSError as error:
            raise DataError(f"cannot write {place}: {error.strerror}; choose another --heatmap") from None
        row["heatmap"] = printable(place)
    return row
