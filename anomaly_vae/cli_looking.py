"""The sub-commands that look at a bundle or a folder and change neither; `cli` puts them into the one program."""

from pathlib import Path
from typing import Annotated

import typer

from anomaly_vae.cli_common import (
    Alpha,
    AsJson,
    BundleArgument,
    DataOverride,
    Device,
    data_spec_of,
    engine_of,
    only_data,
    print_json,
)


def explore(
    bundle: BundleArgument,
    *,
    out: Annotated[Path, typer.Option(help="Folder to write the pictures and index.html to.")],
    data: Annotated[str | None, typer.Option(help="Folder of pictures; without it only what needs none.")] = None,
    override: DataOverride = None,
    add: Annotated[list[str] | None, typer.Option(metavar="A-B", help="Add the difference of two labels to B.")] = None,
    alpha: Annotated[str, typer.Option(help="How many times to add it.")] = "0.5,1,1.5,2",
    seed: Annotated[int, typer.Option(min=0, help="Another one draws other samples and pictures.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Look into the latent space: samples, reconstructions, traversals, sums, maps, extremes."""
    from anomaly_vae import console
    from anomaly_vae.exploring import alphas_of
    from anomaly_vae.exploring import explore as run

    engine, alphas = engine_of(bundle, device, None), alphas_of(alpha)
    explored = run(engine, bundle, out, data, data_spec_of(engine, override or []), add or [], alphas, seed)
    if as_json:
        print_json(explored.to_dict())
        return
    for line in [*explored.notes, *explored.lines()]:
        console.say(line)


def export(
    bundle: BundleArgument,
    to: Annotated[str, typer.Option(help="Format to write: onnx.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="File to write; without it BUNDLE.onnx beside the bundle.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="How far probe images' scores may move, in quartile ranges; 0.001 unless told.")
    ] = None,
    alpha: Alpha = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a bundle as one ONNX file, for onnxruntime alone; checked against the bundle's own scores first."""
    from anomaly_vae import console
    from anomaly_vae.exporting import TOLERANCE
    from anomaly_vae.exporting import export as run

    done = run(bundle, to, out, TOLERANCE if tolerance is None else tolerance, alpha, overwrite)
    if as_json:
        print_json(done.to_dict())
        return
    for line in done.lines():
        console.say(line)


def info(bundle: BundleArgument, as_json: AsJson = False) -> None:
    """Show what a bundle is, what its verdicts promise and how it was made."""
    from anomaly_vae import console
    from anomaly_vae.bundle import read_bundle
    from anomaly_vae.describing import bundle_facts, facts_table
    from anomaly_vae.detector import Detector

    detector, stored = Detector.load(bundle), read_bundle(bundle)
    facts = bundle_facts(detector, stored)
    if as_json:
        print_json(facts)
    else:
        console.out.print(facts_table(bundle, facts))
        console.say(console.policy_line(detector))


def check(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of pictures, CSV manifest, or NAME:ROOT.")],
    override: DataOverride = None,
    as_json: AsJson = False,
) -> None:
    """Look through a folder before training: duplicates, leaks, odd ones, unreadable files, smallest alpha."""
    from anomaly_vae import console
    from anomaly_vae.checking import check as run
    from anomaly_vae.recipe import DetectorSpec

    report = run(folder, DetectorSpec().with_overrides(only_data(override or [])).data)
    if as_json:
        print_json(report.to_dict())
        return
    for line in report.lines():
        console.say(line)
    if report.outlook.problem:
        raise typer.Exit(2)


def classify(
    bundle: BundleArgument,
    *,
    data: Annotated[str, typer.Option(help="Pictures with labels: folders named by class, CSV manifest, NAME:ROOT.")],
    override: DataOverride = None,
    labels: Annotated[str, typer.Option(help="How many labelled pictures, of all classes together.")] = "10,50,200",
    seeds: Annotated[int, typer.Option(min=1, max=100, help="So many draws of the labelled pictures.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps, fine-tuned and from scratch alike.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Another one draws other labels and first weights.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Tell classes apart from few labels: by the bundle's encoder, frozen or fine-tuned, and from scratch."""
    from anomaly_vae import console
    from anomaly_vae.classifying import classify as run
    from anomaly_vae.labelling import label_counts

    counts, engine = label_counts(labels), engine_of(bundle, device, None)
    done = run(engine, data, data_spec_of(engine, override or []), counts, seeds, steps, seed, console.note)
    if as_json:
        print_json(done.to_dict() | {"version": engine.detector.version})
        return
    for remark in done.notes:
        console.note(f"note: {remark}")
    console.out.print(console.classes_table(done))
    for line in done.lines():
        console.say(line)
