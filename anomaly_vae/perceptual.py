"""The perceptual loss: how far two pictures lie apart in the features of a frozen network.

Deep feature consistent autoencoders: Hou, Shen, Sun and Qiu, WACV 2017. The network is one of torchvision's classifiers
or the encoder of a bundle; it never learns.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_vae.bundle import MANIFEST, read_bundle
from anomaly_vae.errors import BundleError, ConfigError
from anomaly_vae.images import ImageSpec
from anomaly_vae.model import ModelSpec
from anomaly_vae.networks import Encoder, Shape
from anomaly_vae.pretrained import ClassifierSpec, LayerName, unknown_layer, with_channels
from anomaly_vae.spec import Spec

LayerWeight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class TorchvisionSpec(ClassifierSpec):
    """A classifier of torchvision."""

    kind: Literal["torchvision"] = "torchvision"
    name: str = "vgg19"

    def build(self, layers: Sequence[str]) -> nn.Module:
        """Images (B, 1 or 3, H, W) in [0, 1] to a list of features, one of each layer; raises `ConfigError`."""
        features = self.network(layers, "perceptual")
        self.load(features)
        return features


class BundleSpec(Spec):
    """The encoder of a bundle's first member. Layers are the numbers of its stages, from 0.

    Pictures of another size are stretched to the bundle's; grey becomes RGB by repeating, RGB grey as ITU-R 601 luma.
    """

    kind: Literal["bundle"] = "bundle"
    path: Path

    def build(self, layers: Sequence[str]) -> nn.Module:
        """Images (B, 1 or 3, H, W) in [0, 1] to a list of features, one of each layer.

        Raises `BundleError` for a missing or damaged bundle, `ConfigError` for one that cannot serve.
        """
        encoder, shape = _encoder_of(self.path)
        known = [str(i) for i in range(len(encoder.stages))]
        for layer in layers:
            if layer not in known:
                raise unknown_layer(layer, f"the encoder of {self.path}", known, "perceptual")
        return _BundleFeatures(encoder, [int(layer) for layer in layers], shape)


FeatureNetworkSpec = Annotated[TorchvisionSpec | BundleSpec, Field(discriminator="kind")]


def _layers_of_hou() -> dict[str, float]:
    return {"relu1_1": 1.0, "relu2_1": 1.0, "relu3_1": 1.0}


class PerceptualSpec(Spec):
    """Which features of which network are compared.

    `layers` maps names to weights; the default is VAE-123 of Hou et al. `weight` is that of the whole term beside the
    other terms of a loss; `PerceptualLoss` has it in.
    """

    network: FeatureNetworkSpec = Field(default_factory=TorchvisionSpec)
    layers: dict[LayerName, LayerWeight] = Field(default_factory=_layers_of_hou, min_length=1)
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)

    def build(self, channels: int) -> "PerceptualLoss":
        """The loss for images of 1 or 3 `channels`; raises `ConfigError` or `BundleError` where it cannot be had."""
        if channels not in (1, 3):
            raise ConfigError(f"perceptual: pictures of {channels} channels are neither grey nor RGB; use 1 or 3")
        weights = [self.weight * weight for weight in self.layers.values()]
        return PerceptualLoss(self.network.build(list(self.layers)), weights, channels)


class PerceptualLoss(nn.Module):
    """The sum over layers l of weight_l / (2 C_l H_l W_l) |features_l(x) - features_l(reconstruction)|^2, batch mean.

    Equation 3 of Hou et al. 2017, with the spec's `weight` in each weight_l. Frozen: no parameter asks for a gradient,
    and `train()` leaves it in eval mode.
    """

    def __init__(self, features: nn.Module, weights: Sequence[float], channels: int) -> None:
        super().__init__()
        self.features, self.weights, self.channels = features, tuple(weights), channels
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stay in eval mode, whatever the model around it does: batch norms would learn and dropout would add noise."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, x: Tensor) -> Tensor:
        """Loss (), >= 0, of images (B, C, H, W) in [0, 1]; only `reconstruction` gets a gradient.

        Raises `ConfigError` for pictures too small for the deepest layer.
        """
        if reconstruction.shape != x.shape or x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"images of shapes {tuple(reconstruction.shape)} and {tuple(x.shape)}, not (B, {self.channels}, H, W)"
            )
        with torch.no_grad():
            wanted = self.features(x.float())
        found = self.features(reconstruction.float())
        loss = x.new_zeros((), dtype=torch.float32)
        for weight, ours, theirs in zip(self.weights, found, wanted, strict=True):
            # Under mixed precision features are bfloat16, too coarse to add up.
            loss = loss + 0.5 * weight * (ours.float() - theirs.float()).square().mean()
        return loss


class _BundleFeatures(nn.Module):
    def __init__(self, encoder: Encoder, stages: Sequence[int], shape: Shape) -> None:
        super().__init__()
        self.encoder, self.stages, self.shape = encoder, tuple(stages), shape

    def forward(self, x: Tensor) -> list[Tensor]:
        x = with_channels(x, self.shape[0])
        if x.shape[2:] != self.shape[1:]:
            x = F.interpolate(x, self.shape[1:], mode="bilinear", antialias=True)
        activations = self.encoder.activations(x)
        return [activations[stage] for stage in self.stages]


def _encoder_of(path: Path) -> tuple[Encoder, Shape]:
    bundle = read_bundle(path)
    source = str(path / MANIFEST)
    damaged = BundleError(f"{path} is damaged (its encoder is not as it says); restore the bundle from a copy")
    try:
        spec = bundle.description["spec"]
        image, model = ImageSpec.parse(spec["image"], source), ModelSpec.parse(spec["model"], source)
        weights = safetensors.torch.load(bundle.files["weights.safetensors"])
    except (KeyError, TypeError, ConfigError, safetensors.SafetensorError):
        raise damaged from None
    if model.condition is not None:
        raise ConfigError(f"perceptual: the encoder of {path} wants each picture's class; give an unconditional bundle")
    if model.backbone is not None:
        raise ConfigError(f"perceptual: the encoder of {path} sees features; give a bundle without model.backbone")
    shape = model.seen((image.channels, image.height, image.width))
    # On the meta device a spec that claims gigabytes costs nothing until its weights turn out to be there.
    with torch.device("meta"):
        encoder = model.network.encoder(shape, model.latent.encoder_outputs)
    prefix = "0//0.encoder."
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    wanted = {name: (value.shape, value.dtype) for name, value in encoder.state_dict().items()}
    if wanted != {name: (value.shape, value.dtype) for name, value in own.items()}:
        raise damaged
    encoder.load_state_dict(own, assign=True)
    return encoder, shape
