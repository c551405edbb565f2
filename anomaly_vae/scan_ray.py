"""A scan on many machines: Ray Data hands blocks of paths to actors that read, decode and judge, and takes back rows.

The driver alone lists the source and writes the ledger, so that a scan on a cluster goes on as any other, here or
there. Blocks come back in order, each once: Ray does a block again whose worker or machine was lost, and where it
cannot, the driver begins anew with the first block that has no rows yet.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch

from anomaly_vae.detector import Detector
from anomaly_vae.engine import Engine
from anomaly_vae.entries import Entry, Reader
from anomaly_vae.errors import AnomalyVaeError, ClusterError, DataError
from anomaly_vae.gpu_decoding import GpuDecoding
from anomaly_vae.ray_cluster import Cluster, Share, alive, connected, imported
from anomaly_vae.ray_pipeline import Judge, MachineLost, Pipeline
from anomaly_vae.scan_manifest import Manifest, entries_of
from anomaly_vae.scan_rows import schema_of, scored
from anomaly_vae.sources import Source

_AHEAD = 4
"""Blocks that are listed ahead for each actor."""
_TRIES = 3
"""A cluster that fails so often, with nothing done between, is given up."""
_DEATHS = 5
"""A block over which so many workers died is the fault of what is in it."""


@dataclass(frozen=True)
class Opening:
    """How an actor opens a bundle; `files`: its contents by their names, so that it need not lie on shared disks."""

    files: dict[str, bytes]
    device: str
    alpha: float | None
    max_batch: int
    precision: str
    decode_on_gpu: bool = False

    @classmethod
    def of(
        cls, bundle: Path, device: str, alpha: float | None, max_batch: int, precision: str, decode_on_gpu: bool = False
    ) -> "Opening":
        """Read the bundle's own files; a report is none of what is needed."""
        files = {one.name: one.read_bytes() for one in bundle.iterdir() if one.is_file() and one.suffix != ".html"}
        return cls(files, device, alpha, max_batch, precision, decode_on_gpu)

    def engine(self, device: str) -> Engine:
        """Open it here."""
        with tempfile.TemporaryDirectory() as folder:
            for name, data in self.files.items():
                (Path(folder) / name).write_bytes(data)
            detector = Detector.load(Path(folder), device)
        if self.alpha is not None:
            detector = detector.with_policy(self.alpha)
        return Engine(detector, device, self.max_batch, self.precision)


class RayScored:
    """`scored`, on a cluster: for `Scan.run`. `folder`: beside the result; a manifest lies there meanwhile.

    `tell` hears what a person should know of the cluster.
    """

    def __init__(
        self, cluster: Cluster, source: Source, opening: Opening, folder: Path,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self._cluster, self._opening, self._folder, self._tell = cluster, opening, folder.absolute(), tell
        if source.reader is None:
            raise DataError(f"{source.identity}: the machines of a cluster cannot share an archive; "
                            "unpack it, or use --engine local")  # fmt: skip
        self._reader = source.reader
        imported()

    def __call__(self, _: Engine, entries: Iterator[Entry]) -> Iterator[pa.Table]:
        with connected(self._cluster.address):
            ahead = _AHEAD * max(self._share().actors, 4)
            opens = _Opens(self._opening, self._reader)
            pipeline = Pipeline(opens, self._manifest, self._share, _DEATHS, self._tell)
            with Manifest(entries, self._manifest, ahead, pipeline.announce) as manifest:
                yield from self._all(manifest, pipeline)
                manifest.check()

    @property
    def _manifest(self) -> Path:
        return self._folder / "manifest"

    def _share(self) -> Share:
        return Share.of(self._cluster, self._opening.device, list(alive().values()))

    def _all(self, manifest: Manifest, pipeline: Pipeline) -> Iterator[pa.Table]:
        """Rows of all blocks in order, whatever fails in between."""
        done, failures = 0, 0
        while True:
            try:
                for table in pipeline.rows(done):
                    done, failures = done + 1, 0
                    manifest.took()
                    pipeline.took(done)
                    yield table
                return
            except (imported().exceptions.RayError, MachineLost) as error:
                failures += 1
                if failures == _TRIES:
                    reason = " ".join(str(error).split())[-200:]
                    what = f"the cluster failed {_TRIES} times at block {done} of the scan ({reason})"
                    raise ClusterError(f"{what}; see `ray status`, the same command goes on") from None
                self._tell("the cluster lost a machine or worker; what it held is done again")


@dataclass(frozen=True)
class _Opens:
    """What becomes a judge in an actor."""

    opening: Opening
    reader: Reader

    def judge(self, threads: int, gpu: bool) -> Judge:
        """A judge with a detector that it opened once; one that cannot be opened is a refusal of each block."""
        torch.set_num_threads(threads)
        try:
            engine = self.opening.engine("cuda" if gpu else "cpu")
            engine.warm()
            decoding = GpuDecoding(engine) if self.opening.decode_on_gpu else None
        except AnomalyVaeError as error:
            refusal = str(error)
            return lambda block: refusal
        empty = schema_of(engine.detector.spec.parts).empty_table()

        def judge(block: pa.Table) -> pa.Table:
            return pa.concat_tables([empty, *scored(engine, entries_of(block, self.reader), threads, decoding)])

        return judge
