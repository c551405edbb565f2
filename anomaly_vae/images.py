"""Bytes of a JPEG, PNG, WebP, BMP, TIFF or GIF file to a uint8 tensor: the one way, in training and in service.

Headers are read (`image_headers`) before any decoder sees the file, so size and kind cost nothing to judge.
Decoders get the file without its text, profiles and further pages. Depths above 8 bits keep their 8 high bits
(16 bits: v // 256; nothing is clipped, 8-bit content times 257 comes back exactly); 12-bit samples in a 16-bit file
cannot be told from dark 16-bit ones: store them times 16. Colour profiles are ignored. Grey is ITU-R 601 luma.
"""

import io
from base64 import b64decode
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from pydantic import Field, model_validator

from anomaly_vae.errors import BadImage
from anomaly_vae.image_headers import Header, checked_header, clean_png, clean_tiff, require_all_rows
from anomaly_vae.image_headers import ImageInfo as ImageInfo
from anomaly_vae.image_sniffing import BAD_IMAGE_CODES as BAD_IMAGE_CODES
from anomaly_vae.image_sniffing import corrupt, truncated
from anomaly_vae.spec import Spec

# Importing a plugin registers it; without this Pillow would import all of its forty at the first WebP or TIFF.
_PLUGINS = (BmpImagePlugin, GifImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
_Byte = Annotated[int, Field(ge=0, le=255)]
_MOST_PIXELS = 2**22


class ImageSpec(Spec):
    """What every picture becomes: uint8, `channels` x `height` x `width`.

    `fit`: `stretch` ignores the aspect ratio, `crop` keeps the centre, `letterbox` adds bars of `background`, which
    also shows through transparent pixels. Files above `max_bytes` or `max_pixels` are refused before decoding.
    `region`: which pixels count, a PNG in base64 that training makes (see `masking`); others become `background`.
    """

    height: int = Field(ge=16, le=4096)
    width: int = Field(ge=16, le=4096)
    channels: Literal[1, 3]
    fit: Literal["stretch", "crop", "letterbox"] = "stretch"
    background: tuple[_Byte, _Byte, _Byte] = (255, 255, 255)
    max_bytes: int = Field(default=32 * 2**20, ge=1)
    # Pillow warns above 89,478,485 pixels; staying below keeps its global limit out of play.
    max_pixels: int = Field(default=64_000_000, ge=1, le=89_000_000)
    region: str | None = None

    @model_validator(mode="after")
    def _is_bearable(self) -> Self:
        if self.height * self.width > _MOST_PIXELS:
            raise ValueError(f"{self.width}x{self.height} px are more than {_MOST_PIXELS:,}; choose a smaller image")
        inside(self)
        return self


def decode(data: bytes, spec: ImageSpec) -> torch.Tensor:
    """One file's bytes to a uint8 (C,H,W) tensor of `spec`; the first frame or page where there are several.

    Raises only `BadImage`. Thread-safe; the same bytes give the same pixels. A JPEG is decoded at a reduced scale
    where that leaves at least twice the target; other formats are averaged down by the same factor.
    """
    plan = planned(data, spec)
    header = plan.header
    picture = _guarded(header, lambda: _reduced_pixels(data, header, spec, plan.factor))
    fitted = _upright(picture.resize(plan.size, Image.Resampling.BILINEAR, plan.region), header.orientation)
    return masked(_to_tensor(_on_background(fitted, spec)), spec)


class Plan(NamedTuple):
    """How a file becomes a picture: averaged down by `factor`; `region` of that (left, top, right, bottom) resampled to
    `size` (width, height); turned upright as `header` says; centred on the background."""

    header: Header
    factor: int
    region: tuple[float, float, float, float]
    size: tuple[int, int]


def planned(data: bytes, spec: ImageSpec) -> Plan:
    """What `decode` will do with a file, from its header alone; raises `BadImage`."""
    header = checked_header(data, spec.max_bytes)
    pixels = header.width * header.height
    if pixels > spec.max_pixels:
        raise BadImage(
            "too_many_pixels",
            f"the {header.format.upper()} has {header.width} x {header.height} pixels, more than the {spec.max_pixels} "
            "allowed; send a smaller picture or raise image.max_pixels",
        )
    box, size = _placement(header, spec)
    factor = next(
        f for f in (8, 4, 2, 1) if f == 1 or all(side >= 2 * f * to for side, to in zip(box, size, strict=True))
    )
    left, top = (header.width - box[0]) / 2, (header.height - box[1]) / 2
    region = (left / factor, top / factor, (left + box[0]) / factor, (top + box[1]) / factor)
    return Plan(header, factor, region, size)


def inside(spec: ImageSpec) -> torch.Tensor | None:
    """Which pixels count, bool (H, W); None where all do. Not to be written to."""
    return None if spec.region is None else _region_pixels(spec.region, spec.height, spec.width)


def masked(images: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """uint8 images (..., C, H, W) with `background` wherever nothing counts."""
    counts = inside(spec)
    if counts is None:
        return images
    background = Image.new("RGB", (1, 1), spec.background).convert("L" if spec.channels == 1 else "RGB")
    return torch.where(counts.to(images.device), images, _to_tensor(background).to(images.device))


def peek(data: bytes) -> ImageInfo:
    """Format, displayed size, mode and depth from the header alone; raises `BadImage` where there is none."""
    header = checked_header(data, None)
    width, height = (header.height, header.width) if header.turned else (header.width, header.height)
    return ImageInfo(header.format, width, height, header.mode, header.bit_depth)


def encode_png(image: torch.Tensor | NDArray[np.uint8]) -> bytes:
    """A uint8 (C,H,W) image with 1 or 3 channels, or (H,W), as the bytes of a PNG."""
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[0] not in (1, 3)):
        raise ValueError(f"a PNG is made of uint8 (H,W), (1,H,W) or (3,H,W), not {array.dtype} {array.shape}")
    if array.ndim == 3:
        array = array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG")
    return buffer.getvalue()


@lru_cache(maxsize=8)
def _region_pixels(region: str, height: int, width: int) -> torch.Tensor:
    wrong = ValueError("image.region is what training makes; give a region.polygon or a region.mask instead")
    try:
        picture = Image.open(io.BytesIO(b64decode(region, validate=True)), formats=["PNG"])
        fits = picture.size == (width, height)
        counts = np.asarray(picture.convert("L")) > 0 if fits else np.zeros(0)
    except Exception:  # a decoder fails with anything
        raise wrong from None
    if not counts.any():
        raise wrong
    return torch.from_numpy(counts)


# --- geometry -------------------------------------------------------------------------------------------------------


def _placement(header: Header, spec: ImageSpec) -> tuple[tuple[float, float], tuple[int, int]]:
    """Width and height of the centred source region, and of the picture it becomes, both as stored (not turned)."""
    target = (spec.height, spec.width) if header.turned else (spec.width, spec.height)
    source = (float(header.width), float(header.height))
    ratios = [side / to for side, to in zip(source, target, strict=True)]
    if spec.fit == "crop":
        scale = min(ratios)
        return (min(source[0], target[0] * scale), min(source[1], target[1] * scale)), target
    if spec.fit == "letterbox":
        scale = max(ratios)
        width, height = (min(to, max(1, round(side / scale))) for side, to in zip(source, target, strict=True))
        return source, (width, height)
    return source, target


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _on_background(picture: Image.Image, spec: ImageSpec) -> Image.Image:
    if picture.size == (spec.width, spec.height):
        return picture
    canvas = Image.new("RGB", (spec.width, spec.height), spec.background).convert(picture.mode)
    canvas.paste(picture, ((spec.width - picture.width) // 2, (spec.height - picture.height) // 2))
    return canvas


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    array = np.array(picture)
    planes = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(planes))


# --- pixels ---------------------------------------------------------------------------------------------------------


def _guarded(header: Header, work: Callable[[], Image.Image]) -> Image.Image:
    """Decoders fail with anything from struct.error to SystemError: all of it is the file's fault, said in one way."""
    try:
        return work()
    except BadImage:
        raise
    except MemoryError:
        raise BadImage(
            "too_many_pixels",
            f"not enough memory for {header.width} x {header.height} pixels; send a smaller picture",
        ) from None
    except Exception as error:
        reason = " ".join(str(error).lower().split())
        cut = any(word in reason for word in ("truncated", "premature end", "not enough image data"))
        if cut:
            raise truncated(header.format) from None
        raise corrupt(header.format, "its pixel data is damaged") from None


def _reduced_pixels(data: bytes, header: Header, spec: ImageSpec, factor: int) -> Image.Image:
    """The whole stored picture as mode L or RGB, 1/`factor` of its size (the last row and column may be partial)."""
    mode = "L" if spec.channels == 1 else "RGB"
    if header.format == "jpeg":
        return _jpeg_pixels(data, header, mode, factor)
    picture = _flat(_pillow_pixels(data, header), header, spec.background, mode)
    return picture.reduce(factor) if factor > 1 else picture


def _jpeg_pixels(data: bytes, header: Header, mode: str, factor: int) -> Image.Image:
    """Decoding straight to 1/`factor` in the DCT is close to averaging the full picture, and far cheaper."""
    least = {"min_width": -(-header.width // factor), "min_height": -(-header.height // factor)}
    space = "CMYK" if header.mode == "cmyk" else {"L": "GRAY", "RGB": "RGB"}[mode]
    array = simplejpeg.decode_jpeg(data, space, **least, min_factor=1, strict=True)
    if space != "CMYK":
        return Image.fromarray(array[..., 0] if mode == "L" else array)
    inks = np.ascontiguousarray(255 - array if header.inverted else array)
    picture = Image.frombuffer("CMYK", (inks.shape[1], inks.shape[0]), inks.tobytes(), "raw", "CMYK", 0, 1)
    return picture.convert("RGB").convert(mode)


def _pillow_pixels(data: bytes, header: Header) -> Image.Image:
    clean = {"png": clean_png, "tiff": clean_tiff}.get(header.format)
    picture = Image.open(io.BytesIO(clean(data) if clean else data), formats=[header.format.upper()])
    if picture.size != (header.width, header.height):
        raise corrupt(header.format, "its headers contradict each other")
    picture.load()
    if header.format == "png":
        require_all_rows(data, header, picture)
    return picture


def _flat(picture: Image.Image, header: Header, background: tuple[int, int, int], mode: str) -> Image.Image:
    """Any mode to opaque L or RGB: deep samples to 8 bits, transparency over `background`."""
    if picture.mode.startswith("I;16"):
        array = np.asarray(picture)
        array = 2**header.bit_depth - 1 - array if header.inverted else array
        picture = Image.fromarray((array >> (header.bit_depth - 8)).astype(np.uint8))
    if picture.mode == "La":
        picture = picture.convert("LA")
    if header.colour_key is not None:
        picture = _keyed(picture, header.colour_key)
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
        if header.format == "bmp" and alpha.getbbox() is None:
            return picture.convert("RGB").convert(mode)  # writers leave the fourth byte 0 and mean opaque
        opaque = Image.new("RGB", picture.size, background)
        opaque.paste(picture, mask=alpha)
        return opaque.convert(mode)
    return picture.convert("RGB").convert(mode) if picture.mode in ("CMYK", "YCbCr") else picture.convert(mode)


def _keyed(picture: Image.Image, key: tuple[int, ...]) -> Image.Image:
    picture = picture.convert("L") if picture.mode == "1" else picture
    samples = np.asarray(picture)
    samples = samples[..., None] if samples.ndim == 2 else samples
    seen = Image.fromarray(np.where((samples == key).all(axis=-1), 0, 255).astype(np.uint8))
    picture = picture.convert("RGB")
    picture.putalpha(seen)
    return picture
