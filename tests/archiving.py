"""Archives for tests: good ones of every make, and hostile ones."""

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterable

Files = Iterable[tuple[str, bytes]]


def zipped(files: Files, method: int = zipfile.ZIP_DEFLATED, zip64: bool = False) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            with archive.open(info, "w", force_zip64=zip64) as entry:
                entry.write(data)
    return file.getvalue()


def tarred(files: Files, form: int = tarfile.PAX_FORMAT) -> bytes:
    return bundled([(tarfile.TarInfo(name), data) for name, data in files], form)


def bundled(members: Iterable[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of members of any type; sizes are those of the data."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


MAKES = {
    "zip, deflated": zipped,
    "zip, stored": lambda files: zipped(files, zipfile.ZIP_STORED),
    "zip64": lambda files: zipped(files, zip64=True),
    "tar, pax": tarred,
    "tar, gnu": lambda files: tarred(files, tarfile.GNU_FORMAT),
    "tar, ustar": lambda files: tarred(files, tarfile.USTAR_FORMAT),
    "tar.gz": lambda files: gzip.compress(tarred(files)),
}


def typed(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def bomb(mebibytes: int, head: bytes = b"") -> bytes:
    """Deflated `head` and then so many mebibytes of zeros, made without deflating them all; it has no end."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + block * mebibytes


def tar_bomb(mebibytes: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar.gz with one entry of `kind` that is all of a `bomb`."""
    info = typed("big", kind)
    info.size = mebibytes << 20
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + bomb(mebibytes, info.tobuf(tarfile.GNU_FORMAT))


def zip_bomb(entries: int, mebibytes: int) -> bytes:
    """A zip of entries that each expand to so much."""
    file = io.BytesIO()
    deflated = bomb(mebibytes) + b"\x03\0"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for number in range(entries):
            archive.writestr(f"{number}.bmp", deflated)
        for info in archive.filelist:  # the directory says what they really are
            info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, mebibytes << 20
            info.CRC = zlib.crc32(bytes(mebibytes << 20))
    return file.getvalue()
