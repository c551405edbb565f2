"""`anomaly-vae watch`: a folder that pictures come into, until it is stopped."""

import os
import signal
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from anomaly_vae.cli_common import Alpha, BundleArgument, Device, engine_of
from anomaly_vae.errors import ConfigError, DataError

if TYPE_CHECKING:
    from anomaly_vae.delivering import Standing
    from anomaly_vae.watch_state import WatchState
    from anomaly_vae.watching import MakeWebhook, Stop
    from anomaly_vae.webhook import Webhook


def watch(
    bundle: BundleArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that pictures come into; with those below.")],
    *,
    move: Annotated[
        bool, typer.Option("--move", help="Move scored files into normal/, outlier/, unreadable/.")
    ] = False,
    into: Annotated[Path | None, typer.Option(help="With --move: the folder for these; not inside FOLDER.")] = None,
    webhook: Annotated[str | None, typer.Option(metavar="URL", help="Post verdicts there, signed; see above.")] = None,
    webhook_for: Annotated[Literal["outliers", "all"], typer.Option(help="Which verdicts to post.")] = "outliers",
    only_new: Annotated[
        bool, typer.Option("--only-new", help="At the very first start leave out the files that are there already.")
    ] = False,
    settle: Annotated[float, typer.Option(help="Seconds without a change until a file is taken to be whole.")] = 1.0,
    patience: Annotated[float, typer.Option(help="Seconds more for files that seem cut short or broken.")] = 10.0,
    every: Annotated[float, typer.Option(help="Seconds between full listings (network drives report nothing).")] = 10.0,
    state: Annotated[
        Path | None, typer.Option(help="What was done so far; by default FOLDER/.anomaly-vae-watch.sqlite.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Score again what an earlier watch has scored.")] = False,
    alpha: Alpha = None,
    base_rate: Annotated[float, typer.Option(help="Share of outliers that FOLDER is known to bring.")] = 0.0,
    alarms_anew: Annotated[bool, typer.Option("--alarms-anew", help="Begin raised alarms anew.")] = False,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics; 0 takes a free port.")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address to serve metrics at.")] = "127.0.0.1",
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images judged at once.")] = 32,
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16 (quicker where the device has it), auto.")
    ] = "float32",
) -> None:
    """Score every picture that comes into a folder: a line of JSON each, until Ctrl-C; killed, it goes on.

    A webhook is signed with the secret in the environment variable ANOMALY_VAE_WEBHOOK_SECRET.
    """
    from anomaly_vae import console
    from anomaly_vae.delivering import Standing, Told
    from anomaly_vae.watch_alarms import WatchAlarms
    from anomaly_vae.watching import STATE_NAME, Stop, Wanted, check
    from anomaly_vae.watching import watch as run

    if move != (into is not None):
        raise ConfigError("--move and --into DIR belong together; give both, or neither")
    _check_webhook(webhook)
    engine = engine_of(bundle, device, alpha, batch_size, precision)
    if engine.remark:
        console.note(engine.remark)
    wanted = Wanted(
        settle, patience, every, into and into.expanduser(), webhook_for, only_new, fresh, base_rate, alarms_anew
    )
    root, stop = folder.expanduser().absolute(), Stop()
    check(engine, root, wanted)
    standing = Standing.first(WatchAlarms(engine.detector, base_rate))
    if metrics_port is not None:
        from anomaly_vae.watch_metrics import serve_metrics

        console.note(f"metrics at {serve_metrics(standing, metrics_host, metrics_port)}")
    console.note(console.policy_line(engine.detector))
    console.note(f"watching {root}; Ctrl-C ends")
    _stop_by_signals(stop)
    place = root / STATE_NAME if state is None else state.expanduser()
    run(engine, root, place, wanted, Told(_say, console.note), stop, standing, _posting(webhook, standing, stop))
    console.note(_last_line(standing))


def _check_webhook(url: str | None) -> None:
    if url is not None:
        from anomaly_vae.webhook import checked_secret, checked_url

        checked_url(url)
        checked_secret(os.environ)


def _posting(url: str | None, standing: "Standing", stop: "Stop") -> "MakeWebhook | None":
    if url is None:
        return None
    from anomaly_vae import console
    from anomaly_vae.webhook import Webhook, checked_secret, checked_url

    where, secret = checked_url(url), checked_secret(os.environ)

    def made(state: "WatchState", failed: Callable[[Exception], None]) -> "Webhook":
        return Webhook(where, secret, state, console.note, failed, stop.wake, standing.webhooks)

    return made


def _stop_by_signals(stop: "Stop") -> None:
    def handle(number: int, _: object) -> None:
        stop()
        # A second one ends it at once; a watch may be killed at any moment.
        signal.signal(number, signal.SIG_DFL)

    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, handle)


def _say(lines: Sequence[str]) -> None:
    """Lines on standard output, and where that is a file, on disk."""
    if not lines:
        return
    descriptor, left = sys.stdout.fileno(), "".join(f"{line}\n" for line in lines).encode()
    try:
        while left:
            left = left[os.write(descriptor, left) :]
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fsync(descriptor)
    except OSError as error:
        what = f"cannot write to standard output ({error.strerror})"
        raise DataError(f"{what}; mend that and start the watch again: no line is lost") from None


def _last_line(standing: "Standing") -> str:
    files, posts = standing.files, standing.webhooks
    scored = f"{files.total():,} files scored: {files['outlier']:,} outliers, {files['unreadable']:,} unreadable"
    posted = f"; {posts['sent']:,} posted" if posts or standing.webhooks_waiting else ""
    posted += f", {posts['given_up']:,} given up" if posts["given_up"] else ""
    posted += f", {standing.webhooks_waiting:,} wait to be posted" if standing.webhooks_waiting else ""
    moves = f"; {standing.failed_moves:,} wait to be moved" if standing.failed_moves else ""
    return f"stopped: {scored}{posted}{moves}; the same command goes on from here"
