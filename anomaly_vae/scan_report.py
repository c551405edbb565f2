"""The report of a scan: one page that opens offline."""

import base64
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from anomaly_vae import report_charts as charts
from anomaly_vae.drift import BLOCK, WINDOWS
from anomaly_vae.engine import Engine
from anomaly_vae.overlaying import overlay
from anomaly_vae.reporting import page
from anomaly_vae.scan_files import looks
from anomaly_vae.scan_summary import Summary
from anomaly_vae.sources import Source

_GROUPS, _OF_GROUP = 50, 5
_LONGEST = 320


@dataclass(frozen=True)
class Shown:
    """An odd picture on the page, and the same under its heat map, as data URIs; None where it is there no more."""

    path: str
    score: float
    p_value: float
    outlier: bool
    picture: str | None
    heat: str | None


def scan_report(
    engine: Engine, source: Source, summary: Summary, tables: Iterable[pa.Table], name: str, verdict: str
) -> str:
    """The page; `tables`: all rows once more. `name`: of the scan. `verdict`: when a picture is an outlier."""
    detector, counts = engine.detector, summary.counts
    calibration = np.concatenate(detector.calibration.scores)
    threshold = None if summary.by_fdr else detector.policy.threshold
    drawn = {"p-values": charts.p_value_shares(summary.p_values, summary.largest_odd_p)}
    if counts.images:
        drawn["scores"] = charts.score_histogram(calibration, summary.scores, threshold, ("calibration", "this scan"))
    return page(
        "scan.html",
        f"Scan of {name}",
        detector,
        drawn,
        counts=counts,
        outliers=summary.outliers,
        rate=summary.outliers / max(counts.images, 1),
        expected=counts.expected,
        by_fdr=summary.by_fdr,
        verdict=verdict,
        shift=summary.shift,
        least=WINDOWS[0] * BLOCK,
        sampled=len(summary.scores) < counts.images,
        small=max(detector.image.height, detector.image.width) < 128,
        shown=list(_shown(engine, source, summary)),
        errors=[list(one) for one in summary.errors],
        groups=list(_groups(summary, tables)),
        repeated=sum(summary.repeated().values()) - len(summary.repeated()),
    )


def _shown(engine: Engine, source: Source, summary: Summary) -> Iterator[Shown]:
    odd, most = summary.oddest, summary.largest_odd_p
    pictures: dict[str, tuple[str, str]] = {}
    for look in looks(engine, source, [one.path for one in odd]):
        colour = look.image if len(look.image) == 3 else look.image.repeat(3, axis=0)
        pictures[look.path] = _data_uri(look.image), _data_uri(overlay(look.heat, look.scale, colour))
    for one in odd:
        outlier = most is not None and one.p_value <= most
        yield Shown(one.path, one.score, one.p_value, outlier, *pictures.get(one.path, (None, None)))


def _data_uri(image: npt.NDArray[np.uint8]) -> str:
    """A picture (C, H, W) as a JPEG of no more than `_LONGEST` px."""
    picture = Image.fromarray(image.transpose(1, 2, 0).squeeze())
    picture.thumbnail((_LONGEST, _LONGEST))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _groups(summary: Summary, tables: Iterable[pa.Table]) -> Iterator[list[str]]:
    """Of the contents that came most often: how often, and the first paths."""
    wanted = dict(list(summary.repeated().items())[:_GROUPS])
    paths: dict[int, list[str]] = {digest: [] for digest in wanted}
    for table in tables if wanted else ():
        for path, digest in zip(table["path"].to_pylist(), table["sha256"].to_pylist(), strict=True):
            found = paths.get(int(digest[:16], 16)) if digest else None
            if found is not None and len(found) < _OF_GROUP:
                found.append(path)
    for digest, count in wanted.items():
        more = f" and {count - _OF_GROUP} more" if count > _OF_GROUP else ""
        yield [str(count), ", ".join(paths[digest]) + more]
