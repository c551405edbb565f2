"""Results on disk, as the ending of their file says: .parquet, .csv, .jsonl or .ndjson; written and read as streams."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from anomaly_vae.errors import DataError

ENDINGS = (".parquet", ".csv", ".jsonl", ".ndjson")
_AT_ONCE = 4096


class Writer(Protocol):
    """What takes tables."""

    def write_table(self, table: pa.Table) -> None: ...


def check_ending(out: Path) -> str:
    """The format that the name of a file asks for; raises `DataError`."""
    ending = out.suffix.lower()
    if ending not in ENDINGS:
        raise DataError(f"--out {out.name}: the ending decides the format; use one of {', '.join(ENDINGS)}")
    return ending


@contextmanager
def writing(place: Path, ending: str, schema: pa.Schema) -> Iterator[Writer]:
    """A writer of a new file; raises `OSError`."""
    if ending == ".parquet":
        with pq.ParquetWriter(place, schema) as writer:
            yield writer
    elif ending == ".csv":
        with pc.CSVWriter(place, schema) as writer:
            yield writer
    else:
        with place.open("w", encoding="utf-8") as file:
            yield _Lines(file)


class _Lines:
    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write_table(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def reading(place: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """The tables of a file that `writing` made; raises `DataError` where it has other columns, or is damaged."""
    try:
        yield from _READERS.get(place.suffix.lower(), _lines)(place, schema)
    except (pa.ArrowException, KeyError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{place} is not a result of this bundle's scans ({first}); give --fresh") from None


def _parquet(place: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    with pq.ParquetFile(place) as file:
        for batch in file.iter_batches(_AT_ONCE):
            yield pa.Table.from_batches([batch]).select(schema.names).cast(schema)


def _csv(place: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    types = {field.name: field.type for field in schema}
    options = pc.ConvertOptions(column_types=types, strings_can_be_null=True, quoted_strings_can_be_null=False)
    with pc.open_csv(place, convert_options=options, parse_options=pc.ParseOptions(newlines_in_values=True)) as file:
        for batch in file:
            yield pa.Table.from_batches([batch]).select(schema.names)


def _lines(place: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    with place.open(encoding="utf-8") as file:
        rows: list[dict[str, Any]] = []
        for line in file:
            rows.append(json.loads(line))
            if len(rows) == _AT_ONCE:
                yield pa.Table.from_pylist(rows, schema=schema)
                rows = []
        if rows:
            yield pa.Table.from_pylist(rows, schema=schema)


_READERS = {".parquet": _parquet, ".csv": _csv}
