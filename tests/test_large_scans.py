"""Memory does not grow with a scan: many more files take a little more of it."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "large_scan.py"
FEW, MANY = 10_000, 150_000
MOST_MORE = 100
"""MB. Every row that were held would be a kilobyte; what is counted of each takes some bytes."""


def peaks(bundle: Path, out: Path, count: int) -> dict[str, list[int]]:
    """In MB after each step, with how many rows the result has and how many were scored."""
    words = [sys.executable, SCRIPT, bundle, out, str(count)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return {words[0]: [int(word) for word in words[1:]] for words in map(str.split, done.stdout.splitlines())}


def test_memory_does_not_grow_with_the_files_of_a_scan_nor_of_one_that_is_brought_up_to_date(tiny_bundle, tmp_path):
    few = peaks(tiny_bundle, tmp_path / "few.parquet", FEW)
    many = peaks(tiny_bundle, tmp_path / "many.parquet", MANY)
    assert many["scanned"][1:] == [MANY, MANY]
    assert many["updated"][1:] == [MANY, 0]
    for step in ("scanned", "updated"):
        assert many[step][0] - few[step][0] < MOST_MORE, (few, many)
