"""`anomaly-vae scan`: a whole source into one table."""

from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anomaly_vae.cli_common import Alpha, AsJson, BundleArgument, Device, engine_of, print_json
from anomaly_vae.cli_sending import KEY, Sending
from anomaly_vae.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anomaly_vae.detector import Detector
    from anomaly_vae.engine import Engine
    from anomaly_vae.scan_calls import FinishedScan
    from anomaly_vae.scan_summary import Summary
    from anomaly_vae.scanning import Scan, Score
    from anomaly_vae.sources import Source

Which = Literal["none", "outliers", "all"]
How = Literal["link", "move"]
Decoder = Literal["cpu", "gpu"]


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
    report: Annotated[
        Path | None, typer.Option(help="Write a page that opens offline: rates, scores, the 100 most unusual, copies.")
    ] = None,
    heatmaps: Annotated[Which, typer.Option(help="Of which pictures heat maps are drawn.")] = "none",
    heatmaps_to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where they go.", show_default="OUT.heatmaps")
    ] = None,
    quarantine: Annotated[Path | None, typer.Option(metavar="DIR", help="Put files there that cannot be read.")] = None,
    quarantine_by: Annotated[How, typer.Option(help="Whether they are linked there, or moved.")] = "link",
    send_to: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help=f"Send rows and report to a service, for its page; a key is taken from {KEY}."
        ),
    ] = None,
    send_as: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="What the service shows the rows under.", show_default="the key's, or scan"
        ),
    ] = None,
    send_rows: Annotated[
        bool, typer.Option(help="Whether the service gets the rows, or counts and report alone.")
    ] = True,
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
    decode: Annotated[
        Decoder, typer.Option(help="Who decodes JPEGs; gpu: nvJPEG by torchvision, where it judges them alike.")
    ] = "cpu",
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
    from anomaly_vae.scanning import Scan, Score, Wanted
    from anomaly_vae.sources import source_of

    on_ray = where is Where.ray
    # Who drives a cluster judges nothing, and may lack what the actors have.
    engine = engine_of(bundle, *(("cpu", alpha) if on_ray else (device, alpha, batch_size, precision)))
    pictures = source_of(source, engine.detector.image.max_bytes)
    maps_to = heatmaps_to or out.with_name(f"{out.name}.heatmaps")
    sending = Sending(send_to, send_as, send_rows, bundle)
    wishes = _Wishes(report, heatmaps, maps_to, quarantine, quarantine_by, send_to is not None)
    wishes.check(pictures)
    sending.check()
    if engine.remark:
        console.note(engine.remark)
    running = Scan(engine, pictures, out, Wanted(fdr, fresh, update))
    score: Score = scored
    if on_ray:
        from anomaly_vae.ray_cluster import Cluster
        from anomaly_vae.scan_ray import Opening, RayScored

        opening = Opening.of(bundle, device, alpha, batch_size, precision, decode == "gpu")
        where_to = Cluster(address, actors, gpus_per_actor)
        score = RayScored(where_to, pictures, opening, running.ledger.folder, console.note)
    elif (address, actors, gpus_per_actor) != (None, None, None):
        raise ConfigError("--address, --actors and --gpus-per-actor are for --engine ray; add it")
    elif decode == "gpu":
        score = _with_gpu(engine)
    shown = pictures if pictures.plain and source != "-" else None
    with running, _interruptible():
        facts, lines = sending.finished_before(running, out, fresh or update), list[str]()
        if facts is None:
            summary = _scanned(running, score, shown)
            made = _Made(engine, pictures, source, running, summary)
            page, facts = made.as_wished(wishes, fdr), _facts(engine.detector, summary, out)
            running.finish(summary, sending.keeping(made.told, facts, page))
            lines = [*_lines(summary, fdr, out), *made.lines]
        if as_json:
            print_json(facts)
        else:
            console.say("\n".join(lines) or None)
        sending.send(running)
    raise typer.Exit(_code(facts, fail_above, strict))


@contextmanager
def _interruptible() -> "Iterator[None]":
    try:
        yield
    except KeyboardInterrupt:
        from anomaly_vae import console

        console.note("interrupted; the same command goes on from here, with --fresh it begins anew")
        raise typer.Exit(130) from None


def _scanned(scan: "Scan", score: "Score", shown: "Source | None") -> "Summary":
    from anomaly_vae import console
    from anomaly_vae.scan_view import ScanView

    if scan.ledger.begun:
        console.note("an earlier go was cut short; its rows are kept")
    with ScanView(shown) as view:
        return scan.run(view, score)


def _with_gpu(engine: "Engine") -> "Score":
    from anomaly_vae import console
    from anomaly_vae.gpu_decoding import GpuDecoding
    from anomaly_vae.scan_rows import scored

    return partial(scored, decoding=GpuDecoding(engine, tell=console.note))


@dataclass(frozen=True)
class _Wishes:
    """What shall be made of a scan beside its table."""

    report: Path | None
    heatmaps: Which
    heatmaps_to: Path
    quarantine: Path | None
    quarantine_by: How
    sent: bool

    def check(self, source: "Source") -> None:
        """Before hours of scanning rather than after them."""
        if self.report is not None:
            from anomaly_vae.reporting import check_report  # a second of imports

            check_report(self.report)
        if self.quarantine is not None and not source.plain:
            raise ConfigError("--quarantine is for files on disk, not for those of archives and object stores")
        if self.heatmaps != "none" and source.identity == "-":
            raise ConfigError("--heatmaps looks at pictures again, and standard input is read once; use a file (.txt)")


class _Made:
    """Makes it; `lines` say so."""

    def __init__(self, engine: "Engine", source: "Source", name: str, scan: "Scan", summary: "Summary") -> None:
        self._engine, self._source, self._scan, self._summary = engine, source, scan, summary
        self._name = "".join(one if one.isprintable() else " " for one in name)[-200:]
        self.lines: list[str] = []

    def _rows(self, column: str, wanted: "Callable[[Any], bool]") -> "Iterator[str]":
        for table in self._scan.tables(self._summary):
            for path, value in zip(table["path"].to_pylist(), table[column].to_pylist(), strict=True):
                if wanted(value):
                    yield path

    def as_wished(self, wishes: _Wishes, fdr: float | None) -> str:
        """All but the message to a service; the report, as HTML, if anybody wants one."""
        from anomaly_vae.scan_files import quarantine, write_heat_maps

        if wishes.heatmaps != "none":
            of_all, folder = wishes.heatmaps == "all", wishes.heatmaps_to
            paths = self._rows("outlier", lambda outlier: outlier is not None and (of_all or outlier))
            count = write_heat_maps(self._engine, self._source, paths, folder)
            self.lines.append(f"{count:,} heat maps written to {folder}")
        page = self.report(fdr) if wishes.report is not None or wishes.sent else ""
        if wishes.report is not None:
            from anomaly_vae.reporting import write_report

            write_report(wishes.report, page)
            self.lines.append(f"report written to {wishes.report}")
        if wishes.quarantine is not None:
            count = quarantine(
                self._rows("error", lambda error: error is not None), wishes.quarantine, wishes.quarantine_by
            )
            done = "linked" if wishes.quarantine_by == "link" else "moved"
            self.lines.append(f"{count:,} files that cannot be read {done} to {wishes.quarantine}")
        return page

    def report(self, fdr: float | None) -> str:
        from anomaly_vae.scan_report import scan_report

        policy = self._engine.detector.policy
        verdict = f"a picture with a p-value of at most {policy.alpha:g} ({policy.mode})"
        if fdr is not None:
            verdict = f"one by Benjamini and Hochberg at a false-discovery rate of {fdr:g} over the whole scan"
        return scan_report(
            self._engine, self._source, self._summary, self._scan.tables(self._summary), self._name, verdict
        )

    def told(self, model: str, source: str | None) -> "FinishedScan":
        """What a service is told of it."""
        from datetime import UTC, datetime

        from anomaly_vae.scan_calls import FinishedScan

        counts, policy, by_fdr = self._summary.counts, self._engine.detector.policy, self._summary.by_fdr
        return FinishedScan(
            name=self._name,
            model=model,
            version=self._engine.detector.version,
            source=source,
            started=datetime.fromtimestamp(self._scan.ledger.started, UTC),
            finished=datetime.now(UTC),
            scored=counts.images,
            failed=counts.errors,
            outliers=self._summary.outliers,
            # By a false-discovery rate none is expected where all are normal, and the p-value that decides is its cut.
            expected_rate=0.0 if by_fdr else policy.expected_false_alarm_rate,
            alpha=(self._summary.cut or 0.0) if by_fdr else policy.alpha,
        )


def _code(facts: dict[str, Any], fail_above: float | None, strict: bool) -> int:
    if fail_above is not None and facts["outliers"] > fail_above * facts["images"]:
        return 3
    return 4 if strict and facts["errors"] else 0


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
