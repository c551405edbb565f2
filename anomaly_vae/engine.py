"""`Engine`: a detector on a device, made fast and warm; serves scan and service alike."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from anomaly_vae.detector import Detector, Judgement
from anomaly_vae.errors import ConfigError


class Engine:
    """Judges batches on one device. `judge` belongs to one thread at a time; `prepare` to any number.

    On a GPU batches are padded to 1, 2, 4 ... `max_batch` images, so that it meets only shapes it was warmed with; a
    CPU takes any. Larger ones are cut. A picture's score does not depend on the batch it came in (float32: within 1e-5
    of the calibration scores' quartile range).
    """

    def __init__(self, detector: Detector, device: str = "auto", max_batch: int = 32) -> None:
        if max_batch < 1:
            raise ConfigError(f"max_batch must be at least 1, not {max_batch}")
        self.device = pick_device(device)
        self.detector = detector.to(self.device)
        self.max_batch = max_batch

    def warm(self) -> None:
        """Judge one blank batch of every size, so that no user waits for kernels to be chosen."""
        image = self.detector.image
        for size in self._buckets():
            blank = torch.zeros((size, image.channels, image.height, image.width), dtype=torch.uint8)
            self.detector.judge(blank, heat=True)

    def prepare(self, data: bytes) -> Tensor:
        """A picture's bytes as uint8 (C, H, W); raises `BadImage`."""
        return self.detector.prepare(data)

    def judge(self, images: Tensor, heat: bool = False) -> Judgement:
        """Judge uint8 images (B, C, H, W), however many."""
        if not len(images):
            raise ConfigError("there is no image to judge; give a batch of at least one")
        pieces = [self._judge_padded(piece, heat) for piece in torch.split(images, self.max_batch)]
        return pieces[0] if len(pieces) == 1 else _joined(pieces)

    def _judge_padded(self, images: Tensor, heat: bool) -> Judgement:
        count = len(images)
        size = next(bucket for bucket in self._buckets() if bucket >= count)
        if self.device.type == "cpu":
            size = count
        if size > count:
            images = torch.cat([images, images[-1:].expand(size - count, *images.shape[1:])])
        return _first(self.detector.judge(images, heat), count)

    def _buckets(self) -> Iterator[int]:
        size = 1
        while size < self.max_batch:
            yield size
            size *= 2
        yield self.max_batch


def pick_device(name: str) -> torch.device:
    """`_find_device`, with float32 meaning float32: TF32 would move scores by far more than the tolerance allows."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    return _find_device(name)


def _find_device(name: str) -> torch.device:
    """`auto`: CUDA, else Apple's GPU, else the CPU. Raises `ConfigError` for one that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here ({reason}); try --device cpu") from None
    return device


def _first(judged: Judgement, count: int) -> Judgement:
    if count == len(judged):
        return judged
    return Judgement(
        judged.score[:count],
        judged.p_value[:count],
        judged.outlier[:count],
        {name: column[:count] for name, column in judged.parts.items()},
        None if judged.heat is None else judged.heat[:count],
        judged.heat_scale,
        judged.policy,
        judged.version,
    )


def _joined(pieces: list[Judgement]) -> Judgement:
    first = pieces[0]
    heats = [piece.heat for piece in pieces if piece.heat is not None]
    return Judgement(
        [value for piece in pieces for value in piece.score],
        [value for piece in pieces for value in piece.p_value],
        [value for piece in pieces for value in piece.outlier],
        {name: [value for piece in pieces for value in piece.parts[name]] for name in first.parts},
        np.concatenate(heats) if heats else None,
        first.heat_scale,
        first.policy,
        first.version,
    )
