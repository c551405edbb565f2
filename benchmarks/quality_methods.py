"""How `quality.py` measures one method on one task: the product's presets, and baselines on the same pixels."""

import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from baselines import BASELINES, BY_CHANCE
from quality_rows import Achieved, baseline_code, product_code
from quality_tasks import Task

from anomaly_vae import ConfigError, Detector, DetectorSpec, Engine, ImageSpec, Judgement
from anomaly_vae.calibration import Calibration
from anomaly_vae.data import Pictures, open_pictures, suggest_image_spec, survey
from anomaly_vae.errors import CalibrationError
from anomaly_vae.layouts import DataSpec
from anomaly_vae.metrics import Detection, detection, localisation
from anomaly_vae.presets import DEFAULT, preset_names, read_preset
from anomaly_vae.training import train

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

ALPHAS = (0.01, 0.05, 0.1)
REDRAWS = 100
BATCH = 32
QUICK = ("training.steps=20", "calibration.few_normals=40", "calibration.folds=2")
"""Few pictures shall go the way of many as well as that of few."""


@dataclass(frozen=True)
class Method:
    """A column of the tables: a preset with settings of its own, or with `preset` None one of the `BASELINES`."""

    name: str
    preset: str | None = None
    overrides: tuple[str, ...] = ()

    @property
    def code(self) -> str:
        """Stands for the code that its figures depend on."""
        return product_code() if self.preset else baseline_code()

    @property
    def by_chance(self) -> bool:
        """Whether another seed gives other figures."""
        return self.preset is not None or self.name in BY_CHANCE

    def spec(self, task: Task, image: Sequence[str], seed: int, quick: bool) -> DetectorSpec:
        """Settings of a product's row; raises `ConfigError`."""
        assert self.preset is not None
        chosen = [*(self._quick() if quick else ()), *image, *self.overrides, *task.overrides, f"seed={seed}"]
        return read_preset(self.preset, chosen)

    def _quick(self) -> list[str]:
        """Few steps for every kind of model."""
        assert self.preset is not None
        beside = read_preset(self.preset).beside
        return [*QUICK, *(f"beside.{name}.{QUICK[0]}" for name in beside)]


PLAIN = {
    "plain-ae": Method("plain-ae", "conv-autoencoder", ("verdict=squared_error",)),
    "plain-vae-elbo": Method(
        "plain-vae-elbo", "vae" if "vae" in preset_names() else DEFAULT, ("verdict=negative_elbo",)
    ),
}


def methods_of(names: str | None, presets: str | None, overrides: Sequence[str]) -> list[Method]:
    """`names` (None: the default preset and all baselines), then `presets`, with commas; raises `ConfigError`."""
    known = (*PLAIN, *BASELINES, *preset_names())
    wanted = [DEFAULT, *BASELINES, *PLAIN] if names is None else names.split(",")
    found = {}
    for name in [*wanted, *(presets.split(",") if presets else [])]:
        if name in PLAIN:
            found[name] = PLAIN[name]
        elif name in BASELINES:
            found[name] = Method(name)
        elif name in known:
            method = Method(" ".join([name, *(f"-o {one}" for one in overrides)]), name, tuple(overrides))
            found[method.name] = method
        else:
            raise ConfigError(f"there is no method {name!r}; choose among {', '.join(known)}")
    return list(found.values())


class Case:
    """A task on disk, with its pictures opened once for all methods that see them at the same size.

    `test`: pictures of the test part of which no copy is in the other part or in the test already.
    """

    def __init__(self, task: Task, folder: Path, image: ImageSpec | None) -> None:
        self.task, self.folder = task, task.write(folder)
        self._data = DataSpec(normal=task.normal)
        self.image = image or suggest_image_spec(survey(self.folder, self._data))
        self._opened: tuple[ImageSpec, Pictures] | None = None

    def pictures(self, image: ImageSpec) -> Pictures:
        """All pictures of the task, decoded to `image`."""
        if self._opened is None or self._opened[0] != image:
            self._opened = image, open_pictures(self.folder, self._data, image)
        return self._opened[1]

    def parts(self, image: ImageSpec) -> tuple[Pictures, Pictures]:
        """What a method is made from, and what it is tested on."""
        pictures = self.pictures(image)
        train = np.array([item.split == "train" for item in pictures.items])
        first = np.zeros(len(pictures), bool)
        first[np.unique(pictures.fingerprints, return_index=True)[1]] = True
        fresh = first & ~np.isin(pictures.fingerprints, pictures.fingerprints[train])
        return pictures.select(np.flatnonzero(train)), pictures.select(np.flatnonzero(~train & fresh))


def settings_of(task: Task, method: Method, image: ImageSpec | None, seed_free: DetectorSpec | None) -> str:
    """Stands for all that a row's figures depend on, but the seed and the code."""
    size = image.model_dump_json() if image else "chosen from the pictures"
    settings = seed_free.model_dump_json() if seed_free else method.name
    return hashlib.sha256("\n".join([task.digest(), size, settings]).encode()).hexdigest()[:16]


def measure(case: Case, method: Method, spec: DetectorSpec | None, seed: int, device: str) -> dict[str, Any]:
    """The figures of a `Row`; raises whatever goes wrong."""
    if spec is None:
        return _measure_baseline(case, method, seed)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        started = time.monotonic()
        if train(spec, case.folder, bundle, device=device) is None:
            raise ConfigError("run it as one process; quality.py does not go with torchrun")
        seconds = time.monotonic() - started
        engine = Engine(Detector.load(bundle, device), device, BATCH)
    return {"train_seconds": seconds, **_measure_detector(case, engine)}


# --- the product ----------------------------------------------------------------------------------------------------


def _measure_detector(case: Case, engine: Engine) -> dict[str, Any]:
    detector = engine.detector
    test, localise = case.parts(detector.image)[1], _has_masks(case)
    engine.warm()
    judged: list[Judgement] = []
    seconds = 0.0
    for _, images in test.batches(BATCH):
        started = time.perf_counter()
        judged.append(engine.judge(images, heat=localise))
        seconds += time.perf_counter() - started
    abnormal = ~_normal(test)
    scores = np.array([score for one in judged for score in one.score])
    outlier = np.array([verdict for one in judged for verdict in one.outlier], bool)
    parts = {name: np.array([v for one in judged for v in one.parts[name]]) for name in judged[0].parts}
    heat = [one.heat for one in judged if one.heat is not None]
    calibration, policy = detector.calibration, detector.policy
    normals = int((~abnormal).sum())
    interval = calibration.false_alarms_interval(normals, policy.alpha, policy.mode) if policy.band else None
    return {
        **_figures(scores, test, np.concatenate(heat) if heat else None, 1000 * seconds / len(test)),
        "n_train": case.task.n_train - (0 if calibration.crossed else calibration.n),
        "n_calibrate": calibration.n,
        "alpha": policy.alpha,
        "expected_rate": policy.expected_false_alarm_rate,
        "false_alarms": int((outlier & ~abnormal).sum()),
        "false_alarm_interval": interval,
        "flagged": float(outlier[abnormal].mean()),
        "achieved": redrawn(calibration, scores[~abnormal]),
        "parts": {name: detection(part[~abnormal], part[abnormal]).auroc for name, part in parts.items()},
    }


def redrawn(calibration: Calibration, test_normals: Floats, alphas: Sequence[float] = ALPHAS) -> tuple[Achieved, ...]:
    """`achieved_rates` with every second of the test normals as spare pictures, and the others as the test.

    Nothing with K-fold calibration, whose scores are of several models, nor with groups, which do not come one by one.
    """
    if calibration.crossed or calibration.groups is not None:
        return ()
    return achieved_rates(calibration.scores[0], test_normals[::2], test_normals[1::2], alphas)


def achieved_rates(
    calibration: Floats, spare: Floats, test: Floats, alphas: Sequence[float] = ALPHAS, redraws: int = REDRAWS
) -> tuple[Achieved, ...]:
    """False-alarm rates on `test`, for calibration sets of the given size redrawn from `calibration` and `spare`.

    All are scores of normal pictures that nothing was trained on. An alpha that so many do not support is left out.
    The redraws share pictures and the test stays the same, so they spread far less than wholly new sets would, which is
    what `Achieved.interval` says; redrawing the test as well would hide any difference between the two.
    """
    pool, rng = np.concatenate([calibration, spare]), np.random.default_rng(0)
    drawn = [Calibration.of([rng.choice(pool, len(calibration), replace=False)]) for _ in range(redraws)]
    return tuple(_achieved(drawn, test, alpha) for alpha in alphas if len(test) and _supported(drawn[0], alpha))


def _supported(calibration: Calibration, alpha: float) -> bool:
    try:
        return calibration.rank(alpha) > 0
    except CalibrationError:
        return False


def _achieved(drawn: Sequence[Calibration], test: Floats, alpha: float) -> Achieved:
    rates = [float(one.outliers(one.p_values(test), alpha).mean()) for one in drawn]
    low, high = np.quantile(rates, [0.05, 0.95])
    few, many = drawn[0].false_alarms_interval(len(test), alpha)
    return Achieved(
        alpha=alpha,
        mean=float(np.mean(rates)),
        low=float(low),
        high=float(high),
        interval=(few / len(test), many / len(test)),
        redraws=len(drawn),
    )


# --- baselines ------------------------------------------------------------------------------------------------------


def _measure_baseline(case: Case, method: Method, seed: int) -> dict[str, Any]:
    baseline = BASELINES[method.name](seed)
    made, test = case.parts(case.image)
    normals = np.concatenate(list(_rows(made)))
    started = time.monotonic()
    baseline.fit(normals)
    trained = time.monotonic() - started
    localise, seconds = _has_masks(case), 0.0
    scores, maps = [], []
    for x in _rows(test):
        started = time.perf_counter()
        scores.append(baseline.scores(x))
        seconds += time.perf_counter() - started
        errors = baseline.errors(x) if localise else None
        if errors is not None:
            maps.append(errors.reshape(len(x), case.image.channels, case.image.height, case.image.width).mean(1))
    heat = np.concatenate(maps) if maps else None
    figures = _figures(np.concatenate(scores), test, heat, 1000 * seconds / len(test))
    return {**figures, "train_seconds": trained, "n_train": len(made), "n_calibrate": 0}


def _rows(pictures: Pictures) -> Iterator[npt.NDArray[np.float32]]:
    for _, images in pictures.batches(8 * BATCH):
        yield (images.flatten(1).float() / 255).numpy()


# --- both -----------------------------------------------------------------------------------------------------------


def _figures(scores: Floats, test: Pictures, heat: npt.NDArray[np.float32] | None, ms: float) -> dict[str, Any]:
    abnormal = ~_normal(test)
    quality: Detection = detection(scores[~abnormal], scores[abnormal])
    figures = {
        "n_normal": int((~abnormal).sum()),
        "n_abnormal": int(abnormal.sum()),
        "auroc": quality.auroc,
        "auroc_interval": quality.auroc_interval,
        "average_precision": quality.average_precision,
        "tpr_at_1_fpr": quality.tpr_at_1_fpr,
        "ms_an_image": ms,
    }
    if heat is None:
        return figures
    # An abnormal picture without a mask says nothing about its pixels.
    known = [(one, mask) for i, one in enumerate(heat) if (mask := test.mask(i)) is not None]
    pixels = localisation(*zip(*known, strict=True))
    if pixels is None:
        return figures
    return figures | {
        "pixel_auroc": pixels.auroc,
        "pixel_average_precision": pixels.average_precision,
        "pro": pixels.pro,
    }


def _normal(pictures: Pictures) -> npt.NDArray[np.bool_]:
    return np.array([item.normal for item in pictures.items], bool)


def _has_masks(case: Case) -> bool:
    return any(entry.mask is not None for entry in case.task.entries)
