"""What is left of a scan, on disk: every entry once, and readable by its path alone, elsewhere too."""

import os
import threading
from itertools import count

import pytest

from anomaly_vae.entries import Entry, failed
from anomaly_vae.errors import DataError
from anomaly_vae.scan_manifest import FEWEST, MOST, Manifest, entries_of, place_of, read_block, table_of
from anomaly_vae.sources import source_of

NAMES = ("plain.png", "two words.png", os.fsdecode(b"caf\xe9.png"), "back\\slash.png", "ünï.png")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    for name in NAMES:
        (root / "deep" / name).write_bytes(os.fsencode(name))
    (tmp_path / "list.txt").write_bytes(b"pictures/deep/plain.png\npictures/missing.png\n")
    monkeypatch.chdir(tmp_path)
    return root


@pytest.mark.parametrize("place", ["FOLDER", "pictures", "pictures/**/*.png", "list.txt", "file://FOLDER"])
def test_entries_of_any_source_can_be_read_by_their_paths_from_anywhere(folder, place, monkeypatch, tmp_path):
    source = source_of(place.replace("FOLDER", str(folder)), 1000)
    entries = list(source)
    assert len(entries) == (2 if place == "list.txt" else len(NAMES))
    said = [said_by(entry) for entry in entries]
    block, reader = table_of(entries), source.reader
    monkeypatch.chdir("/")
    again = list(entries_of(block, reader))
    assert [(one.path, one.size, one.mtime) for one in again] == [(one.path, one.size, one.mtime) for one in entries]
    assert [said_by(entry) for entry in again] == said


def said_by(entry):
    try:
        return entry.read(1000)
    except OSError as error:
        return error.strerror


def test_what_could_not_be_listed_keeps_its_reason():
    entries = [failed("a", PermissionError(13, "Permission denied")), failed("b", ValueError("odd\nmore"))]
    again = list(entries_of(table_of(entries), lambda path: pytest.fail("was read")))
    assert [said_by(one) for one in again] == ["Permission denied", "odd"]


def test_archives_are_for_one_process(tmp_path):
    for name in ("x.zip", "x.tar"):
        (tmp_path / name).write_bytes(b"")
        assert source_of(str(tmp_path / name), 1).reader is None


def numbered(n):
    return (Entry(f"{i:06d}.png", i, None, lambda most: b"") for i in n)


def test_blocks_hold_every_entry_once_and_grow(tmp_path):
    told, ended = [], threading.Event()

    def announce(number, all_of_them):
        told.append((number, all_of_them))
        if all_of_them:
            ended.set()

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "99999999.parquet").write_bytes(b"of an earlier go")
    with Manifest(numbered(range(30_000)), tmp_path / "m", 4, announce) as manifest:
        for _ in range(500):
            manifest.took()
        assert ended.wait(30)
        manifest.check()
    blocks = [read_block(place_of(tmp_path / "m", i)) for i in range(told[-1][0])]
    assert [path.as_py() for block in blocks for path in block["path"]] == [f"{i:06d}.png" for i in range(30_000)]
    assert len(blocks[0]) == FEWEST
    assert max(len(block) for block in blocks) == MOST
    assert not place_of(tmp_path / "m", 99999999).exists()


def test_listing_keeps_a_bounded_distance_and_ends_when_nobody_wants_more(tmp_path):
    told, enough = [], threading.Semaphore(0)

    def announce(number, all_of_them):
        told.append(number)
        enough.release()

    with Manifest(numbered(count()), tmp_path / "m", 3, announce) as manifest:
        for _ in range(3):
            assert enough.acquire(timeout=30)
        assert not enough.acquire(timeout=0.2)
        manifest.took()
        assert enough.acquire(timeout=30)
    assert told[:4] == [1, 2, 3, 4]


def test_what_cuts_the_listing_short_is_raised_where_it_is_asked_for(tmp_path):
    ended = threading.Event()

    def entries():
        yield from numbered(range(3))
        raise DataError("changed; begin anew")

    with Manifest(entries(), tmp_path / "m", 3, lambda number, last: ended.set() if last else None) as manifest:
        assert ended.wait(30)
        with pytest.raises(DataError, match="begin anew"):
            manifest.check()
