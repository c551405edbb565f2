"""`Normals`: what a detector made of normal pictures that it was not trained on, kept in order to explain others."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anomaly_vae.drift import widest
from anomaly_vae.member import Batch, Member
from anomaly_vae.recipe import DetectorSpec

Singles = npt.NDArray[np.float32]

MOST = 2000
"""So many normals tell percentiles to a twentieth of a percent."""
_CODE_NUMBERS = 1 << 20
_MOVED = 5


@dataclass(frozen=True)
class Normals:
    """`parts` (n, parts): every score of n normals that calibrate. `codes` (m, D): the first model's posterior means of
    m of them, and `names` (m), by which their owner knows them; none where the model sees tiles.
    """

    parts: Singles
    codes: Singles
    names: tuple[str, ...]

    @classmethod
    def of(
        cls, spec: DetectorSpec, member: Member, parts: npt.NDArray[np.float64], batches: Iterator[Batch],
        names: Sequence[str],
    ) -> "Normals":  # fmt: skip
        """From the calibration pictures' parts, and batches of those (or some of those) called `names`."""
        kept = parts[np.linspace(0, len(parts) - 1, min(MOST, len(parts))).astype(int)].astype(np.float32)
        if spec.tiling is not None:
            return cls(kept, np.zeros((0, 0), np.float32), ())
        with torch.inference_mode():
            codes = np.concatenate([codes_of(member, batch).numpy() for batch in batches])
        most = min(MOST, len(codes), max(1, _CODE_NUMBERS // codes.shape[1]))
        chosen = np.linspace(0, len(codes) - 1, most).astype(int)
        return cls(kept, codes[chosen], tuple(names[i] for i in chosen))

    @cached_property
    def widest(self) -> tuple[int, ...]:
        """The latents to watch: see `drift.widest`."""
        return widest(self.codes)

    def explanations(
        self, member: Member, images: Tensor, parts: Mapping[str, Sequence[float]]
    ) -> list[dict[str, Any]]:
        """That of each of the images (B, C, H, W), of which `member` is the first to see them."""
        codes = np.zeros((len(images), 0), np.float32)
        if len(self.codes):
            with torch.inference_mode():
                codes = codes_of(member, Batch(images)).numpy()
        rows = (dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True))
        return [self.explanation(row, code) for row, code in zip(rows, codes, strict=True)]

    def explanation(self, parts: Mapping[str, float], code: Singles) -> dict[str, Any]:
        """What is unusual about a picture with these parts and this code (D,), as plain values.

        `percentiles`: the share of normals, in %, whose part is not larger. `latents`: those of the code that lie
        farthest from the normals' mean, in their standard deviations. `nearest_normal`: the most similar code's name,
        an `id` that stands for it where names are nobody's business, and the root mean square of these deviations
        between the two.
        """
        found: dict[str, Any] = {
            "percentiles": {
                name: 100 * float((column <= value).mean())
                for (name, value), column in zip(parts.items(), self.parts.T, strict=True)
            }
        }
        if len(self.codes) < 2:
            return {**found, "latents": [], "nearest_normal": None}
        spread = self.codes.std(0)
        spread = np.where(spread > 1e-6 * spread.max() + 1e-12, spread, np.inf)
        away = (code - self.codes.mean(0)) / spread
        moved = np.argsort(-np.abs(away))[:_MOVED]
        distances = np.sqrt((((self.codes - code) / spread) ** 2).mean(1))
        nearest = int(distances.argmin())
        return {
            **found,
            "latents": [{"index": int(i), "value": float(code[i]), "deviations": float(away[i])} for i in moved],
            "nearest_normal": {
                "id": self._id_of(nearest),
                "name": self.names[nearest],
                "distance": float(distances[nearest]),
            },
        }

    def _id_of(self, i: int) -> str:
        # Of its code as well, which nobody is told: else whoever guesses names could tell that one is right.
        content = self.names[i].encode("utf-8", "surrogateescape") + self.codes[i].astype("<f4").tobytes()
        return hashlib.sha256(content).hexdigest()[:12]

    def packed(self) -> dict[str, npt.NDArray[Any]]:
        """As arrays for a bundle."""
        names = np.frombuffer(json.dumps(self.names).encode("utf-8", "surrogateescape"), np.uint8)
        return {"parts": self.parts, "codes": self.codes, "names": names}

    @classmethod
    def unpacked(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> "Normals":
        """From `packed`; raises `ValueError` where it is not that."""
        names = json.loads(arrays["names"].tobytes())
        if len(names) != len(arrays["codes"]):
            raise ValueError(f"{len(arrays['codes'])} normals have {len(names)} names")
        return cls(arrays["parts"], arrays["codes"], tuple(names))


def codes_of(member: Member, batch: Batch) -> Tensor:
    """Posterior means by the member's first model, float32 (B, D) on the CPU."""
    code: Tensor = batch.seen_by(member.model).code.flatten(1)
    return code.float().cpu()
