"""What names and bytes of pictures look like, and every refusal of one: one code, one line with cause and remedy."""

from anomaly_vae.errors import BadImage

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})

BAD_IMAGE_CODES: tuple[str, ...] = (
    "empty",
    "too_large",
    "not_an_image",
    "unsupported_format",
    "unsupported_variant",
    "unsupported_depth",
    "too_many_pixels",
    "truncated",
    "corrupt",
)

_CONVERT = "convert it to JPEG or PNG"
SEND = "send a JPEG, PNG, WebP, BMP, TIFF or GIF file"
_AGAIN = "export the picture again and send the whole file"


def truncated(kind: str) -> BadImage:
    return BadImage("truncated", f"the {kind.upper()} ends before its last pixel; {_AGAIN}")


def corrupt(kind: str, what: str) -> BadImage:
    return BadImage("corrupt", f"the {kind.upper()} cannot be read: {what}; {_AGAIN}")


def variant(kind: str, what: str) -> BadImage:
    return BadImage(
        "unsupported_variant", f"the {kind.upper()} {what}, which is not supported; save it as a plain JPEG or PNG"
    )


def unsupported_depth(kind: str, what: str) -> BadImage:
    return BadImage(
        "unsupported_depth", f"the {kind.upper()} has {what} samples; scale it to 8 or 16 bits and save it as PNG"
    )


_MAGIC = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
)
_OTHER_PICTURES = (
    (b"%PDF", "a PDF"),
    (b"%!PS", "PostScript"),
    (b"8BPS", "a Photoshop file"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x01\x00", "an icon"),
    (b"II+\0", "BigTIFF"),
    (b"MM\0+", "BigTIFF"),
    (b"v/1\x01", "OpenEXR"),
    (b"SIMPLE  =", "FITS"),
    (b"qoif", "QOI"),
    (b"\x89HDF", "HDF5"),
    *((b"P%d%c" % (n, end), "a PNM picture") for n in range(1, 7) for end in b" \n\r\t"),
)
_NO_PICTURES = (
    (b"PK\x03\x04", "a ZIP archive; unpack it and send the pictures one by one"),
    (b"\x1f\x8b", "gzip; unpack it first"),
    (b"RIFF", "sound or video; send a picture"),
    (b"\x93NUMPY", "a NumPy array; save it as a PNG"),
    (b"\x7fELF", f"a program; {SEND}"),
    (b"/9j/", "base64 text; send the bytes it encodes"),
    (b"iVBORw0KGgo", "base64 text; send the bytes it encodes"),
    (b"data:", "a data URL; send the bytes it encodes"),
    (b"{", f"JSON; {SEND}"),
    (b"--", "a multipart body; send the picture alone or name the content type multipart/form-data"),
)


def sniff(data: bytes) -> str:
    """The format by its first bytes, or a refusal that says what they look like instead."""
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
        if magic.startswith(data):
            raise truncated(kind)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    for magic, what in _OTHER_PICTURES:
        if data.startswith(magic):
            raise BadImage("unsupported_format", f"the file is {what}, which is not supported; {_CONVERT}")
    for magic, what in _NO_PICTURES:
        if data.startswith(magic):
            raise BadImage("not_an_image", f"the bytes are no picture but {what}")
    raise _unknown(data)


def _unknown(data: bytes) -> BadImage:
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        what = "AVIF" if brand in (b"avif", b"avis") else "HEIC" if brand[:2] in (b"he", b"mi", b"ms") else ""
        if what:
            return BadImage("unsupported_format", f"the file is {what}, which is not supported; {_CONVERT}")
        return BadImage("not_an_image", "the bytes are a video; send single frames as JPEG or PNG")
    if data[128:132] == b"DICM":
        return BadImage("unsupported_format", f"the file is DICOM, which is not supported; {_CONVERT}")
    text = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in text:
        return BadImage("unsupported_format", f"the file is SVG, which is not supported; {_CONVERT}")
    if text.startswith((b"<!doctype html", b"<html")):
        return BadImage(
            "not_an_image", "the bytes are a web page, perhaps a login or error page; fetch the picture itself"
        )
    if text and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in text):
        return BadImage("not_an_image", f"the bytes are text; {SEND}")
    return BadImage("not_an_image", f"the bytes begin like no known picture; {SEND}")
