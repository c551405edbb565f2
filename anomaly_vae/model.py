"""`AutoEncoder`: a network, a likelihood and a law of z, given a class or not, with a critic of images or not."""

from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_vae.backbones import BackboneSpec
from anomaly_vae.latents import GaussianLatentSpec, LatentSpec
from anomaly_vae.likelihoods import GaussianSpec, LikelihoodSpec
from anomaly_vae.marking import MarkerSpec
from anomaly_vae.networks import ConvSpec, NetworkSpec, Shape
from anomaly_vae.posteriors import Posterior
from anomaly_vae.spec import Spec
from anomaly_vae.viewing import ViewsSpec


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
    """The parts of an autoencoder: all that scoring needs.

    `side`: larger pictures are shrunk to this many pixels of their shorter side before the model sees them.
    `marker` learns to mark made-up defects, `views` to tell turned and mirrored pictures from upright ones. With a
    `backbone` all else models its feature maps instead of pixels.
    """

    side: int | None = Field(None, ge=8, le=4096)
    backbone: BackboneSpec | None = None
    network: NetworkSpec = Field(default_factory=ConvSpec)
    latent: LatentSpec = Field(default_factory=GaussianLatentSpec)
    likelihood: LikelihoodSpec = Field(default_factory=GaussianSpec)
    condition: ConditionSpec | None = None
    critic: CriticSpec | None = None
    marker: MarkerSpec | None = None
    views: ViewsSpec | None = None

    @model_validator(mode="after")
    def _one_picture_one_code(self) -> Self:
        if self.latent.kind == "contractive" and getattr(self.network, "norm", "none") == "batch":
            raise ValueError(
                "a contractive code needs network.norm group or none: "
                "batch normalisation makes it depend on the other pictures of the batch"
            )
        return self

    @model_validator(mode="after")
    def _features_are_no_pictures(self) -> Self:
        if self.backbone is not None and getattr(self.likelihood, "squash", True):
            raise ValueError(
                "model.backbone gives features, which lie on both sides of 0: "
                "set model.likelihood.kind to gaussian or laplace, and model.likelihood.squash to false"
            )
        if self.backbone is not None and (self.marker is not None or self.views is not None):
            raise ValueError("model.marker and model.views look at pixels; leave them out, or model.backbone")
        return self

    @property
    def decodes(self) -> bool:
        """Whether a code alone gives a picture."""
        return self.backbone is None and not self.network.sees_input

    @property
    def has_elbo(self) -> bool:
        """Whether reconstruction + KL bounds the log-likelihood: a KL, and a decoder that sees x only through z."""
        return self.latent.has_kl and not self.network.sees_input

    def seen(self, shape: Shape) -> Shape:
        """The shape to which images of `shape` (C, H, W) are shrunk before the model, or its backbone, sees them."""
        channels, height, width = shape
        if self.side is None or min(height, width) <= self.side:
            return shape
        scale = self.side / min(height, width)
        return channels, round(height * scale), round(width * scale)

    def build(self, shape: Shape, seed: int) -> "AutoEncoder":
        """A model for images of `shape` (C, H, W) with weights drawn from `seed`."""
        # PyTorch's layers draw their first weights from the global generator; the fork leaves it as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoEncoder(self, self.seen(shape))


class Context(NamedTuple):
    """What the decoder sees beside z: the embedded class (B, E), and the encoder's activations where it has skips."""

    embedded: Tensor | None = None
    maps: tuple[Tensor, ...] = ()


class AutoEncoder(nn.Module):
    """An autoencoder over images in [0, 1] of one shape. `label` is the class's number, int64 (B,).

    With a backbone it is one over features: what it calls an image is then a feature map of `shape`, and only
    `pictures` of `picture_shape` are pictures.
    """

    def __init__(self, spec: ModelSpec, shape: Shape) -> None:
        super().__init__()
        self.picture_shape = shape
        self.backbone = spec.backbone.build(shape) if spec.backbone else None
        shape = self.backbone.shape if self.backbone else shape
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
        self.marker = spec.marker.build(*shape) if spec.marker else None
        self.views = spec.views.build(*shape) if spec.views else None

    def view(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or floats, as the model sees them: `pictures`, or the backbone's maps of them."""
        return self.perceive(self.pictures(images))

    def pictures(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or floats, on the model's device, in [0, 1], shrunk by area."""
        x = normalise(images, self.device)
        return x if x.shape[1:] == self.picture_shape else F.interpolate(x, size=self.picture_shape[1:], mode="area")

    def perceive(self, pictures: Tensor) -> Tensor:
        """What is modelled of pictures in [0, 1]: themselves, or the backbone's maps."""
        return pictures if self.backbone is None else self.backbone(pictures)

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
            z = torch.cat([z, context.embedded.to(z).expand(z.shape[0], -1)], 1)
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

    def mark(self, x: Tensor, output: Tensor) -> Tensor:
        """The marker's logits (B, H, W) for images x and the decoder's output; the restoration learns nothing by it."""
        assert self.marker is not None
        with torch.no_grad():
            mean, deviation = self.likelihood.mean(output), self.likelihood.deviation(output, x).mean(1)
        logits: Tensor = self.marker(x, mean, deviation)
        return logits.float()

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


def normalise(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, C, H, W) to floats in [0, 1] on `device`, channels last; the bytes travel, the floats do not.

    Floats are taken for normalised already.
    """
    x = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    return x if x.is_floating_point() else x.float() / 255
