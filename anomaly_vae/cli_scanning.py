"""`anomaly-vae scan`: a whole source into one table."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anomaly_vae.cli_common import Alpha, AsJson, BundleArgument, Device, engine_of, print_json
from anomaly_vae.errors import ConfigError

if TYPE_CHECKING:
    from anomaly_vae.detector import Detector
    from anomaly_vae.scan_summary import Summary


class Where(StrEnum):
    """What does the work of a scan."""

    local = "local"
    ray = "ray"


def scan(
    bundle: BundleArgument,
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, a pattern in quotes ('in/**/*.png'), a list of files (.txt, or - for standard input), an "
            "archive (.zip, .tar), or a URL (s3://bucket/in)."
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(help="Table to write: .parquet, .csv, .jsonl or .ndjson.")],
    alpha: Alpha = None,
    fdr: Annotated[
        float | None,
        typer.Option(help="Instead of alpha: at most this share of the outliers is false (Benjamini-Hochberg)."),
    ] = None,
    fail_above: Annotated[
        float | None, typer.Option(help="Exit with 3 where the rate of outliers is above this.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 4 where files cannot be read.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever an unfinished scan left.")] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Keep the rows of files whose size and time are as --out has them.")
    ] = False,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images judged at once.")] = 32,
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16 (quicker where the device has it), auto.")
    ] = "float32",
    where: Annotated[
        Where, typer.Option("--engine", help="local: this process; ray: one machine or many by Ray, see docs/scale.md.")
    ] = Where.local,
    address: Annotated[
        str | None, typer.Option(help="With ray: a running cluster, such as auto; else one of this machine alone.")
    ] = None,
    actors: Annotated[int | None, typer.Option(help="With ray: how many judge at once; else all that fit.")] = None,
    gpus_per_actor: Annotated[
        float | None, typer.Option(help="With ray: such as 0.5; else 1 where the cluster has GPUs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score every picture of a folder, list, archive or bucket into a table; killed, the same command goes on."""
    from anomaly_vae import console
    from anomaly_vae.scan_rows import scored
    from anomaly_vae.scan_view import ScanView
    from anomaly_vae.scanning import Scan, Score, Wanted
    from anomaly_vae.sources import source_of

    on_ray = where is Where.ray
    # Who drives a cluster judges nothing, and may lack what the actors have.
    engine = engine_of(bundle, *(("cpu", alpha) if on_ray else (device, alpha, batch_size, precision)))
    pictures = source_of(source, engine.detector.image.max_bytes)
    if engine.remark:
        console.note(engine.remark)
    running = Scan(engine, pictures, out, Wanted(fdr, fresh, update))
    score: Score = scored
    if on_ray:
        from anomaly_vae.ray_cluster import Cluster
        from anomaly_vae.scan_ray import Opening, RayScored

        opening = Opening.of(bundle, device, alpha, batch_size, precision)
        score = RayScored(Cluster(address, actors, gpus_per_actor), pictures, opening, running.ledger.folder)
    elif (address, actors, gpus_per_actor) != (None, None, None):
        raise ConfigError("--address, --actors and --gpus-per-actor are for --engine ray; add it")
    with running:
        if running.ledger.begun:
            console.note("an earlier go was cut short; its rows are kept")
        try:
            with ScanView(pictures if pictures.plain and source != "-" else None) as view:
                summary = running.run(view, score)
        except KeyboardInterrupt:
            console.note("interrupted; the same command goes on from here, with --fresh it begins anew")
            raise typer.Exit(130) from None
        running.finish(summary)
    if as_json:
        print_json(_facts(engine.detector, summary, out))
    else:
        for line in _lines(summary, fdr, out):
            console.say(line)
    raise typer.Exit(_code(summary, fail_above, strict))


def _code(summary: "Summary", fail_above: float | None, strict: bool) -> int:
    if fail_above is not None and summary.outliers > fail_above * summary.counts.images:
        return 3
    return 4 if strict and summary.counts.errors else 0


def _facts(detector: "Detector", summary: "Summary", out: Path) -> dict[str, Any]:
    counts, shift = summary.counts, summary.shift
    return {
        "out": str(out),
        "version": detector.version,
        "images": counts.images,
        "errors": counts.errors,
        "outliers": summary.outliers,
        "expected": counts.expected,
        "alpha": detector.policy.alpha,
        "fdr_cut": summary.cut,
        "shift": None if shift is None else {"part": shift.part, "effect": shift.effect, "limit": shift.limit},
    }


def _lines(summary: "Summary", fdr: float | None, out: Path) -> list[str]:
    counts, found = summary.counts, summary.outliers
    rate = f"{found / max(counts.images, 1):.1%}"
    if fdr is None:
        false = f"about {counts.expected:.1f} would be false alarms if all were normal"
    else:
        false = f"about {fdr * found:.1f} of them false, if the rest of the pictures is as calibration was"
    lines = [f"{counts.images:,} images: {found:,} outliers ({rate}); {false}"]
    if counts.errors:
        lines.append(f"{counts.errors:,} files could not be read; column 'error' of {out} says why")
    if summary.shift is not None:
        lines.append(shift_line(summary.shift.part, summary.shift.effect))
    return [*lines, f"written to {out}"]


def shift_line(part: str, effect: float) -> str:
    """What a shift of the whole scan means."""
    where = "the score" if part == "score" else f"the part {part}"
    way = "higher" if effect > 0 else "lower"
    return (
        f"the pictures as a whole are not as in training: {where} of most is {way} (effect {abs(effect):.2f} of 1); "
        "look at camera, light, format and scale before you look at single outliers"
    )
