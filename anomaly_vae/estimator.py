"""`VAEOutlierDetector`: a calibrated detector of array rows or array images in scikit-learn's fashion."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from anomaly_vae.calibration import Calibration
from anomaly_vae.engine import pick_device
from anomaly_vae.errors import ConfigError
from anomaly_vae.fabric import make_fabric
from anomaly_vae.fitting import Fitting
from anomaly_vae.member import Batch, Batches, Member, member_scores
from anomaly_vae.networks import Shape
from anomaly_vae.objectives import Objective
from anomaly_vae.recipe import FUSED, DetectorSpec
from anomaly_vae.seeds import seed_of
from anomaly_vae.spec import override
from anomaly_vae.splitting import folds

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_LEAST_ROWS = 10
"""Fewer leave no two rows to train on, or none to measure the scores' spread by, once some are held out."""
_LEAST_FIT = 10
_LEAST_CONV_SIDE = 16
_LARGEST_IN_WIDE_BATCHES = 4096
_FURTHEST = 1e6
"""Standard deviations beyond which a feature is only far: squares of it must not overflow in float32."""
_FEATURE_PARTS = ("squared_error", "local_maximum", "mahalanobis")
"""What is fused for features: the relative error divides by a picture's contrast, which grows with an outlier."""


class VAEOutlierDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """Variational autoencoder trained on X, with conformal calibration on rows of X that it is not trained on.

    POLARITY: as scikit-learn has it, `score_samples` and `decision_function` are HIGHER for more NORMAL rows, opposite
    to all scores elsewhere in this library. `predict` gives +1 (normal) or -1 (outlier).

    X is an array of

    - features (n, d): standardised by the rows trained on; any finite numbers;
    - pictures (n, H, W) or (n, H, W, C): uint8, or anything else in [0, 1] (ValueError otherwise: a scale guessed from
      the data would change from one call to the next).

    Parameters: `latents`: None is half the features, or a quarter of the pixels, 32 at most. `network`: `auto` (conv
    for pictures from 16 px on, else mlp), `mlp` with layers `hidden`, `conv` or `linear`. `contamination`: `auto` puts
    the threshold where a new normal row is called an outlier with probability `alpha`; a number in (0, 0.5] puts it
    so that this share of the training rows lies below. `verdict`: the score it goes by, `fused` or a kind of `scores`.
    `steps`: optimiser steps, of all members together. `device`: as for PyTorch, or `auto`. `overrides`: texts
    `key.sub=value` for `DetectorSpec`, such as `model.latent.kind=mixture`; they win over all other parameters. What
    concerns files (`image`, `data`, `probes`) has no effect, and classes (`model.condition`) are refused.

    Fitted: `offset_` (decision_function = score_samples - offset_); `alpha_`, the false-alarm rate that a threshold
    `auto` stands for (above `alpha` where there are fewer than 1/alpha - 1 calibration rows; None with a number as
    contamination); `spec_`, `members_`, `calibration_`, `shape_in_` (of one row), `n_features_in_` (of pictures the
    height, as scikit-learn counts), `feature_names_in_`.

    With fewer than `calibration.few_normals` (200) rows there are five members, and each row is ranked by the one that
    never saw it (cross-conformal, Vovk 2015). `score_samples` then is not the negative score but the number of
    calibration rows at least as unusual, plus a fraction that orders ties by the members' mean score: no threshold on a
    mean of members would keep the rate. The rate then tends to lie below alpha: ranks by five vary less than by one.
    Rows of X count as exchangeable: no groups, no copies.

    Errors: `ConfigError` for parameters, ValueError for X, `TrainingError` for a loss that is not a number.
    """

    def __init__(
        self,
        *,
        latents: int | None = None,
        hidden: tuple[int, ...] = (64, 32),
        network: str = "auto",
        contamination: float | str = "auto",
        alpha: float = 0.05,
        verdict: str = FUSED,
        steps: int = 1000,
        batch_size: int = 64,
        learning_rate: float = 2e-3,
        device: str = "cpu",
        random_state: Any = None,
        overrides: tuple[str, ...] = (),
    ) -> None:
        self.latents = latents
        self.hidden = hidden
        self.network = network
        self.contamination = contamination
        self.alpha = alpha
        self.verdict = verdict
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.device = device
        self.random_state = random_state
        self.overrides = overrides

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: N803 - scikit-learn's name
        """Train and calibrate on X, at least 10 rows, mostly normal; `y` is ignored. Quiet."""
        share = self._share()
        X = validate_data(self, X, allow_nd=True, ensure_min_samples=_LEAST_ROWS)  # noqa: N806
        self.shape_in_ = tuple(X.shape[1:])
        rows = _as_rows(X)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.spec_ = self._spec(rows.shape[1:], X.ndim == 2, seed)
        parts = _divide(self.spec_, len(rows))
        # A device that is not there gets its line here: Fabric would say it in its own words.
        fabric = make_fabric(str(pick_device(self.device)), self.spec_.training.precision, None)
        self.members_ = [
            _make_reader(self.spec_, rows, part, fabric, i, len(parts), X.ndim == 2) for i, part in enumerate(parts)
        ]
        self.calibration_ = Calibration.of(
            [
                _scores(self.spec_, reader, rows[part.calibrate])
                for reader, part in zip(self.members_, parts, strict=True)
            ]
        )
        self._set_offset(rows, share)
        return self

    def score_samples(self, X: Any) -> Floats:  # noqa: N803
        """Normality of rows, shape (n,): HIGHER is more NORMAL; the negative of the library's score, see the class."""
        return self._normality(self._columns(self._checked(X)))

    def decision_function(self, X: Any) -> Floats:  # noqa: N803
        """`score_samples` - `offset_`, shape (n,): below 0 for outliers, HIGHER is more NORMAL."""
        normality = self.score_samples(X)
        return np.asarray(normality - self.offset_, np.float64)

    def predict(self, X: Any) -> Indices:  # noqa: N803
        """+1 for normal rows, -1 for outliers; int64 (n,). Rows of `fit` count as outliers less often than new ones."""
        return np.where(self.decision_function(X) < 0, -1, 1).astype(np.int64)

    def p_values(self, X: Any) -> Floats:  # noqa: N803
        """Conformal p-values (n,) of rows not in the training X, whatever `contamination`: small is unusual.

        A new normal row has p <= a with probability a at most; see `Calibration` for what five members promise.
        """
        return self.calibration_.p_values(self._columns(self._checked(X)))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _share(self) -> float | None:
        """The contamination as a share, None for `auto`."""
        given = self.contamination
        if isinstance(given, str) and given == "auto":
            return None
        if isinstance(given, str | bool) or not 0 < given <= 0.5:
            raise ConfigError(f"contamination must be 'auto' or in (0, 0.5], not {given!r}; 0.1 expects 10% outliers")
        return float(given)

    def _spec(self, shape: Shape, features: bool, seed: int) -> DetectorSpec:
        data = self._settings(shape, features, seed)
        spec = DetectorSpec.parse(override(data, self.overrides), "the estimator's parameters")
        _check_suits(spec, features)
        # What only one kind of part has is set once the kind is known, and before the overrides, so that they win.
        first = []
        if spec.model.network.kind == "mlp":
            first.append(f"model.network.hidden={[_plain(width) for width in self.hidden]}")
        if features:
            first.append("model.likelihood.squash=false")
        return DetectorSpec.parse(override(data, [*first, *self.overrides]), "the estimator's parameters")

    def _settings(self, shape: Shape, features: bool, seed: int) -> dict[str, Any]:
        numbers = int(np.prod(shape))
        network = self.network
        if network == "auto":
            network = "mlp" if features or min(shape[1:]) < _LEAST_CONV_SIDE else "conv"
        latents = min(32, -(-numbers // (2 if features else 4))) if self.latents is None else self.latents
        settings: dict[str, Any] = {
            "model": {
                "network": {"kind": network},
                "latent": {"kind": "gaussian", "size": _plain(latents)},
                "likelihood": {"kind": "gaussian"},
            },
            "training": {
                "steps": _plain(self.steps),
                "batch_size": _plain(self.batch_size),
                "learning_rate": _plain(self.learning_rate),
            },
            "calibration": {"alpha": _plain(self.alpha)},
            "verdict": self.verdict,
            "seed": seed,
        }
        if self.verdict != FUSED:
            settings["scores"] = [{"kind": self.verdict}]
        elif features:
            settings["fusion"] = {"parts": list(_FEATURE_PARTS)}
        return settings

    def _set_offset(self, rows: Array, share: float | None) -> None:
        if share is not None:
            self.alpha_ = None
            self.offset_ = float(np.quantile(self._normality(self._columns(rows)), share))
            return
        calibration, mode = self.calibration_, self.spec_.calibration.mode
        alpha = max(self.spec_.calibration.alpha or calibration.smallest_alpha(mode), 1 / (calibration.n + 1))
        self.alpha_ = calibration.promise(alpha, mode).expected
        threshold = calibration.threshold(alpha, mode)
        # Of k calibration rows allowed in all, an outlier leaves at most k - 1 and a fraction below 1.
        self.offset_ = float(calibration.rank(alpha, mode)) if threshold is None else -threshold

    def _checked(self, X: Any) -> Array:  # noqa: N803
        check_is_fitted(self)
        X = validate_data(self, X, allow_nd=True, reset=False)  # noqa: N806
        if tuple(X.shape[1:]) != self.shape_in_:
            raise ValueError(f"rows of X have shape {X.shape[1:]}, those of fit had {self.shape_in_}; bring them to it")
        return _as_rows(X)

    def _columns(self, rows: Array) -> Floats:
        """Scores (n, members), higher is more anomalous."""
        return np.stack([_scores(self.spec_, reader, rows) for reader in self.members_], 1)

    def _normality(self, columns: Floats) -> Floats:
        if not self.calibration_.crossed:
            return -columns[:, 0]
        at_least = np.rint(self.calibration_.p_values(columns) * (self.calibration_.n + 1)) - 1
        # From 1 to 0 as the score goes from -inf to inf, and exact for large ones.
        return np.asarray(at_least + np.arctan2(1.0, columns.mean(1)) / np.pi, np.float64)


class _Part(NamedTuple):
    """Rows that one member trains on, fits references on, and calibrates by."""

    train: Indices
    fit: Indices
    calibrate: Indices


class _Standard(NamedTuple):
    """Features in standard deviations from the mean of the rows trained on."""

    centre: Floats
    scale: Floats

    @classmethod
    def of(cls, rows: Floats) -> "_Standard":
        centre, scale = rows.mean(0), rows.std(0)
        # A constant feature has only rounding for a spread; what differs from it counts in its own units.
        return cls(centre, np.where(scale > 1e-9 * np.abs(centre), scale, 1.0))

    def __call__(self, rows: Floats) -> Floats:
        return np.asarray(((rows - self.centre) / self.scale).clip(-_FURTHEST, _FURTHEST), np.float64)


class _Reader(NamedTuple):
    """A member and how it is shown rows: pictures as they are (None), features standardised."""

    member: Member
    standard: _Standard | None


class _Rows(NamedTuple):
    """Rows as `Fitting` takes them."""

    images: Tensor

    def batches(
        self, batch_size: int, order: npt.ArrayLike | None = None, drop_last: bool = False
    ) -> Iterator[tuple[Indices, Tensor]]:
        """(indices, images) in the given order."""
        chosen = np.arange(len(self.images)) if order is None else np.asarray(order, np.int64)
        stop = len(chosen) - len(chosen) % batch_size if drop_last else len(chosen)
        for start in range(0, stop, batch_size):
            indices = chosen[start : min(start + batch_size, stop)]
            yield indices, self.images[torch.from_numpy(indices)]


def _as_rows(X: Array) -> Array:  # noqa: N803
    """X as (n, C, H, W): features float64 (n, 1, 1, d), pictures uint8 or float32."""
    if X.ndim == 2:
        return np.asarray(X[:, None, None, :], np.float64)
    if X.ndim not in (3, 4):
        raise ValueError(f"X has {X.ndim} dimensions; give (n, features), (n, height, width) or (n, height, width, C)")
    if X.dtype != np.uint8 and not (X.min() >= 0 and X.max() <= 1):
        raise ValueError(
            f"pictures that are not uint8 must lie in [0, 1], these reach from {X.min():g} to {X.max():g}; "
            "divide them by the largest value they may have"
        )
    planes = X[:, None] if X.ndim == 3 else X.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(planes, np.uint8 if X.dtype == np.uint8 else np.float32)


def _tensor(rows: Array, standard: _Standard | None) -> Tensor:
    # A copy: scikit-learn may hand over memory that cannot be written to, which torch warns of.
    return torch.tensor(rows if standard is None else standard(rows).astype(np.float32))


def _divide(spec: DetectorSpec, count: int) -> list[_Part]:
    """One part for split calibration, or several for cross-conformal calibration of few rows."""
    rows = np.arange(count)
    if count >= spec.calibration.few_normals:
        order = np.random.default_rng(seed_of(spec.seed, "split", 0)).permutation(count)
        fit, held = max(2, round(count * spec.split.fit)), round(count * spec.split.calibrate)
        return [_Part(np.sort(order[fit + held :]), np.sort(order[:fit]), np.sort(order[fit : fit + held]))]
    parts = []
    for k, held_out in enumerate(folds(rows, None, min(spec.calibration.folds, count), spec.seed)):
        rest = np.setdiff1d(rows, held_out)
        shares = max(2, min(round((1 - spec.split.calibrate) / spec.split.fit), len(rest) // _LEAST_FIT))
        chosen = folds(rest, None, shares, seed_of(spec.seed, "fit", k))[0]
        parts.append(_Part(np.setdiff1d(rest, chosen), chosen, held_out))
    return parts


def _make_reader(
    spec: DetectorSpec, rows: Array, part: _Part, fabric: Fabric, i: int, count: int, features: bool
) -> _Reader:
    standard = _Standard.of(rows[part.train]) if features else None
    images = _tensor(rows, standard)
    shape: Shape = (images.shape[1], images.shape[2], images.shape[3])
    try:
        model = spec.model.build(shape, seed_of(spec.seed, "weights", i))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    seed = seed_of(spec.seed, "member", i)
    objective = Objective(spec.objective, model)
    Fitting(fabric, objective, spec.training, _Rows(images), part.train, part.fit, seed, 1 / count).run(
        None, lambda progress: None
    )
    member = Member.fit(spec, {"": [model]}, _shown(images, part.fit), _shown(images, part.train))
    return _Reader(member, standard)


def _shown(images: Tensor, chosen: Indices) -> Batches:
    rows = torch.from_numpy(chosen)
    return lambda: (Batch(images[some]) for some in torch.split(rows, _batch_size(images)))


def _scores(spec: DetectorSpec, reader: _Reader, rows: Array) -> Floats:
    """The verdict's scores of rows, shape (n,)."""
    images = _tensor(rows, reader.standard)
    return member_scores(spec, reader.member, _full_batches(images))[: len(images)]


def _full_batches(images: Tensor) -> Iterator[Batch]:
    """Batches of one size, the last filled up: float32 products round otherwise in batches of another size."""
    size = _batch_size(images)
    for batch in _batches(images):
        yield Batch(torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])]))


def _batches(images: Tensor) -> Iterator[Tensor]:
    size = _batch_size(images)
    return (images[start : start + size] for start in range(0, len(images), size))


def _batch_size(images: Tensor) -> int:
    return 64 if images[0].numel() <= _LARGEST_IN_WIDE_BATCHES else 8


def _check_suits(spec: DetectorSpec, features: bool) -> None:
    if spec.beside or spec.ensemble > 1:
        raise ConfigError("the estimator trains one model a fold; leave out beside and ensemble")
    if spec.tiles is not None:
        raise ConfigError("the estimator's model sees whole rows; leave out tiles")
    if spec.model.condition is not None:
        raise ConfigError("the rows of an array have no classes; leave out model.condition")
    if features and spec.model.backbone is not None:
        raise ConfigError("a backbone looks at pictures, and these rows are features; leave out model.backbone")
    if features and spec.model.likelihood.kind not in ("gaussian", "laplace"):
        raise ConfigError(
            f"model.likelihood.kind={spec.model.likelihood.kind} is for pictures; use gaussian or laplace"
        )
    looking = next((score.kind for score in spec.scores if score.of_pictures), None)
    if features and looking is not None:
        raise ConfigError(f"scores: {looking} looks at pictures, and these rows are features; remove it")
    if features and spec.objective.loss.kind == "bce":
        raise ConfigError("objective.loss.kind=bce is for pictures; use nll, mse or mae for standardised features")


def _plain(value: Any) -> Any:
    """A NumPy number, of which grids of parameters are made, as Python's."""
    return value.item() if isinstance(value, np.generic) else value
