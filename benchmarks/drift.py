"""How often the drift alarms are wrong, how soon they are right, and whether the right one speaks: docs/drift.md.

    python benchmarks/drift.py simulate --out build/drift.json
    python benchmarks/drift.py pictures --data DIR --out build/drift.json --seeds 3
    python benchmarks/drift.py table --out build/drift.json

`simulate` redraws the calibration for every stream. `pictures` trains small detectors on MNIST (one digit; the others
are defects) and on quarters of PIPED's first four papers, and sends them held-out normal pictures whose light,
contrast, focus and so on change from picture 500 on, or that are mixed with defects. Nothing is tuned by any of it.
Streams are drawn with replacement from those held-out pictures; PIPED's are turned and mirrored, and of sheets never
calibrated on.
"""

import argparse
import io
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from drift_simulated import Floats, Row, simulate, spread
from PIL import Image, ImageEnhance, ImageFilter
from quality_tasks import Entry, Task, Wanted, classes_of, crops_of, papers_of, thin

from anomaly_vae import Detector, DetectorSpec, Engine
from anomaly_vae.drift import RateAlarm, ShiftAlarm, tolerated_rate
from anomaly_vae.presets import read_preset
from anomaly_vae.training import train

Pixels = npt.NDArray[np.uint8]
Change = Callable[[Pixels, np.random.Generator], Pixels]

QUIET, CHANGED = 500, 2000
"""Pictures of a stream before the change, and after it."""
STREAMS = 5
POOL = 320
"""Pictures of each kind that streams are drawn from."""


def _enhanced(kind: Callable[[Image.Image], Any], factor: float) -> Change:
    return lambda pixels, _: np.asarray(kind(Image.fromarray(pixels)).enhance(factor))


def _blurred(radius: float) -> Change:
    return lambda pixels, _: np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def _jpeg(quality: int) -> Change:
    def change(pixels: Pixels, _: np.random.Generator) -> Pixels:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        return np.asarray(Image.open(buffer))

    return change


def _noisy(sigma: float) -> Change:
    return lambda pixels, random: np.clip(pixels + random.normal(0, sigma, pixels.shape), 0, 255).astype(np.uint8)


CHANGES: dict[str, Change] = {
    **{f"brightness x {factor:g}": _enhanced(ImageEnhance.Brightness, factor) for factor in (0.97, 0.9, 0.7)},
    **{f"contrast x {factor:g}": _enhanced(ImageEnhance.Contrast, factor) for factor in (0.95, 0.8, 0.5)},
    **{f"blur, radius {radius:g} px": _blurred(radius) for radius in (0.3, 0.6, 1.2)},
    **{f"JPEG quality {quality}": _jpeg(quality) for quality in (95, 75, 30)},
    **{f"noise, sigma {sigma:g}": _noisy(sigma) for sigma in (1, 4, 12)},
}
DEFECTS = (0.02, 0.1, 0.3)


class Kept:
    """Held-out normals and defects of a data set, and the task that makes a detector."""

    def __init__(self, task: Task, normals: Sequence[Pixels], defects: Sequence[Pixels], preset: DetectorSpec) -> None:
        self.task, self.normals, self.defects, self.preset = task, normals, defects, preset


def mnist(wanted: Wanted, seed: int) -> Kept:
    """One digit is normal, another for each seed; all others are defects."""
    found, normal = classes_of("mnist", wanted), str(seed)
    held = [one.pixels for one in thin(found.test[normal], POOL)]
    others = [name for name in found.test if name != normal]
    odd = [one.pixels for name in others for one in thin(found.test[name], POOL // len(others) + 1)]
    preset = read_preset("vae").with_overrides(["training.steps=300", "model.network.width=8", "split.calibrate=0.25"])
    task = Task("MNIST", normal, "dev", "", (normal,), tuple(thin(found.made[normal], 2000)))
    return Kept(task, [one for one in held if one is not None], [one for one in odd if one is not None], preset)


def papers(wanted: Wanted, _: int) -> Kept:
    """Quarters of 64 px of four papers; defective are those with at least 20 impure pixels."""
    entries: list[Entry] = []
    normals: list[Pixels] = []
    defects: list[Pixels] = []
    for paper in papers_of(wanted):
        made, test = crops_of(paper, wanted)
        for one in made:
            parts = quarters(np.asarray(Image.open(one.path).convert("RGB")))
            entries += [
                Entry(wanted.scratch / f"{one.path.stem}-{i}.png", "good", True, pixels=part)
                for i, part in enumerate(parts)
            ]
        for one in test:
            parts = quarters(np.asarray(Image.open(one.path).convert("RGB")))
            if one.label == "good":
                normals += parts
            elif one.mask is not None:
                masks = quarters(np.asarray(Image.open(one.mask).convert("L")))
                defects += [part for part, mask in zip(parts, masks, strict=True) if (mask > 127).sum() >= 20]
    preset = read_preset("vae").with_overrides(["training.steps=300", "model.network.width=8", "split.calibrate=0.4"])
    task = Task("PIPED", "quarters", "dev", "", ("good",), tuple(entries))
    return Kept(task, turned(normals), turned(defects), preset)


def quarters(pixels: Pixels) -> list[Pixels]:
    """Four squares of 64 px of one of 128 px."""
    return [pixels[y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64)]


def turned(pictures: Sequence[Pixels]) -> list[Pixels]:
    """`POOL` pictures: these in random order, turned and mirrored by chance."""
    random = np.random.default_rng(0)
    chosen = random.choice(len(pictures), POOL, replace=len(pictures) < POOL)
    found = [np.rot90(pictures[i], int(random.integers(4))) for i in chosen]
    return [np.ascontiguousarray(one[:, ::-1] if random.random() < 0.5 else one) for one in found]


Told = dict[str, Floats]


def told(engine: Engine, detector: Detector, pictures: Sequence[Pixels]) -> Told:
    """All that the alarms are told of pictures, as columns."""
    images = []
    for pixels in pictures:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append(engine.prepare(buffer.getvalue()))
    judged = engine.judge(torch.stack(images))
    values = {"score": judged.score, **judged.parts}
    assert judged.latents is not None
    latents = {f"latent {k}": judged.latents[:, i] for i, k in enumerate(detector.watched)}
    return {
        name: np.asarray(column, float) for name, column in (values | latents | {"outlier": judged.outlier}).items()
    }


def stream(before: Told, after: Told, share: float, random: np.random.Generator) -> Iterator[Told]:
    """A quiet part and a changed one, in which this share is of `after` and the rest of `before`."""
    size = len(before["score"])
    first, second = random.integers(size, size=QUIET), random.integers(size, size=CHANGED)
    other = random.integers(len(after["score"]), size=CHANGED)
    new = random.random(CHANGED) < share
    yield {name: column[first] for name, column in before.items()}
    yield {name: np.where(new, after[name][other], column[second]) for name, column in before.items()}


def _no_alarms() -> dict[str, int | None]:
    return {"rate": None, "shift": None}


def watched(detector: Detector, before: Told, after: Told, share: float, random: np.random.Generator) -> Row:
    """When each alarm is raised, in pictures since the change (0: before it), and what is said in the end."""
    calibration, policy = detector.calibration, detector.policy
    rate = RateAlarm(tolerated_rate(calibration, calibration.rank(policy.alpha, policy.mode)).rate)
    shift, found = ShiftAlarm(detector.reference()), _no_alarms()
    for changed, part in enumerate(stream(before, after, share, random)):
        raised = {"rate": rate.update(part["outlier"] > 0.5), "shift": shift.update(part)}
        for kind, at in raised.items():
            if at is not None:
                found[kind] = at + 1 if changed else 0
    said = "changed" if found["shift"] is not None else "defects" if found["rate"] is not None else "nothing"
    return {**found, "said": said, "outliers": float((after["outlier"] > 0.5).mean())}


def pictures(data: Path, seeds: int, only: str | None) -> Iterator[Row]:
    """A row a data set, detector and change."""
    for make in (mnist, papers):
        if only not in (None, make.__name__):
            continue
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as scratch:
                kept = make(Wanted(data, Path(scratch) / "pictures"), seed)
                folder = kept.task.write(Path(scratch) / "task")
                spec = kept.preset.with_overrides([*kept.task.overrides, f"seed={seed}"])
                train(spec, folder, Path(scratch) / "bundle", device="cpu", say=print)
                yield from _of_detector(kept, Detector.load(Path(scratch) / "bundle"), seed)


def _of_detector(kept: Kept, detector: Detector, seed: int) -> Iterator[Row]:
    engine = Engine(detector, "cpu")
    engine.warm()
    normal, odd = told(engine, detector, kept.normals), told(engine, detector, kept.defects)
    streams: dict[str, tuple[Told, float, str]] = {"unchanged": (normal, 1.0, "nothing")}
    for name, change in CHANGES.items():
        random = np.random.default_rng(seed)
        streams[name] = told(engine, detector, [change(one, random) for one in kept.normals]), 1.0, "changed"
    streams |= {f"defects in {share:.0%}": (odd, share, "defects") for share in DEFECTS}
    for name, (after, share, right) in streams.items():
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        runs = [watched(detector, normal, after, share, random) for _ in range(STREAMS)]
        facts = {"data_set": kept.task.data_set, "change": name, "seed": seed, "right": right, "runs": runs}
        yield {**facts, "n": detector.calibration.n, "alpha": detector.policy.alpha}


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Markdown of whatever there is."""
    if "false_alarms" in found:
        yield from _simulated(found)
    rows: Sequence[Row] = found.get("pictures", ())
    for data_set in dict.fromkeys(row["data_set"] for row in rows):
        ours = [row for row in rows if row["data_set"] == data_set]
        seeds = len({row["seed"] for row in ours})
        yield f"\n{data_set}: {seeds} detectors x {STREAMS} streams, n = {ours[0]['n']}, alpha {ours[0]['alpha']:g}\n"
        yield "| from picture 500 on | flagged | rate alarm | after | shift alarm | after | said in the end |"
        yield "|---|---|---|---|---|---|---|"
        for change in dict.fromkeys(row["change"] for row in ours):
            yield _line(change, [row for row in ours if row["change"] == change])


def _simulated(found: Mapping[str, Any]) -> Iterator[str]:
    yield "| calibration | alpha | tolerated | pictures | false alarms | naive |\n|---|---|---|---|---|---|"
    for row in found["false_alarms"]:
        shares = (f"{row[kind] / row['runs']:.1%} ({row[kind]} of {row['runs']})" for kind in ("raised", "naive"))
        yield (
            f"| {row['what']} | {row['alpha']:g} | {row['tolerated']:.2%} | {row['images']:,} | {' | '.join(shares)} |"
        )
    yield "\n| n, alpha | tolerated | rise to | quiet before | found | after pictures |\n|---|---|---|---|---|---|"
    for row in found["delays"]:
        of = f"{min(0.95, row['rise'] * row['alpha']):.0%} (x {row['rise']:g})"
        after = "-" if row["median"] is None else f"{row['median']:.0f} ({row['low']:.0f}-{row['high']:.0f})"
        yield (
            f"| {row['n']}, {row['alpha']:g} | {row['tolerated']:.2%} | {of} | {row['quiet']:,} | "
            f"{row['found']} of {row['runs']} | {after} |"
        )
    yield "\n| calibration pictures | names | pictures | false shift alarms | largest effect at the end |"
    yield "|---|---|---|---|---|"
    for row in found["false_shifts"]:
        yield (
            f"| {row['n']} | {row['names']} | {row['images']:,} | {row['raised']} of {row['runs']} | "
            f"{row['largest']:.2f} |"
        )


def _line(change: str, rows: Sequence[Row]) -> str:
    runs = [run for row in rows for run in row["runs"]]
    cells = [change, f"{np.mean([run['outliers'] for run in runs]):.1%}"]
    for kind in ("rate", "shift"):
        one = spread([run[kind] for run in runs])
        after = "-" if one["median"] is None else f"{one['median']:.0f} ({one['low']:.0f}-{one['high']:.0f})"
        cells += [f"{one['found']} of {len(runs)}", after]
    said = {what: sum(run["said"] == what for run in runs) for what in ("changed", "defects", "nothing")}
    cells.append(", ".join(f"{what} {count}" for what, count in said.items() if count))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("simulate", "pictures", "table"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=("mnist", "papers"))
    parser.add_argument("--runs", type=int, default=200, help="calibrations to draw, each with a stream")
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.what == "simulate":
        found |= simulate(options.runs)
    elif options.what == "pictures":
        if options.data is None:
            parser.error("--data: give the folder that holds mnist/ and piped/")
        rows = list(pictures(options.data, options.seeds, options.only))
        again = {row["data_set"] for row in rows}
        found["pictures"] = [row for row in found.get("pictures", ()) if row["data_set"] not in again] + rows
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
