"""Archives as sources: every picture an entry, damage an entry with its reason, and nothing is written anywhere."""

import bz2
import gzip
import io
import lzma
import random
import subprocess
import tarfile
import tracemalloc
import zipfile

import pytest

from anomaly_vae.sources import source_of

MOST = 3 << 20


def told(place, most=MOST):
    """By the path inside the archive, the bytes of each entry or why there are none."""
    found = {}
    for entry in source_of(str(place), most):
        name = entry.path.removeprefix(f"{place}/")
        assert name not in found, "a path is one entry's"
        entry.path.encode()
        try:
            found[name] = entry.read(most + 1)
        except OSError as error:
            found[name] = error.strerror or pytest.fail("a row would say None")
    return found


def zipped(place, members, how=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(place, "w", how) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return place


def tarred(place, members, mode="w", **how):
    """Members are names with bytes, or what `tarfile` calls a member."""
    with tarfile.open(place, mode, **how) as archive:
        for name, data in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(data))
    return place


NAMES = [
    "b/2.png",
    "a.JPG",
    ".h.png",
    "b/.d/x.png",
    "n.txt",
    "inner.zip",
    "/abs.png",
    "../up.png",
    "./dot.png",
    "é\n\\.png",
]
SHOWN = ["b/2.png", "a.JPG", "/abs.png", "../up.png", "./dot.png", "é\n\\\\.png"]


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_is_read_where_it_lies(tmp_path, monkeypatch, how):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    place = zipped(tmp_path / "x.ZIP", [("folder.png/", b""), *((name, name.encode()) for name in NAMES)], how)
    found = told(place)
    assert list(found) == SHOWN
    assert found["b/2.png"] == b"b/2.png"
    assert found["é\n\\\\.png"] == "é\n\\.png".encode()
    assert {path.name for path in tmp_path.rglob("*")} == {"cwd", "x.ZIP"}


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_a_tar_is_read_where_it_lies(tmp_path, monkeypatch, ending):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    kind = {"tar": "", "tgz": "gz"}.get(ending, ending[4:])
    place = tarred(tmp_path / f"x.{ending}", [(name, name.encode()) for name in NAMES], f"w:{kind}")
    found = told(place)
    assert list(found) == SHOWN
    assert found["../up.png"] == b"../up.png"
    assert {path.name for path in tmp_path.rglob("*")} == {"cwd", f"x.{ending}"}


def test_two_members_of_one_name_are_two_entries(tmp_path):
    members = [("a.png", b"1"), ("b.png", b"x"), ("a.png", b"2"), ("a.png", b"3")]
    expected = {"a.png": b"1", "b.png": b"x", "a.png (2)": b"2", "a.png (3)": b"3"}
    with pytest.warns(UserWarning, match="Duplicate name"):
        assert told(zipped(tmp_path / "x.zip", members)) == expected
    assert told(tarred(tmp_path / "x.tar", members)) == expected


def test_names_that_are_not_utf_8(tmp_path):
    raw = zipped(tmp_path / "x.zip", [("cafXX.png", b"1"), ("YYf.png", b"2")]).read_bytes()
    # Without the flag, names are what the writer's machine had: UTF-8 where it is, bytes where it is not.
    (tmp_path / "x.zip").write_bytes(raw.replace(b"cafXX", b"caf\xe9\x82").replace(b"YYf", "éf".encode()))
    assert told(tmp_path / "x.zip") == {r"caf\xe9\x82.png": b"1", "éf.png": b"2"}
    place = tarred(tmp_path / "x.tar", [("caf\udce9.png", b"1")], format=tarfile.GNU_FORMAT, errors="surrogateescape")
    assert told(place) == {r"caf\xe9.png": b"1"}


def test_a_name_that_says_it_is_utf_8_and_is_not_breaks_the_zip_alone(tmp_path):
    raw = zipped(tmp_path / "x.zip", [("é.png", b"1")]).read_bytes()
    (tmp_path / "x.zip").write_bytes(raw.replace("é".encode(), b"\xff\xfe"))
    (path, why), *rest = told(tmp_path / "x.zip").items()
    assert (path, rest) == (str(tmp_path / "x.zip"), [])
    assert "codec can't decode" in why


def test_a_zip_tells_what_cannot_be_read_and_goes_on(tmp_path):
    data = random.Random(0).randbytes(5000)
    place = zipped(
        tmp_path / "x.zip", [("a.png", data), ("b.png", data), ("c.png", b"3"), ("d.png", b"4"), ("e.png", b"5")]
    )
    with zipfile.ZipFile(place) as archive:
        start = {one.filename: one.header_offset for one in archive.infolist()}
    raw = bytearray(place.read_bytes())
    raw[start["b.png"] + 2000] ^= 255  # the picture
    table = raw.index(b"PK\1\2")
    for name, at, value in ((b"c.png", 8, 1), (b"d.png", 10, 99)):  # encrypted; an unknown compression
        entry = raw.rindex(name) - 46
        assert entry >= table
        raw[entry + at] = value
        raw[start[name.decode()] + at - 2] = value
    place.write_bytes(raw)
    found = told(place)
    assert (found["a.png"], found["e.png"]) == (data, b"5")
    assert "Bad CRC-32" in found["b.png"]
    assert "encrypted" in found["c.png"]
    assert "compression" in found["d.png"]


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tgz", "x.tar.bz2", "x.tar.xz"])
@pytest.mark.parametrize(
    "raw", [b"", b"no archive", b"\x1f\x8b\x08", b"PK\3\4" + b"x" * 600, b"\0" * 100, b"BZh9" + b"\0" * 20]
)
def test_what_is_no_archive_is_one_entry_with_its_reason(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    found = told(tmp_path / name)
    assert list(found) == [str(tmp_path / name)]
    assert isinstance(found[str(tmp_path / name)], str)


@pytest.mark.parametrize("kind", ["", "gz", "bz2", "xz"])
def test_a_tar_that_is_cut_or_damaged_never_seems_whole(tmp_path, kind):
    draw = random.Random(1)
    members = [(f"{i}.png", draw.randbytes(700)) for i in range(12)]
    raw = tarred(tmp_path / "x.tar", members, f"w:{kind}").read_bytes()
    data = dict(members)
    place = tmp_path / "x.tar"
    whole = 12 * (512 + 1024)
    ends = [draw.randrange(len(raw) if kind else whole) for _ in range(25)] + [
        0,
        512,
        1536,
        1537,
        whole if not kind else 40,
    ]
    for end in ends:
        place.write_bytes(raw[:end])
        found = told(place)
        assert isinstance(found.pop(str(place)), str), end
        assert found.items() <= data.items()
    for at in (
        [draw.randrange(len(raw)) for _ in range(25)] if kind else [i * 1536 + draw.randrange(500) for i in range(12)]
    ):
        broken = bytearray(raw)
        broken[at] ^= 1 << draw.randrange(8)
        place.write_bytes(broken)
        found = told(place)
        # A flag of the outer header of gzip, its time or its system, damages nothing.
        assert (str(place) in found and isinstance(found[str(place)], str)) or (kind == "gz" and at < 10), at


@pytest.mark.parametrize(("kind", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_streams_may_stand_one_behind_the_other(tmp_path, kind, pack):
    """As programs that compress in parallel leave them."""
    members = [(f"{i}.png", b"%d" % i) for i in range(30)]
    raw = tarred(tmp_path / "plain", members).read_bytes()
    place = tmp_path / f"x.tar.{kind}"
    place.write_bytes(b"".join(pack(raw[i : i + 5000]) for i in range(0, len(raw), 5000)))
    assert told(place) == dict(members)


def test_links_and_devices_in_a_tar_are_told_not_lost(tmp_path):
    def member(name, kind, link=""):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        return info, b""

    place = tarred(tmp_path / "x.tar", [
        ("a.png", b"1"), member("hard.png", tarfile.LNKTYPE, "a.png"), member("soft.png", tarfile.SYMTYPE, "a.png"),
        member("pipe.png", tarfile.FIFOTYPE), member("device.png", tarfile.CHRTYPE), member("d.png", tarfile.DIRTYPE),
        member("notes", tarfile.SYMTYPE, "/etc/passwd"), ("b.png", b"2"),
    ])  # fmt: skip
    link, other = "a link within the archive; unpack it to scan it", "not a plain file"
    assert told(place) == {
        "a.png": b"1", "hard.png": link, "soft.png": link, "pipe.png": other, "device.png": other, "b.png": b"2",
    }  # fmt: skip


def test_sparse_members_are_read_with_their_holes(tmp_path):
    with (tmp_path / "s.png").open("wb") as file:
        file.write(b"begin")
        file.seek(1 << 20)
        file.write(b"end")
    subprocess.run(["tar", "-C", tmp_path, "--sparse", "-cf", tmp_path / "x.tar", "s.png"], check=True)
    assert (tmp_path / "x.tar").stat().st_size < 100_000
    assert told(tmp_path / "x.tar")["s.png"] == (tmp_path / "s.png").read_bytes()


def test_huge_members_take_bounded_memory(tmp_path):
    """A small archive may hold gigabytes, and many pictures wait at a time."""
    big = tarfile.TarInfo("big.png")
    big.size = 256 << 20
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", compresslevel=1) as archive, open("/dev/zero", "rb") as zeros:  # noqa: PTH123
        archive.addfile(big, zeros)
        for i in range(30):
            one = tarfile.TarInfo(f"{i}.png")
            one.size = MOST
            archive.addfile(one, zeros)
    tracemalloc.start()
    try:
        entries = list(source_of(str(tmp_path / "x.tar.gz"), MOST))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * MOST
    assert entries[0].size == 256 << 20
    assert [len(entry.read(MOST + 1)) for entry in entries] == [MOST + 1] + [MOST] * 30
    assert entries[5].read(10) == entries[5].read(10) == bytes(10)
    entries.clear()
    place = zipped(tmp_path / "x.zip", [("big.png", bytes(64 << 20))])
    tracemalloc.start()
    try:
        (entry,) = source_of(str(place), MOST)
        assert len(entry.read(MOST + 1)) == MOST + 1
        assert tracemalloc.get_traced_memory()[1] < 4 * MOST
    finally:
        tracemalloc.stop()


def test_nonsense_in_headers_is_no_nonsense_in_rows(tmp_path):
    def header(**about):
        one = tarfile.TarInfo("a.png")
        one.pax_headers = about
        return one, b""

    for about, expected in (({"mtime": "nan"}, None), ({"mtime": "inf"}, None), ({"mtime": "12.5"}, 12.5)):
        (entry,) = source_of(str(tarred(tmp_path / "x.tar", [header(**about)])), MOST)
        assert entry.mtime == expected
    for size in ("-512", "-1000000", str(1 << 70)):
        found = told(tarred(tmp_path / "x.tar", [("first.png", b"1"), header(size=size), ("b.png", b"")]))
        assert isinstance(found[str(tmp_path / "x.tar")], str), size


@pytest.mark.parametrize("ending", ["zip", "tar"])
def test_no_damage_whatever_stops_a_scan(tmp_path, ending):
    draw = random.Random(2)
    members = [(f"{'long' * 40}{i}é.png", draw.randbytes(60)) for i in range(4)]
    make = zipped if ending == "zip" else tarred
    raw = make(tmp_path / f"x.{ending}", members).read_bytes()
    for _ in range(600):
        broken = bytearray(raw)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(len(broken))] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, 0x2D, 0x39])
        (tmp_path / f"x.{ending}").write_bytes(broken[: draw.choice([len(broken), draw.randrange(len(broken))])])
        told(tmp_path / f"x.{ending}")


def test_an_archive_of_very_many_small_pictures(tmp_path):
    place = zipped(tmp_path / "x.zip", ((f"{i % 7}/{i}.png", b"%d" % i) for i in range(5000)), zipfile.ZIP_STORED)
    found = told(place)
    assert len(found) == 5000
    assert found[f"{4998 % 7}/4998.png"] == b"4998"
