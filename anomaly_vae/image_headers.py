"""Image headers, read by hand before a decoder sees the file, and files reduced to what makes pixels.

Size, depth and kind are judged here on numbers that cost nothing; text, profiles and further pages, which may hold
decompression bombs of their own, never reach a decoder.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from anomaly_vae.errors import BadImage
from anomaly_vae.image_sniffing import SEND, corrupt, sniff, truncated, unsupported_depth, variant

_MAX_PARTS = 100_000  # segments, chunks, blocks or strips of one file; more serve only to keep a reader busy
_MAX_SCANS = 128  # each scan of a progressive JPEG passes over all pixels; encoders write about ten
_MAX_GIF_PREAMBLE = 2**22


@dataclass(frozen=True)
class ImageInfo:
    """What the header says: `width` and `height` as displayed (after EXIF orientation), `bit_depth` of one sample."""

    format: str
    width: int
    height: int
    mode: str
    bit_depth: int


class Header(NamedTuple):
    """`ImageInfo` with the stored width and height, and what decoding must know besides."""

    format: str
    width: int
    height: int
    mode: str
    bit_depth: int
    orientation: int = 1
    inverted: bool = False  # CMYK as Adobe stores it; deep TIFFs in which 0 is white
    colour_key: tuple[int, ...] | None = None  # the one transparent colour of a grey or RGB PNG
    interlaced: bool = False

    @property
    def turned(self) -> bool:
        return self.orientation >= 5


def checked_header(data: bytes, max_bytes: int | None) -> Header:
    if not data:
        raise BadImage("empty", f"there are no bytes; {SEND}")
    if max_bytes is not None and len(data) > max_bytes:
        raise BadImage(
            "too_large",
            f"the file has {len(data)} bytes, more than the {max_bytes} allowed; send a smaller file or raise "
            "image.max_bytes",
        )
    kind = sniff(data)
    try:
        header = _READERS[kind](data)
    except (struct.error, IndexError):
        raise truncated(kind) from None
    if header.width < 1 or header.height < 1:
        raise corrupt(kind, f"it claims {header.width} x {header.height} pixels")
    return header


def _exif_orientation(exif: bytes) -> int:
    """Tag 274 of the first directory, 1 to 8. Damaged EXIF is common and harmless: it counts as upright."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == 274:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, content) of every segment up to the first scan."""
    position = 2
    for _ in range(_MAX_PARTS):
        marker = data[position + 1]
        if data[position] != 0xFF:
            raise corrupt("jpeg", "there is rubbish between its segments")
        if marker in (0xD9, 0xDA):
            return
        if marker == 0xFF:  # filling
            position += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # a segment without a body
            position += 2
        else:
            (length,) = struct.unpack_from(">H", data, position + 2)
            yield marker, data[position + 4 : position + 2 + length]
            position += 2 + length


def _read_jpeg(data: bytes) -> Header:
    orientation, adobe, progressive, frame = 1, False, False, b""
    for marker, content in _jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame, progressive = frame or content, progressive or marker not in (0xC0, 0xC1)
        elif marker == 0xE1 and content.startswith(b"Exif\0\0"):
            orientation = _exif_orientation(content[6:])
        elif marker == 0xEE and content.startswith(b"Adobe"):
            adobe = True
    if not frame:
        raise corrupt("jpeg", "it has no frame header")
    if progressive and data.count(b"\xff\xda") > _MAX_SCANS:
        raise variant("jpeg", f"has more than {_MAX_SCANS} scans")
    depth, height, width, components = struct.unpack_from(">BHHB", frame)
    if depth != 8:
        raise unsupported_depth("jpeg", f"{depth}-bit")
    mode = {1: "grey", 3: "rgb", 4: "cmyk"}.get(components)
    if mode is None:
        raise variant("jpeg", f"has {components} components")
    return Header("jpeg", width, height, mode, depth, orientation, inverted=adobe and mode == "cmyk")


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes, int]]:
    """(kind, content, checksum) of every chunk up to IEND; `truncated` when IEND never comes."""
    chunks = []
    position = 8
    for _ in range(_MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, position)
        content = data[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, position + 8 + length)
        chunks.append((kind, content, checksum))
        position += 12 + length
        if kind == b"IEND":
            return chunks
    raise variant("png", f"has more than {_MAX_PARTS} chunks")


_PNG_MODES = {0: "grey", 2: "rgb", 3: "palette", 4: "grey_alpha", 6: "rgba"}
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def _read_png(data: bytes) -> Header:
    length, kind, width, height, depth, colour, _, _, interlace = struct.unpack_from(">I4sIIBBBBB", data, 8)
    if kind != b"IHDR" or length != 13 or colour not in _PNG_MODES or depth not in (1, 2, 4, 8, 16):
        raise corrupt("png", "its header is damaged")
    orientation, key = 1, None
    for kind, content, _ in _png_chunks(data):
        if kind == b"eXIf":
            orientation = _exif_orientation(content)
        elif kind == b"tRNS" and colour in (0, 2):
            samples = struct.unpack_from(f">{_PNG_SAMPLES[colour]}H", content)
            key = tuple(value >> 8 if depth == 16 else value * 255 // (2**depth - 1) for value in samples)
    return Header(
        "png", width, height, _PNG_MODES[colour], depth, orientation, colour_key=key, interlaced=bool(interlace)
    )


def clean_png(data: bytes) -> bytes:
    """Only the chunks that make pixels, each checked: no text or profile (these may inflate without end)."""
    parts = [data[:8]]
    for kind, content, checksum in _png_chunks(data):
        if kind not in (b"IHDR", b"PLTE", b"IDAT", b"IEND") and not (kind == b"tRNS" and data[25] == 3):
            continue
        if zlib.crc32(content, zlib.crc32(kind)) != checksum:
            raise corrupt("png", f"the checksum of its {kind.decode()} chunk is wrong")
        parts.append(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum))
    return b"".join(parts)


_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def require_all_rows(data: bytes, header: Header, picture: Image.Image) -> None:
    """Pillow leaves rows that a finished but too short stream lacks at zero, silently; count the bytes in that case."""
    last = picture.crop((0, header.height - 1, header.width, header.height))
    if not header.interlaced and last.getbbox(alpha_only=False) is not None:
        return
    bits = header.bit_depth * _PNG_SAMPLES[data[25]]
    missing = 0
    for x, y, dx, dy in _ADAM7 if header.interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(header.width - x) // dx), -(-(header.height - y) // dy)
        missing += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    stream = zlib.decompressobj()
    rest = b"".join(content for kind, content, _ in _png_chunks(data) if kind == b"IDAT")
    while missing > 0:
        piece = stream.decompress(rest, min(missing, 2**20))
        if not piece:
            raise truncated("png")
        rest = stream.unconsumed_tail
        missing -= len(piece)


def _read_webp(data: bytes) -> Header:
    (size,) = struct.unpack_from("<I", data, 4)
    if size + 8 > len(data):
        raise truncated("webp")
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
        return Header("webp", width, height, "rgb", 8)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        mode = "rgba" if bits >> 28 & 1 else "rgb"
        return Header("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, mode, 8)
    if kind != b"VP8X":
        raise corrupt("webp", "its first chunk is unknown")
    flags = data[20]
    width, height = (1 + int.from_bytes(data[start : start + 3], "little") for start in (24, 27))
    orientation = _exif_orientation(_webp_exif(data)) if flags & 8 else 1
    return Header("webp", width, height, "rgba" if flags & 16 else "rgb", 8, orientation)


def _webp_exif(data: bytes) -> bytes:
    position = 12
    for _ in range(_MAX_PARTS):
        kind, length = data[position : position + 4], data[position + 4 : position + 8]
        if not kind:
            break
        size = int.from_bytes(length, "little")
        if kind == b"EXIF":
            return data[position + 8 : position + 8 + size].removeprefix(b"Exif\0\0")
        position += 8 + size + size % 2
    return b""


def _read_gif(data: bytes) -> Header:
    """Walk to the first frame: like Pillow, the picture grows to hold a frame that leaves the screen."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while position < _MAX_GIF_PREAMBLE:
        block = data[position]
        if block == 0x2C:
            x, y, columns, rows = struct.unpack_from("<HHHH", data, position + 1)
            return Header("gif", max(width, x + columns), max(height, y + rows), "palette", 8)
        if block == 0x3B:
            raise corrupt("gif", "it has no frame")
        if block == 0x21:
            position += 2
            while data[position]:
                position += 1 + data[position]
        position += 1
    raise variant("gif", f"has more than {_MAX_GIF_PREAMBLE} bytes before its first frame")


def _read_bmp(data: bytes) -> Header:
    (size,) = struct.unpack_from("<I", data, 14)
    compression = 0
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
    elif size in (40, 52, 56, 64, 108, 124):
        width, height, _, bits, compression = struct.unpack_from("<IiHHI", data, 18)
    else:
        raise corrupt("bmp", "its header has no known length")
    if compression not in (0, 3):
        raise variant("bmp", "is compressed")
    if bits not in (1, 4, 8, 16, 24, 32):
        raise unsupported_depth("bmp", f"{bits}-bit")
    return Header("bmp", width, abs(height), "palette" if bits <= 8 else "rgb", min(bits, 8))


_TIFF_SIZES = {1: 1, 3: 2, 4: 4, 7: 1}  # byte, short, long, undefined
# What makes pixels: all else (text, EXIF, private tags, further pages) never reaches the decoder.
_TIFF_TAGS = frozenset((256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325))
_TIFF_TAGS |= {338, 339, 347, 530}


class _Directory(NamedTuple):
    order: str
    values: dict[int, tuple[int, ...]]
    entries: dict[int, bytes]


def _tiff_directory(data: bytes) -> _Directory:
    """The first directory's tags that make pixels; every value must lie within the file."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    values: dict[int, tuple[int, ...]] = {}
    entries: dict[int, bytes] = {}
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number, offset = struct.unpack_from(order + "HHII", data, entry)
        if (tag not in _TIFF_TAGS and tag != 274) or tag in values:
            continue
        if kind not in _TIFF_SIZES or number < 1:
            raise corrupt("tiff", f"tag {tag} has an impossible type")
        if number > _MAX_PARTS and kind != 7:
            raise variant("tiff", f"has more than {_MAX_PARTS} strips or tiles")
        where = entry + 8 if number * _TIFF_SIZES[kind] <= 4 else offset
        letter = {1: "B", 3: "H", 4: "I"}.get(kind)
        values[tag] = struct.unpack_from(f"{order}{number}{letter}", data, where) if letter else ()
        if tag != 274:
            entries[tag] = data[entry : entry + 12]
    return _Directory(order, values, entries)


# None, LZW, JPEG, deflate (two numbers), PackBits. Fax (2, 3, 4) is left out: damaged lines pass there unnoticed.
_TIFF_COMPRESSIONS = (1, 5, 7, 8, 32946, 32773)
_TIFF_MODES = {0: "grey", 1: "grey", 2: "rgb", 3: "palette", 5: "cmyk", 6: "rgb"}


def _read_tiff(data: bytes) -> Header:
    values = _tiff_directory(data).values
    if not values.get(256) or not values.get(257):
        raise corrupt("tiff", "it does not say its width and height")
    width, height = values[256][0], values[257][0]
    bits = max(values.get(258) or (1,))
    if set(values.get(339) or (1,)) != {1}:
        raise unsupported_depth("tiff", "floating-point, signed or complex")
    if bits not in (1, 2, 4, 8, 12, 16):
        raise unsupported_depth("tiff", f"{bits}-bit")
    white, compression = _first(values, 262, 0), _first(values, 259, 1)
    mode = _TIFF_MODES.get(white)
    if compression not in _TIFF_COMPRESSIONS or mode is None:
        raise variant("tiff", f"uses compression {compression} and photometric interpretation {white}")
    if width and height:
        _check_strips(data, values, width, height, bits)
    alpha = {"grey": "grey_alpha", "rgb": "rgba"}.get(mode) if values.get(338) else None
    orientation = _first(values, 274, 1)
    upright = orientation if 1 <= orientation <= 8 else 1
    return Header("tiff", width, height, alpha or mode, bits, upright, inverted=white == 0 and bits > 8)


def _first(values: dict[int, tuple[int, ...]], tag: int, default: int) -> int:
    found = values.get(tag)
    return found[0] if found else default


def _check_strips(data: bytes, values: dict[int, tuple[int, ...]], width: int, height: int, bits: int) -> None:
    """Refuse strips or tiles that are missing, cut or too large: Pillow would leave them black."""
    tiled = 324 in values
    columns, rows = (_first(values, 322, 0), _first(values, 323, 0)) if tiled else (width, _first(values, 278, height))
    if not columns or not rows or (tiled and columns * rows > 2**26):
        raise corrupt("tiff", "its strips or tiles have an impossible size")
    samples = _first(values, 277, 1)
    planes = samples if _first(values, 284, 1) == 2 else 1
    expected = -(-width // columns) * -(-height // rows) * planes
    offsets, sizes = values.get(324 if tiled else 273, ()), values.get(325 if tiled else 279, ())
    if len(offsets) < expected or (sizes and len(sizes) < expected):
        raise truncated("tiff")
    if any(offset + size > len(data) for offset, size in zip(offsets, sizes or (1,) * len(offsets), strict=False)):
        raise truncated("tiff")
    if _first(values, 259, 1) == 1 and (sum(sizes) if sizes else len(data)) < -(-width * bits * samples // 8) * height:
        raise truncated("tiff")


def clean_tiff(data: bytes) -> bytes:
    """The same file with one directory, at its end, of nothing but the tags that make pixels."""
    order, _, entries = _tiff_directory(data)
    padding = b"\0" * (len(data) % 2)
    header = data[:4] + struct.pack(order + "I", len(data) + len(padding))
    body = b"".join(entries[tag] for tag in sorted(entries))
    return header + data[8:] + padding + struct.pack(order + "H", len(entries)) + body + b"\0\0\0\0"


_READERS: dict[str, Callable[[bytes], Header]] = {
    "jpeg": _read_jpeg,
    "png": _read_png,
    "webp": _read_webp,
    "gif": _read_gif,
    "bmp": _read_bmp,
    "tiff": _read_tiff,
}
