"""`WhitenedScore`: what all scores have in common that ask how rare some numbers are among those of normals."""

from abc import abstractmethod

from torch import Tensor

from anomaly_vae.observations import Observation, Seen
from anomaly_vae.score_base import Array, Fitted, References, Score, of_classes
from anomaly_vae.whitening import distance, fit_whitening


class WhitenedScore(Score):
    """Squared Mahalanobis distance of some numbers from those of normals, covariance after Ledoit and Wolf (2004)."""

    @abstractmethod
    def numbers(self, seen: Observation) -> Tensor:
        """What is judged of each picture, (B, D), in float64: whitening magnifies rounding."""

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return distance(self.numbers(seen), references)

    def statistic(self, seen: Seen) -> Tensor:
        return of_classes(seen, self.numbers)

    def fit(self, statistics: Array) -> Fitted:
        return fit_whitening(statistics)
