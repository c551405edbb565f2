"""`AutoEncoder`: a network, a likelihood and a law of z, and the loss they make together."""

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from anomaly_vae.latents import GaussianLatentSpec, LatentSpec, Posterior
from anomaly_vae.likelihoods import GaussianSpec, LikelihoodSpec
from anomaly_vae.networks import ConvSpec, NetworkSpec, Shape
from anomaly_vae.spec import Spec


class ModelSpec(Spec):
    """The three parts of an autoencoder."""

    network: NetworkSpec = Field(default_factory=ConvSpec)
    latent: LatentSpec = Field(default_factory=GaussianLatentSpec)
    likelihood: LikelihoodSpec = Field(default_factory=GaussianSpec)

    def build(self, shape: Shape, seed: int) -> "AutoEncoder":
        """A model for images of `shape` (C, H, W) with weights drawn from `seed`."""
        # PyTorch's layers draw their first weights from the global generator; the fork leaves it as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoEncoder(self, shape)


class Loss(NamedTuple):
    """Training loss: `total` is what is minimised, per pixel; the parts are mean nats per image, as measured."""

    total: Tensor
    reconstruction: Tensor
    kl: Tensor


class AutoEncoder(nn.Module):
    """A variational autoencoder over images in [0, 1] of one shape."""

    def __init__(self, spec: ModelSpec, shape: Shape) -> None:
        super().__init__()
        self.spec, self.shape = spec, shape
        self.likelihood = spec.likelihood.build()
        self.encoder = spec.network.encoder(shape, spec.latent.encoder_outputs)
        output_shape = (shape[0] * self.likelihood.outputs_per_channel, *shape[1:])
        self.decoder = spec.network.decoder(spec.latent.size, output_shape)

    def encode(self, x: Tensor) -> Posterior:
        """q(z given x) of images x (B, C, H, W) in [0, 1]."""
        return self.spec.latent.posterior(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's raw parameters for latents z (B, D)."""
        output: Tensor = self.decoder(z)
        return output

    def forward(self, x: Tensor, noise: Tensor, beta: float) -> Loss:
        """Loss of a batch x (B, C, H, W); `noise` (B, D) is standard normal and decides the draw of z.

        total = (-E_q log p(x given z) + beta KL) / (C H W): the division keeps one learning rate right for all sizes.
        """
        posterior = self.encode(x)
        output = self.decode(posterior.at(noise)).float()
        if self.training:
            self.likelihood.observe(output, x)
        posterior = Posterior(posterior.mu.float(), posterior.logvar.float())
        reconstruction = -self.likelihood.log_prob(output, x).flatten(1).sum(1).mean()
        total = (reconstruction + beta * self.spec.latent.cost(posterior)) / x[0].numel()
        return Loss(total, reconstruction.detach(), posterior.kl().sum(1).mean().detach())

    def lay_channels_last(self) -> None:
        """Order the convolutions' weights as CPUs and GPUs compute them fastest; values do not change."""
        nn.Module.to(self, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device
