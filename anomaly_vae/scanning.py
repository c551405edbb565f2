"""The verb `scan`: every picture of a source becomes one row of a table, a bad file a row with its error."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from anomaly_vae.calibration import fdr_resolution
from anomaly_vae.engine import Engine
from anomaly_vae.entries import Entry
from anomaly_vae.errors import CalibrationError, ConfigError, DataError
from anomaly_vae.paths import order_of, printable
from anomaly_vae.scan_ledger import Ledger, Row
from anomaly_vae.scan_rows import schema_of, scored
from anomaly_vae.scan_summary import Counts, Summary
from anomaly_vae.sources import Source
from anomaly_vae.tables import check_ending, reading, writing

COARSEST = 0.1
"""A false-discovery rate is refused where not even this share of all pictures would be found, however unusual."""

_TAKEN_AT_ONCE = 4096
_COUNTED = ["outlier", "error"]
"""Columns that `Counts` looks at."""

Score = Callable[[Engine, Iterator[Entry]], Iterator[pa.Table]]
"""What turns entries into tables of rows, in their order."""


@dataclass(frozen=True)
class Wanted:
    """How to scan. `fdr`: see `Summary`. `fresh`: forget an unfinished scan. `update`: take over the rows of a finished
    result whose files have neither another size nor another time, and of those alone that are still there."""

    fdr: float | None = None
    fresh: bool = False
    update: bool = False


class Scan:
    """A scan of one source into one file (.parquet, .csv, .jsonl or .ndjson). Use it in a `with`: it holds a lock.

    `run`, then `finish`; killed at any moment, the same scan goes on where it was, and no path is missing or there
    twice. The result is complete or absent. Raises `DataError` where it cannot begin.
    """

    def __init__(self, engine: Engine, source: Source, out: Path, wanted: Wanted = Wanted()) -> None:
        self._engine, self._source, self._out, self._wanted = engine, source, out, wanted
        self._ending = check_ending(out)
        _check_fdr(engine, wanted.fdr)
        if wanted.update and not source.sorted:
            raise ConfigError("--update needs a source with an order of its own: a folder, a pattern or a URL")
        self.schema = schema_of(engine.detector.spec.parts)
        policy = engine.detector.policy
        facts = {"source": source.identity, "version": engine.detector.version, "alpha": policy.alpha,
                 "mode": policy.mode}  # fmt: skip
        self.ledger = Ledger(out, self.schema, facts, source.sorted, wanted.fresh)

    def __enter__(self) -> "Scan":
        self.ledger.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.ledger.__exit__(*error)

    @property
    def kind(self) -> dict[str, Any]:
        """What tells its result from those of other scans into the same file."""
        return {**self.ledger.facts, "fdr": self._wanted.fdr}

    def run(self, report: Callable[[Counts], None] = lambda counts: None, score: Score = scored) -> Summary:
        """Score what is not scored yet; what the whole scan found, earlier goes included."""
        counts = Counts()
        expected = self._engine.detector.policy.expected_false_alarm_rate
        try:
            for table in self._do(score):
                counts.add(table, expected)
                report(counts)
            self.ledger.flush()
            return self._summed()
        except OSError as error:
            raise self._unwritable(error) from None

    def tables(self, summary: Summary) -> Iterator[pa.Table]:
        """All rows, with the verdict that holds for the whole scan."""
        return map(summary.judged_anew, self.ledger.tables())

    def finish(self, summary: Summary, keep: Callable[[Path], None] | None = None) -> None:
        """Write the result, and forget the ledger but for what `keep` puts into its folder: see `Ledger.finish`."""

        def write(place: Path) -> None:
            with writing(place, self._ending, self.schema) as table_writer:
                for table in self.tables(summary):
                    table_writer.write_table(table)

        try:
            self.ledger.finish(write, keep)
        except OSError as error:
            raise self._unwritable(error) from None

    def written(self) -> Iterator[pa.Table]:
        """All rows of the result, once it is finished."""
        return reading(self._out, self.schema)

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"cannot write {printable(self._out)}: {error.strerror or error}; mend that and repeat the "
                         "command to go on, or choose another --out")  # fmt: skip

    def _summed(self) -> Summary:
        summary = Summary(self._engine.detector, self._wanted.fdr)
        for table in self.ledger.tables():
            summary.add(table)
        if not summary.counts.images + summary.counts.errors:
            self.ledger.forget()
            raise DataError(f"{self._source.identity} holds no picture")
        return summary

    def _do(self, score: Score) -> Iterator[pa.Table]:
        """Put what is new into the ledger, and beside it what an earlier result knows already; both go by."""
        done, taken = self.ledger.done(), _Taken(self.schema, self.ledger)
        entries = (
            _missing(self._source, done, self._wanted.update) if self._source.sorted else _behind(self._source, done)
        )
        if self._wanted.update and self._out.exists():
            entries = taken.without(entries, _Known(self._old()), self._engine.detector.version)
        for table in score(self._engine, entries):
            self.ledger.add(table)
            yield from taken.counted()
            yield table
        yield from taken.counted()

    def _old(self) -> Iterator[Row]:
        for table in reading(self._out, self.schema):
            yield from table.to_pylist()


def _missing(source: Source, done: Iterator[Row], update: bool) -> Iterator[Entry]:
    """Entries without a row, both in one order; with `update` also those whose files are others now."""
    known = _Known(done)
    for entry in source:
        row = known.row_of(entry)
        if row is None or (update and _is_other(entry, row)):
            yield entry


def _behind(source: Source, done: Iterator[Row]) -> Iterator[Entry]:
    """Entries behind those that have a row, in an order that never changes."""
    entries = iter(source)
    for row in done:
        entry = next(entries, None)
        if entry is None or entry.path != row["path"]:
            what = f"{source.identity} is not what it was when this scan began"
            raise DataError(f"{what}; give --fresh to begin anew")
    yield from entries


def _is_other(entry: Entry, row: Row) -> bool:
    return row["error"] is not None or (entry.size, entry.mtime) != (row["size"], row["mtime"])


class _Known:
    """Rows in order, asked for in that order."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self._row = next(rows, None)

    def row_of(self, entry: Entry) -> Row | None:
        """The row of an entry, if there is one."""
        if self._row is not None and self._row["path"] != entry.path:
            order = order_of(entry.path)
            while self._row is not None and order_of(self._row["path"]) < order:
                self._row = next(self._rows, None)
        if self._row is None or self._row["path"] != entry.path:
            return None
        found, self._row = self._row, next(self._rows, None)
        return found


class _Taken:
    """Rows that an earlier result knows of files that have not changed, on their way into the ledger.

    However many there are before something must be scored: whoever lists puts them into the ledger, some at a time, and
    of those no more is held than what is counted of them.
    """

    def __init__(self, schema: pa.Schema, ledger: Ledger) -> None:
        self._schema, self._ledger = schema, ledger
        self._guard = threading.Lock()
        self._rows: list[Row] = []
        self._uncounted: list[pa.Table] = []

    def without(self, entries: Iterator[Entry], known: _Known, version: str) -> Iterator[Entry]:
        """Entries that it does not know; whoever lists them does so in a thread of its own."""
        for entry in entries:
            row = known.row_of(entry)
            if row is None or row["version"] != version or _is_other(entry, row):
                yield entry
            else:
                with self._guard:
                    self._rows.append(row)
                    if len(self._rows) == _TAKEN_AT_ONCE:
                        self._put()

    def counted(self) -> Iterator[pa.Table]:
        """What is counted of the rows since the last time, all of which are in the ledger then."""
        with self._guard:
            self._put()
            tables, self._uncounted = self._uncounted, []
        yield from tables

    def _put(self) -> None:
        if self._rows:
            table = pa.Table.from_pylist(self._rows, schema=self._schema)
            self._ledger.add(table, lane=1)
            self._uncounted.append(table.select(_COUNTED))
            self._rows = []


def _check_fdr(engine: Engine, fdr: float | None) -> None:
    if fdr is None:
        return
    if not 0 < fdr < 1:
        raise ConfigError(f"--fdr is a share of the outliers between 0 and 1, such as 0.1; got {fdr:g}")
    n = engine.detector.calibration.n
    least = fdr_resolution(n, fdr)
    if least > COARSEST:
        needed = round(1 / (COARSEST * fdr)) - 1
        raise CalibrationError(
            f"with {n} calibration pictures --fdr {fdr:g} finds nothing unless {least:.0%} of all pictures are odd; "
            f"train with at least {needed} for calibration, allow more (--fdr {min(0.9, fdr * least / COARSEST):.2g}), "
            "or use --alpha"
        )
