"""A list that comes slowly through a real pipe: each file is scored when it is named, and kills cost nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

SCRIPT = "from anomaly_vae import cli, scan_ledger\nscan_ledger._SECONDS = 0.2\ncli.main()\n"
SECONDS = 120
"""For a machine that has much else to do; what is waited for takes moments."""


@pytest.fixture
def script(tmp_path):
    """The command, with what is scored on disk a moment after."""
    (tmp_path / "run.py").write_text(SCRIPT)
    return tmp_path / "run.py"


def began(script: Path, bundle: Path, out: Path) -> subprocess.Popen:
    words = [sys.executable, str(script), "scan", str(bundle), "-", "--out", str(out)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=out.parent,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def until_scored(out: Path, count: int) -> None:
    """Wait until so many rows are on disk."""
    folder, end = out.with_name(f".{out.name}.scan"), time.monotonic() + SECONDS
    while sum(pq.read_metadata(one).num_rows for one in folder.glob("[0-9]*.parquet")) < count:
        assert time.monotonic() < end, f"{count} files were named, and are not scored"
        time.sleep(0.02)


@pytest.mark.parametrize("end", [b"\n", b"\0"])
def test_each_file_is_scored_when_it_is_named_and_a_kill_costs_nothing(tiny_bundle, good, tmp_path, script, end):
    strange = [tmp_path / os.fsdecode(b"caf\xe9.png"), tmp_path / ("a\nb.png" if end == b"\0" else "a b.png")]
    for place in strange:
        place.write_bytes(good[0].read_bytes())
    names = [os.fsencode(path) + end for path in (*strange, *good[:8])]
    names.insert(4, os.fsencode(tmp_path / "none.png") + end)
    out = tmp_path / "out.ndjson"
    first = began(script, tiny_bundle, out)
    for i, name in enumerate(names[:5]):
        first.stdin.write(name)
        first.stdin.flush()
        until_scored(out, i + 1)  # while the pipe stays open, and nothing else comes
    first.kill()
    first.wait(SECONDS)
    second = began(script, tiny_bundle, out)
    for name in names[:7]:
        second.stdin.write(name)
        second.stdin.flush()
    until_scored(out, 7)
    second.stdin.write(b"".join(names[7:]))
    _, said = second.communicate(timeout=SECONDS)
    assert second.returncode == 0, said
    assert b"its rows are kept" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [Path(row["path"]).name for row in rows[:2]] == ["caf\\xe9.png", strange[1].name]
    assert len(rows) == len(names)
    assert [i for i, row in enumerate(rows) if row["error"]] == [4]


def test_a_scan_that_waits_for_a_list_can_be_interrupted(tiny_bundle, good, tmp_path, script):
    out = tmp_path / "out.csv"
    process = began(script, tiny_bundle, out)
    process.stdin.write(os.fsencode(good[0]) + b"\n")
    process.stdin.flush()
    until_scored(out, 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 130
    said = process.stderr.read().decode()
    assert said == "interrupted; the same command goes on from here, with --fresh it begins anew\n"
    process.stdin.close()
