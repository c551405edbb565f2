"""A scan that is killed at random moments, again and again, ends with the rows of one that never was."""

import os
import random
import time

from forked import begun
from test_scanning import read, scan

from anomaly_vae import Detector, Engine

SCRIPT = "from anomaly_vae import cli, scan_ledger\nscan_ledger._ROWS = 32\ncli.main()\n"


def test_killed_at_random_moments_no_path_is_missing_and_none_is_there_twice(tiny_bundle, digits_folder, tmp_path):
    folder, out, dice = tmp_path / "in", tmp_path / "out.jsonl", random.Random(7)
    for i, path in enumerate(sorted(digits_folder.rglob("*.png"))[:600]):
        place = folder / str(i % 5) / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    whole = tmp_path / "whole.jsonl"
    scan(Engine(Detector.load(tiny_bundle), "cpu", 32), folder, whole)
    script, ledger = tmp_path / "run.py", tmp_path / ".out.jsonl.scan"
    script.write_text(SCRIPT)
    words, seen, kills = ["scan", tiny_bundle, folder, "--out", out, "--batch-size", "8"], set(), 0
    nowhere = os.open(os.devnull, os.O_WRONLY)
    while not out.exists() and kills < 30:
        before = len(list(ledger.glob("*-*.parquet")))
        process = begun(words, nowhere, nowhere, script=script)
        until = time.monotonic() + 60
        wanted = before + dice.randint(1, 4)
        while process.poll() is None and len(list(ledger.glob("*-*.parquet"))) < wanted and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(dice.random() * 0.02)
        kills += process.poll() is None
        process.kill()
        process.wait(60)
        seen.add(before)
    os.close(nowhere)
    assert kills >= 4
    assert len(seen) >= 4
    assert [row["path"] for row in read(out)] == [row["path"] for row in read(whole)]
    assert [row["p_value"] for row in read(out)] == [row["p_value"] for row in read(whole)]
    assert not ledger.exists()
