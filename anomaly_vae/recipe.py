"""`DetectorSpec`: all that makes a detector, from the folder's layout to the verdict; stored whole in a bundle."""

from collections.abc import Iterator
from typing import Any, Self

from pydantic import Field, model_validator

from anomaly_vae.calibration import Mode
from anomaly_vae.data import DataSpec
from anomaly_vae.expert_spec import ExpertSpec
from anomaly_vae.expert_spec import RaritySpec as RaritySpec
from anomaly_vae.expert_spec import TrainingSpec as TrainingSpec
from anomaly_vae.images import ImageSpec
from anomaly_vae.masking import RegionSpec
from anomaly_vae.networks import Shape
from anomaly_vae.spec import Spec
from anomaly_vae.tiling import TilesSpec, Tiling, tiling_of

FUSED = "fused"

_LARGEST_SIDE = 512
"""Of what a model sees."""


class CalibrationSpec(Spec):
    """How verdicts are calibrated; see `calibration`.

    Fewer than `few_normals` usable normals are not split but calibrated by `folds`-fold cross-conformal prediction.
    """

    alpha: float | None = Field(None, gt=0, lt=1)
    mode: Mode = "average"
    few_normals: int = Field(200, ge=0)
    folds: int = Field(5, ge=2, le=20)


class SplitSpec(Spec):
    """Shares of the normals (after the test part is set aside) that are not trained on."""

    fit: float = Field(0.15, gt=0, lt=0.5)
    calibrate: float = Field(0.25, gt=0, lt=0.8)

    @model_validator(mode="after")
    def _some_left_to_train(self) -> Self:
        if self.fit + self.calibrate > 0.8:
            raise ValueError("fit + calibrate must leave at least 20% of the normals for training")
        return self


class DetectorSpec(ExpertSpec):
    """A detector before it is trained. `image: null` chooses size and channels from the pictures.

    `tiles`: show large or wide pictures to the models in pieces. `region`: the part of the picture that counts;
    training moves it, as pixels, into `image`.

    The fields of `ExpertSpec` describe its first kind of model; `beside` has others by name, whose scores are called
    NAME.KIND; training leaves them out where what models see has fewer than `beside_from` pixels on its shorter side.
    `verdict` names the score that is calibrated: one of `parts`, or `fused`, the largest that a kind of models fuses
    of its own: a silent kind then costs little. `heat_blur`: standard deviation of the heat maps' blur, as a share of
    the shorter side. `offline` allows scores that are too slow for a service, which then refuses the bundle. `probes`:
    how many training pictures the bundle keeps to check itself on another machine (0: none).
    """

    preset: str = "custom"
    image: ImageSpec | None = None
    tiles: TilesSpec | None = None
    region: RegionSpec | None = None
    beside: dict[str, ExpertSpec] = Field(default_factory=dict)
    beside_from: int = Field(0, ge=0)
    verdict: str = FUSED
    heat_blur: float = Field(0.015, ge=0, le=0.5)
    calibration: CalibrationSpec = Field(default_factory=CalibrationSpec)
    split: SplitSpec = Field(default_factory=SplitSpec)
    data: DataSpec = Field(default_factory=DataSpec)
    offline: bool = False
    probes: int = Field(32, ge=0, le=1024)
    seed: int = Field(0, ge=0)

    def derived(self) -> Any:
        """Scores that nobody chose follow the model, in all experts."""
        beside = {name: dict.fromkeys(expert.derived(), True) for name, expert in self.beside.items()}
        return dict.fromkeys(super().derived(), True) | {"beside": {k: v for k, v in beside.items() if v}}

    @property
    def shape(self) -> Shape:
        """(C, H, W) of what the models see: the picture, or a tile; raises ValueError while that is open."""
        if self.image is None:
            raise ValueError("it does not say the size of its images")
        sides = (self.tiles.side, self.tiles.side) if self.tiles else (self.image.height, self.image.width)
        return self.image.channels, *sides

    @property
    def tiling(self) -> Tiling | None:
        """Where the tiles of a picture lie; None where models see it whole."""
        return tiling_of(self.image, self.tiles) if self.image and self.tiles else None

    @property
    def experts(self) -> dict[str, ExpertSpec]:
        """All kinds of models by name; the first has none."""
        return {"": self, **self.beside}

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the scores of all experts, in order."""
        return tuple(self._parts())

    def _parts(self) -> Iterator[str]:
        for name, expert in self.experts.items():
            yield from (f"{name}.{kind}" if name else kind for kind in expert.columns)

    @model_validator(mode="after")
    def _fast_enough(self) -> Self:
        slow = [score.column for expert in self.experts.values() for score in expert.scores if score.offline]
        if slow and not self.offline:
            raise ValueError(
                f"scores: {', '.join(slow)} takes seconds a picture, too slow for a service; remove it, or set offline "
                "to true for a detector that only scans"
            )
        return self

    @model_validator(mode="after")
    def _verdict_exists(self) -> Self:
        if self.verdict != FUSED and self.verdict not in self.parts:
            raise ValueError(f"verdict {self.verdict!r} is not among the scores: {', '.join((FUSED, *self.parts))}")
        if any(not name.isidentifier() for name in self.beside):
            raise ValueError("the names in beside are plain words, such as defect; rename them")
        if self.model.condition is not None and self.beside:
            raise ValueError("a conditional model stands alone; leave out beside or model.condition")
        if any(expert.model.condition is not None for expert in self.beside.values()):
            raise ValueError("a conditional model stands alone; leave out model.condition of those in beside")
        return self

    @model_validator(mode="after")
    def _networks_fit_image(self) -> Self:
        # Of a tile the size is known before the picture's.
        known = self.image or (self.tiles and ImageSpec(height=self.tiles.side, width=self.tiles.side, channels=1))
        for expert in self.experts.values() if known else ():
            expert.check_shape(self.model_copy(update={"image": known}).shape)
        return self

    @model_validator(mode="after")
    def _tiles_fit(self) -> Self:
        if self.tiles is None:
            if self.image is not None and max(self.image.height, self.image.width) > _LARGEST_SIDE:
                raise ValueError(
                    f"models see {_LARGEST_SIDE} px a side at most; set tiles.side=128, or a smaller image"
                )
            return self
        if self.image is not None and self.tiles.side > min(self.image.height, self.image.width):
            size = f"{self.image.width}x{self.image.height}"
            raise ValueError(
                f"tiles.side {self.tiles.side} is larger than the picture of {size} px; "
                "make it smaller or image larger, or leave out tiles"
            )
        if self.model.condition is not None:
            raise ValueError("a class is of a whole picture, not of its tiles; leave out tiles or model.condition")
        if any(expert.training.rarity is not None for expert in self.experts.values()):
            raise ValueError("rare pictures are found by whole pictures' codes; leave out tiles or training.rarity")
        if any(expert.training.trim is not None for expert in self.experts.values()):
            raise ValueError("it is whole pictures that training.trim leaves out; leave out tiles or training.trim")
        return self
