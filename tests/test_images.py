"""Laws of decoding: what must come out of every format, depth, orientation and fit."""

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from bad_bytes import (
    HEIGHT,
    WIDTH,
    bad_bytes,
    encoded,
    exif,
    jpeg_segment,
    picture,
    png,
    png_chunk,
    png_rows,
    strange_but_fine,
    tiff,
    tiff_tags,
    valid,
    with_segment,
)
from PIL import Image, ImageFile

from anomaly_vae.errors import BadImage, ConfigError
from anomaly_vae.images import ImageSpec, decode, encode_png, peek

FORMATS = ("jpeg", "png", "webp", "bmp", "tiff", "gif")
LOSSLESS = ("png", "webp", "bmp", "tiff")
FITS = ("stretch", "crop", "letterbox")


def spec(height=HEIGHT, width=WIDTH, channels=3, **more):
    """By default as large as the test picture, so that pixels come back as they are."""
    return ImageSpec(height=height, width=width, channels=channels, **more)


def pixels(image):
    """A Pillow picture as (C,H,W) integers."""
    array = np.asarray(image).astype(int)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def distance(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_comes_out_as_the_spec_says(kind, channels, fit):
    for height, width in ((16, 48), (64, 20), (HEIGHT, WIDTH)):
        image = decode(valid()[kind], spec(height, width, channels, fit=fit))
        assert image.shape == (channels, height, width)
        assert image.dtype == torch.uint8
        assert image.is_contiguous()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_lossless_file_of_the_target_size_keeps_its_pixels(kind):
    assert not distance(decode(valid()[kind], spec()), pixels(picture())).any()


def test_an_interlaced_png_is_the_same_picture():
    image = decode(strange_but_fine()["PNG interlaced"], spec())
    assert torch.equal(image, decode(valid()["png"], spec()))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fit", FITS)
def test_lossless_formats_agree_at_any_size(fit, channels):
    large = picture("RGB", 333, 517)
    target = spec(40, 56, channels, fit=fit)
    images = [decode(encoded(large, kind, **more), target) for kind, more in _LOSSLESS_OPTIONS.items()]
    assert all(torch.equal(image, images[0]) for image in images)


_LOSSLESS_OPTIONS = {"PNG": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_jpeg_of_the_target_size_is_near_its_picture(channels, subsampling):
    data = encoded(picture(), "JPEG", quality=98, subsampling=subsampling)
    difference = distance(decode(data, spec(channels=channels)), pixels(picture("L" if channels == 1 else "RGB")))
    assert difference.mean() < 3.5


@cache
def _large_jpeg(size):
    """A JPEG, and a lossless file of it decoded in full."""
    data = encoded(picture("RGB", *size), "JPEG", quality=90)
    return data, encoded(Image.open(io.BytesIO(data)).convert("RGB"), "BMP")


@pytest.mark.parametrize("size", [(1024, 768), (1000, 777), (515, 2049)])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_decoded_to_scale_is_near_the_one_decoded_in_full(size, fit, channels):
    """The tolerance the library states: 1 grey level on average, 8 at worst, on a picture with texture."""
    data, in_full = _large_jpeg(size)
    target = spec(64, 48, channels, fit=fit)
    difference = distance(decode(data, target), decode(in_full, target))
    assert difference.mean() < 1
    assert difference.max() <= 8


def test_scaling_down_averages_and_does_not_pick():
    """A one-pixel checkerboard is grey from afar; picking pixels would leave black, white or stripes."""
    board = (np.indices((480, 480)).sum(axis=0) % 2 * 255).astype(np.uint8)
    for kind in ("PNG", "JPEG"):
        image = decode(
            encoded(Image.fromarray(board), kind, **({"quality": 98} if kind == "JPEG" else {})), spec(48, 48, 1)
        )
        assert distance(image, 127).max() <= 8


def test_decoding_to_scale_keeps_detail_of_the_target_size():
    """Squares of two target pixels stay black and white: no scale below the target was used on the way."""
    board = (np.kron(np.indices((32, 32)).sum(axis=0) % 2, np.ones((32, 32))) * 255).astype(np.uint8)
    image = decode(encoded(Image.fromarray(board), "JPEG", quality=95), spec(64, 64, 1)).numpy()
    assert image.min() < 60
    assert image.max() > 195


def _turned(orientation):
    """The test picture stored so that `orientation` shows it upright."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = picture("RGB", 416, 320)
    return image.transpose(undo[orientation]) if orientation in undo else image


def _oriented(kind, orientation):
    tags = Image.Exif()
    tags[274] = orientation
    options = {"jpeg": {"quality": 98, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    return encoded(_turned(orientation), kind.upper(), exif=tags.tobytes(), **options)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_show_the_same_picture(kind, orientation):
    data = _oriented(kind, orientation)
    assert (peek(data).width, peek(data).height) == (416, 320)
    for fit in FITS:
        target = spec(45, 50, fit=fit)
        upright = decode(encoded(picture("RGB", 416, 320), "PNG"), target)
        assert distance(decode(data, target), upright).max() <= (3 if kind == "jpeg" else 1), fit


def test_exif_of_either_byte_order_is_read():
    big = b"MM\0*\0\0\0\x08\0\x01" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + bytes(4)
    jpeg = valid()["jpeg"]
    images = [decode(with_segment(jpeg, jpeg_segment(0xE1, b"Exif\0\0" + tags)), spec()) for tags in (big, exif(6))]
    assert torch.equal(*images)
    assert not torch.equal(images[0], decode(jpeg, spec()))


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (200, 30, 90)])
@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_transparency_shows_the_background(kind, background):
    alpha = np.tile(np.linspace(0, 255, WIDTH).round().astype(np.uint8), (HEIGHT, 1))
    image = picture("RGBA")
    image.putalpha(Image.fromarray(alpha))
    options = {"webp": {"lossless": True, "exact": True}}.get(kind, {})
    cover = alpha / 255
    expected = pixels(picture()) * cover + np.array(background)[:, None, None] * (1 - cover)
    got = decode(encoded(image, kind.upper(), **options), spec(background=background))
    assert np.abs(got.numpy() - expected).max() <= 1


def test_transparent_colours_and_palettes_show_the_background():
    array = np.full((16, 16), 7, dtype=np.uint8)
    array[:8] = 200
    key = png_chunk(b"tRNS", b"\0\x07")
    colour = png(16, 16, 8, 2, png_rows(np.stack([array] * 3, -1)), png_chunk(b"tRNS", b"\0\x07\0\x07\0\x07"))
    deep = png(16, 16, 16, 0, png_rows(array.astype(">u2") * 257), png_chunk(b"tRNS", b"\x07\x07"))
    palette = Image.fromarray(array).convert("P")
    files = [png(16, 16, 8, 0, png_rows(array), key), colour, deep, encoded(palette, "PNG", transparency=7)]
    files.append(encoded(palette, "GIF", transparency=7))
    for data in files:
        image = decode(data, spec(16, 16, background=(10, 20, 30)))
        assert (image[:, :8] == 200).all()
        assert image[:, 12, 8].tolist() == [10, 20, 30]


def test_four_bit_grey_compares_its_transparent_colour_in_its_own_units():
    rows = b"".join(b"\0" + bytes([0x3C] * 8) for _ in range(16))
    image = decode(png(16, 16, 4, 0, rows, png_chunk(b"tRNS", b"\0\x03")), spec(16, 16, 1, background=(255,) * 3))
    assert image[0, 0, :2].tolist() == [255, 12 * 17]


def test_a_bitmap_with_an_unused_fourth_byte_is_opaque():
    header = bytearray(encoded(picture("RGBA"), "BMP"))
    at = int.from_bytes(header[10:14], "little")
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = b"".join(value.to_bytes(4, "little") for value in masks) + bytes(52)
    body = np.frombuffer(bytes(header[at:]), np.uint8).reshape(-1, 4).copy()
    body[:, 3] = 0
    v4 = bytearray(header[:54] + info + body.tobytes())
    v4[10:14], v4[14:18], v4[30:34] = (
        (122).to_bytes(4, "little"),
        (108).to_bytes(4, "little"),
        (3).to_bytes(4, "little"),
    )
    assert not distance(decode(bytes(v4), spec()), pixels(picture())).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_the_eight_high_ones(channels):
    grey, rgb = np.asarray(picture("L")), np.asarray(picture())
    tags = tiff_tags(WIDTH, HEIGHT, 16, WIDTH * HEIGHT * 2)
    files = {
        "grey PNG": (png(WIDTH, HEIGHT, 16, 0, png_rows(grey.astype(">u2") * 257)), grey),
        "grey TIFF": (tiff(tags, (grey.astype("<u2") * 257).tobytes()), grey),
        "grey TIFF, big-endian": (tiff(tags, (grey.astype(">u2") * 257).tobytes(), ">"), grey),
        "grey TIFF, 0 is white": (tiff(tags | {262: (3, 0)}, (65535 - grey.astype("<u2") * 257).tobytes()), grey),
        "RGB PNG": (png(WIDTH, HEIGHT, 16, 2, png_rows(rgb.astype(">u2") * 257)), rgb),
        "RGB TIFF": (_rgb_tiff(rgb), rgb),
    }
    for name, (data, array) in files.items():
        expected = pixels(Image.fromarray(array).convert("L" if channels == 1 else "RGB"))
        assert not distance(decode(data, spec(channels=channels)), expected).any(), name
        assert peek(data).bit_depth == 16


def _rgb_tiff(rgb):
    deep = (rgb.astype("<u2") * 257).tobytes()
    more = {258: (3, (16, 16, 16)), 262: (3, 2), 277: (3, 3)}
    return tiff(tiff_tags(WIDTH, HEIGHT, 16, len(deep)) | more, deep)


def test_sixteen_bits_are_scaled_and_never_clipped():
    ramp = np.linspace(0, 65535, 256).astype(">u2").reshape(16, 16)
    image = decode(png(16, 16, 16, 0, png_rows(ramp)), spec(16, 16, 1)).numpy().ravel()
    assert image[0] == 0
    assert image[-1] == 255
    assert len(np.unique(image)) >= 254
    assert np.abs(image - np.linspace(0, 255, 256)).max() <= 1


def test_grey_is_the_same_luma_from_jpeg_and_png():
    """Colours inside the gamut, so that the JPEG's luma plane was never clipped."""
    data = encoded(picture(), "JPEG", quality=98, subsampling=0)
    by_pillow = pixels(Image.open(io.BytesIO(data)).convert("RGB").convert("L"))
    assert distance(decode(data, spec(channels=1)), by_pillow).max() <= 2
    assert not distance(decode(valid()["png"], spec(channels=1)), pixels(picture("L"))).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_cmyk_jpeg_looks_as_in_pillow(channels):
    data = encoded(picture("CMYK"), "JPEG", quality=98, subsampling=0)
    expected = pixels(Image.open(io.BytesIO(data)).convert("RGB").convert("L" if channels == 1 else "RGB"))
    assert distance(decode(data, spec(channels=channels)), expected).max() <= 2
    assert peek(data).mode == "cmyk"


@pytest.mark.parametrize(("size", "box"), [((80, 40), (0, 16, 64, 48)), ((40, 80), (16, 0, 48, 64))])
def test_letterbox_keeps_the_aspect_ratio_between_bars(size, box):
    white = encoded(Image.new("RGB", size, (250, 250, 250)), "PNG")
    image = decode(white, spec(64, 64, fit="letterbox", background=(9, 8, 7))).numpy()
    left, top, right, bottom = box
    inside = np.zeros((64, 64), dtype=bool)
    inside[top:bottom, left:right] = True
    assert (image[:, inside] == 250).all()
    assert (image[:, ~inside] == np.array([9, 8, 7])[:, None]).all()


def test_letterbox_bars_are_the_luma_of_the_background_in_grey():
    image = decode(encoded(picture("RGB", 80, 40), "PNG"), spec(64, 64, 1, fit="letterbox", background=(200, 100, 50)))
    assert image[0, 0, 0] == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)


def test_crop_keeps_the_centre_and_the_aspect_ratio():
    stripes = np.zeros((40, 120), dtype=np.uint8)
    stripes[:, 60:78] = 255  # from the middle to just inside the centre square's right edge
    for stored, axis in ((stripes, 1), (stripes.T.copy(), 0)):
        image = decode(encoded(Image.fromarray(stored), "PNG"), spec(20, 20, 1, fit="crop")).numpy()[0]
        line = image.take(10, axis=1 - axis)
        assert (line[:9] == 0).all()
        assert (line[11:18] == 255).all()
        assert line[19] < 128


def test_stretch_fills_the_target():
    image = decode(encoded(Image.new("RGB", (300, 20), (90, 90, 90)), "PNG"), spec(32, 32))
    assert (image == 90).all()


def test_only_the_first_frame_or_page_counts():
    first, second = picture(), Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3))
    for kind, options in (("TIFF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encoded(first, kind, save_all=True, append_images=[second], **options)
        assert not distance(decode(data, spec()), pixels(first)).any(), kind


def test_threads_get_the_same_pixels():
    files = [*valid().values(), *(data for data in strange_but_fine().values() if len(data) < 50_000)]
    target = spec(20, 28, fit="crop")
    alone = [decode(data, target) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode(data, target), files * 5))
    assert all(torch.equal(image, alone[index % len(files)]) for index, image in enumerate(together))


def test_pillows_global_settings_are_left_alone():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    for data in (*valid().values(), *bad_bytes().values()):
        try:
            decode(data, spec())
        except BadImage:
            continue
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))


@pytest.mark.parametrize(
    ("name", "mode", "depth"),
    [
        ("PNG palette", "palette", 4),
        ("PNG grey", "grey", 8),
        ("PNG grey with alpha", "grey_alpha", 8),
        ("PNG with alpha", "rgba", 8),
        ("PNG of 1 bit", "grey", 1),
        ("PNG of 16-bit RGB", "rgb", 16),
        ("JPEG grey", "grey", 8),
        ("JPEG progressive", "rgb", 8),
        ("TIFF of 16 bits, big-endian", "grey", 16),
        ("TIFF CMYK", "cmyk", 8),
        ("TIFF with alpha", "rgba", 8),
        ("BMP palette", "palette", 8),
        ("GIF animation", "palette", 8),
        ("WebP lossy", "rgb", 8),
        ("WebP with alpha", "rgba", 8),
    ],
)
def test_peek_reads_the_header(name, mode, depth):
    info = peek(strange_but_fine()[name])
    assert info.format == name.split()[0].lower()
    assert (info.width, info.height, info.mode, info.bit_depth) == (WIDTH, HEIGHT, mode, depth)


@pytest.mark.parametrize("kind", ["jpeg", "bmp", "gif"])
def test_peek_needs_the_header_alone(kind):
    data = valid()[kind]
    head = {"jpeg": data.find(b"\xff\xda") + 2, "bmp": 54, "gif": 900}[kind]
    assert head < len(data)
    assert peek(data[:head]) == peek(data)


def test_encode_png_keeps_every_pixel():
    rgb = torch.from_numpy(pixels(picture()).astype(np.uint8))
    for image in (rgb, rgb[:1], rgb[0]):
        channels = 3 if image.ndim == 3 and image.shape[0] == 3 else 1
        back = decode(encode_png(image), spec(channels=channels))
        assert torch.equal(back, image if image.ndim == 3 else image[None])
    with pytest.raises(ValueError, match="uint8"):
        encode_png(rgb.float())
    with pytest.raises(ValueError, match=r"\(2, 30, 40\)"):
        encode_png(rgb[:2])


@pytest.mark.parametrize(
    "wrong", [{"height": 15}, {"width": 4097}, {"channels": 2}, {"fit": "pad"}, {"max_pixels": 10**9}]
)
def test_an_impossible_spec_is_a_config_error(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ImageSpec.parse({"height": 32, "width": 32, "channels": 3} | wrong)


def test_real_faces_decode_to_scale_as_in_full(real_images):
    files = sorted((real_images / "faces_london").rglob("*.jpg"))[:8]
    if not files:
        pytest.skip("no faces_london among the real images")
    for path in files:
        data = path.read_bytes()
        in_full = encoded(Image.open(io.BytesIO(data)).convert("RGB"), "PNG")
        target = spec(32, 32)
        assert distance(decode(data, target), decode(in_full, target)).mean() < 1.5
