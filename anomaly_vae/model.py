"""`AutoEncoder`: a network, a likelihood and a law of z, given a class or not, with a critic of images or not."""

from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from anomaly_vae.latents import GaussianLatentSpec, LatentSpec
from anomaly_vae.likelihoods import GaussianSpec, LikelihoodSpec
from anomaly_vae.networks import ConvSpec, NetworkSpec, Shape
from anomaly_vae.posteriors import Posterior
from anomaly_vae.spec import Spec


class ConditionSpec(Spec):
    """The class of a picture as an embedding of `size` numbers, which encoder, decoder and critic see.

    `classes`: names of the folders; empty: those of the normal pictures. `scoring`: the class is `given` with every
    picture to judge, or `marginalised`: all classes are tried and weighed by how well they explain the picture.
    """

    size: int = Field(8, ge=1, le=1024)
    classes: tuple[str, ...] = ()
    scoring: Literal["marginalised", "given"] = "marginalised"

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes names one twice")
        return self


class CriticSpec(Spec):
    """A critic that tells pictures from decoded ones. Its features are the activations after stage `features`."""

    network: NetworkSpec = Field(default_factory=lambda: ConvSpec(norm="group"))
    features: int = Field(1, ge=0, le=8)


class ModelSpec(Spec):
    """The parts of an autoencoder: all that scoring needs."""

    network: NetworkSpec = Field(default_factory=ConvSpec)
    latent: LatentSpec = Field(default_factory=GaussianLatentSpec)
    likelihood: LikelihoodSpec = Field(default_factory=GaussianSpec)
    condition: ConditionSpec | None = None
    critic: CriticSpec | None = None

    @model_validator(mode="after")
    def _one_picture_one_code(self) -> Self:
        if self.latent.kind == "contractive" and getattr(self.network, "norm", "none") == "batch":
            raise ValueError(
                "a contractive code needs network.norm group or none: "
                "batch normalisation makes it depend on the other pictures of the batch"
            )
        return self

    @property
    def has_elbo(self) -> bool:
        """Whether reconstruction + KL bounds the log-likelihood: a KL, and a decoder that sees x only through z."""
        return self.latent.has_kl and not self.network.sees_input

    def build(self, shape: Shape, seed: int) -> "AutoEncoder":
        """A model for images of `shape` (C, H, W) with weights drawn from `seed`."""
        # PyTorch's layers draw their first weights from the global generator; the fork leaves it as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoEncoder(self, shape)


class Context(NamedTuple):
    """What the decoder sees beside z: the embedded class (B, E), and the encoder's activations where it has skips."""

    embedded: Tensor | None = None
    maps: tuple[Tensor, ...] = ()


class AutoEncoder(nn.Module):
    """An autoencoder over images in [0, 1] of one shape. `label` is the class's number, int64 (B,)."""

    def __init__(self, spec: ModelSpec, shape: Shape) -> None:
        super().__init__()
        self.spec, self.shape = spec, shape
        self.likelihood = spec.likelihood.build()
        self.law = spec.latent.build()
        self.classes = spec.condition.classes if spec.condition else ()
        extra = 0
        if spec.condition is not None:
            if not self.classes:
                raise ValueError("model.condition has no classes; training finds them in the pictures")
            extra = spec.condition.size
            self.embedding = nn.Embedding(len(self.classes), extra)
        seen = (shape[0] + extra, *shape[1:])
        self.encoder = spec.network.encoder(seen, spec.latent.encoder_outputs)
        output_shape = (shape[0] * self.likelihood.outputs_per_channel, *shape[1:])
        self.decoder = spec.network.decoder(spec.latent.size + extra, output_shape)
        self.critic = spec.critic.network.encoder(seen, 1) if spec.critic else None

    def read(self, x: Tensor, label: Tensor | None = None) -> tuple[Posterior, Context]:
        """q(z given x) of images x (B, C, H, W) in [0, 1], and what else the decoder sees of them."""
        embedded = self.embed(label)
        x = beside(x, embedded)
        if not self.spec.network.sees_input:
            return self.law.posterior(self.encoder(x)), Context(embedded)
        activations = self.encoder.activations(x)
        return self.law.posterior(activations[-1]), Context(embedded, tuple(activations))

    def encode(self, x: Tensor, label: Tensor | None = None) -> Posterior:
        """q(z given x) alone."""
        return self.read(x, label)[0]

    def decode(self, z: Tensor, context: Context | None = None) -> Tensor:
        """The likelihood's raw parameters for latents z (B, D)."""
        context = context or Context()
        if context.embedded is not None:
            z = torch.cat([z, context.embedded.to(z).expand(len(z), -1)], 1)
        output: Tensor = self.decoder(z, context.maps) if context.maps else self.decoder(z)
        return output

    def embed(self, label: Tensor | None) -> Tensor | None:
        """The class as numbers (B, E); None for models without classes."""
        if not self.classes:
            return None
        if label is None:
            raise ValueError("this model is conditional: it needs the class of every picture")
        embedded: Tensor = self.embedding(label)
        return embedded

    def features(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """The critic's features of images x, which VAE-GANs and f-AnoGAN compare; shape (B, ...)."""
        assert self.critic is not None
        assert self.spec.critic is not None
        activations: list[Tensor] = self.critic.activations(beside(x, self.embed(label)))
        return activations[min(self.spec.critic.features, len(activations) - 2)]

    def lay_channels_last(self) -> None:
        """Order the convolutions' weights as CPUs and GPUs compute them fastest; values do not change."""
        nn.Module.to(self, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device


def beside(x: Tensor, embedded: Tensor | None) -> Tensor:
    """Images (B, C, H, W) with the embedded class (B, E) as E constant channels more."""
    if embedded is None:
        return x
    planes = embedded.to(x)[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return torch.cat([x, planes], 1)
