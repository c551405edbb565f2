"""Sources on disk: folders, patterns, lists. Whatever lies there is listed once, in one order, and nothing hangs."""

import os
import random
import socket
import sys
import tempfile
import time
import tracemalloc
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anomaly_vae import DataError, external_sort
from anomaly_vae.paths import on_disk, order_of, printable
from anomaly_vae.sources import FileList, Folder, Pattern, source_of
from anomaly_vae.trickling import Trickle

MOST = 1 << 20


def paths(source):
    return [entry.path for entry in source]


def below(root, source):
    return [entry.path.removeprefix(f"{printable(root)}/") for entry in source]


def fill(root, *names):
    for name in names:
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(name.encode())


def reason(entry):
    with pytest.raises(OSError) as caught:
        entry.read(10)
    assert caught.value.strerror, "what a row shows"
    return caught.value.strerror


PIECES = st.sampled_from(
    [b"a", b"b", b"-", b" ", b"!", b"\n", b"\\", b"\xe9", "é".encode(), b".x", b"0", b"~", b"\x01"]
)
STEMS = st.lists(PIECES, min_size=1, max_size=4).map(b"".join).filter(lambda name: not name.startswith(b"."))
TREES = st.recursive(
    st.none(),
    lambda inner: st.dictionaries(st.tuples(STEMS, st.sampled_from([b"", b".png", b".JPG"])).map(b"".join), inner,
                                  max_size=5),
    max_leaves=20,
)  # fmt: skip


def grow(root: bytes, tree) -> int:
    """A tree on disk: None is a file. The number of pictures."""
    if tree is None:
        with open(root, "wb"):  # noqa: PTH123
            return int(root.endswith((b".png", b".JPG")))
    os.mkdir(root)  # noqa: PTH102
    return sum(grow(root + b"/" + name, inner) for name, inner in tree.items())


@settings(deadline=None, max_examples=60)
@given(TREES.filter(lambda tree: tree is not None))
def test_any_tree_comes_in_the_order_of_its_paths(tree):
    with tempfile.TemporaryDirectory() as place:
        count = grow(os.fsencode(place) + b"/in", tree)
        found = paths(Folder(Path(place, "in")))
        assert found == sorted(found, key=order_of)
        assert len(set(found)) == len(found) == count
        assert all(on_disk(path).is_file() for path in found)


def test_names_that_begin_alike_are_in_order(tmp_path):
    fill(
        tmp_path,
        "a/x.png",
        "a.png",
        "a-b/x.png",
        "a b.png",
        "a!/x.png",
        "a.png.d/x.png",
        "A.PNG",
        "a/0/x.png",
        "a\n/x.png",
    )
    assert below(tmp_path, Folder(tmp_path)) == [
        "A.PNG", "a/0/x.png", "a/x.png", "a\n/x.png", "a b.png", "a!/x.png", "a-b/x.png", "a.png", "a.png.d/x.png",
    ]  # fmt: skip


def test_links_lead_to_each_folder_once_and_loops_end(tmp_path):
    fill(tmp_path, "in/c/x.png", "in/d/y.png", "out/z.png", "in/one.png")
    root = tmp_path / "in"
    (root / "b").symlink_to("c")
    (root / "d" / "up").symlink_to("..")
    (root / "far").symlink_to(tmp_path / "out")
    (root / "self.png").symlink_to("self.png")
    (root / "gone.png").symlink_to("nowhere")
    (root / "gone").symlink_to("nowhere")
    (root / "two.png").symlink_to("one.png")
    entries = {entry.path.removeprefix(f"{root}/"): entry for entry in Folder(root)}
    assert list(entries) == ["b/x.png", "d/y.png", "far/z.png", "gone.png", "one.png", "self.png", "two.png"]
    assert "No such file" in reason(entries["gone.png"])
    assert "symbolic links" in reason(entries["self.png"])
    assert entries["two.png"].read(99) == b"in/one.png"
    assert (entries["one.png"].size, entries["one.png"].mtime) == (10, (root / "one.png").stat().st_mtime)


def test_hidden_files_are_left_out_and_endings_may_be_in_capitals(tmp_path):
    fill(
        tmp_path,
        ".x.png",
        ".in/x.png",
        "in/.x/y.png",
        "in/.png",
        "in/X.JPeG",
        "in/x.tif",
        "in/png",
        "in/x.txt",
        "in/x.png.bak",
    )
    assert below(tmp_path, Folder(tmp_path)) == ["in/X.JPeG", "in/x.tif"]
    assert below(tmp_path, source_of(f"{tmp_path}/.in", MOST)) == [".in/x.png"]


def test_pipes_and_sockets_are_entries_that_cannot_be_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        (tmp_path / "a.png").mkdir()
        entries = list(Folder(tmp_path))
        assert len(entries) == 3
        for entry in entries:
            reason(entry)


def test_a_folder_that_cannot_be_listed_is_an_entry_with_its_reason(tmp_path, monkeypatch):
    fill(tmp_path, "a.png", "b/x.png", "b/y.png", "c/z.png", "d/w.png")
    listing = os.scandir

    class Breaks:
        """A disk that breaks while a folder is listed, as no test can have one."""

        def __init__(self, folder):
            self.listed = listing(folder)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.listed.close()

        def __iter__(self):
            yield next(self.listed)
            raise OSError(5, "Input/output error")

    def refusing(folder):
        if folder.name == "c":
            raise PermissionError(13, "Permission denied")
        return Breaks(folder) if folder.name == "b" else listing(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    entries = {entry.path.removeprefix(f"{tmp_path}/"): entry for entry in Folder(tmp_path)}
    assert list(entries) == ["a.png", "b", "c", "d/w.png"]
    assert (reason(entries["b"]), reason(entries["c"])) == ("Input/output error", "Permission denied")


def test_folders_may_be_deeper_than_calls(tmp_path):
    # Not as deep as the interpreter's own limit, or pytest could not delete them.
    depth, limit = 400, sys.getrecursionlimit()
    place = tmp_path / "/".join("d" * depth)
    place.mkdir(parents=True)
    (place / "x.png").write_bytes(b"deep")
    sys.setrecursionlimit(300)
    try:
        (entry,) = Folder(tmp_path / "d")
    finally:
        sys.setrecursionlimit(limit)
    assert entry.path == f"{place}/x.png"
    assert entry.read(9) == b"deep"


def test_a_folder_of_very_many_names_takes_little_memory(tmp_path, monkeypatch):
    names = [f"{i:060}.png" for i in range(12_000)]
    random.Random(0).shuffle(names)
    (tmp_path / "first").write_bytes(b"")
    for name in names:
        os.link(tmp_path / "first", tmp_path / name)
    monkeypatch.setattr("anomaly_vae.sources.in_order", partial(external_sort.in_order, most=500))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    tracemalloc.start()
    try:
        listing = iter(Folder(tmp_path))
        assert Path(next(listing).path).name == min(names)
        count = 1 + sum(1 for _ in listing)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == len(names)
    assert peak < 600_000
    listing = iter(Folder(tmp_path))
    next(listing)
    del listing
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize(("pattern", "found"), [
    ("in/*.png", ["in/a.png", "in/b[1].png"]),
    ("in/**/*.png", ["in/a.png", "in/b[1].png", "in/b/c/d.png", "in/sub/e.png"]),
    ("in/?[ab]*.jpg", ["in/xa.jpg", "in/xb1.jpg"]),
    ("in/?[!ab]*.jpg", ["in/xc.jpg"]),
    ("in/*/?.png", ["in/sub/e.png"]),
    ("i[n]/s*/**", ["in/sub/e.png", "in/sub/f.txt"]),
    ("in/b[1].png", ["in/b[1].png"]),
    ("in/b[[]1].png", ["in/b[1].png"]),
    ("i?/l*/e.png", ["in/link/e.png"]),
    ("in/*.gif", []),
    ("in/[z", []),
])  # fmt: skip
def test_a_pattern_chooses_files(tmp_path, monkeypatch, pattern, found):
    fill(tmp_path, "in/a.png", "in/b[1].png", "in/b/c/d.png", "in/sub/e.png", "in/sub/f.txt", "in/xa.jpg", "in/xb1.jpg",
         "in/xc.jpg", "in/.h.png", "in/.d/x.png")  # fmt: skip
    (tmp_path / "in" / "link").symlink_to("sub")
    monkeypatch.chdir(tmp_path)
    expected = sorted(found, key=order_of)
    # Each folder once, by its first path: here that of the link.
    if pattern in ("in/**/*.png", "in/*/?.png"):
        expected = sorted((path.replace("sub/", "link/") for path in found), key=order_of)
    assert paths(source_of(pattern, MOST)) == expected
    assert below(tmp_path, source_of(f"{tmp_path}/{pattern}", MOST)) == expected


def test_a_pattern_does_not_look_where_nothing_can_be(tmp_path, monkeypatch):
    fill(tmp_path, "in/a/x.png", "in/b/deep/y.png", "in/b/z.png")
    looked = []
    listing = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: looked.append(folder.name) or listing(folder))
    assert below(tmp_path, Pattern(tmp_path / "in" / "b*" / "*.png")) == ["in/b/z.png"]
    assert looked == ["in", "b"]


@pytest.mark.parametrize(("place", "says"), [
    ("missing", "missing does not exist; give a folder, a pattern"),
    ("missing/*.png", "missing is no folder; mend the pattern"),
    ("in/a**b/*.png", "can only be an entire path component"),
    ("in/x.bin", "is no source of pictures; give a folder"),
    ("x" * 300, "File name too long; give a folder"),
    ("~nobody-of-this-name/in", "home directory; give a folder"),
    ("in/caf\udce9", r"caf\\xe9 does not exist"),
    ("foo://bar/in", "Protocol not known: foo; known are s3://"),
])  # fmt: skip
def test_a_place_that_is_no_source_is_refused_in_one_line(tmp_path, monkeypatch, place, says):
    fill(tmp_path, "in/x.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=says) as caught:
        source_of(place, MOST)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_one_picture_is_a_source_too_and_a_url_may_be_a_file(tmp_path):
    fill(tmp_path, "x.PNG")
    assert paths(source_of(f"{tmp_path}/x.PNG", MOST)) == [f"{tmp_path}/x.PNG"]
    assert paths(source_of(f"file://{tmp_path}", MOST)) == [f"{tmp_path}/x.PNG"]


def listed(tmp_path, raw):
    (tmp_path / "list.txt").write_bytes(raw)
    return paths(source_of(f"{tmp_path}/list.txt", MOST))


@pytest.mark.parametrize(("raw", "expected"), [
    (b"a.png\nb.png\n", ["a.png", "b.png"]),
    (b"a.png\nb.png", ["a.png", "b.png"]),
    (b"a.png\r\nb.png\r\n", ["a.png", "b.png"]),
    (b"\n\na.png\n\r\n\nb.png\n\n", ["a.png", "b.png"]),
    (b"a.png\0b\n.png\0", ["a.png", "b\n.png"]),
    (b"b\n.png\0a.png", ["b\n.png", "a.png"]),
    (b"a\r\0b.png\0\0", ["a\r", "b.png"]),
    (b"a.png\na.png\n", ["a.png", "a.png"]),
    (b"\xef\xbb\xbfa.png\n", ["a.png"]),
    (b"caf\xe9.png\n~x.png\n a.png \n", [r"caf\xe9.png", "~x.png", " a.png "]),
    (b"", []),
    (b"\n", []),
])  # fmt: skip
def test_a_list_has_a_path_on_each_line_or_before_each_nul(tmp_path, raw, expected):
    assert listed(tmp_path, raw) == expected


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.sampled_from([b"\n", b"\r\n", b"\0"]), st.booleans())
def test_names_lie_across_the_edges_of_what_is_read_at_once(tmp_path, seed, end, ended):
    draw = random.Random(seed)
    inside = "\n" if end == b"\0" else "é"
    names = [f"{i}{inside * draw.randint(0, 1)}{'x' * draw.randint(1, 3000)}.png" for i in range(150)]
    raw = end.join(name.encode() for name in names) + end * ended
    assert len(raw) > 1 << 17
    assert listed(tmp_path, raw) == names


@pytest.mark.parametrize(("raw", "says"), [
    ("a.png\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    (b"x" * 200_000, "is no list of files"),
    (b"a.png\n" * 20_000 + b"x" * 200_000, "is no list of files"),
])  # fmt: skip
def test_what_is_no_list_is_refused(tmp_path, raw, says):
    with pytest.raises(DataError, match=says):
        listed(tmp_path, raw)


def test_what_a_list_names_wrongly_is_an_entry_with_its_reason(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"x.png\n" * 20_000 + f"{tmp_path}\n{'y' * 300}\na\0b.png\n".encode())
    *_, folder, long, nul = FileList(str(tmp_path / "list.txt"))
    assert reason(folder) == "Is a directory"
    assert reason(long) == "File name too long"
    assert "null byte" in reason(nul)


def test_a_list_and_its_paths_are_what_a_scan_must_find_unchanged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "list.txt", "in/x")
    first = source_of("list.txt", MOST).identity
    assert source_of(str(tmp_path / "list.txt"), MOST).identity == first
    monkeypatch.chdir(tmp_path / "in")
    assert source_of(str(tmp_path / "list.txt"), MOST).identity != first, "its relative paths are others"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_bytes(b"other")
    assert source_of("list.txt", MOST).identity != first


def test_a_list_that_is_gone_is_told(tmp_path):
    fill(tmp_path, "list.txt")
    source = source_of(f"{tmp_path}/list.txt", MOST)
    (tmp_path / "list.txt").unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(source)


@contextmanager
def standard_input():
    """Another one, as what writes into it."""
    reading, writing = os.pipe()
    before = os.dup(0)
    os.dup2(reading, 0)
    os.close(reading)
    try:
        with os.fdopen(writing, "wb", buffering=0) as given:
            yield given
    finally:
        os.dup2(before, 0)
        os.close(before)


@pytest.mark.parametrize(("pieces", "expected"), [
    ([b"a.png\n", b"b", b".png\nc.png"], [["a.png"], [], ["b.png", "c.png"]]),
    ([b"a", b".png\r", b"\n", b"caf\xe9.png\n"], [[], [], ["a.png"], [r"caf\xe9.png"]]),
    ([b"a\n.png\0", b"b.png\0c", b".png\0"], [["a\n.png"], ["b.png"], ["c.png"]]),
    ([b"\xef", b"\xbb", b"\xbfa.png\n", b"\n\n", b"b.png"], [[], [], ["a.png"], [], ["b.png"]]),
    ([b"\xef", b"a.png\n"], [[], [r"\xefa.png"]]),
])  # fmt: skip
def test_each_line_of_standard_input_counts_as_soon_as_it_is_there(pieces, expected):
    with standard_input() as given, Trickle(iter(source_of("-", MOST)), patience=0.01) as coming:
        for piece, names in zip(pieces, expected, strict=True):
            given.write(piece)
            if piece is pieces[-1]:
                given.close()
            found = []
            while len(found) < len(names):
                found += [entry.path for entry in coming.take(len(names) - len(found))]
            assert found == names
            if not names:
                time.sleep(0.05)  # so that pieces are read apart
        assert coming.take(1) == []


def test_a_nul_that_comes_too_late_in_a_pipe_is_told(tmp_path):
    with standard_input() as given:
        names = iter(source_of("-", MOST))
        given.write(b"a.png\nb.png\n")
        assert [next(names).path, next(names).path] == ["a.png", "b.png"]
        given.write(b"c.png\0d.png\0")
        with pytest.raises(DataError, match="an end of line before its first NUL"):
            next(names)
