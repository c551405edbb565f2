"""The `demo` command: the whole product once, on real handwritten digits, with the commands that a user would type.

Normal are the digits 0 to 3, abnormal 4 to 9, of the 1,797 that scikit-learn ships (8x8 px, enlarged four times so that
people can see them). Which pictures are held out is fixed by their number.
"""

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomaly_vae import AnomalyVaeError, Client
from anomaly_vae.answers import Scored

NORMAL = (0, 1, 2, 3)
ALPHA = 0.05
LEAST_AUROC = 0.97
_CLIENTS = 8
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Sent:
    """A held-out picture and what the service said of it."""

    path: Path
    normal: bool
    verdict: Scored


def demo_command(check: bool, folder: Path, port: int) -> None:
    """Run the demo in `folder`; with `check` stop the service at the end and fail if anything fell short."""
    if not check:
        _require_free(port)
    started = time.monotonic()
    pictures, bundle = folder / "digits", folder / "bundle"
    count = write_pictures(pictures)
    print_line(f"{count} handwritten digits written to {pictures} (normal: 0-3, abnormal: 4-9)")
    # A plain VAE: a minute must do for all of it.
    options = ["--preset", "vae", "--overwrite", "-o", f"calibration.alpha={ALPHA}"]
    _run("train", "--data", str(pictures), "--out", str(bundle), *options)
    evaluation = json.loads(_run("evaluate", str(bundle), "--data", str(pictures), "--json"))
    with _service(bundle, 0 if check else port) as (process, address):
        sent, seconds = _score_all(address, pictures / "test")
        shortfalls = _report(evaluation, sent, seconds, time.monotonic() - started)
        if check:
            _finish(shortfalls)
        print_line(f"\nThe service runs at {address} until you press Ctrl-C. Try:")
        print_line(f"  curl --data-binary @{shlex.quote(str(sent[-1].path))} {address}/v1/score")
        _until_interrupted(process)


def _require_free(port: int) -> None:
    """Refuse a port that is taken before the work, not after it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            reason = f"port {port} cannot be listened on ({error.strerror})"
            raise AnomalyVaeError(f"{reason}; choose another: make demo PORT=0, or anomaly-vae demo --port 0") from None


def write_pictures(folder: Path) -> int:
    """The digits as PNGs: `train/good` (three quarters of the normals), `test/good`, and `test/<digit>`."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        kind = "good" if label in NORMAL else str(label)
        place = folder / ("train" if kind == "good" and i % 4 != 1 else "test") / kind
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.minimum(pixels * 16, 255).astype(np.uint8))
        image.resize((32, 32), Image.Resampling.BICUBIC).save(place / f"{i:04}.png")
    return len(digits.target)


def print_line(line: str) -> None:
    """To the terminal, at once, whatever standard output is."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _run(*arguments: str) -> str:
    """Show a command and run it; its standard output is returned, what it tells people passes through."""
    print_line(f"\n$ anomaly-vae {shlex.join(arguments)}")
    as_json = "--json" in arguments
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "anomaly_vae", *arguments], stdout=subprocess.PIPE if as_json else None, text=True
    )
    if done.returncode:
        raise AnomalyVaeError(f"the demo's `anomaly-vae {arguments[0]}` failed; its message is above")
    return done.stdout or ""


@contextmanager
def _service(bundle: Path, port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`anomaly-vae serve` in a process of its own; stopped as an operator would, by SIGTERM."""
    arguments = ["serve", str(bundle), "--port", str(port)]
    print_line(f"\n$ anomaly-vae {shlex.join(arguments)}")
    command = [sys.executable, "-m", "anomaly_vae", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603 - our own command
    try:
        yield process, _address(process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(_START_SECONDS)


def _address(process: subprocess.Popen[bytes]) -> str:
    """Where the service says that it listens; what else it prints is passed on."""
    assert process.stdout is not None
    for raw in process.stdout:
        line = raw.decode(errors="replace").rstrip()
        print_line(line)
        words = [word for word in line.split() if word.startswith("http://")]
        if words:
            return words[0].split("/v1")[0].rstrip("/")
    raise AnomalyVaeError("the demo's service did not start; its message is above")


def _score_all(address: str, folder: Path) -> tuple[list[Sent], float]:
    """Post every held-out picture, each in a request of its own, from some clients at once."""
    paths = sorted(folder.rglob("*.png"))
    started = time.monotonic()
    with Client(address) as client, ThreadPoolExecutor(_CLIENTS) as workers:
        verdicts = list(workers.map(client.score_one, paths))
    seconds = time.monotonic() - started
    return [Sent(path, path.parent.name == "good", one) for path, one in zip(paths, verdicts, strict=True)], seconds


def _report(evaluation: dict[str, Any], sent: list[Sent], seconds: float, total: float) -> list[str]:
    """Print the tables; returns what fell short, in words."""
    from rich.console import Console
    from rich.table import Table
    from sklearn.metrics import roc_auc_score

    normals = [one for one in sent if one.normal]
    alarms = sum(one.verdict.outlier for one in normals)
    found = sum(one.verdict.outlier for one in sent if not one.normal)
    auroc = float(roc_auc_score([not one.normal for one in sent], [one.verdict.score for one in sent]))
    low, high = evaluation["false_alarm_interval"]
    table = Table("over HTTP", "value", "wanted")
    table.add_row("AUROC", f"{auroc:.4f}", f"at least {LEAST_AUROC}")
    table.add_row(
        f"false alarms at alpha {ALPHA:.0%}", f"{alarms} of {len(normals)}", f"{low} to {high} (90% interval)"
    )
    table.add_row("outliers found", f"{found} of {len(sent) - len(normals)}", "")
    table.add_row("images a second", f"{len(sent) / seconds:.0f}", f"{_CLIENTS} clients, one image a request")
    table.add_row("whole demo", f"{total:.0f} s", "")
    console = Console()
    console.print()
    console.print(table)
    console.print(_verdicts(sent))
    shortfalls = []
    if auroc < LEAST_AUROC:
        shortfalls.append(f"AUROC {auroc:.4f} is below {LEAST_AUROC}")
    if not low <= alarms <= high:
        shortfalls.append(f"{alarms} false alarms lie outside {low} to {high}")
    if alarms != evaluation["false_alarms"] or abs(auroc - evaluation["auroc"]) > 1e-4:
        shortfalls.append("the service and `evaluate` disagree on the same pictures")
    return shortfalls


def _verdicts(sent: list[Sent]) -> Any:
    from rich.table import Table

    table = Table("picture", "verdict", "p-value", "score", title="Some verdicts", title_justify="left")
    for kind in dict.fromkeys(one.path.parent.name for one in sorted(sent, key=lambda one: not one.normal)):
        own = [one for one in sent if one.path.parent.name == kind]
        for one in own[: 3 if kind == "good" else 1]:
            verdict = "outlier" if one.verdict.outlier else "normal"
            name = f"{kind}/{one.path.name}"
            table.add_row(name, verdict, f"{one.verdict.p_value:.4f}", f"{one.verdict.score:.2f}")
    return table


def _finish(shortfalls: list[str]) -> None:
    if shortfalls:
        raise AnomalyVaeError(f"the demo fell short: {'; '.join(shortfalls)}")
    print_line("demo: all checks passed")
    raise SystemExit(0)


def _until_interrupted(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait()
    except KeyboardInterrupt:
        print_line("\nstopping the service")
