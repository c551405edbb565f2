"""Results on disk: what is written is what is read, in every format, and nothing else is taken for a result."""

import math
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anomaly_vae import DataError
from anomaly_vae.paths import printable
from anomaly_vae.scan_rows import schema_of
from anomaly_vae.tables import ENDINGS, check_ending, reading, writing

SCHEMA = schema_of(["kl", "mse"])
NUMBERS = st.none() | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ROWS = st.fixed_dictionaries({
    "path": TEXT | st.binary(max_size=9).map(printable) | st.sampled_from(["NA", "null", "", '"', "a,\r\nb"]),
    "size": st.none() | st.integers(0, 2**63 - 1),
    "mtime": NUMBERS,
    "sha256": st.none() | st.just("e3b0" * 16),
    "score": NUMBERS,
    "p_value": NUMBERS,
    "outlier": st.none() | st.booleans(),
    "part_kl": NUMBERS,
    "part_mse": NUMBERS,
    "error": st.none() | TEXT | st.sampled_from(["null", 'a "b"\nc', " x "]),
    "version": st.just("0123456789ab"),
})  # fmt: skip
ROW = dict.fromkeys(SCHEMA.names) | {"path": "a.png", "version": "0123456789ab", "score": 0.1}


def write(place, rows, schema=SCHEMA):
    with writing(place, check_ending(place), schema) as table_writer:
        table_writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return place


def read(place):
    return [row for table in reading(place, SCHEMA) for row in table.to_pylist()]


def bits(rows):
    """Rows with the sign of zero."""
    return [{name: (x, math.copysign(1, x)) if isinstance(x, float) else x for name, x in row.items()} for row in rows]


@pytest.mark.parametrize("ending", ENDINGS)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, max_size=6))
def test_what_is_written_is_read_to_the_last_bit(tmp_path, ending, rows):
    assert bits(read(write(tmp_path / f"x{ending}", rows))) == bits(rows)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_name_of_a_result_may_be_any(tmp_path, ending):
    place = write(tmp_path / os.fsdecode(b"caf\xe9 \n" + ending.upper().encode()), [ROW])
    assert read(place) == [ROW]


@pytest.mark.parametrize("ending", ENDINGS)
def test_large_results_are_streams(tmp_path, ending):
    place, rows = tmp_path / f"x{ending}", [{**ROW, "path": f"{'x' * 150}\n{i}.png"} for i in range(2000)]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    before = pa.total_allocated_bytes()
    held = []
    with writing(place, ending, SCHEMA) as table_writer:
        for _ in range(30):
            table_writer.write_table(table)
            held.append(pa.total_allocated_bytes() - before)
    count = 0
    tracemalloc.start()
    try:
        for part in reading(place, SCHEMA):
            count += len(part)
            assert len(part) <= 20_000
            held.append(pa.total_allocated_bytes() - before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 60_000
    assert max(held) < 12 << 20, "of 30 MB of rows"
    assert peak < 12 << 20


FOREIGN = pa.schema([("path", pa.string()), ("label", pa.int64())])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_table_of_another_kind_is_refused_in_one_line(tmp_path, ending):
    refused(write(tmp_path / f"x{ending}", [{"path": "a", "label": 1}], FOREIGN))
    refused(write(tmp_path / f"y{ending}", [{**ROW, "path": None}]))
    other = SCHEMA.set(SCHEMA.names.index("score"), pa.field("score", pa.string()))
    refused(write(tmp_path / f"z{ending}", [{**ROW, "score": "high"}], other))
    refused(tmp_path / f"missing{ending}")
    (tmp_path / f"folder{ending}").mkdir()
    refused(tmp_path / f"folder{ending}")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "raw", [b"", b"\0" * 100, b"PAR1PAR1", b"\xff\xfe\xfd", b"[1]\n", b"3\n", b"{}\n", b"{", b"a,b\n1,2\n"]
)
def test_a_file_that_is_no_result_is_refused_in_one_line(tmp_path, ending, raw):
    place = tmp_path / f"x{ending}"
    place.write_bytes(raw)
    if raw or ending in (".parquet", ".csv"):
        refused(place)
    else:
        assert read(place) == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_damage_is_refused_or_changes_rows_but_breaks_nothing(tmp_path, ending):
    place = write(tmp_path / f"x{ending}", [{**ROW, "path": f"é{i}", "score": i / 7} for i in range(50)])
    raw = place.read_bytes()
    refusals = 0
    for at in range(0, len(raw), max(1, len(raw) // 150)):
        for broken in (raw[:at], raw[:at] + bytes([raw[at] ^ 0x91]) + raw[at + 1 :]):
            place.write_bytes(broken)
            try:
                read(place)
            except DataError:
                refusals += 1
    assert refusals > 50


def refused(place):
    with pytest.raises(DataError, match=r"is not a result of this bundle's scans .*scan without --update") as caught:
        read(place)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x", "x.xlsx", "x.csv.gz", ".csv", "csv"])
def test_an_ending_decides_the_format(name):
    with pytest.raises(DataError, match="the ending decides the format; use one of"):
        check_ending(Path(name))
    assert check_ending(Path("x.PARQUET")) == ".parquet"


def test_no_number_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path / "x.jsonl", [{**ROW, "score": math.nan}])
    assert pq.read_schema(write(tmp_path / "x.parquet", [ROW])) == SCHEMA
