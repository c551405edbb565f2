"""Outlier exposure (Hendrycks et al. 2019): a few known anomalies keep a margin from what the model rebuilds well."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_vae.model import AutoEncoder
from anomaly_vae.spec import Spec

_SMALLEST_ERROR = 1e-8


class ExposureSpec(Spec):
    """How the pictures of `known_anomalies/`, where there are any, take part in training.

    Their log mean squared error is to lie `margin` nats above the normals' mean one; what it falls short by costs
    `weight` a nat, per pixel as the loss is. A marker is to mark something of each and nothing of normals, by the mean
    of the share `top` of its highest logits; its cross-entropy weighs `marks`. `share`: so many of them in a step, as a
    share of the batch.
    """

    weight: float = Field(0.3, ge=0)
    margin: float = Field(math.log(4), gt=0, le=20)
    marks: float = Field(0.03, ge=0)
    top: float = Field(0.01, gt=0, le=1)
    share: float = Field(0.25, gt=0, le=4)

    def count(self, batch: int, processes: int) -> int:
        """How many are drawn beside `batch` normals; every process gets equally many."""
        return processes * max(1, round(self.share * batch / processes))

    def loss(self, model: AutoEncoder, known: Tensor, normal: Tensor) -> Tensor:
        """The cost () of known anomalies (K, C, H, W) beside normals (B, C, H, W), both as the model sees them."""
        count = min(len(normal), len(known))
        both = torch.cat([normal[:count], known])
        # Both by the statistics that scoring goes by. Were only the anomalies, the model would learn to be wrong of
        # whatever is seen by those; were they all in one batch, the normals' statistics would no longer be their own.
        with _still_norms(model):
            posterior, context = model.read(both)
            output = model.decode(posterior.float().mu, context).float()
            error = _log_error(model, output, both)
            total = self.weight * F.relu(error[:count].mean() + self.margin - error[count:]).mean()
            if model.marker is not None:
                highest = _highest(model.mark(both, output), self.top)
                told = F.softplus(highest[:count]).mean() + F.softplus(-highest[count:]).mean()
                total = total + self.marks * told
        return total


def _highest(logits: Tensor, top: float) -> Tensor:
    """Mean of the highest marks of each picture, (B,), of logits (B, H, W).

    Of a picture that is abnormal somewhere nobody says where: what is marked most in it counts (multiple-instance
    learning, Sultani et al. 2018).
    """
    flat = logits.flatten(1)
    return flat.topk(max(1, round(top * flat.shape[1])), dim=1).values.mean(1)


def _log_error(model: AutoEncoder, output: Tensor, x: Tensor) -> Tensor:
    """Log of the mean squared error of each picture, (B,)."""
    error = (model.likelihood.mean(output) - x.float()).square().flatten(1).mean(1)
    return error.clamp_min(_SMALLEST_ERROR).log()


@contextmanager
def _still_norms(model: nn.Module) -> Iterator[None]:
    """Batch normalisation by what it remembers, which does not change."""
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
