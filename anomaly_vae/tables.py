"""Results on disk, as the ending of their file says: .parquet, .csv, .jsonl or .ndjson; written and read as streams."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from anomaly_vae.errors import DataError
from anomaly_vae.paths import printable

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
    # Arrow would refuse names of files that are not UTF-8, so that it gets open files.
    if ending == ".parquet":
        with place.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
            yield writer
    elif ending == ".csv":
        with place.open("wb") as file, pc.CSVWriter(file, schema) as writer:
            yield writer
    else:
        with place.open("w", encoding="utf-8") as text:
            yield _Lines(text)


class _Lines:
    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write_table(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def reading(place: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """The tables of a file that `writing` made; raises `DataError` where it has other columns, or is damaged."""
    try:
        for table in _READERS.get(place.suffix.lower(), _lines)(place, schema):
            if table["path"].null_count:
                raise ValueError("a row has no path")
            yield table
    except (pa.ArrowException, KeyError, ValueError, TypeError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"{printable(place)} is not a result of this bundle's scans ({first})"
        raise DataError(f"{what}; scan without --update, or into another --out") from None


def _parquet(place: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    with place.open("rb") as opened, pq.ParquetFile(opened) as file:
        for batch in file.iter_batches(_AT_ONCE):
            yield pa.Table.from_batches([batch]).select(schema.names).cast(schema)


def _csv(place: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    types = {field.name: field.type for field in schema}
    options = pc.ConvertOptions(column_types=types, strings_can_be_null=True, quoted_strings_can_be_null=False)
    lines = pc.ParseOptions(newlines_in_values=True)
    with place.open("rb") as opened, pc.open_csv(opened, convert_options=options, parse_options=lines) as file:
        if not set(file.schema.names) >= set(schema.names):
            raise ValueError("it has other columns")
        for batch in file:
            yield pa.Table.from_batches([batch]).select(schema.names)


def _lines(place: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    with place.open(encoding="utf-8") as file:
        while lines := list(islice(file, _AT_ONCE)):
            yield pa.Table.from_pylist([_row(line, schema.names) for line in lines], schema=schema)


def _row(line: str, names: list[str]) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict) or not row.keys() >= set(names):
        raise ValueError("a line has other columns")
    return row


_READERS = {".parquet": _parquet, ".csv": _csv}
