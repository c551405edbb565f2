"""How far a scan is, as people see it: on a real terminal, and in a log."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forked import command
from PIL import Image
from terminal import screens

from anomaly_vae.scan_view import fitted

ROOT = Path(__file__).parent.parent
BAR = re.compile(r"scanning [━╸╺]+ +\d+% ETA \d:\d\d:\d\d")
FACTS = re.compile(r"\d+ files, \d+ images/s, \d+ outliers \(\d+\.\d\d%\), 3 unreadable")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 pictures that take a while to decode, and three that cannot be read; these come among the first."""
    root = tmp_path_factory.mktemp("view")
    (root / "in").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (1500, 1500), dtype=np.uint8)
    Image.fromarray(noise).save(root / "in" / "000.png", compress_level=1)
    for i in range(1, 60):
        os.link(root / "in" / "000.png", root / "in" / f"{i:03}.png")
    for i in (1, 2, 4):
        (root / "in" / f"{i:03}-bad.png").write_bytes(b"no picture")
    return root


@pytest.mark.parametrize("columns", [40, 80])
def test_a_terminal_shows_speed_time_left_outliers_and_bad_files_and_then_the_result_alone(
    tiny_bundle, folder, columns
):
    words = [sys.executable, "-m", "anomaly_vae", "scan", str(tiny_bundle), "in", "--out", f"{columns}.csv",
             "--batch-size", "2"]  # fmt: skip
    seen = set()
    for screen in screens(words, columns, folder):
        lines = screen.shown()
        if lines and lines[0].startswith("scanning"):
            # Nothing is cut off, and nothing wraps: the bar has one line, the facts as many as it takes.
            assert len(lines[0]) <= columns
            assert "…" not in "".join(lines)
            assert not [line for line in lines[1:] if line.startswith("scanning")], lines
            seen.add(
                (BAR.fullmatch(lines[0]) is not None, FACTS.fullmatch(" ".join(lines[1:])) is not None, len(lines))
            )
    assert (True, True, 2 if columns == 80 else 3) in seen, seen
    assert screen.cursor_shown
    said = (
        r"60 images: \d+ outliers \(\d+\.\d%\); about 0\.\d would be false alarms if all were normal "
        rf"3 files could not be read; column 'error' of {columns}\.csv says why written to {columns}\.csv"
    )
    # Where a line is full, the next may begin in the middle of a word.
    last = "".join(screen.shown()).replace(" ", "")
    assert re.fullmatch(said.replace(" ", ""), last), "the result, and nothing of the bar"


def test_a_log_gets_plain_lines(tiny_bundle, folder, tmp_path):
    script = tmp_path / "run.py"
    script.write_text("from anomaly_vae import cli, console\nconsole.PLAIN_SECONDS = 0.05\ncli.main()\n")
    words = ["scan", tiny_bundle, folder / "in", "--out", tmp_path / "out.csv", "--batch-size", "2"]
    done = command(*words, script=script)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) > 2
    for line in lines:
        assert re.fullmatch(r"\d+ files, \d+ images/s, \d+ outliers \(\d+\.\d\d%\), \d unreadable", line), line
    counts = [int(line.split()[0]) for line in lines]
    assert counts == sorted(counts)
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"written to {tmp_path / 'out.csv'}"


def test_a_scan_of_moments_says_its_result_alone(tiny_bundle, good, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "anomaly_vae", "scan", tiny_bundle, good[0], "--out", tmp_path / "out.csv"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stderr == ""


@pytest.mark.parametrize(("width", "lines"), [
    (80, ["12 files, 3 images/s, 1 outliers (8.33%), 0 unreadable"]),
    (40, ["12 files, 3 images/s,", "1 outliers (8.33%), 0 unreadable"]),
    (22, ["12 files, 3 images/s,", "1 outliers (8.33%),", "0 unreadable"]),
    (5, ["12 files,", "3 images/s,", "1 outliers (8.33%),", "0 unreadable"]),
])  # fmt: skip
def test_facts_stand_in_as_many_lines_as_it_takes(width, lines):
    assert fitted(["12 files", "3 images/s", "1 outliers (8.33%)", "0 unreadable"], width) == lines
