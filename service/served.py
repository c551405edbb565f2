"""`Served`: one version of a model, loaded and warm; `Bundles`: the folder that it comes from, and how it is made."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from anomaly_vae import BundleError, ConfigError, Detector, Engine, glance, pick_device
from service import memory
from service.decisions import Sample
from service.errors import Problem
from service.policies import InForce
from service.refusals import refused
from service.tickets import NotAccepted, Target

if TYPE_CHECKING:
    from torch import Tensor

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MANIFEST = "bundle.yaml"
_NO_MEMORY = re.compile(r"out of memory|(?:allocate|not enough) memory")


@dataclass(frozen=True, eq=False)
class Served:
    """One version of a model, loaded and warm. `bundle`: its folder's name; `own`: the detector as that bundle has it.

    `calibration` is the revision that ranks what `engine` scores, 0 for the bundle's own. `since`: when it was loaded,
    in seconds since 1970.
    """

    name: str
    bundle: str
    own: Detector
    engine: Engine
    target: Target
    policy: InForce
    since: float
    calibration: int = 0

    @property
    def detector(self) -> Detector:
        """Which scores and ranks."""
        return self.engine.detector

    @property
    def version(self) -> str:
        """As shown everywhere."""
        return self.detector.version

    @property
    def base(self) -> str:
        """The bundle's own version."""
        return self.own.version

    @property
    def shown(self) -> dict[str, str]:
        """In replies."""
        return {"name": self.name, "version": self.version}

    def prepare(self, data: bytes) -> "Tensor":
        """A picture's bytes as the models see it; raises `BadImage`."""
        return self.engine.prepare(data)

    def ranked(self, sample: Sample | None, revision: int = 0, at: float | None = None) -> "Served":
        """The same warm models, ranked among other normals or (None) the bundle's own; raises `CalibrationError`.

        `at`: when these were chosen, in seconds since 1970.
        """
        own = self.own
        detector = own if sample is None else own.recalibrated(sample.scores, sample.seen, sample.independent, at)
        engine = self.engine.ranked_as(detector)
        target, policy = Target(engine.judge, self.target.probe), InForce.of(engine.detector)
        return replace(self, engine=engine, target=target, policy=policy, calibration=revision)


class Bundles:
    """The folder of bundles that may be loaded by name.

    Whatever computes runs by `warm`, which does work on the models' thread. `clock`: seconds since 1970.
    """

    def __init__(
        self,
        folder: Path | None,
        open_bundle: Callable[[Path], Detector],
        engine: Callable[[Detector], Engine],
        device: str,
        max_batch: int,
        clock: Callable[[], float],
    ) -> None:
        self._folder, self._open, self._engine = folder, open_bundle, engine
        self._device, self._max_batch, self._clock = device, max_batch, clock
        self.warm: Callable[[Callable[[], None]], None] = lambda work: work()

    def names(self) -> list[str]:
        """All of them."""
        try:
            there = [] if self._folder is None else [path.name for path in self._folder.iterdir()]
            return sorted(filter(self._is_there, there))
        except OSError:  # it was taken away
            return []

    def version(self, bundle: str) -> str:
        """Which one a bundle is, by its manifest alone; raises `Problem`."""
        try:
            return glance(self._place(bundle)).version
        except (BundleError, ConfigError) as error:
            raise _bad(error) from None

    def read(self, name: str, bundle: str) -> Served:
        """A bundle to be served under a name; raises `Problem`."""
        place = self._place(bundle)
        try:
            self._make_sure_of_room(bundle, place)
            return self.made(name, bundle, self._open(place), place)
        except (BundleError, ConfigError) as error:
            raise _bad(error) from None
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
                memory.release()
                message = f"there is not memory enough for the bundle {bundle}; retire a version that is not needed"
                raise Problem(HTTPStatus.INSUFFICIENT_STORAGE, "no_memory", message) from None
            raise

    def made(self, name: str, bundle: str, detector: Detector, place: Path | None = None) -> Served:
        """A detector, warm. `place`: of a bundle whose probes were not scored yet."""
        import torch

        engines: list[Engine] = []

        def work() -> None:
            if place is not None:
                detector.check_probes(place)
            engines.append(self._engine(detector))
            engines[0].warm()

        try:
            self.warm(work)
        except NotAccepted as refusal:
            raise refused(refusal) from None
        (engine,) = engines
        image = detector.image
        probe = torch.zeros((image.channels, image.height, image.width), dtype=torch.uint8)
        target = Target(engine.judge, probe)
        return Served(name, bundle, detector, engine, target, InForce.of(engine.detector), self._clock())

    def _place(self, bundle: str) -> Path:
        if self._folder is None:
            message = "this service has no folder of bundles; start it with -o models=FOLDER"
            raise Problem(HTTPStatus.CONFLICT, "no_models_folder", message)
        if not self._is_there(bundle):
            there = ", ".join(self.names()) or "none"
            message = (
                f"there is no bundle {bundle[:64]!r} in the folder of models, links out of it aside; there is {there}"
            )
            raise Problem(HTTPStatus.NOT_FOUND, "unknown_bundle", message)
        return self._folder / bundle

    def _is_there(self, bundle: str) -> bool:
        """Whether it is a folder of this very folder, or a link to one, with a manifest of its own."""
        assert self._folder is not None
        if not NAME.fullmatch(bundle):
            return False
        try:
            place = (self._folder / bundle).resolve(strict=True)
            manifest = place / _MANIFEST
            return place.parent == self._folder.resolve() and manifest.is_file() and not manifest.is_symlink()
        except (OSError, RuntimeError):  # links in a circle
            return False

    def _make_sure_of_room(self, bundle: str, place: Path) -> None:
        there = memory.available(str(pick_device(self._device)))
        wanted = memory.needed(place, self._max_batch)
        if there is not None and wanted > there:
            message = (
                f"the bundle {bundle} takes up to {wanted / 2**20:,.0f} MiB of memory, and {there / 2**20:,.0f} MiB "
                "are free; retire a version that is not needed (POST /v1/models/NAME:retire)"
            )
            raise Problem(HTTPStatus.INSUFFICIENT_STORAGE, "no_memory", message)


def _bad(error: Exception) -> Problem:
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "bad_bundle", str(error))
