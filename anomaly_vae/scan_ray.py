"""A scan on many machines: Ray Data hands blocks of paths to actors that read, decode and judge, and takes back rows.

The driver alone lists the source and writes the ledger, so that a scan on a cluster goes on as any other, here or
there. Blocks come back in order, each once: Ray does a block again whose worker or machine was lost, and where it
cannot, the driver begins anew with the first block that has no rows yet.
"""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pyarrow as pa
import torch

from anomaly_vae.detector import Detector
from anomaly_vae.engine import Engine
from anomaly_vae.entries import Entry, Reader
from anomaly_vae.errors import AnomalyVaeError, ClusterError, DataError
from anomaly_vae.ray_cluster import Bell, Cluster, Share, alive, bound_here, connected, imported
from anomaly_vae.scan_manifest import Manifest, entries_of, place_of, read_block
from anomaly_vae.scan_rows import schema_of, scored
from anomaly_vae.sources import Source

_AHEAD = 4
"""Blocks that are listed ahead for each actor."""
_TRIES = 3
"""A cluster that fails so often, with nothing done between, is given up."""
_DEATHS = 5
"""A block over which so many workers died is the fault of what is in it."""
_SILENCE = 30.0
"""Seconds that a pipeline may take to end once it is given up."""
_PATIENCE = 5.0
"""Seconds without a block after which a pipeline that lost a machine may be waiting in vain."""


@dataclass(frozen=True)
class Opening:
    """How an actor opens a bundle; `files`: its contents by their names, so that it need not lie on shared disks."""

    files: dict[str, bytes]
    device: str
    alpha: float | None
    max_batch: int
    precision: str

    @classmethod
    def of(cls, bundle: Path, device: str, alpha: float | None, max_batch: int, precision: str) -> "Opening":
        """Read the bundle's own files; a report is none of what is needed."""
        files = {one.name: one.read_bytes() for one in bundle.iterdir() if one.is_file() and one.suffix != ".html"}
        return cls(files, device, alpha, max_batch, precision)

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
    """`scored`, on a cluster: for `Scan.run`. `folder`: beside the result; a manifest lies there meanwhile."""

    def __init__(self, cluster: Cluster, source: Source, opening: Opening, folder: Path) -> None:
        self._cluster, self._opening, self._folder = cluster, opening, folder.absolute()
        if source.reader is None:
            raise DataError(f"{source.identity}: the machines of a cluster cannot share an archive; "
                            "unpack it, or use --engine local")  # fmt: skip
        self._reader = source.reader
        imported()

    def __call__(self, _: Engine, entries: Iterator[Entry]) -> Iterator[pa.Table]:
        with connected(self._cluster.address):
            share, bell = self._share(), Bell(bound_here())
            ahead = _AHEAD * max(share.actors, 4)
            with Manifest(entries, self._folder / "manifest", ahead, bell.announce) as manifest:
                yield from self._all(manifest, bell)
                manifest.check()

    def _share(self) -> Share:
        return Share.of(self._cluster, self._opening.device, list(alive().values()))

    def _all(self, manifest: Manifest, bell: Bell) -> Iterator[pa.Table]:
        """Rows of all blocks in order, whatever fails in between."""
        ray = imported()
        done, failures = 0, 0
        while True:
            try:
                with self._watched(bell):
                    for number, table in _answered(self._from(manifest.folder, done, bell)):
                        if number != done:
                            raise ClusterError(f"the cluster lost block {done} of the scan; the same command goes on")
                        done, failures = done + 1, 0
                        manifest.took()
                        bell.took(done)
                        yield table
                return
            except (ray.exceptions.RayError, MachineLost) as error:
                failures += 1
                if failures == _TRIES:
                    reason = " ".join(str(error).split())[-200:]
                    what = f"the cluster failed {_TRIES} times at block {done} of the scan ({reason})"
                    raise ClusterError(f"{what}; see `ray status`, the same command goes on") from None
                bell.renew()

    def _from(self, folder: Path, first: int, bell: Bell) -> Iterator[tuple[int, pa.Table]]:
        """Numbers and rows of blocks, in order, from block `first` on."""
        import ray
        from ray.data import ActorPoolStrategy

        share, opening = self._share(), ray.put(self._opening)
        begin = ray.data.from_items([{"first": first}], override_num_blocks=1)
        begin.context.enable_progress_bars = False
        begin.context.execution_options.preserve_order = True
        giving: Any = Giving
        begin.context.custom_execution_callback_classes.append(giving)
        # A block of paths is one row, and shall be on its way as soon as it is there.
        begin.context.target_max_block_size = 1
        listing: Any = _blocks
        blocks = begin.map_batches(
            listing, fn_args=(folder, bell.actor), batch_format="pyarrow", num_cpus=0, resources=bound_here()
        )
        rows = blocks.map_batches(
            _Judge,
            fn_constructor_args=(opening, self._reader, share, bell.actor, _DEATHS),
            compute=ActorPoolStrategy(min_size=1, max_size=share.actors),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=share.cpus,
            num_gpus=share.gpus,
        )
        # Not by batches: these keep the last one back until the next is there.
        for bundle in rows.iter_internal_ref_bundles():
            for block in ray.get(bundle.block_refs):
                yield _unrow(block)

    @contextmanager
    def _watched(self, bell: Bell) -> Iterator[None]:
        """Give up a pipeline that waits in vain: Ray wants an actor back whose machine is gone, and there is no room.

        It is begun anew with what is left, which costs the blocks in flight.
        """
        before, room, ended = set(alive()), self._share().room, threading.Event()

        def watch() -> None:
            seen = -1
            while not ended.wait(_PATIENCE):
                taken, seen = seen, bell.taken
                if seen == taken and before - set(alive()) and self._share().room < room:
                    _GIVE_UP.set()
                    return

        _GIVE_UP.clear()
        thread = threading.Thread(target=watch, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _answered(blocks: Iterator[tuple[int, pa.Table]]) -> Iterator[tuple[int, pa.Table]]:
    """Blocks, taken in a thread of its own: a pipeline that neither goes on nor gives up is left behind."""
    found: Queue[tuple[int, pa.Table] | BaseException | None] = Queue(1)

    def take() -> None:
        try:
            for one in blocks:
                found.put(one)
            found.put(None)
        except BaseException as error:
            found.put(error)

    threading.Thread(target=take, name="blocks", daemon=True).start()
    in_vain = 0.0
    while True:
        try:
            one = found.get(timeout=1.0)
        except Empty:
            in_vain = in_vain + 1.0 if _GIVE_UP.is_set() else 0.0
            if in_vain > _SILENCE:
                what = "a machine was lost, and Ray neither goes on nor gives up"
                raise ClusterError(f"{what}; see `ray status`, the same command goes on from here") from None
            continue
        if one is None:
            return
        if isinstance(one, BaseException):
            raise one
        yield one


_GIVE_UP = threading.Event()
"""Set when the pipeline of this process waits in vain."""


class MachineLost(Exception):
    """A machine is gone, and a pipeline waits for it."""


class Giving:
    """What Ray Data calls at every step of a pipeline, and that ends it by raising: `ExecutionCallback` by its methods.

    Ray makes it anew for each, and sends its class about, so that it can hold nothing itself.
    """

    def before_execution_starts(self, executor: Any) -> None: ...

    def on_execution_step(self, _: Any) -> None:
        if _GIVE_UP.is_set():
            raise MachineLost("a machine was lost")

    def after_execution_succeeds(self, executor: Any) -> None: ...

    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...


def _blocks(begin: pa.Table, folder: Path, bell: Any) -> Iterator[pa.Table]:
    """The blocks of a manifest as they come, a row each."""
    import ray

    number = begin["first"][0].as_py()
    while ray.get(bell.has.remote(number)):
        yield _row(number, read_block(place_of(folder, number)))
        number += 1


class _Judge:
    """Judges blocks with a detector that it opened once; refuses one over which more than `deaths` workers died.

    A refusal is an answer: what an actor raises would have Ray try again, and lose the words.
    """

    def __init__(self, opening: Any, reader: Reader, share: Share, bell: Any, deaths: int) -> None:
        import ray

        self._reader, self._threads, self._bell, self._deaths = reader, share.cpus, bell, deaths
        self._opened: Engine | str
        torch.set_num_threads(share.cpus)
        try:
            engine: Engine = ray.get(opening).engine("cuda" if share.gpus else "cpu")
            engine.warm()
            self._opened = engine
        except AnomalyVaeError as error:
            self._opened = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        number, block = _unrow(batch)
        done = self._judged(number, block)
        return _row(number, _EMPTY, done) if isinstance(done, str) else _row(number, done)

    def _judged(self, number: int, block: pa.Table) -> pa.Table | str:
        import ray

        if isinstance(self._opened, str):
            return self._opened
        if ray.get(self._bell.begins.remote(number)) > self._deaths:
            what = f"workers died over the files from {block['path'][0]} to {block['path'][-1]}"
            return f"{what}; has an actor memory enough, and does --engine local read them?"
        tables = scored(self._opened, entries_of(block, self._reader), self._threads)
        return pa.concat_tables([schema_of(self._opened.detector.spec.parts).empty_table(), *tables])


_EMPTY = pa.table({})


def _row(number: int, table: pa.Table, refusal: str | None = None) -> pa.Table:
    """A table as one row, which Ray cannot cut or join with others."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = pa.array([sink.getvalue().to_pybytes()], pa.large_binary())
    return pa.table({"block": [number], "table": data, "refusal": pa.array([refusal], pa.string())})


def _unrow(batch: pa.Table) -> tuple[int, pa.Table]:
    if (refusal := batch["refusal"][0].as_py()) is not None:
        raise ClusterError(refusal)
    return batch["block"][0].as_py(), pa.ipc.open_stream(batch["table"][0].as_buffer()).read_all()
