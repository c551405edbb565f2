"""JPEGs decoded by the GPU, for scans that the cores cannot feed: torchvision's nvJPEG, then the same geometry there.

Pixels are those of `images.decode` but for rounding and for what averages the picture down (boxes, not the DCT), so
scores move a little. How far is measured on the first pictures of each scan, which are decoded both ways: if one moves
by more than bfloat16 may move it, the cores decode as ever.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from anomaly_vae.engine import Engine
from anomaly_vae.errors import BadImage, ConfigError
from anomaly_vae.images import ImageSpec, Plan, masked, planned
from anomaly_vae.precision import MOST_MOVED
from anomaly_vae.torchvision_compat import import_torchvision

DecodeJpegs = Callable[[list[Tensor], int, torch.device], list[Tensor]]
"""Bytes of JPEGs to their pixels, uint8 (1 or 3, H, W), on a device; raises `RuntimeError` for all if one is bad."""

_TRIED = 32
"""Pictures that are decoded both ways."""
_MOST_PIXELS = 1 << 27
"""So many are decoded at once; a GPU holds them as bytes."""


@dataclass(frozen=True)
class Jpeg:
    """A file that the GPU shall decode."""

    data: bytes
    plan: Plan


class GpuDecoding:
    """Decodes for one scan. `begin` may be called by any thread, `finish` by one. `tell` hears why it stops.

    Raises `ConfigError` where there is no GPU, or no torchvision that decodes there.
    """

    def __init__(
        self, engine: Engine, decode_jpegs: DecodeJpegs | None = None, tell: Callable[[str], None] = lambda line: None
    ) -> None:
        self._engine = engine
        self._decode = decode_jpegs or torchvision_decoder(engine.device)
        self._tell, self._left, self._trusted = tell, _TRIED, True

    def begin(self, data: bytes) -> Jpeg | None:
        """The file as the GPU shall decode it; None if the cores shall. Raises `BadImage`."""
        if not self._trusted:
            return None
        plan = planned(data, self._engine.detector.image)
        return Jpeg(data, plan) if _takes(data, plan) else None

    def finish(self, jpegs: Sequence[Jpeg]) -> list[Tensor | BadImage]:
        """Their pictures, uint8 (C, H, W), in the same order."""
        return [picture for some in _bounded(jpegs) for picture in self._pictures(some)]

    def _pictures(self, files: list[Jpeg]) -> Sequence[Tensor | BadImage]:
        if not self._trusted:
            return [self._on_cores(one) for one in files]
        spec, device = self._engine.detector.image, self._engine.device
        try:
            bytes_of = [torch.frombuffer(bytearray(one.data), dtype=torch.uint8) for one in files]
            pixels = self._decode(bytes_of, spec.channels, device)
            # One that came out otherwise than its header says is none of ours.
            sizes = [(spec.channels, one.plan.header.height, one.plan.header.width) for one in files]
            if [tuple(one.shape) for one in pixels] != sizes:
                raise RuntimeError("sizes differ")
        except RuntimeError:  # one of them is bad, and the cores can tell which
            return [self._on_cores(one) for one in files]
        pictures = [fitted(one, file.plan, spec) for one, file in zip(pixels, files, strict=True)]
        if self._left > 0:
            return self._tried(files, pictures)
        return pictures

    def _tried(self, files: list[Jpeg], pictures: list[Tensor]) -> Sequence[Tensor | BadImage]:
        """Pictures as the cores decode them, and whether those of the GPU would have been judged alike."""
        found = [self._on_cores(one) for one in files]
        pairs = [(one, other) for one, other in zip(found, pictures, strict=True) if isinstance(one, Tensor)]
        self._left -= len(pairs)
        if pairs:
            moved = self._moved(*(torch.stack([pair[i].to(self._engine.device) for pair in pairs]) for i in range(2)))
            if not moved <= MOST_MOVED:
                self._trusted = False
                self._tell(f"--decode gpu: it moves scores by {moved:.2g} quartile ranges, {MOST_MOVED:g} allowed; "
                           "the cores decode")  # fmt: skip
        return found

    def _moved(self, ours: Tensor, theirs: Tensor) -> float:
        scores = [np.array(self._engine.judge(images).score) for images in (ours, theirs)]
        return float(np.abs(scores[0] - scores[1]).max()) / self._engine.detector.calibration.unit

    def _on_cores(self, one: Jpeg) -> Tensor | BadImage:
        try:
            return self._engine.prepare(one.data)
        except BadImage as error:
            return error


def torchvision_decoder(device: torch.device) -> DecodeJpegs:
    """nvJPEG by torchvision; raises `ConfigError` where there is none, after trying it on a picture."""
    if device.type != "cuda":
        raise ConfigError(f"--decode gpu needs a CUDA device, and this is {device.type}; leave it out")
    import_torchvision()
    from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

    def decode_all(files: list[Tensor], channels: int, on: torch.device) -> list[Tensor]:
        mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
        return list(decode_jpeg(files, mode=mode, device=on))

    try:
        decode_all([encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))], 3, device)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--decode gpu: torchvision does not decode here ({reason}); leave it out, or install the "
                          "torchvision that is built for this torch and CUDA") from None  # fmt: skip
    return decode_all


def fitted(pixels: Tensor, plan: Plan, spec: ImageSpec) -> Tensor:
    """A decoded file's pixels, uint8 (C, H, W), as what `images.decode` makes of it, on their device."""
    picture = pixels
    if plan.factor > 1:
        picture = avg_pool2d(pixels.float(), plan.factor, ceil_mode=True, count_include_pad=False).round()
    left, top, right, bottom = plan.region
    width, height = plan.size
    # Across first, rounded in between, as Pillow does.
    picture = _level(picture.float() @ _weights(picture.shape[2], left, right, width).to(pixels.device).T)
    picture = _level(_weights(picture.shape[1], top, bottom, height).to(pixels.device) @ picture)
    return masked(_on_background(_upright(picture.to(torch.uint8), plan.header.orientation), spec), spec)


def _level(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0, 255)


@lru_cache(maxsize=64)
def _weights(size: int, start: float, end: float, to: int) -> Tensor:
    """The triangle filter that `Image.resize(BILINEAR)` applies to `size` pixels, of which start..end become `to`."""
    scale = (end - start) / to
    support = max(scale, 1.0)
    found = np.zeros((to, size))
    for i in range(to):
        centre = start + (i + 0.5) * scale
        first, last = max(0, int(centre - support + 0.5)), min(size, int(centre + support + 0.5))
        row = np.maximum(0.0, 1.0 - np.abs((np.arange(first, last) - centre + 0.5) / support))
        found[i, first:last] = row / row.sum()
    return torch.from_numpy(found).float()


def _upright(picture: Tensor, orientation: int) -> Tensor:
    """Turned as EXIF says: mirrored first where it is mirrored at all."""
    if orientation in (5, 7):
        picture = picture.transpose(1, 2)
        return picture.flip(1, 2) if orientation == 7 else picture
    if orientation in (2, 4):
        return picture.flip(2 if orientation == 2 else 1)
    quarters = {3: 2, 6: 3, 8: 1}.get(orientation, 0)
    return torch.rot90(picture, quarters, (1, 2))


def _on_background(picture: Tensor, spec: ImageSpec) -> Tensor:
    if picture.shape[1:] == (spec.height, spec.width):
        return picture
    colours = torch.tensor(spec.background, dtype=torch.float32)
    if spec.channels == 1:  # ITU-R 601, as Pillow's "L"
        colours = (colours * torch.tensor([0.299, 0.587, 0.114])).sum().round().reshape(1)
    canvas = colours.to(picture)[:, None, None].expand(-1, spec.height, spec.width).clone()
    top, left = (spec.height - picture.shape[1]) // 2, (spec.width - picture.shape[2]) // 2
    canvas[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    return canvas


def _takes(data: bytes, plan: Plan) -> bool:
    """Whether the GPU decodes a file as the cores do: a whole JPEG of greys or YCbCr.

    Adobe's marker may say that colours are stored otherwise; what is cut short a GPU may fill up without a word.
    """
    plain = plan.header.format == "jpeg" and plan.header.mode != "cmyk" and b"Adobe" not in data[: 1 << 16]
    return plain and data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")  # an end, behind the last beginning of pixels


def _bounded(jpegs: Sequence[Jpeg]) -> Iterator[list[Jpeg]]:
    some: list[Jpeg] = []
    pixels = 0
    for one in jpegs:
        size = one.plan.header.width * one.plan.header.height
        if some and pixels + size > _MOST_PIXELS:
            yield some
            some, pixels = [], 0
        some.append(one)
        pixels += size
    if some:
        yield some
