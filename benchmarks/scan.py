"""How fast a scan is beside the least that it must do, in one run, interleaved, on the same cores: docs/scanning.md.

    python benchmarks/scan.py speed BUNDLE --pictures DIR [--kinds png128 jpeg1024 jpeg12m] [--files 2000]
    python benchmarks/scan.py memory BUNDLE --pictures DIR --files 200000
    python benchmarks/scan.py kills BUNDLE --pictures DIR --kills 50

`--pictures`: real ones, of which files of the wanted kinds are made. `bare`: files are read and decoded by as many
threads as there are cores while the detector judges full batches: no listing, no hashes, no verdicts kept. `scan`: the
command's own engine, with all of that. `loader`: a DataLoader with a worker for each core and Pillow around the same
detector, as one writes it by hand.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from anomaly_vae import Detector, Engine
from anomaly_vae.gpu_decoding import GpuDecoding
from anomaly_vae.scan_rows import scored
from anomaly_vae.scanning import Scan
from anomaly_vae.sources import Folder

BATCH = 32
KINDS = {"png128": (".png", (128, 128)), "jpeg1024": (".jpg", (1024, 1024)), "jpeg12m": (".jpg", (4000, 3000))}


def made(pictures: Path, kind: str, count: int, folder: Path) -> list[Path]:
    """`count` files of a kind, each different from the others; made from real pictures."""
    suffix, size = KINDS[kind]
    sources = [path for path in sorted(pictures.rglob("*")) if path.suffix.lower() in (".png", ".jpg", ".jpeg")][:50]
    if not sources:
        sys.exit(f"{pictures} holds no picture")
    folder.mkdir(parents=True, exist_ok=True)
    masters = []
    for i, path in enumerate(sources[:count]):
        with Image.open(path) as found:
            image = found.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        # A camera's noise, without which JPEGs of enlarged pictures are far smaller than real ones.
        noise = np.random.default_rng(i).normal(0, 4, (*size[::-1], 1))
        pixels = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
        master = folder.parent / f"master-{i}{suffix}"
        pixels.save(master, quality=90) if suffix == ".jpg" else pixels.save(master)
        masters.append(master.read_bytes())
    paths = []
    for i in range(count):
        path = folder / f"{i // 1000:04d}" / f"{i:07d}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(masters[i % len(masters)] + i.to_bytes(4, "big"))  # bytes behind the end change the hash only
        paths.append(path)
    return paths


def bare(engine: Engine, paths: Sequence[Path]) -> None:
    """Read, decode, judge."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = pool.map(lambda path: engine.prepare(path.read_bytes()), paths)
        while batch := list(islice(images, BATCH)):
            engine.judge(torch.stack(batch))


class Files(Dataset[torch.Tensor]):
    """Pictures as a dataset of one's own, decoded by Pillow."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], channels: int) -> None:
        self._paths, self._size, self._mode = paths, size, "RGB" if channels == 3 else "L"

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self._paths[i]) as image:
            pixels = np.asarray(image.convert(self._mode).resize(self._size, Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def loader(detector: Detector, paths: Sequence[Path]) -> None:
    """A DataLoader around the detector."""
    image = detector.image
    files = Files(paths, (image.width, image.height), image.channels)
    for batch in DataLoader(files, batch_size=BATCH, num_workers=os.cpu_count() or 1):
        detector.judge(batch)


def scanned(engine: Engine, folder: Path, out: Path, on_gpu: bool = False) -> None:
    """The command's engine."""
    decoding = GpuDecoding(engine, tell=print) if on_gpu else None
    with Scan(engine, Folder(folder), out) as scan:
        scan.finish(scan.run(score=partial(scored, decoding=decoding)))


def speed(options: argparse.Namespace) -> Iterator[str]:
    """Images a second; medians of interleaved runs."""
    yield from machine()
    on_gpu = options.device.startswith("cuda")
    heads = ["bare images/s", "scan", "share of bare", "DataLoader", "scan / DataLoader"]
    heads += ["scan --decode gpu"] if on_gpu else []
    yield "| | " + " | ".join(heads) + " |"
    yield "|---" * (len(heads) + 1) + "|"
    for kind in options.kinds:
        count = max(64, options.files // {"png128": 1, "jpeg1024": 4, "jpeg12m": 20}[kind])
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "in"
            paths = made(options.pictures, kind, count, folder)
            engine = Engine(Detector.load(options.bundle), options.device, BATCH)
            engine.warm()  # as a scan does after a thousand pictures
            by_hand = Detector.load(options.bundle, options.device)
            out = Path(place) / "out.parquet"
            ways: dict[str, Callable[[], None]] = {
                "bare": partial(bare, engine, paths),
                "scan": partial(scanned, engine, folder, out),
                "loader": partial(loader, by_hand, paths),
            }
            if on_gpu:
                ways["gpu"] = partial(scanned, engine, folder, out, True)
            runs: dict[str, list[float]] = {name: [] for name in ways}
            for way in ways.values():
                timed(way)  # once for caches and warm-up
            for _ in range(options.repeats):
                for name, way in ways.items():
                    runs[name].append(count / timed(way))
        middle = {name: statistics.median(found) for name, found in runs.items()}
        cells = [f"{middle[n]:.0f} ({min(runs[n]):.0f}-{max(runs[n]):.0f})" for n in ("bare", "scan")]
        cells += [f"{middle['scan'] / middle['bare']:.0%}", f"{middle['loader']:.0f}"]
        cells.append(f"{middle['scan'] / middle['loader']:.1f}")
        cells += [f"{middle['gpu']:.0f} ({min(runs['gpu']):.0f}-{max(runs['gpu']):.0f})"] if on_gpu else []
        yield f"| {kind}, {count:,} files | " + " | ".join(cells) + " |"
    yield f"start-up: {start_up(options):.1f} s for a scan of one picture, as a command"


def timed(way: Callable[[], Any]) -> float:
    """Seconds."""
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def start_up(options: argparse.Namespace) -> float:
    """Seconds that the command takes for one picture."""
    with tempfile.TemporaryDirectory() as place:
        made(options.pictures, "png128", 1, Path(place) / "in")
        words = command(options.bundle, Path(place) / "in", Path(place) / "out.csv")
        return min(timed(lambda: subprocess.run(words, check=True, capture_output=True)) for _ in range(3))


def command(bundle: Path, source: Path, out: Path, segments: str = "") -> list[str]:
    """A scan as a command; `segments`: what is done to the ledger's module before."""
    begin = f"from anomaly_vae import cli, scan_ledger; {segments or None}; cli.main()"
    return [sys.executable, "-c", begin, "scan", str(bundle), str(source), "--out", str(out), "--device", "cpu"]


def most_memory(options: argparse.Namespace) -> Iterator[str]:
    """The most memory that a scan as a command ever had, after a tenth of the files and after all."""
    yield from machine()
    for count in (options.files // 10, options.files):
        with tempfile.TemporaryDirectory() as place:
            made(options.pictures, "png128", count, Path(place) / "in")
            started = time.perf_counter()
            process = subprocess.Popen(command(options.bundle, Path(place) / "in", Path(place) / "out.parquet"))
            _, status, used = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            rows = pq.ParquetFile(Path(place) / "out.parquet").metadata.num_rows
            size = (Path(place) / "out.parquet").stat().st_size
        memory = f"exit {os.waitstatus_to_exitcode(status)}, peak {used.ru_maxrss / 1024:.0f} MB"
        pace = f"{seconds:.0f} s ({count / seconds:.0f} images/s)"
        yield f"{count:,} files: {rows:,} rows, {memory}, {pace}, result {size / count:.0f} bytes a picture"


def kills(options: argparse.Namespace) -> Iterator[str]:
    """Kill a scan at random moments, again and again until it is done; its rows must be those of one never killed."""
    yield from machine()
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "in"
        paths = made(options.pictures, "png128", options.files, source)
        whole, out = Path(place) / "whole.parquet", Path(place) / "out.parquet"
        seconds = timed(lambda: subprocess.run(command(options.bundle, source, whole), check=True, capture_output=True))
        expected = pq.read_table(whole)
        done, goes, finished, resumed, segments = 0, 0, 0, 0, 0
        while done < options.kills:
            # Segments are small, so that a short scan has as many as one of hours.
            words = command(options.bundle, source, out, "scan_ledger._ROWS = 256")
            left = len(list(out.with_name(f".{out.name}.scan").glob("*-*.parquet")))
            resumed, segments = resumed + (left > 0), max(segments, left)
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            goes += 1
            try:
                process.wait(dice.uniform(0.2, seconds * 1.05))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
            else:
                assert process.returncode == 0, "a scan failed"
                finished += 1
                check(expected, out, len(paths))
                out.unlink()
        subprocess.run(command(options.bundle, source, out), check=True, capture_output=True)
        check(expected, out, len(paths))
    yield (f"{done} kills at random moments (seed {options.seed}) of a scan of {len(paths):,} files that takes "
           f"{seconds:.0f} s; {goes + 1} goes, {resumed} of which went on with "
           f"up to {segments} segments of earlier ones, "
           f"{finished + 1} finished; every result equal to that of a scan that was "
           "never killed: no path missing, none twice")  # fmt: skip


def check(expected: Any, out: Path, count: int) -> None:
    """Every path once, in order, with the same row, but for the last bits of scores of other batches."""
    found = pq.read_table(out)
    assert found["path"].to_pylist() == expected["path"].to_pylist()
    assert len(found) == count
    for name in ("sha256", "outlier", "error", "p_value", "version"):
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    assert np.allclose(found["score"].to_numpy(), expected["score"].to_numpy(), rtol=1e-4)


def machine() -> Iterator[str]:
    """What it was measured on."""
    name = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")), "?")  # fmt: skip
    python = ".".join(map(str, sys.version_info[:3]))
    yield f"{os.cpu_count()} cores of {name}; Python {python}, torch {torch.__version__}; load {os.getloadavg()[0]:.1f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "kills"))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--device", default="cpu", help="for speed; with cuda also a scan whose JPEGs the GPU decodes")
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for line in {"speed": speed, "memory": most_memory, "kills": kills}[options.what](options):
        print(line, flush=True)


if __name__ == "__main__":
    main()
