"""Detectors that anybody would try first, on the very pixels that the product sees.

Each is `fit` on rows of normal pixels in [0, 1] and gives rows a score, higher being more anomalous. They calibrate
nothing, and so may use all normals.
"""

from abc import abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import OneClassSVM

Pixels = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]

VARIANCE = 0.95


class MissingError(Exception):
    """A package that a baseline needs is not installed; the message is the line that installs it."""


class Baseline:
    """A score of rows of pixels, learned from normal ones."""

    @abstractmethod
    def fit(self, x: Pixels) -> None:
        """Learn from normal pictures (n, pixels)."""

    @abstractmethod
    def scores(self, x: Pixels) -> Scores:
        """One score a row; that of a row does not depend on the others."""

    def errors(self, x: Pixels) -> Pixels | None:
        """How odd every pixel is, shaped as `x`; None where a method cannot tell."""
        return None


class PixelPca(Baseline):
    """Squared error of the projection on the principal components that hold 95% of the variance."""

    def fit(self, x: Pixels) -> None:
        self._pca = _reduction(x)

    def scores(self, x: Pixels) -> Scores:
        return np.asarray(self.errors(x).mean(1), np.float64)

    def errors(self, x: Pixels) -> Pixels:
        restored = self._pca.inverse_transform(self._pca.transform(x))
        return np.asarray((x - restored) ** 2, np.float32)


class PixelNeighbours(Baseline):
    """Mean Euclidean distance to the five nearest normal pictures."""

    def fit(self, x: Pixels) -> None:
        self._nearest = NearestNeighbors(n_neighbors=min(5, len(x)), algorithm="brute").fit(x)

    def scores(self, x: Pixels) -> Scores:
        return np.asarray(self._nearest.kneighbors(x)[0].mean(1), np.float64)


class OneClass(Baseline):
    """Support vectors with a Gaussian kernel (Schoelkopf et al. 2001) on the components that hold 95%; nu = 0.1."""

    def fit(self, x: Pixels) -> None:
        self._pca = _reduction(x)
        self._svm = OneClassSVM(kernel="rbf", gamma="scale", nu=0.1).fit(self._pca.transform(x))

    def scores(self, x: Pixels) -> Scores:
        return np.asarray(-self._svm.decision_function(self._pca.transform(x)), np.float64)


class PyodForest(Baseline):
    """PyOD's isolation forest on pixels. Its ECOD is not used, since there a score depends on the batch's others."""

    def __init__(self, seed: int) -> None:
        try:
            self._forest: Any = import_module("pyod.models.iforest").IForest(random_state=seed)
        except ImportError:
            raise MissingError("pip install pyod") from None

    def fit(self, x: Pixels) -> None:
        self._forest.fit(x)

    def scores(self, x: Pixels) -> Scores:
        return np.asarray(self._forest.decision_function(x), np.float64)


BASELINES: dict[str, Callable[[int], Baseline]] = {
    "pixel-pca": lambda seed: PixelPca(),
    "pixel-knn": lambda seed: PixelNeighbours(),
    "one-class-svm": lambda seed: OneClass(),
    "pyod-iforest": PyodForest,
}
BY_CHANCE = frozenset({"pyod-iforest"})
"""The others give the same scores with every seed."""


def _reduction(x: Pixels) -> PCA:
    return PCA(VARIANCE, svd_solver="full").fit(x)
