"""`anomaly-vae`: one sub-command a verb. Thin: every command imports what it needs when it runs.

Exit codes: 0 done; 1 something failed that is not the user's doing; 2 a mistake in the command, the configuration or
the data; 4 some images could not be read; 130 interrupted.
"""

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anomaly_vae import __version__, cli_looking, cli_scanning, cli_watching
from anomaly_vae.cli_common import (
    Alpha,
    AsJson,
    BundleArgument,
    DataOverride,
    Device,
    Override,
    data_spec_of,
    engine_of,
    print_json,
)
from anomaly_vae.errors import AnomalyVaeError, ConfigError

if TYPE_CHECKING:
    from anomaly_vae.engine import Engine
    from anomaly_vae.evaluation import Evaluation
    from anomaly_vae.recipe import DetectorSpec
    from anomaly_vae.training import Trained

app = typer.Typer(
    help="Calibrated image anomaly detection with variational autoencoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 a mistake in command, configuration or data, 4 some images unreadable.",
)


def main() -> None:
    """Entry point: every error of the user's is one line, never a traceback."""
    # OpenMP's threads spin while they wait for each other; on a machine that does anything else besides, that costs
    # up to fifty times the work itself. So they spin briefly only; it is read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        app()
    except AnomalyVaeError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("ANOMALY_VAE_TRACEBACK"):
            raise
        reason = " ".join(str(error).split())
        _fail(f"unexpected {type(error).__name__}: {reason} (set ANOMALY_VAE_TRACEBACK=1 to see where)", 1)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"anomaly-vae {__version__}")
        raise typer.Exit


def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file; see configs/models.")] = None,
    *,
    data: Annotated[str, typer.Option(help="Folder of pictures, CSV manifest, or NAME:ROOT such as mnist:DIR.")],
    out: Annotated[Path, typer.Option(help="Folder to write the bundle to.")],
    preset: Annotated[str | None, typer.Option(help="A shipped recipe instead of CONFIG.")] = None,
    override: Override = None,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing bundle.")] = False,
    restart: Annotated[bool, typer.Option(help="Begin anew instead of going on where a training stopped.")] = False,
    tensorboard: Annotated[Path | None, typer.Option(help="Write TensorBoard logs there.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Write report.html into the bundle.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train on a folder of normal pictures, calibrate, and write a bundle."""
    from anomaly_vae import console
    from anomaly_vae.training import train as run

    spec = _recipe(config, preset, override or [])
    try:
        with console.training_view() as view:
            trained = run(
                spec,
                data,
                out,
                device=device,
                overwrite=overwrite,
                restart=restart,
                say=console.note,
                report=view,
                tensorboard=tensorboard,
            )
    except KeyboardInterrupt:
        console.note("interrupted; the same command goes on from here, --restart begins anew")
        raise typer.Exit(130) from None
    if trained is not None:
        if report:
            _report_training(trained)
        _tell_trained(trained, as_json)


def _report_training(trained: "Trained") -> None:
    from anomaly_vae import console
    from anomaly_vae.reporting import training_report, write_report

    place = trained.path / "report.html"
    write_report(place, training_report(trained, console.policy_line(trained.detector)))
    console.note(f"report: {place}")


def _recipe(config: Path | None, preset: str | None, overrides: list[str]) -> "DetectorSpec":
    from anomaly_vae import console
    from anomaly_vae.presets import DEFAULT, read_preset
    from anomaly_vae.recipe import DetectorSpec

    if config is not None and preset is not None:
        raise ConfigError("give a CONFIG file or --preset, not both")
    if config is not None:
        return DetectorSpec.read(config, overrides)
    if preset is None:
        console.note(
            "recipe: preset 'default', which is novelty and defect together (--preset takes one alone, or another)"
        )
    return read_preset(preset or DEFAULT, overrides)


def _tell_trained(trained: "Trained", as_json: bool) -> None:
    from anomaly_vae import console

    for remark in trained.notes:
        console.note(f"note: {remark}")
    if as_json:
        print_json(trained.to_dict())
        return
    for line in console.trained_lines(trained):
        console.say(line)


def evaluate(
    bundle: BundleArgument,
    *,
    data: Annotated[
        str, typer.Option(help="Folder with normal and abnormal pictures; training pictures are left out.")
    ],
    alpha: Alpha = None,
    override: DataOverride = None,
    device: Device = "auto",
    report: Annotated[Path | None, typer.Option(help="Write a page with curves and mistakes: a .html file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure AUROC and false alarms on pictures the detector has not seen."""
    from anomaly_vae import console
    from anomaly_vae.evaluation import evaluate as run

    if report is not None:
        from anomaly_vae.reporting import check_report

        check_report(report)
    engine = engine_of(bundle, device, alpha)
    evaluation = run(engine, data, data_spec_of(engine, override or []))
    if report is not None:
        _report_evaluation(report, bundle, data, engine, evaluation)
    if as_json:
        print_json(evaluation.to_dict() | {"version": engine.detector.version})
        return
    if evaluation.excluded:
        console.note(f"left out {evaluation.excluded} pictures that the detector was made from")
    if evaluation.classless:
        console.note(f"left out {evaluation.classless} pictures of no class that the detector knows")
    console.say(console.power_line(engine.detector))
    if evaluation.unreadable:
        console.note(f"skipped {evaluation.unreadable} unreadable pictures")
    console.out.print(console.evaluation_table(evaluation))
    if len(evaluation.kinds) > 1 or evaluation.known_kinds:
        console.out.print(console.kinds_table(evaluation))


def _report_evaluation(place: Path, bundle: Path, data: str, engine: "Engine", evaluation: "Evaluation") -> None:
    from anomaly_vae import console
    from anomaly_vae.bundle import read_bundle
    from anomaly_vae.reporting import evaluation_report, write_report

    page = evaluation_report(
        engine,
        evaluation,
        name=bundle.resolve().name,
        source=data,
        sentence=console.policy_line(engine.detector),
        metrics=read_bundle(bundle).metrics,
    )
    write_report(place, page)
    console.note(f"report: {place}")


def score(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files.")],
    heatmap: Annotated[Path | None, typer.Option(help="Write a heat map of each picture into this folder.")] = None,
    class_name: Annotated[
        str | None, typer.Option("--class", help="Class of the pictures, for a bundle that must be told it.")
    ] = None,
    alpha: Alpha = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Score single pictures."""
    from anomaly_vae import console
    from anomaly_vae.scoring import score_files

    rows = score_files(engine_of(bundle, device, alpha), images, heatmap, class_name)
    if as_json:
        print_json({"results": rows})
    else:
        console.out.print(console.verdict_table(rows))
        if heatmap is not None:
            console.say(f"heat maps written to {heatmap}")
    if any(row["error"] for row in rows):
        raise typer.Exit(4)


def serve(
    bundle: BundleArgument,
    config: Annotated[Path | None, typer.Option(help="YAML file; see configs/service.yaml.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")] = None,
    override: Override = None,
) -> None:
    """Serve a bundle over HTTP until interrupted."""
    _service_command("serve")(bundle, config, host, port, device, override or [])


def keys(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File of keys, for -o keys=FILE of serve.")],
    add: Annotated[str | None, typer.Option(metavar="NAME", help="Make a key for NAME and show it, once.")] = None,
    role: Annotated[str, typer.Option(help="score, read or admin: what a new key may do.")] = "score",
    source: Annotated[str | None, typer.Option(help="What a new key's pictures are counted under.")] = None,
    days: Annotated[float | None, typer.Option(help="A new key ends after so many days.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second that a new key may make.")] = None,
    megabytes: Annotated[float | None, typer.Option(help="Megabytes that its unanswered requests may hold.")] = None,
    remove: Annotated[str | None, typer.Option(metavar="ID", help="Remove the key with this id.")] = None,
) -> None:
    """Make, list or remove the keys of a service; a running one sees the change within a second."""
    _service_command("keys")(path, add, role, source, days, rate, megabytes, remove)


def store(
    place: Annotated[str, typer.Argument(metavar="STORE", help="Path of the store, or its postgresql:// URL.")],
    backup: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a whole copy; the service goes on.")
    ] = None,
    forget_before: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="Delete verdicts older than that, and their pictures.")
    ] = None,
    forget_pictures_before: Annotated[
        float | None, typer.Option(metavar="DAYS", min=0, help="Delete pictures older than that; verdicts stay.")
    ] = None,
) -> None:
    """Look at a service's store of verdicts, back it up, or delete what is old. Restore: serve with -o store=BACKUP."""
    _service_command("store")(place, backup, forget_before, forget_pictures_before)


def demo(
    check: Annotated[bool, typer.Option(help="Exit after the demo, non-zero if anything falls short.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the demo's pictures and bundle go.")] = Path(".demo"),
    port: Annotated[int, typer.Option(help="Port of the demo's service; 0 takes a free one.")] = 8765,
) -> None:
    """Everything once, on handwritten digits: train, calibrate, evaluate, serve, score over HTTP."""
    _service_command("demo")(check, folder, port)


def _service_command(name: str) -> Any:
    found = entry_points(group="anomaly_vae.commands", name=name)
    if not found:
        raise ConfigError(f"the command {name!r} comes with the service, which is not installed; reinstall the package")
    return next(iter(found)).load()


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)


# `--help` lists them in this order.
for _command in (
    train,
    evaluate,
    score,
    cli_scanning.scan,
    cli_watching.watch,
    cli_looking.explore,
    cli_looking.classify,
    cli_looking.export,
    serve,
    keys,
    store,
    cli_looking.info,
    cli_looking.check,
    demo,
):
    app.command()(_command)
