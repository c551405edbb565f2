"""Reading archives: what went in comes out, whoever made it; what is damaged or hostile ends in one clear line."""

import gzip
import io
import random
import stat
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from dataclasses import replace

import pytest
from archiving import MAKES, bundled, tar_bomb, tarred, typed, zip_bomb, zipped

from service.archives import BLOCK, Bounds, Entry, archive_kind, entries
from service.errors import Problem

FILES = [(f"folder/{number}.png", random.Random(number).randbytes(100 + 997 * number)) for number in range(9)]
BOUNDS = Bounds(entries=100, entry_bytes=1 << 20, expanded=4 << 20, deadline=float("inf"))


def read(data: bytes, bounds: Bounds = BOUNDS) -> list[Entry]:
    kind = archive_kind(data[:BLOCK], "")
    assert kind is not None
    return list(entries(io.BytesIO(data), kind, bounds))


def contents(found: list[Entry]) -> list[tuple[str, bytes]]:
    assert all(isinstance(entry.content, bytes) for entry in found), found
    return [(entry.name, entry.content) for entry in found]


def refusal(data: bytes, bounds: Bounds = BOUNDS, kind: str | None = None) -> Problem:
    """Why an archive cannot be read to its end, in one line that names a remedy."""
    with pytest.raises(Problem) as refused:
        list(entries(io.BytesIO(data), kind or archive_kind(data[:BLOCK], ""), bounds))
    assert "\n" not in str(refused.value)
    assert any(word in str(refused.value) for word in ("send", "split", "put", "make", "store")), refused.value
    return refused.value


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
def test_what_went_in_comes_out_in_order(make):
    twice = [*FILES, FILES[0], ("empty.png", b""), ("ünï/ço dé.png", b"1"), ("a/" * 60 + "b.png", b"2")]
    assert contents(read(make(twice))) == twice


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_may_be_long(form):
    files = [("x" * 300 + ".png", b"1"), ("y/" * 200 + "z.png", b"2")]
    assert contents(read(tarred(files, form))) == files
    assert len(read(tarred([("x" * 5000, b"")], form))[0].name) == 1024


def test_names_are_shown_and_nothing_else():
    names = [
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\Windows\\a.png",
        "./a.png",
        "a//../b.png",
        "new\nline.png",
        "~root",
    ]
    assert [entry.name for entry in read(tarred((name, b"") for name in names))] == names
    assert [entry.name for entry in read(zipped((name, b"") for name in names))] == names
    (entry,) = read(bundled([(typed("bad\udcff.png", tarfile.REGTYPE), b"")], tarfile.GNU_FORMAT))
    assert entry.name == "bad\ufffd.png"


def test_only_pictures_and_their_like_are_read():
    junk = ["__MACOSX/a.png", "a/.DS_Store", ".hidden/a.png", "._a.png", "Thumbs.db", "x/desktop.ini"]
    others = [
        typed("folder", tarfile.DIRTYPE), typed("link", tarfile.SYMTYPE, "/etc/passwd"), typed("p", tarfile.FIFOTYPE),
        typed("hard", tarfile.LNKTYPE, "../../etc/shadow"), typed("sd", tarfile.BLKTYPE), typed("t", tarfile.CHRTYPE),
    ]  # fmt: skip
    members = [(info, b"") for info in others] + [(tarfile.TarInfo(name), b"123") for name in [*junk, "a.png"]]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        assert contents(read(bundled(members, form))) == [("a.png", b"123")]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.mkdir("folder")
        for name in [*junk, "a.png"]:
            archive.writestr(name, b"123")
    assert contents(read(file.getvalue())) == [("a.png", b"123")]
    assert refusal(tarred((name, b"") for name in junk)).code == "empty_archive"
    assert refusal(zipped([])).code == "empty_archive"
    assert refusal(bytes(10240), kind="tar").code == "empty_archive"


def with_flag(data: bytes, flag: int) -> bytes:
    """A zip whose second entry has a flag in the directory."""
    place = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4) + 8
    return data[:place] + struct.pack("<H", flag) + data[place + 2 :]


def sparse(extended: bool) -> bytes:
    """An old sparse file, with or without more blocks of its map, between two others."""
    block = bytearray(typed("b", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"00000001000\0"
    block[482] = extended
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return tarred([("a", b"1")])[:1024] + bytes(block) + bytes(512) * extended + bytes(512) + tarred([("c", b"3")])


DEFLATED = (zlib.compress(b"2" * 99, wbits=-zlib.MAX_WBITS)[:2], b"\x07\x07")  # and a block of a type there is not
DAMAGED = {
    "encrypted_entry": with_flag(zipped([("a", b"1"), ("b", b"2"), ("c", b"3")]), 1),
    "too_large": zipped([("a", b"1"), ("b", bytes(1 << 21)), ("c", b"3")]),
    "too_large in a tar": tarred([("a", b"1"), ("b", bytes(1 << 21)), ("c", b"3")]),
    "too_large in a tar.gz": gzip.compress(tarred([("a", b"1"), ("b", bytes(1 << 21)), ("c", b"3")])),
    "bad_entry: checksum": zipped([("a", b"1"), ("b", b"two"), ("c", b"3")], zipfile.ZIP_STORED).replace(
        b"two", b"2wo"
    ),
    "bad_entry: deflate": zipped([("a", b"1"), ("b", b"2" * 99), ("c", b"3")]).replace(*DEFLATED),
    "bad_entry: patched": with_flag(zipped([("a", b"1"), ("b", b"2"), ("c", b"3")]), 32),
    "bad_entry: names": zipped([("a", b"1"), ("b", b"2"), ("c", b"3")]).replace(b"b", b"x", 1),
    "bad_entry: sparse": sparse(False),
    "bad_entry: sparse, a longer map": sparse(True),
}
for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
    a, b, c = ((name, method if name == "b" else zipfile.ZIP_STORED) for name in "abc")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, way in (a, b, c):
            archive.writestr(name, {"a": b"1", "b": b"2", "c": b"3"}[name], way)
    DAMAGED[f"bad_entry: method {method}"] = file.getvalue()


@pytest.mark.parametrize("named", DAMAGED)
def test_a_bad_entry_does_not_disturb_its_neighbours(named):
    first, second, third = read(DAMAGED[named])
    assert contents([first, third]) == [("a", b"1"), ("c", b"3")]
    assert isinstance(second.content, Problem)
    assert second.content.code == named.split()[0].rstrip(":")
    assert ";" in str(second.content)


def test_a_pax_sparse_file_is_one_too():
    info = tarfile.TarInfo("GNUSparseFile.0/b")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b"}
    entry, after = read(bundled([(info, b"0\n"), (tarfile.TarInfo("c"), b"3")]))
    assert (entry.name, entry.content.code, after.content) == ("b", "bad_entry", b"3")


@pytest.mark.parametrize("make", ["zip, deflated", "tar, pax", "tar.gz"])
def test_cut_off_anywhere_it_is_a_bad_archive_and_what_came_is_right(make):
    data = MAKES[make](FILES)
    whole = len(data) if make != "tar, pax" else len(data.rstrip(b"\0")) + 512
    for length in [*range(520, whole, 997), whole - 1]:
        found: list[Entry] = []
        coming = entries(io.BytesIO(data[:length]), archive_kind(data[:BLOCK], ""), BOUNDS)
        with pytest.raises(Problem) as refused:
            found.extend(coming)
        assert refused.value.code == "bad_archive"
        assert contents(found) == FILES[: len(found)]


@pytest.mark.parametrize("make", MAKES)
def test_whatever_is_damaged_nothing_but_a_problem_comes_of_it(make):
    data, chance = MAKES[make]([*FILES[:3], ("l/" * 70 + "l", b"long")]), random.Random(0)
    ended = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 3, 30])):
            # Mostly where structure is: at the start and the end.
            place = chance.choice([chance.randrange(len(data)), -1 - chance.randrange(300), chance.randrange(600)])
            damaged[place] = chance.choice([0, 255, chance.randrange(256)])
        try:
            list(entries(io.BytesIO(damaged), "zip" if "zip" in make else make[:6].split(",")[0], BOUNDS))
        except Problem:
            ended += 1
    assert ended


def test_garbage_after_the_magic_is_a_bad_archive():
    noise = random.Random(0).randbytes(5000)
    for magic, kind in ((b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"), (b"\x1f\x8b\x08\0", "tar.gz")):
        assert archive_kind(magic + noise[:BLOCK], "application/octet-stream") == kind
        assert refusal(magic + noise).code == "bad_archive"
    assert refusal(noise, kind="tar").code == "bad_archive"
    assert refusal(gzip.compress(noise)).code == "bad_archive"
    assert refusal(tarred(FILES)[:2048] + noise).code == "bad_archive"
    wrong = bytearray(gzip.compress(tarred(FILES) + bytes(1 << 19)))
    wrong[-6] ^= 1
    assert "check" in refusal(bytes(wrong)).message


@pytest.mark.parametrize("make", ["zip, stored", "tar, gnu", "tar.gz"])
def test_entries_are_counted_folders_and_all(make):
    hundred = [(f"{number}", b"") for number in range(99)] + [(".hidden", b"")]
    assert len(read(MAKES[make](hundred))) == 99
    refused = refusal(MAKES[make]([*hundred, (".more", b"")]))
    assert (refused.code, refused.status) == ("too_many_entries", 413)
    assert "100" in refused.message


BOMBS = {
    "zip": zip_bomb(8, 1),
    "zip, wrong checksums": zip_bomb(8, 1).replace(struct.pack("<L", zlib.crc32(bytes(1 << 20))), bytes(4)),
    "tar.gz": tar_bomb(300),
    "tar.gz, a link's data": tar_bomb(300, b"Z"),
    "tar.gz, entry by entry": gzip.compress(tarred((str(number), bytes(1 << 20)) for number in range(8))),
    "tar.gz, after the end": gzip.compress(tarred([("a", b"")]) + bytes(64 << 20)),
    "tar.gz, in a header": tar_bomb(300, tarfile.XHDTYPE),
    "tar.gz, in a long name": tar_bomb(300, tarfile.GNUTYPE_LONGNAME),
    "tar, in a header": tarred([("x" * (1 << 20), b"")]),
    "tar, header upon header": typed("g", tarfile.XGLTYPE).tobuf() * 20_000,
    "zip, directory": zipped((f"{number}" * 20, b"") for number in range(20_000)),
}


@pytest.mark.parametrize("named", BOMBS)
def test_bombs_are_stopped_before_they_fill_the_memory(named):
    tracemalloc.start()
    try:
        for _ in range(2):
            try:
                for entry in entries(io.BytesIO(BOMBS[named]), named.split(",")[0], BOUNDS):
                    assert isinstance(entry.content, Problem) or len(entry.content) <= BOUNDS.entry_bytes
                code = None
            except Problem as problem:
                code = problem.code
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20
    expected = {"header": "bad_archive", "name": "bad_archive", "directory": "too_many_entries", "end": None}
    assert code == next((code for word, code in expected.items() if word in named), "expands_too_much")


def test_an_honest_archive_may_expand_up_to_its_bound():
    for make in ("zip, deflated", "tar.gz"):
        data = MAKES[make]([("a", bytes(1 << 20)), ("b", bytes(1 << 20))])
        assert len(read(data, replace(BOUNDS, expanded=(2 << 20) + 8192))) == 2
        assert refusal(data, replace(BOUNDS, expanded=(2 << 20) - 1)).code == "expands_too_much"


def test_the_deadline_ends_a_long_way_between_two_entries():
    for make in ("tar, pax", "tar.gz", "zip, stored"):
        assert refusal(MAKES[make](FILES), replace(BOUNDS, deadline=time.monotonic())).code == "deadline_exceeded"


@pytest.mark.parametrize(
    ("head", "content_type", "kind"),
    [
        (b"PK\x03\x04", "", "zip"),
        (b"\x1f\x8b\x08", "application/octet-stream", "tar.gz"),
        (b"\x1f\x8b\x08", "application/x-tar", "tar.gz"),
        (tarred(FILES)[:BLOCK], "application/x-www-form-urlencoded", "tar"),
        (tarred(FILES)[:BLOCK], "image/png", None),
        (b"PK\x03\x04", "multipart/form-data", None),
        (b"\x89PNG", "", None),
        (b"\x89PNG", "application/zip", "zip"),
        (bytes(BLOCK), "", None),
        (b"", "", None),
    ],
)
def test_what_a_body_is(head, content_type, kind):
    assert archive_kind(head, content_type) == kind


@pytest.mark.parametrize(
    "magic", [b"BZh91AY", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07"]
)
def test_other_archives_are_refused_by_name(magic):
    with pytest.raises(Problem, match="send a zip, a tar") as refused:
        archive_kind(magic, "")
    assert refused.value.code == "unsupported_archive"
