"""The verb `score`: single picture files, with heat maps beside them."""

from pathlib import Path
from typing import Any

from anomaly_vae.engine import Engine
from anomaly_vae.errors import BadImage, DataError
from anomaly_vae.rendering import heatmap_png
from anomaly_vae.scanning import printable


def score_files(engine: Engine, paths: list[Path], heatmaps: Path | None = None) -> list[dict[str, Any]]:
    """One row a file: verdict, or `error` in one line. Heat maps are written as `heatmaps`/NAME.heatmap.png."""
    if heatmaps is not None:
        try:
            heatmaps.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the folder {heatmaps}: {error.strerror}; choose another --heatmap") from None
    return [_score_file(engine, path, heatmaps) for path in paths]


def _score_file(engine: Engine, path: Path, heatmaps: Path | None) -> dict[str, Any]:
    row: dict[str, Any] = {"path": printable(path), "error": None}
    try:
        image = engine.prepare(path.read_bytes())
    except BadImage as error:
        return row | {"error": str(error)}
    except OSError as error:
        return row | {"error": f"cannot be read: {error.strerror}"}
    judged = engine.judge(image[None], heat=heatmaps is not None)
    row |= judged.row(0) | {"version": judged.version}
    if heatmaps is not None and judged.heat is not None:
        place = heatmaps / f"{path.name}.heatmap.png"
        place.write_bytes(heatmap_png(judged.heat[0], judged.heat_scale, image.numpy()))
        row["heatmap"] = printable(place)
    return row
