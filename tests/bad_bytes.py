"""Bytes people and programs send by mistake or malice, by name; and strange files that are nevertheless pictures."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30


def picture(mode: str = "RGB", width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A picture without symmetries, with a little texture, whose last row is not black."""
    texture = np.random.default_rng(0).uniform(-8, 8, (height, width, 3))
    y, x = np.mgrid[0:height, 0:width].astype(float)
    planes = [40 + 200 * x / width, 220 - 180 * y / height, 60 + 150 * (x + 2 * y) / (width + 2 * height)]
    return Image.fromarray((np.stack(planes, axis=-1) + texture).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes, interlaced: int = 0) -> bytes:
    """A PNG of raw (filter byte first) rows; `extra` chunks stand before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"".join((b"\x89PNG\r\n\x1a\n", png_chunk(b"IHDR", header), *extra, pixels, png_chunk(b"IEND", b"")))


def png_rows(array: np.ndarray) -> bytes:
    """Unfiltered PNG rows of an array whose samples are in big-endian order."""
    return b"".join(b"\0" + row.tobytes() for row in array)


def interlaced_rows(array: np.ndarray) -> list[bytes]:
    """The seven passes of an interlaced PNG."""
    steps = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    return [png_rows(np.ascontiguousarray(array[y::dy, x::dx])) for x, y, dx, dy in steps]


def tiff(tags: dict[int, tuple[int, Any]], pixels: bytes = b"", order: str = "<") -> bytes:
    """A TIFF of (type, value or values) by tag, pixels at offset 8."""
    letters = {1: "B", 3: "H", 4: "I"}
    entries, extra = [], b""
    start = 8 + len(pixels) + len(pixels) % 2
    after = start + 2 + 12 * len(tags) + 4
    for tag, (kind, value) in sorted(tags.items()):
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"{order}{len(values)}{letters[kind]}", *values)
        if len(packed) > 4:
            field, extra = struct.pack(order + "I", after + len(extra)), extra + packed
        else:
            field = packed.ljust(4, b"\0")
        entries.append(struct.pack(order + "HHI", tag, kind, len(values)) + field)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    body = pixels + b"\0" * (len(pixels) % 2) + struct.pack(order + "H", len(entries)) + b"".join(entries)
    return magic + struct.pack(order + "I", start) + body + b"\0\0\0\0" + extra


def tiff_tags(width: int, height: int, bits: int, size: int, **more: Any) -> dict[int, tuple[int, Any]]:
    """Tags of a grey, uncompressed TIFF in one strip."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: size}
    return {tag: (4, value) for tag, value in tags.items()}


def exif(orientation: int) -> bytes:
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 274, 3, 1, orientation, 0) + b"\0\0\0\0"


def jpeg_segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segment(jpeg: bytes, segment: bytes) -> bytes:
    return jpeg[:2] + segment + jpeg[2:]


def jpeg_frame(data: bytes, depth: int = 8, height: int = HEIGHT, width: int = WIDTH, components: int = 3) -> bytes:
    """The JPEG with another frame header."""
    at = data.index(b"\xff\xc0") + 4
    return data[:at] + struct.pack(">BHHB", depth, height, width, components) + data[at + 6 :]


def gif(screen: tuple[int, int], frame: tuple[int, int, int, int], body: bytes = b"\x08\x01\x00\x00;") -> bytes:
    palette = bytes(range(256)) * 3
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", *screen, 0xF7, 0, 0)
        + palette
        + b","
        + struct.pack("<HHHHB", *frame, 0)
        + body
    )


def valid() -> dict[str, bytes]:
    """One plain file of each format, of WIDTH x HEIGHT."""
    image = picture()
    return {
        "jpeg": encoded(image, "JPEG", quality=95, subsampling=0),
        "png": encoded(image, "PNG"),
        "webp": encoded(image, "WEBP", lossless=True),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF"),
        "gif": encoded(image, "GIF"),
    }


def bad_bytes() -> dict[str, bytes]:
    """Name -> bytes, none of which may become a picture."""
    return _no_pictures() | _other_formats() | _cut_short() | _damaged() | _bombs() | _rare_kinds()


def _no_pictures() -> dict[str, bytes]:
    return {
        "empty": b"",
        "one newline": b"\n",
        "text": b"please find the picture attached",
        "HTML page": b"<!DOCTYPE html>\n<html><body>Please log in</body></html>",
        "JSON": b'{"image": "cat.jpg"}',
        "base64 of a JPEG": b"/9j/4AAQSkZJRgABAQAAAQABAAD",
        "base64 of a PNG": b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAAB",
        "data URL": b"data:image/png;base64,iVBORw0KGgo",
        "multipart body": b"--boundary\r\nContent-Disposition: form-data\r\n\r\n",
        "ZIP archive": b"PK\x03\x04" + bytes(60),
        "gzip": b"\x1f\x8b\x08" + bytes(60),
        "WAV sound": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40),
        "MP4 video": b"\0\0\0\x18ftypisom" + bytes(40),
        "NumPy array": b"\x93NUMPY\x01\0" + bytes(60),
        "program": b"\x7fELF" + bytes(60),
        "zeros": bytes(4096),
        "random": np.random.default_rng(3).bytes(4096),
    }


def _other_formats() -> dict[str, bytes]:
    return {
        "PDF": b"%PDF-1.7\n" + bytes(60),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "SVG in XML": b'<?xml version="1.0"?>\n<!-- a logo -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
        "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0mif1avif" + bytes(40),
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
        "JPEG XL": b"\xff\x0a" + bytes(40),
        "Photoshop": b"8BPS\0\x01" + bytes(40),
        "icon": b"\0\0\x01\0\x01\0" + bytes(40),
        "BigTIFF": b"II+\0\x08\0\0\0" + bytes(40),
        "PNM": b"P6\n2 2\n255\n" + bytes(12),
        "DICOM": bytes(128) + b"DICM" + bytes(40),
    }


def _cut_short() -> dict[str, bytes]:
    files = valid()
    half = {f"half a {kind}": data[: len(data) // 2] for kind, data in files.items()}
    start = {f"only the start of a {kind}": files[kind][:6] for kind in ("jpeg", "png", "gif", "bmp", "tiff")}
    rows = png_rows(np.asarray(picture())[: HEIGHT // 2])
    passes = interlaced_rows(np.asarray(picture()))
    webp = files["webp"][:-200]
    patched = webp[:4] + struct.pack("<I", len(webp) - 8) + webp[8:16] + struct.pack("<I", len(webp) - 20) + webp[20:]
    progressive = encoded(picture(), "JPEG", quality=95, progressive=True)
    two_strips = tiff_tags(WIDTH, HEIGHT, 8, WIDTH * HEIGHT // 2) | {278: (4, HEIGHT // 2)}
    return (
        half
        | start
        | {
            "JPEG without its end marker": files["jpeg"][:-2],
            "half a JPEG with an end marker": files["jpeg"][: len(files["jpeg"]) * 2 // 3] + b"\xff\xd9",
            "half a progressive JPEG with an end marker": progressive[: len(progressive) // 2] + b"\xff\xd9",
            "PNG without IEND": files["png"][:-12],
            "PNG of half the rows": png(WIDTH, HEIGHT, 8, 2, rows),
            "interlaced PNG without its last pass": png(WIDTH, HEIGHT, 8, 2, b"".join(passes[:-1]), interlaced=1),
            "WebP cut, sizes mended": patched,
            "TIFF with a strip missing": tiff(two_strips, bytes(WIDTH * HEIGHT)),
            "TIFF with a strip outside": tiff(
                tiff_tags(WIDTH, HEIGHT, 8, WIDTH * HEIGHT) | {273: (4, 10**6)}, bytes(1200)
            ),
            "TIFF directory outside": b"II*\0" + struct.pack("<I", 10**6) + bytes(100),
            "GIF with hardly any pixels": gif((40, 30), (0, 0, 40, 30), b"\x08\x03\x00\x03\x02\x00;"),
        }
    )


def _damaged() -> dict[str, bytes]:
    files = valid()
    jpeg, plain = files["jpeg"], files["png"]
    checksum = bytearray(plain)
    checksum[60] ^= 0xFF
    broken_stream = (
        png_chunk(b"IHDR", plain[16:29]) + png_chunk(b"IDAT", b"\x78\x9crubbish" * 20) + png_chunk(b"IEND", b"")
    )
    tables = jpeg.index(b"\xff\xdb")
    return {
        "JPEG of an end marker alone": b"\xff\xd8\xff\xd9",
        "JPEG with rubbish between segments": jpeg[:20] + b"rubbish" + jpeg[20:],
        "JPEG without quantisation tables": jpeg[:tables] + jpeg[jpeg.index(b"\xff\xc0") :],
        "JPEG of zero height": jpeg_frame(jpeg, height=0),
        "PNG with a wrong checksum": bytes(checksum),
        "PNG with a broken stream": plain[:8] + broken_stream,
        "PNG of zero width": png(0, 4, 8, 2, b"\0" * 4),
        "PNG of an impossible colour type": png(4, 4, 8, 5, bytes(20)),
        "PNG without pixels": plain[:33] + png_chunk(b"IEND", b""),
        "GIF without a frame": gif((4, 4), (0, 0, 4, 4))[:781] + b";",
        "GIF of zero size": gif((0, 0), (0, 0, 0, 0)),
        "BMP with an unknown header": b"BM" + bytes(12) + struct.pack("<I", 77) + bytes(100),
        "WebP with an unknown chunk": b"RIFF\x24\0\0\0WEBPWHAT" + bytes(40),
        "WebP whose frame leaves the canvas": _webp_lying(),
        "TIFF without a width": tiff({257: (4, 4), 258: (3, 8), 273: (4, 8)}, bytes(16)),
        "TIFF tag of an impossible type": tiff(tiff_tags(4, 4, 8, 16), bytes(16)).replace(
            struct.pack("<HHI", 262, 4, 1), struct.pack("<HHI", 262, 12, 1)
        ),
    }


def _webp_lying() -> bytes:
    frame = valid()["webp"][12:]
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (3).to_bytes(3, "little") + (3).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 4 + len(canvas) + len(frame)) + b"WEBP" + canvas + frame


def _bombs() -> dict[str, bytes]:
    huge = 30_000
    side = (huge - 1).to_bytes(3, "little")
    bitmap = bytearray(valid()["bmp"])
    bitmap[18:26] = struct.pack("<ii", huge, -huge)
    deflated = tiff_tags(huge, huge, 8, 16) | {259: (3, 8)}
    return {
        "PNG of 30000 x 30000": png(huge, huge, 8, 2, bytes(100)),
        "PNG of 2^31 x 2^31": png(2**31 - 1, 2**31 - 1, 16, 6, bytes(100)),
        "JPEG of 65500 x 65500": jpeg_frame(valid()["jpeg"], height=65500, width=65500),
        "GIF of 65535 x 65535": gif((65535, 65535), (0, 0, 1, 1)),
        "GIF whose frame is 65535 x 65535": gif((8, 8), (0, 0, 65535, 65535)),
        "BMP of 30000 x -30000": bytes(bitmap),
        "WebP of 30000 x 30000": b"RIFF\x24\0\0\0WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + side + side + bytes(30),
        "TIFF of 30000 x 30000": tiff(deflated, bytes(16)),
    }


def _rare_kinds() -> dict[str, bytes]:
    floats = np.linspace(0, 1, 16, dtype="<f4").tobytes()
    run_length = bytearray(encoded(picture("L"), "BMP"))
    run_length[30:34] = struct.pack("<I", 1)
    two_bits = bytearray(encoded(picture("L"), "BMP"))
    two_bits[28:30] = struct.pack("<H", 2)
    jpeg = valid()["jpeg"]
    scans = encoded(picture(), "JPEG", progressive=True)
    scan = scans.index(b"\xff\xda")
    return {
        "floating-point TIFF": tiff(tiff_tags(4, 4, 32, 64) | {339: (3, 3)}, floats),
        "32-bit TIFF": tiff(tiff_tags(4, 4, 32, 64), bytes(64)),
        "signed 16-bit TIFF": tiff(tiff_tags(4, 4, 16, 32) | {339: (3, 2)}, bytes(32)),
        "12-bit JPEG": jpeg_frame(jpeg, depth=12),
        "2-bit BMP": bytes(two_bits),
        "run-length BMP": bytes(run_length),
        "JPEG of two components": jpeg_frame(jpeg, components=2),
        "JPEG of a thousand scans": scans[:scan] + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" * 1000 + scans[scan:],
        "CIELAB TIFF": tiff(tiff_tags(4, 4, 8, 48) | {262: (3, 8), 277: (3, 3)}, bytes(48)),
        "TIFF fax": encoded(picture("1"), "TIFF", compression="group4"),
        "TIFF with an unknown compression": tiff(tiff_tags(4, 4, 8, 16) | {259: (3, 34925)}, bytes(16)),
        "TIFF of a million strips": tiff(
            tiff_tags(1, 10**6, 8, 10**6) | {278: (4, 1), 273: (3, (8,) * 10**6)}, bytes(10**6)
        ),
    }


def strange_but_fine() -> dict[str, bytes]:
    """Name -> bytes that look wrong to many readers and are pictures all the same."""
    return _strange_pngs() | _strange_jpegs() | _strange_others()


def _strange_pngs() -> dict[str, bytes]:
    rgb = np.asarray(picture())
    rows = png_rows(rgb)
    bomb = b"a\0\0" + zlib.compress(bytes(20_000_000))
    palette = picture().quantize(16)
    return {
        "PNG palette": encoded(palette, "PNG"),
        "PNG palette of 4 bits with alpha": encoded(palette, "PNG", bits=4, transparency=bytes(range(0, 256, 16))),
        "PNG of 1 bit": encoded(picture("1"), "PNG"),
        "PNG grey": encoded(picture("L"), "PNG"),
        "PNG grey with alpha": encoded(picture("LA"), "PNG"),
        "PNG with alpha": encoded(picture("RGBA"), "PNG"),
        "PNG of 16-bit grey": png(WIDTH, HEIGHT, 16, 0, png_rows(rgb[..., 0].astype(">u2") * 257)),
        "PNG of 16-bit RGB": png(WIDTH, HEIGHT, 16, 2, png_rows(rgb.astype(">u2") * 257)),
        "PNG with a transparent colour": png(
            WIDTH, HEIGHT, 8, 2, rows, png_chunk(b"tRNS", bytes([0, 40, 0, 220, 0, 60]))
        ),
        "PNG interlaced": png(WIDTH, HEIGHT, 8, 2, b"".join(interlaced_rows(rgb)), interlaced=1),
        "PNG with a text bomb": png(WIDTH, HEIGHT, 8, 2, rows, png_chunk(b"zTXt", bomb), png_chunk(b"iTXt", bomb)),
        "PNG with a profile bomb": png(WIDTH, HEIGHT, 8, 2, rows, png_chunk(b"iCCP", bomb)),
        "PNG with a broken profile": png(WIDTH, HEIGHT, 8, 2, rows, png_chunk(b"iCCP", b"x\0\0rubbish")),
        "PNG with a wrong animation": png(WIDTH, HEIGHT, 8, 2, rows, png_chunk(b"acTL", bytes(8))),
        "PNG with broken EXIF": png(WIDTH, HEIGHT, 8, 2, rows, png_chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")),
        "PNG with bytes after its end": encoded(picture(), "PNG") + b"appended",
        "PNG animation": encoded(picture(), "PNG", save_all=True, append_images=[picture().rotate(90)]),
        "PNG all black": encoded(Image.new("RGB", (WIDTH, HEIGHT)), "PNG"),
        "PNG of one pixel": encoded(picture("RGB", 1, 1), "PNG"),
        "PNG of one row": encoded(picture("RGB", 3000, 1), "PNG"),
    }


def _strange_jpegs() -> dict[str, bytes]:
    jpeg = valid()["jpeg"]
    return {
        "JPEG progressive": encoded(picture(), "JPEG", progressive=True),
        "JPEG grey": encoded(picture("L"), "JPEG"),
        "JPEG CMYK": encoded(picture("CMYK"), "JPEG"),
        "JPEG stored as RGB": encoded(picture(), "JPEG", keep_rgb=True),
        "JPEG with restart markers": encoded(picture(), "JPEG", restart_marker_blocks=1),
        "JPEG with bytes after its end": jpeg + b"appended" * 10,
        "JPEG with a second JPEG after it": jpeg + jpeg,
        "JPEG with broken EXIF": with_segment(jpeg, jpeg_segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")),
        "JPEG with orientation 99": with_segment(jpeg, jpeg_segment(0xE1, b"Exif\0\0" + exif(99))),
        "JPEG with a thumbnail in EXIF": with_segment(jpeg, jpeg_segment(0xE1, b"Exif\0\0" + exif(1) + jpeg)),
        "JPEG without Huffman tables": jpeg[: jpeg.index(b"\xff\xc4")] + jpeg[jpeg.index(b"\xff\xda") :],
        "JPEG with filling bytes": jpeg[:2] + b"\xff\xff\xff" + jpeg[2:],
    }


def _strange_others() -> dict[str, bytes]:
    image, other = picture(), picture().rotate(180)
    deep = (np.asarray(picture("L")).astype("<u2") * 257).tobytes()
    tags = tiff_tags(WIDTH, HEIGHT, 16, len(deep))
    translucent = picture("RGBA")
    translucent.putalpha(picture("L"))
    return {
        "TIFF LZW": encoded(image, "TIFF", compression="tiff_lzw"),
        "TIFF deflate": encoded(image, "TIFF", compression="tiff_adobe_deflate"),
        "TIFF PackBits": encoded(image, "TIFF", compression="packbits"),
        "TIFF JPEG": encoded(image, "TIFF", compression="jpeg"),
        "TIFF of 1 bit": encoded(picture("1"), "TIFF"),
        "TIFF CMYK": encoded(picture("CMYK"), "TIFF"),
        "TIFF with alpha": encoded(translucent, "TIFF"),
        "TIFF palette": encoded(image.quantize(16), "TIFF"),
        "TIFF of two pages": encoded(image, "TIFF", save_all=True, append_images=[other]),
        "TIFF of 16 bits": tiff(tags, deep),
        "TIFF of 16 bits, big-endian": tiff(tags, np.frombuffer(deep, "<u2").astype(">u2").tobytes(), ">"),
        "TIFF with private tags outside": tiff(tags | {65000: (4, 5)}, deep).replace(
            struct.pack("<HHII", 65000, 4, 1, 5), struct.pack("<HHII", 65000, 4, 2**31, 5)
        ),
        "BMP of 1 bit": encoded(picture("1"), "BMP"),
        "BMP palette": encoded(image.quantize(16), "BMP"),
        "BMP of 32 bits": encoded(translucent, "BMP"),
        "GIF animation": encoded(image, "GIF", save_all=True, append_images=[other]),
        "GIF transparent": encoded(image.quantize(16), "GIF", transparency=3),
        "GIF without its end": encoded(image, "GIF")[:-1],
        "WebP lossy": encoded(image, "WEBP"),
        "WebP with alpha": encoded(translucent, "WEBP", lossless=True),
        "WebP animation": encoded(image, "WEBP", save_all=True, append_images=[other]),
    }
