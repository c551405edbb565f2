"""A copy of a model on which scores may differentiate by the picture, wherever they are called from.

It computes in float64 where the device has it: a gradient jumps where a unit switches, so that float32's rounding,
which differs from batch to batch, would reach the score. Its weights are frozen, and the model's own collect none.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from anomaly_vae.model import AutoEncoder, Context, beside
from anomaly_vae.posteriors import Posterior


@contextmanager
def gradients() -> Iterator[None]:
    """Autograd on, also inside `torch.inference_mode`, as long as only tensors made in here take part."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


class Differentiable:
    """`x`: the images (B, C, H, W) as an ordinary tensor in the copy's `dtype`; methods belong inside `gradients`."""

    def __init__(self, model: AutoEncoder, x: Tensor, label: Tensor | None) -> None:
        self.dtype = torch.float32 if x.device.type == "mps" else torch.float64
        with gradients():
            self.model = copy.deepcopy(model).to(self.dtype).requires_grad_(False)
            self.x = x.clone().to(self.dtype)
            self._label = None if label is None else label.clone()

    def encoded(self, x: Tensor) -> Tensor:
        """The encoder's raw output for images x, (B, `encoder_outputs`)."""
        output: Tensor = self.model.encoder(beside(x, self.model.embed(self._label)))
        return output

    def reconstruction(self, x: Tensor) -> Tensor:
        """E[picture given z = posterior mean of x], shape (B, C, H, W)."""
        posterior, context = self.model.read(x, self._label)
        return self.model.likelihood.mean(self._decode(posterior.mu, context))

    def terms(self, encoded: Tensor, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """-E_q log p(x given z) and KL in nats, each (B,), for q as `encoded` says; rows of `noise` (S, D) draw z.

        For models whose decoder sees x through z alone.
        """
        posterior = self.model.law.posterior(encoded)
        context = Context(self.model.embed(self._label))
        draws = [posterior.at(row.to(self.dtype)) for row in noise]
        missed = [-self.model.likelihood.log_prob(self._decode(z, context), x).flatten(1).sum(1) for z in draws]
        return torch.stack(missed).mean(0), torch.stack([self._kl(posterior, z) for z in draws]).mean(0)

    def _kl(self, posterior: Posterior, z: Tensor) -> Tensor:
        return self.model.law.kl(posterior, z).to(self.dtype).sum(1)

    def _decode(self, z: Tensor, context: Context) -> Tensor:
        # Some laws read their parameters in float32 whatever they are given.
        return self.model.decode(z.to(self.dtype), context)
