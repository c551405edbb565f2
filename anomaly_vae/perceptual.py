"""The perceptual loss: how far two pictures lie apart in the features of a frozen network.

Deep feature consistent autoencoders: Hou, Shen, Sun and Qiu, WACV 2017. The network is one of torchvision's classifiers
or the encoder of a bundle; it never learns.
"""

import contextlib
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.nn import functional as F

from anomaly_vae.bundle import MANIFEST, read_bundle
from anomaly_vae.errors import BundleError, ConfigError
from anomaly_vae.images import ImageSpec
from anomaly_vae.model import ModelSpec
from anomaly_vae.networks import Encoder, Shape
from anomaly_vae.spec import Spec
from anomaly_vae.torchvision_compat import import_torchvision

LayerWeight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LayerName = Annotated[str, Field(coerce_numbers_to_str=True)]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LUMA = (0.299, 0.587, 0.114)
_NAMES_SHOWN = 40
_TOO_SMALL = re.compile(r"too small|greater than actual input size|[Ww]rong image (height|width)")


class TorchvisionSpec(Spec):
    """A classifier of torchvision, which sees RGB pictures; grey ones are repeated.

    `weights`: `random` (drawn from `seed`), a name of torchvision's such as IMAGENET1K_V1 (downloaded into torch's
    cache when it is not there), or the path of a .safetensors file with at least the weights that the layers need.
    Pictures are normalised as named weights say, else by ImageNet's mean and standard deviation.
    Layers are graph nodes as torchvision's `get_graph_node_names` lists them, such as `features.1` or `layer2.0.relu`;
    a module's name stands for its last node. VGGs also know conv1_1, relu1_1, pool1 and so on.
    """

    kind: Literal["torchvision"] = "torchvision"
    name: str = "vgg19"
    weights: str = "DEFAULT"
    seed: int = Field(0, ge=0)

    def build(self, layers: Sequence[str]) -> nn.Module:
        """Images (B, 1 or 3, H, W) in [0, 1] to a list of features, one of each layer; raises `ConfigError`."""
        classifier = self._classifier()
        entry = self._entry()
        if hasattr(classifier, "transform_input"):
            classifier.transform_input = True  # the Inceptions' weights want another normalisation than ImageNet's
        extract, nodes = _extractor(classifier, layers, self.name)
        if entry is not None:
            _load(extract, _fetched(entry, self.name), entry.name)
        elif self.weights != "random":
            _load(extract, _read_safetensors(Path(self.weights), extract.state_dict().keys()), self.weights)
        preset = entry.transforms() if entry is not None else None
        mean, std = (preset.mean, preset.std) if preset is not None else (IMAGENET_MEAN, IMAGENET_STD)
        return _TorchvisionFeatures(extract, nodes, mean, std)

    def _classifier(self) -> Any:
        models = import_torchvision().models
        names = models.list_models(module=models)
        if self.name not in names:
            raise ConfigError(f"perceptual: torchvision has no classifier {self.name!r}; choose {_shown(names)}")
        # The global generator decides torchvision's first weights; the fork leaves it as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return models.get_model(self.name, weights=None)

    def _entry(self) -> Any:
        """torchvision's member for named weights; None for random ones and for files."""
        if self.weights == "random" or self.weights.endswith(".safetensors"):
            return None
        entries = import_torchvision().models.get_model_weights(self.name)
        entry = entries.__members__.get(self.weights.removeprefix(f"{entries.__name__}."))
        if entry is None:
            raise ConfigError(
                f"perceptual: {self.name} has no weights {self.weights!r}; "
                f"choose {', '.join(entries.__members__)}, random, or a .safetensors file (pickles are not read)"
            )
        return entry


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
                raise _unknown_layer(layer, f"the encoder of {self.path}", known)
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


class _TorchvisionFeatures(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, extract: nn.Module, nodes: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.extract, self.nodes = extract, tuple(nodes)
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        try:
            found = self.extract((_with_channels(x, 3) - self.mean) / self.std)
        except (RuntimeError, AssertionError) as error:
            if not _TOO_SMALL.search(str(error)):
                raise
            height, width = x.shape[2:]
            raise ConfigError(
                f"perceptual: {width} x {height} pixels do not fit the network ({str(error).splitlines()[0]}); "
                "choose earlier perceptual.layers, another network, or another image size"
            ) from None
        return [found[node] for node in self.nodes]


class _BundleFeatures(nn.Module):
    def __init__(self, encoder: Encoder, stages: Sequence[int], shape: Shape) -> None:
        super().__init__()
        self.encoder, self.stages, self.shape = encoder, tuple(stages), shape

    def forward(self, x: Tensor) -> list[Tensor]:
        x = _with_channels(x, self.shape[0])
        if x.shape[2:] != self.shape[1:]:
            x = F.interpolate(x, self.shape[1:], mode="bilinear", antialias=True)
        activations = self.encoder.activations(x)
        return [activations[stage] for stage in self.stages]


# --- torchvision ----------------------------------------------------------------------------------------------------


def _extractor(classifier: Any, layers: Sequence[str], name: str) -> tuple[fx.GraphModule, list[str]]:
    """The part of a classifier that the layers need, and the node of each layer."""
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    for module in classifier.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # or the layer after a wanted one would overwrite its output
    first_of_train, in_eval = extraction.get_graph_node_names(classifier, suppress_diff_warning=True)
    aliases = _vgg_aliases(classifier) if name.startswith("vgg") else {}
    nodes = [_node_of(aliases.get(layer, layer), in_eval[1:]) for layer in layers]
    for layer, node in zip(layers, nodes, strict=True):
        if node is None:
            parts = dict.fromkeys(".".join(node.split(".")[:2]) for node in in_eval[1:])
            raise _unknown_layer(layer, name, [*aliases, *parts])
    found = [node for node in nodes if node is not None]
    both = extraction.create_feature_extractor(
        classifier,
        train_return_nodes=first_of_train[:1],
        eval_return_nodes=list(dict.fromkeys(found)),
        suppress_diff_warning=True,
    )
    graph = both.eval().graph
    for node in graph.nodes:
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
    return fx.GraphModule(both, graph), found


def _node_of(layer: str, nodes: Sequence[str]) -> str | None:
    return next((node for node in reversed(nodes) if node == layer or node.startswith(f"{layer}.")), None)


def _vgg_aliases(vgg: Any) -> dict[str, str]:
    """conv1_1, relu1_1, pool1 and so on, as Simonyan and Zisserman's networks are usually spelt."""
    aliases, block, conv = {}, 1, 0
    for i, module in enumerate(vgg.features):
        if isinstance(module, nn.Conv2d):
            conv += 1
            aliases[f"conv{block}_{conv}"] = f"features.{i}"
        elif isinstance(module, nn.ReLU):
            aliases[f"relu{block}_{conv}"] = f"features.{i}"
        elif isinstance(module, nn.MaxPool2d):
            aliases[f"pool{block}"] = f"features.{i}"
            block, conv = block + 1, 0
    return aliases


def _fetched(entry: Any, name: str) -> dict[str, Tensor]:
    """torchvision's own weights. `weights_only`: from their files torch builds tensors and nothing else."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch announces downloads on stdout, which is the user's
            tensors = entry.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:
        raise ConfigError(
            f"perceptual: cannot download the weights {entry.name} of {name} ({getattr(error, 'reason', error)}); "
            "give weights of another name, a local .safetensors file, or random"
        ) from None
    except Exception:
        # torch's messages here advise to trust the file, and span lines.
        raise ConfigError(
            f"perceptual: the weights {entry.name} of {name} are damaged or more than weights; "
            f"delete their file in {torch.hub.get_dir()}, or give a local .safetensors file, or random"
        ) from None
    # DenseNet's files are older than its modules' names (norm.1 for norm1), which torchvision mends as it loads them.
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1", key): tensors[key] for key in tensors}


def _read_safetensors(path: Path, keys: Any) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in set(keys) & set(file.keys())}
    except (OSError, safetensors.SafetensorError):
        raise ConfigError(
            f"perceptual: cannot read the weights {path}; give a .safetensors file with a state dict, or random"
        ) from None


def _load(extract: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load what the kept part of the network needs; the rest of a state dict does not matter."""
    own = extract.state_dict()
    for key, value in own.items():
        # Only training reads the former, and old files lack it; the latter are tracing's own, the same for all weights.
        if key.endswith("num_batches_tracked") or key.startswith("_tensor_constant"):
            continue
        given = tensors.get(key)
        if given is None or given.shape != value.shape or not given.isfinite().all():
            problem = "has no" if given is None else "has another shape or values that are no numbers for"
            raise ConfigError(f"perceptual: {source} {problem} {key}; give weights of this network, or random")
        own[key] = given.float() if value.is_floating_point() else given
    extract.load_state_dict(own)


# --- bundles --------------------------------------------------------------------------------------------------------


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
    shape = (image.channels, image.height, image.width)
    # On the meta device a spec that claims gigabytes costs nothing until its weights turn out to be there.
    with torch.device("meta"):
        encoder = model.network.encoder(shape, model.latent.encoder_outputs)
    prefix = "0.encoder."
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    wanted = {name: (value.shape, value.dtype) for name, value in encoder.state_dict().items()}
    if wanted != {name: (value.shape, value.dtype) for name, value in own.items()}:
        raise damaged
    encoder.load_state_dict(own, assign=True)
    return encoder, shape


# --- both -----------------------------------------------------------------------------------------------------------


def _with_channels(x: Tensor, channels: int) -> Tensor:
    if x.shape[1] == channels:
        return x
    if channels == 3:
        return x.expand(-1, 3, -1, -1)
    return (x * x.new_tensor(_LUMA).reshape(1, 3, 1, 1)).sum(1, keepdim=True)


def _unknown_layer(layer: str, network: str, known: Sequence[str]) -> ConfigError:
    return ConfigError(f"perceptual.layers: {network} has no layer {layer!r}; choose among {_shown(known)}")


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
