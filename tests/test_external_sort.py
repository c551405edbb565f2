"""Sorting more than memory should hold, and paths as text."""

import gc
import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomaly_vae.external_sort import in_order
from anomaly_vae.paths import on_disk, order_of, printable

NAMES = st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name and b"/" not in name and name != b".")


def files_open() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@given(st.lists(st.binary(max_size=6), max_size=60), st.integers(1, 70))
def test_any_records_come_in_order_however_little_memory_there_is(records, most):
    assert list(in_order(iter(records), most)) == sorted(records)


def test_memory_is_bounded_and_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = files_open()
    tracemalloc.start()
    try:
        count = sum(1 for _ in in_order((b"%099d" % (i * 7919 % 40_000) for i in range(40_000)), 2_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 40_000
    assert peak < 2 << 20, "4 MB of records alone"
    for use in (lambda sorting: next(sorting), lambda sorting: None):
        sorting = in_order((b"%d" % i for i in range(100)), 10)
        use(sorting)
        sorting.close()
    gc.collect()
    assert files_open() == before
    assert list(tmp_path.iterdir()) == []


def test_what_breaks_while_it_is_read_breaks_through_and_leaves_nothing():
    def broken():
        yield from (b"%d" % i for i in range(25))
        raise OSError(5, "gone")

    before = files_open()
    with pytest.raises(OSError, match="gone"):
        list(in_order(broken(), 10))
    gc.collect()
    assert files_open() == before


@given(st.lists(NAMES, min_size=1, max_size=4), st.booleans())
def test_a_path_as_text_leads_back_to_the_path(names, absolute):
    path = Path(os.fsdecode(b"/" * absolute + b"/".join(names)))
    text = printable(path)
    assert on_disk(text) == path
    text.encode()  # valid Unicode


@given(st.binary(max_size=12), st.binary(max_size=12))
def test_no_two_paths_have_the_same_text(one, other):
    assert (printable(one) == printable(other)) == (one == other)


@pytest.mark.parametrize("other", [rb"caf\xe9", b"caf\xc3\xa9", rb"caf\\xe9", rb"caf\\\xe9"])
def test_bytes_that_are_no_text_and_what_looks_like_them_are_told_apart(other):
    assert printable(b"caf\xe9") == r"caf\xe9" != printable(other)
    assert os.fsencode(on_disk(printable(other))) == other


@given(st.lists(st.lists(NAMES, min_size=1, max_size=3).map(tuple), max_size=8))
def test_order_is_that_of_folders_and_names(paths):
    texts = [printable(b"/".join(path)) for path in paths]
    assert sorted(texts, key=order_of) == [printable(b"/".join(path)) for path in sorted(paths)]


@pytest.mark.parametrize("other", ["a//b", "a/./b", "a/b/", "/a/b"])
def test_paths_that_are_one_on_disk_may_be_two_in_a_bucket(other):
    assert order_of("a/b") != order_of(other)
