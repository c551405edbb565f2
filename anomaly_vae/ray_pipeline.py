"""The pipeline of a scan in Ray Data: a manifest's blocks go to actors that judge them, rows come back in order.

It is driven by an actor of its own, a `_Desk`, that can be killed with all that it began: Ray Data may wait for ever
for an actor whose machine is gone. Nothing here imports PyTorch, so that only those who judge wait for it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from anomaly_vae.errors import ClusterError
from anomaly_vae.ray_cluster import Share, alive, bound_here, imported
from anomaly_vae.scan_manifest import place_of, read_block

_PATIENCE = 10.0
"""Seconds without rows after which a pipeline is given up that has lost a machine since it began."""
_IN_VAIN = 3
"""So often that, with no actor there, somebody should know."""
_UNFETCHED = 8
"""Blocks of rows that may wait for the driver."""
_AT_ONCE = 16
"""Calls that a desk answers at once: rows, somebody who waits for more of the manifest, and whoever begins a block."""
_EMPTY = pa.table({})


class Judge(Protocol):
    """Turns a block of the manifest into rows; what it cannot do at all it says in a string."""

    def __call__(self, block: pa.Table) -> pa.Table | str: ...


class Opens(Protocol):
    """Can be sent to an actor, and there becomes a judge with so many threads, on a GPU or none."""

    def judge(self, threads: int, gpu: bool) -> Judge: ...


class MachineLost(Exception):
    """A machine is gone, and no rows come any more."""


class Pipeline:
    """The driver's side. `deaths`: a block over which more workers died is the fault of what is in it.

    `tell` hears what a person may have to do something about. `announce` and `took` may be called by any thread, while
    there is a desk or not.
    """

    def __init__(
        self, opens: Opens, folder: Path, share: Callable[[], Share], deaths: int, tell: Callable[[str], None]
    ) -> None:
        self._opens, self._folder, self._share, self._deaths = imported().put(opens), folder, share, deaths
        self._tell = tell
        self._desk: Any = None
        self._count, self._ended, self._taken, self._lock = 0, False, 0, threading.Lock()

    def announce(self, count: int, ended: bool) -> None:
        """The manifest has so many blocks, and these are all if `ended`."""
        with self._lock:
            self._count, self._ended = count, ended
            self._ring()

    def took(self, taken: int) -> None:
        """The rows of so many blocks are there."""
        with self._lock:
            self._taken = taken
            self._ring()

    def rows(self, first: int) -> Iterator[pa.Table]:
        """Rows of the blocks from `first` on, in order; raises `MachineLost` or Ray's error if it must begin anew."""
        ray, before, here, share = imported(), set(alive()), bound_here(), self._share()
        with self._lock:
            made = ray.remote(_Desk).options(num_cpus=0, resources=here, max_concurrency=_AT_ONCE)
            self._desk = made.remote(self._deaths)
            self._ring()
        try:
            how = {"num_returns": "streaming", "_generator_backpressure_num_objects": _UNFETCHED}
            rows = self._desk.rows.options(**how).remote(self._folder, first, [self._opens], share, here)
            in_vain = 0
            while True:
                if not ray.wait([rows], timeout=_PATIENCE)[0]:
                    if before - set(alive()):
                        raise MachineLost("a machine was lost")
                    in_vain += 1
                    if in_vain == _IN_VAIN and not ray.get(self._desk.is_staffed.remote()):
                        self._tell(f"no actor has begun yet; has the cluster room for one, {share}? See `ray status`")
                    continue
                if (one := next(rows, None)) is None:
                    return
                yield _unrow(first, ray.get(one))
                first += 1
        finally:
            with self._lock:
                ray.kill(self._desk)
                self._desk = None

    def _ring(self) -> None:
        if self._desk is not None:
            # One that has died is missed by whoever takes its rows.
            with suppress(imported().exceptions.RayActorError):
                self._desk.ring.remote(self._count, self._ended, self._taken)


class _Desk:
    """The actor that drives the pipeline, tells its reader of more of the manifest, and counts who began with what."""

    def __init__(self, deaths: int) -> None:
        self._count, self._ended, self._taken, self._changed = 0, False, 0, threading.Condition()
        self._begun: dict[int, int] = {}
        self._deaths, self._staffed = deaths, False

    def ring(self, count: int, ended: bool, taken: int) -> None:
        """There are `count` blocks, these are all if `ended`, and the rows of the first `taken` are there.

        Calls may overtake one another, so that none takes back what another said.
        """
        with self._changed:
            self._count, self._taken = max(count, self._count), max(taken, self._taken)
            self._ended = ended or self._ended
            self._begun = {number: times for number, times in self._begun.items() if number >= self._taken}
            self._changed.notify_all()

    def has(self, number: int) -> bool:
        """Wait until this block is there; False once there is nothing left to do at all."""
        with self._changed:
            self._changed.wait_for(lambda: number < self._count or (self._ended and self._taken == self._count))
            return number < self._count

    def comes(self) -> None:
        """There is somebody who will judge."""
        self._staffed = True

    def is_staffed(self) -> bool:
        """Whether somebody came, or there is nothing to do."""
        return self._staffed or not self._count

    def may_begin(self, number: int) -> bool:
        """Somebody begins with this block; False if too many did."""
        with self._changed:
            self._begun[number] = self._begun.get(number, 0) + 1
            return self._begun[number] <= self._deaths

    def rows(
        self, folder: Path, first: int, opens: list[Any], share: Share, here: dict[str, float]
    ) -> Iterator[pa.Table]:
        """Blocks of rows, in order. `opens`: in a list, for Ray to send what it is to those alone who judge."""
        import ray
        from ray.data import ActorPoolStrategy

        desk = ray.get_runtime_context().current_actor
        begin = ray.data.from_items([{"first": first}], override_num_blocks=1)
        begin.context.enable_progress_bars = False
        begin.context.execution_options.preserve_order = True
        # A block of paths is one row, and shall be on its way as soon as it is there.
        begin.context.target_max_block_size = 1
        listing: Any = _blocks
        blocks = begin.map_batches(listing, fn_args=(folder, desk), batch_format="pyarrow", num_cpus=0, resources=here)
        rows = blocks.map_batches(
            _Judging,
            fn_constructor_args=(opens, share, desk),
            compute=ActorPoolStrategy(min_size=1, max_size=share.actors),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=share.cpus,
            num_gpus=share.gpus,
        )
        # Not by batches: these keep the last one back until the next is there.
        for bundle in rows.iter_internal_ref_bundles():
            for block in ray.get(bundle.block_refs):  # noqa: UP028 - Ray sends into the generator, which no list takes
                yield block


def _blocks(begin: pa.Table, folder: Path, desk: Any) -> Iterator[pa.Table]:
    """The blocks of a manifest as they come, a row each."""
    import ray

    number = begin["first"][0].as_py()
    while ray.get(desk.has.remote(number)):
        yield _row(number, read_block(place_of(folder, number)))
        number += 1


class _Judging:
    """An actor that judges blocks.

    A refusal is an answer: what an actor raises would have Ray try again, and lose the words.
    """

    def __init__(self, opens: list[Any], share: Share, desk: Any) -> None:
        import ray

        desk.comes.remote()
        self._judge: Judge = ray.get(opens[0]).judge(share.cpus, share.gpus > 0)
        self._desk = desk

    def __call__(self, batch: pa.Table) -> pa.Table:
        import ray

        number, block = batch["block"][0].as_py(), _table_of(batch)
        if ray.get(self._desk.may_begin.remote(number)):
            done = self._judge(block)
        else:
            what = f"workers died over the files from {block['path'][0]} to {block['path'][-1]}"
            done = f"{what}; has an actor memory enough, and does --engine local read them?"
        return _row(number, _EMPTY, done) if isinstance(done, str) else _row(number, done)


def _row(number: int, table: pa.Table, refusal: str | None = None) -> pa.Table:
    """A table as one row, which Ray cannot cut or join with others."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = pa.array([sink.getvalue().to_pybytes()], pa.large_binary())
    return pa.table({"block": [number], "table": data, "refusal": pa.array([refusal], pa.string())})


def _table_of(row: pa.Table) -> pa.Table:
    return pa.ipc.open_stream(row["table"][0].as_buffer()).read_all()


def _unrow(expected: int, row: pa.Table) -> pa.Table:
    """The rows of block `expected`."""
    if (refusal := row["refusal"][0].as_py()) is not None:
        raise ClusterError(refusal)
    if row["block"][0].as_py() != expected:
        raise ClusterError(f"the cluster lost block {expected} of the scan; the same command goes on")
    return _table_of(row)
