"""Whatever the bytes are, decoding gives a picture or one `BadImage` with a known code and a remedy."""

import subprocess
import sys
import warnings

import pytest
import torch
from bad_bytes import bad_bytes, strange_but_fine, valid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anomaly_vae.errors import BadImage
from anomaly_vae.images import BAD_IMAGE_CODES, ImageSpec, decode, peek

BAD = bad_bytes()
STRANGE = strange_but_fine()
SPEC = ImageSpec(height=24, width=32, channels=3)

CODES = {
    "empty": ["empty"],
    "not_an_image": [
        *("one newline", "text", "HTML page", "JSON", "base64 of a JPEG", "base64 of a PNG", "data URL", "program"),
        *("multipart body", "ZIP archive", "gzip", "WAV sound", "MP4 video", "NumPy array", "zeros", "random"),
    ],
    "unsupported_format": [
        *("PDF", "PostScript", "SVG", "SVG in XML", "HEIC", "AVIF", "JPEG 2000", "JPEG XL", "Photoshop", "icon"),
        *("BigTIFF", "PNM", "DICOM"),
    ],
    "truncated": [
        *(f"half a {kind}" for kind in ("jpeg", "png", "webp", "bmp", "tiff", "gif")),
        *(f"only the start of a {kind}" for kind in ("jpeg", "png", "gif", "bmp", "tiff")),
        *("JPEG without its end marker", "half a JPEG with an end marker", "PNG without IEND", "PNG of half the rows"),
        *("half a progressive JPEG with an end marker", "TIFF with a strip missing", "TIFF with a strip outside"),
        *("TIFF directory outside", "GIF with hardly any pixels", "interlaced PNG without its last pass"),
    ],
    "corrupt": [
        *("WebP cut, sizes mended", "JPEG of an end marker alone"),
        *("JPEG with rubbish between segments", "JPEG without quantisation tables", "JPEG of zero height"),
        *("PNG with a wrong checksum", "PNG with a broken stream", "PNG of zero width", "PNG without pixels"),
        *("PNG of an impossible colour type", "GIF without a frame", "GIF of zero size", "BMP with an unknown header"),
        *("WebP with an unknown chunk", "WebP whose frame leaves the canvas", "TIFF without a width"),
        "TIFF tag of an impossible type",
    ],
    "too_many_pixels": [
        *("PNG of 30000 x 30000", "PNG of 2^31 x 2^31", "JPEG of 65500 x 65500", "GIF of 65535 x 65535"),
        *("GIF whose frame is 65535 x 65535", "BMP of 30000 x -30000", "WebP of 30000 x 30000"),
        "TIFF of 30000 x 30000",
    ],
    "unsupported_depth": ["floating-point TIFF", "32-bit TIFF", "signed 16-bit TIFF", "12-bit JPEG", "2-bit BMP"],
    "unsupported_variant": [
        *("run-length BMP", "JPEG of two components", "JPEG of a thousand scans", "CIELAB TIFF"),
        *("TIFF with an unknown compression", "TIFF of a million strips", "TIFF fax"),
    ],
}
CODE_OF = {name: code for code, names in CODES.items() for name in names}
REMEDY = ("send", "convert", "unpack", "export", "save", "scale", "raise", "fetch")


def outcome(data, spec):
    """The picture, or the `BadImage` it was refused with; anything else escapes and fails the test."""
    try:
        return decode(data, spec)
    except BadImage as error:
        return error


def test_every_kind_has_an_expected_code():
    assert set(CODE_OF) == set(BAD)
    assert len(BAD) >= 40


@pytest.mark.parametrize("name", BAD)
def test_bad_bytes_are_refused_with_cause_and_remedy(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage) as caught:
            decode(BAD[name], SPEC)
    assert caught.value.code == CODE_OF[name]
    assert caught.value.code in BAD_IMAGE_CODES
    message = str(caught.value)
    cause, _, remedy = message.partition("; ")
    assert cause
    assert remedy.startswith(REMEDY)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 200


@pytest.mark.parametrize("name", STRANGE)
def test_strange_but_fine_bytes_are_pictures(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode(STRANGE[name], SPEC)
        info = peek(STRANGE[name])
    assert image.shape == (3, 24, 32)
    assert image.dtype == torch.uint8
    assert min(info.width, info.height) >= 1


@pytest.mark.parametrize("kind", valid())
def test_every_shorter_file_is_refused_or_the_same_picture(kind):
    """No cut file may pass for another picture: half of it grey, say."""
    data = valid()[kind]
    whole = decode(data, SPEC)
    for length in [*range(0, len(data) - 12, 37), *range(len(data) - 12, len(data))]:
        got = outcome(data[:length], SPEC)
        if isinstance(got, BadImage):
            assert got.code in ("empty", "truncated", "corrupt"), length
        else:
            assert torch.equal(got, whole), length


def test_more_bytes_than_allowed_are_refused_before_anything_else():
    spec = ImageSpec(height=24, width=32, channels=3, max_bytes=1000)
    with pytest.raises(BadImage, match=r"1001 bytes, more than the 1000 allowed; send a smaller file") as caught:
        decode(b"\x89" * 1001, spec)
    assert caught.value.code == "too_large"


def test_pixels_are_bounded_exactly():
    data = valid()["png"]
    decode(data, ImageSpec(height=24, width=32, channels=3, max_pixels=1200))
    with pytest.raises(BadImage, match="40 x 30 pixels, more than the 1199 allowed") as caught:
        decode(data, ImageSpec(height=24, width=32, channels=3, max_pixels=1199))
    assert caught.value.code == "too_many_pixels"


_MEMORY = """
import resource, sys
from bad_bytes import bad_bytes, strange_but_fine
from anomaly_vae.errors import BadImage
from anomaly_vae.images import ImageSpec, decode
spec = ImageSpec(height=32, width=32, channels=3)
bombs = [data for name, data in bad_bytes().items() if " x " in name]
inner = [data for name, data in strange_but_fine().items() if "bomb" in name]
decode(strange_but_fine()["PNG palette"], spec)
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
for data in bombs:
    try:
        decode(data, spec)
        raise SystemExit("decoded a bomb")
    except BadImage:
        pass
for data in inner:
    decode(data, spec)
print(len(bombs), len(inner), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)
"""


def test_bombs_reserve_no_memory(pytestconfig):
    """A process of its own, since only its peak tells: 30,000 x 30,000 pixels alone would be 2.7 GB."""
    paths = [str(pytestconfig.rootpath), str(pytestconfig.rootpath / "tests")]
    code = f"import sys; sys.path[:0] = {paths!r}\n{_MEMORY}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bombs, inner, grown = map(int, result.stdout.split())
    assert bombs >= 6
    assert inner >= 2
    assert grown < 16 * 2**20


SEEDS = [*valid().values(), *(data for data in STRANGE.values() if len(data) < 20_000)]
FUZZED = ImageSpec(height=16, width=16, channels=1, fit="letterbox", max_pixels=200_000)


@st.composite
def damaged_files(draw):
    """A valid file with some bytes replaced (early ones, the headers, more often), removed, doubled or cut off."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        reach = draw(st.sampled_from([40, 200, len(data)]))
        at = draw(st.integers(0, max(0, min(reach, len(data)) - 1)))
        how = draw(st.sampled_from(["replace", "replace", "extreme", "remove", "double", "cut"]))
        if how == "replace":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif how == "extreme":
            data[at : at + 4] = draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\1\0"]))
        elif how == "remove":
            del data[at : at + draw(st.integers(1, 30))]
        elif how == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 30))]
        else:
            del data[at + len(data) // 2 :]
    return bytes(data)


@settings(max_examples=2500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(damaged_files())
def test_damaged_files_decode_or_raise_bad_image(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = outcome(data, FUZZED)
    if isinstance(got, BadImage):
        assert got.code in BAD_IMAGE_CODES
        assert "\n" not in str(got)
    else:
        assert got.shape == (1, 16, 16)
        assert got.dtype == torch.uint8


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from([data[:4] for data in valid().values()]), st.binary(max_size=200))
def test_a_signature_alone_makes_no_picture(signature, rest):
    assert isinstance(outcome(signature + rest, FUZZED), BadImage)
