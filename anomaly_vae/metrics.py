"""How well scores separate abnormal from normal images, and maps abnormal from normal pixels.

Polarity everywhere: higher scores are more anomalous; labels are True for abnormal. scikit-learn does the arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage, stats
from sklearn import metrics as sk

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Detection:
    """Image-level quality. `auroc_interval` is the 95% interval of DeLong et al. (1988)."""

    auroc: float
    auroc_interval: tuple[float, float]
    average_precision: float
    tpr_at_1_fpr: float


@dataclass(frozen=True)
class Localisation:
    """Pixel-level quality; `pro` is the per-region overlap up to 30% FPR (Bergmann et al. 2021), scaled to [0, 1]."""

    auroc: float
    average_precision: float
    pro: float


def detection(normal: npt.ArrayLike, abnormal: npt.ArrayLike) -> Detection:
    """Quality of the scores of normal and abnormal images; both must hold at least one."""
    scores = np.concatenate([np.asarray(normal, np.float64), np.asarray(abnormal, np.float64)])
    labels = np.arange(len(scores)) >= len(np.asarray(normal))
    auroc = float(sk.roc_auc_score(labels, scores))
    return Detection(
        auroc,
        _delong_interval(scores[~labels], scores[labels], auroc),
        float(sk.average_precision_score(labels, scores)),
        tpr_at_fpr(scores[~labels], scores[labels], 0.01),
    )


def tpr_at_fpr(normal: Floats, abnormal: Floats, fpr: float) -> float:
    """Largest share of abnormal scores above a threshold that at most `fpr` of the normal ones exceed."""
    allowed = int(np.floor(fpr * len(normal) + 1e-9))
    threshold = np.sort(normal)[len(normal) - 1 - allowed]
    return float((abnormal > threshold).mean())


def localisation(heat: Sequence[npt.NDArray[np.floating]], masks: Sequence[Bools]) -> Localisation | None:
    """Quality of heat maps (H, W) against masks (H, W); None unless some pixels are abnormal and some are not."""
    scores = np.concatenate([one.ravel() for one in heat])
    labels = np.concatenate([mask.ravel() for mask in masks])
    if labels.all() or not labels.any():
        return None
    return Localisation(
        float(sk.roc_auc_score(labels, scores)),
        float(sk.average_precision_score(labels, scores)),
        per_region_overlap(heat, masks),
    )


def per_region_overlap(
    heat: Sequence[npt.NDArray[np.floating]], masks: Sequence[Bools], max_fpr: float = 0.3, steps: int = 300
) -> float:
    """Mean share of each defect region that is found, averaged over the thresholds with FPR up to `max_fpr`."""
    negatives = np.sort(np.concatenate([one[~mask] for one, mask in zip(heat, masks, strict=True)]))[::-1]
    fprs = np.linspace(0, max_fpr, steps)
    thresholds = negatives[np.minimum((fprs * len(negatives)).astype(int), len(negatives) - 1)]
    overlaps = []
    for one, mask in zip(heat, masks, strict=True):
        regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
        for region in range(1, count + 1):
            inside = np.sort(one[regions == region])
            overlaps.append(1 - np.searchsorted(inside, thresholds, side="right") / len(inside))
    return float(np.trapezoid(np.mean(overlaps, 0), fprs) / max_fpr)


def _delong_interval(normal: Floats, abnormal: Floats, auroc: float) -> tuple[float, float]:
    if len(normal) < 2 or len(abnormal) < 2:
        return (0.0, 1.0)
    everyone = stats.rankdata(np.concatenate([normal, abnormal]))
    placed_normal = (everyone[: len(normal)] - stats.rankdata(normal)) / len(abnormal)
    placed_abnormal = (everyone[len(normal) :] - stats.rankdata(abnormal)) / len(normal)
    variance = placed_normal.var(ddof=1) / len(normal) + placed_abnormal.var(ddof=1) / len(abnormal)
    reach = 1.959964 * float(np.sqrt(variance))
    return (max(0.0, auroc - reach), min(1.0, auroc + reach))
