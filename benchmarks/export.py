"""What an export weighs and how long it takes: PyTorch from Python, our recorded native call, onnxruntime.

    python benchmarks/export.py BUNDLE... --threads 1

All three judge the same pictures, without heat, on the same number of threads; that their scores are equal is asserted
first. Rounds of the three alternate, and the best round counts, so that what else the machine does touches all alike.
CPU time is that of the process: it hardly grows with other programs' load, while wall time does.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import PIL
import torch

from anomaly_vae import Detector
from anomaly_vae.compiled import recorded
from anomaly_vae.exporting import export

BATCHES = (1, 16)
_LEAST_SECONDS = 0.5


@dataclass
class Timed:
    """The best of some rounds, ms a picture."""

    wall: float = float("inf")
    cpu: float = float("inf")

    def round(self, judge: Callable[[], object], images: int) -> None:
        """Judge until some time is over, and keep the mean if it is better."""
        wall, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - wall < _LEAST_SECONDS or count < 2:
            judge()
            count += images
        self.wall = min(self.wall, (time.perf_counter() - wall) * 1e3 / count)
        self.cpu = min(self.cpu, (time.process_time() - cpu) * 1e3 / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} thread(s), load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"Pillow {PIL.__version__}\n"
    )
    print("| bundle | picture | bundle MB | ONNX MB | batch | PyTorch | recorded | onnxruntime | scores differ by |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for bundle in options.bundles:
        for line in lines(bundle, options.threads, options.rounds):
            print(line, flush=True)
    print("\nms a picture, wall time (CPU time); scores in quartile ranges of the calibration scores")


def lines(bundle: Path, threads: int, rounds: int) -> list[str]:
    """Table rows of one bundle."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "x.onnx"
        export(bundle, out=place)
        size = place.stat().st_size / 1e6
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(place, settings, providers=["CPUExecutionProvider"])
    eager = Detector.load(bundle)
    native = recorded(eager)
    held = sum(path.stat().st_size for path in bundle.iterdir()) / 1e6
    image = eager.image
    found = []
    for batch in BATCHES:
        images = pictures(eager, batch)
        given = {"images": images.numpy(), "want_heat": np.array(False)}
        moved = checked(eager, native, session, given, images)
        ways: dict[str, Callable[[], object]] = {
            "PyTorch": lambda images=images: eager.judge(images),  # type: ignore[misc]
            "recorded": lambda images=images: native.judge(images),  # type: ignore[misc]
            "onnxruntime": lambda given=given: session.run(None, given),  # type: ignore[misc]
        }
        timed = {name: Timed() for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                timed[name].round(way, batch)
        times = " | ".join(f"{one.wall:.1f} ({one.cpu:.1f})" for one in timed.values())
        shape = f"{image.width} x {image.height} x {image.channels}"
        found.append(f"| {bundle.name} | {shape} | {held:.1f} | {size:.1f} | {batch} | {times} | {moved:.0e} |")
    return found


def pictures(detector: Detector, count: int) -> torch.Tensor:
    """Probes of the bundle, as often as it takes."""
    assert detector.probes is not None
    images = detector.probes.images
    return images[torch.arange(count) % len(images)]


def checked(
    eager: Detector,
    native: Detector,
    session: onnxruntime.InferenceSession,
    given: dict[str, np.ndarray],
    images: torch.Tensor,
) -> float:
    """How far the three's scores differ, in quartile ranges; raises AssertionError where that is more than 0.001."""
    low, high = np.quantile(np.concatenate(eager.calibration.scores), [0.25, 0.75])
    expected = np.array(eager.judge(images).score)
    others = np.array(native.judge(images).score), session.run(["score"], given)[0]
    moved = max(float(np.abs(one - expected).max()) for one in others) / max(float(high - low), 1e-12)
    assert moved <= 1e-3, f"scores differ by {moved:.2g} quartile ranges"
    return moved


if __name__ == "__main__":
    main()
