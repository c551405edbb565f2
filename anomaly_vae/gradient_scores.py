"""Scores that differentiate by the picture or by q(z|x): how much, and how, the model would change them."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from anomaly_vae.differentiable import gradients
from anomaly_vae.model import ModelSpec
from anomaly_vae.observations import Observation, antithetic, gaussian_blur, shorter_side
from anomaly_vae.score_base import References, Score, no_bound


class Gradient(Score):
    """||d(-ELBO)/dx||, nats per unit of grey: how steeply the picture could be made more normal (Zimmerer et al. 2019).

    The map is |x - x^| * |d KL/dx|, means over channels, blurred by `window` of the side: where an error lies that
    the code feels. Under a continuous Bernoulli the slope hardly grows with the error, so it tells less there.
    Cost: `samples` decodes, and twice that back, in float64.
    """

    kind: Literal["gradient"] = "gradient"
    samples: int = Field(2, ge=1, le=256)
    seed: int = 0
    window: float = Field(0.03, gt=0, le=0.5)

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return self._slopes(seen)[:, 0].flatten(1).square().sum(1).sqrt()

    def map(self, seen: Observation, references: References) -> Tensor:
        error = (seen.x - seen.reconstruction).abs().mean(1)
        felt = self._slopes(seen)[:, 1].abs().mean(1)
        return gaussian_blur(error * felt, self.window * shorter_side(error))

    def refusal(self, model: ModelSpec) -> str | None:
        return no_bound(model)

    def _slopes(self, seen: Observation) -> Tensor:
        """d(-ELBO)/dx and d KL/dx, (B, 2, C, H, W)."""
        return seen.once(self, lambda: self._differentiated(seen))

    def _differentiated(self, seen: Observation) -> Tensor:
        model = seen.differentiable
        noise = antithetic(self.samples, model.model.law.size, self.seed).to(seen.x.device)
        with gradients():
            x = model.x.clone().requires_grad_()
            missed, kl = model.terms(model.encoded(x), x, noise)
            (by_kl,) = torch.autograd.grad(kl.sum(), x, retain_graph=True)
            (by_missed,) = torch.autograd.grad(missed.sum(), x)
        return torch.stack([by_missed + by_kl, by_kl], 1)


class LikelihoodRegret(Score):
    """max over q of the ELBO - the ELBO, nats, >= 0: what the encoder loses on this picture (Xiao et al. 2020, eq. 7).

    The parameters of q(z|x), which the encoder puts out, take `steps` steps of Adam of size `rate`, the first from the
    encoder's own; the best is kept, by the same draws. Cost: `steps` * `samples` decodes and as much back, in float64.
    """

    kind: Literal["likelihood_regret"] = "likelihood_regret"
    samples: int = Field(4, ge=1, le=256)
    seed: int = 0
    steps: int = Field(100, ge=2, le=10_000)
    rate: float = Field(0.05, gt=0)
    # The encoder may be right already: 0 has no logarithm.
    log_scale: ClassVar[bool] = False
    offline: ClassVar[bool] = True

    def __call__(self, seen: Observation, references: References) -> Tensor:
        model = seen.differentiable
        noise = antithetic(self.samples, model.model.law.size, self.seed).to(seen.x.device)
        with gradients():
            encoded = model.encoded(model.x).detach().requires_grad_()
            # Adam looks at each parameter alone, so pictures of one batch do not see each other.
            optimiser = torch.optim.Adam([encoded], lr=self.rate)
            found = []
            for _ in range(self.steps):
                missed, kl = model.terms(encoded, model.x, noise)
                found.append((missed + kl).detach())
                (encoded.grad,) = torch.autograd.grad((missed + kl).sum(), encoded)
                optimiser.step()
            return found[0] - torch.stack(found).amin(0)

    def refusal(self, model: ModelSpec) -> str | None:
        return no_bound(model)


class EnergyProjection(Score):
    """Mean of (x - x_T)^2, where x_T is the picture after `steps` of x <- x - rate * grad E(x) * (x - x^)^2 (Dehaene et
    al. 2020, eq. 6), E = ||x - x^||^2 + stay * ||x - x_0||_1: the way to the nearest picture the model can draw.

    The map is |x - x_T|, mean over channels. Cost: `steps` passes and as much back, in float64.
    """

    kind: Literal["energy_projection"] = "energy_projection"
    of_pictures: ClassVar[bool] = True
    steps: int = Field(50, ge=1, le=10_000)
    rate: float = Field(0.5, gt=0)
    stay: float = Field(0.05, ge=0)
    offline: ClassVar[bool] = True

    def __call__(self, seen: Observation, references: References) -> Tensor:
        return self._moved(seen).square().flatten(1).mean(1)

    def map(self, seen: Observation, references: References) -> Tensor:
        return self._moved(seen).abs().mean(1)

    def _moved(self, seen: Observation) -> Tensor:
        """x - x_T, (B, C, H, W)."""
        return seen.once(self, lambda: self._projected(seen))

    def _projected(self, seen: Observation) -> Tensor:
        model = seen.differentiable
        with gradients():
            x = model.x
            for _ in range(self.steps):
                x = x.detach().requires_grad_()
                error = x - model.reconstruction(x)
                (slope,) = torch.autograd.grad(error.square().sum(), x)
                with torch.no_grad():
                    slope = slope + self.stay * (x - model.x).sign()
                    # Off the greys there is nothing that the model ever saw.
                    x = (x - self.rate * slope * error.square()).clamp(0, 1)
            return model.x - x.detach()
