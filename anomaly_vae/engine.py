"""`Engine`: a detector on a device, made fast and warm; serves scan and service alike."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from anomaly_vae.compiled import recorded
from anomaly_vae.detector import Detector
from anomaly_vae.errors import ConfigError
from anomaly_vae.judgement import Judgement
from anomaly_vae.precision import at_precision


class Engine:
    """Judges batches on one device. `judge` belongs to one thread at a time; `prepare` to any number.

    On a GPU batches are padded to 1, 2, 4 ... `max_batch` images, so that it meets only shapes it was warmed with; a
    CPU takes any, and so do tiles, which are judged picture by picture. Larger ones are cut. A picture's score does not
    depend on the batch it came in (float32: within 1e-5 of the calibration scores' quartile range).

    `precision`: bfloat16 is quicker where the device has it and raises no more false alarms (see `precision`); `auto`
    takes it where it can be had, and `remark` says why it could not.
    """

    def __init__(
        self, detector: Detector, device: str = "auto", max_batch: int = 32, precision: str = "float32"
    ) -> None:
        if max_batch < 1:
            raise ConfigError(f"max_batch must be at least 1, not {max_batch}")
        self.device = pick_device(device)
        self.detector, self.remark = at_precision(detector.to(self.device), precision)
        self.max_batch = max_batch
        self.warmed = False

    def warm(self) -> None:
        """Record the scores as native calls, and judge blank batches of every size, so that no user waits for it.

        A CPU gains nothing from sizes between the smallest and the largest.
        """
        self.warmed = True
        self.detector = recorded(self.detector)
        image = self.detector.image
        sizes = list(self._buckets())
        for size in sizes if self.device.type != "cpu" else sorted({sizes[0], sizes[-1]}):
            blank = torch.zeros((size, image.channels, image.height, image.width), dtype=torch.uint8)
            condition = self.detector.spec.model.condition
            classes = [condition.classes[0]] * size if condition and self.detector.wants_classes else None
            for heat in (False, True):
                self.detector.judge(blank, heat, classes)

    def ranked_as(self, detector: Detector) -> "Engine":
        """The same warm models, whose scores are ranked as another detector of the same models ranks them."""
        other = copy.copy(self)
        other.detector = detector.scored_by(self.detector.members, self.detector.calibration.tie)
        return other

    def prepare(self, data: bytes) -> Tensor:
        """A picture's bytes as uint8 (C, H, W); raises `BadImage`."""
        return self.detector.prepare(data)

    def judge(self, images: Tensor, heat: bool = False, classes: Sequence[str] | None = None) -> Judgement:
        """Judge uint8 images (B, C, H, W), however many; `classes` as for `Detector.judge`."""
        if not len(images):
            raise ConfigError("there is no image to judge; give a batch of at least one")
        if classes is not None and len(classes) != len(images):
            raise ConfigError(f"{len(images)} images but {len(classes)} classes; give one for each")
        pieces = []
        for start in range(0, len(images), self.max_batch):
            part = slice(start, start + self.max_batch)
            pieces.append(self._judge_padded(images[part], heat, None if classes is None else classes[part]))
        return pieces[0] if len(pieces) == 1 else _joined(pieces)

    def _judge_padded(self, images: Tensor, heat: bool, classes: Sequence[str] | None) -> Judgement:
        count = len(images)
        padded = self.device.type != "cpu" and self.detector.spec.tiles is None
        size = next(size for size in self._buckets() if size >= count) if padded else count
        if size > count:
            images = torch.cat([images, images[-1:].expand(size - count, *images.shape[1:])])
            classes = None if classes is None else [*classes, *[classes[-1]] * (size - count)]
        return _first(self.detector.judge(images, heat, classes), count)

    def _buckets(self) -> Iterator[int]:
        if self.detector.spec.tiles is not None:
            yield 1
            return
        size = 1
        while size < self.max_batch:
            yield size
            size *= 2
        yield self.max_batch


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA, else Apple's GPU, else the CPU. Raises `ConfigError` for one that is not there."""
    # Float32 shall be float32: TF32 would move scores by far more than the tolerance allows.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
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
    return replace(
        judged,
        score=judged.score[:count],
        p_value=judged.p_value[:count],
        outlier=judged.outlier[:count],
        parts={name: column[:count] for name, column in judged.parts.items()},
        heat=None if judged.heat is None else judged.heat[:count],
        latents=None if judged.latents is None else judged.latents[:count],
    )


def _joined(pieces: list[Judgement]) -> Judgement:
    heats = [piece.heat for piece in pieces if piece.heat is not None]
    latents = [piece.latents for piece in pieces if piece.latents is not None]
    return replace(
        pieces[0],
        score=[value for piece in pieces for value in piece.score],
        p_value=[value for piece in pieces for value in piece.p_value],
        outlier=[value for piece in pieces for value in piece.outlier],
        parts={name: [value for piece in pieces for value in piece.parts[name]] for name in pieces[0].parts},
        heat=np.concatenate(heats) if heats else None,
        latents=np.concatenate(latents) if latents else None,
    )
