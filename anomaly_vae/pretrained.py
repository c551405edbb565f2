"""Classifiers of torchvision as frozen networks of features; weights are torchvision's own, a file's or random."""

import contextlib
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, fx, nn

from anomaly_vae.errors import ConfigError
from anomaly_vae.spec import Spec
from anomaly_vae.torchvision_compat import import_torchvision

LayerName = Annotated[str, Field(coerce_numbers_to_str=True)]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LUMA = (0.299, 0.587, 0.114)
_NAMES_SHOWN = 40
_TOO_SMALL = re.compile(r"too small|greater than actual input size|[Ww]rong image (height|width)")


class ClassifierSpec(Spec):
    """A classifier of torchvision, which sees RGB pictures; grey ones are repeated.

    `weights`: `random` (drawn from `seed`), a name of torchvision's such as IMAGENET1K_V1 (downloaded into torch's
    cache when it is not there), or the path of a .safetensors file with at least the weights that the layers need.
    Pictures are normalised as named weights say, else by ImageNet's mean and standard deviation.
    Layers are graph nodes as torchvision's `get_graph_node_names` lists them, such as `features.1` or `layer2.0.relu`;
    a module's name stands for its last node, and a number for the module at that place, from 0, in `features` or, where
    there is none, in the classifier. VGGs also know conv1_1, relu1_1, pool1 and so on.
    """

    name: str
    weights: str = "DEFAULT"
    seed: int = Field(0, ge=0)

    def network(self, layers: Sequence[str], setting: str) -> "ClassifierFeatures":
        """The part of the classifier that the layers need, with random weights; raises `ConfigError` for unknown names.

        `setting`: where a user wrote it, for the errors.
        """
        classifier = self._classifier(setting)
        if hasattr(classifier, "transform_input"):
            classifier.transform_input = True  # the Inceptions' weights want another normalisation than ImageNet's
        extract, nodes = _extractor(classifier, layers, self.name, setting)
        return ClassifierFeatures(extract, nodes, setting)

    def load(self, into: "ClassifierFeatures") -> None:
        """Put the weights into what `network` made; raises `ConfigError` where they cannot be had."""
        if self.weights == "random":
            return
        if self.weights.endswith(".safetensors"):
            found = _read_safetensors(Path(self.weights), into.extract.state_dict().keys(), into.setting)
            _load(into, found, self.weights)
            return
        entry = self._entry(into.setting)
        _load(into, _fetched(entry, self.name, into.setting), entry.name)
        preset = entry.transforms()
        into.normalise_by(preset.mean, preset.std)

    def _classifier(self, setting: str) -> Any:
        models = import_torchvision().models
        names = models.list_models(module=models)
        if self.name not in names:
            raise ConfigError(f"{setting}: torchvision has no classifier {self.name!r}; choose {_shown(names)}")
        # The global generator decides torchvision's first weights; the fork leaves it as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            try:
                return models.get_model(self.name, weights=None)
            except NotImplementedError:
                # RegNets compute their widths with tensors, which the meta device has none of.
                with torch.device("cpu"):
                    return models.get_model(self.name, weights=None).to("meta")

    def _entry(self, setting: str) -> Any:
        """torchvision's member for named weights."""
        entries = import_torchvision().models.get_model_weights(self.name)
        entry = entries.__members__.get(self.weights.removeprefix(f"{entries.__name__}."))
        if entry is None:
            raise ConfigError(
                f"{setting}: {self.name} has no weights {self.weights!r}; "
                f"choose {', '.join(entries.__members__)}, random, or a .safetensors file (pickles are not read)"
            )
        return entry


class ClassifierFeatures(nn.Module):
    """Images (B, 1 or 3, H, W) in [0, 1] to a list of features, one of each layer."""

    mean: Tensor
    std: Tensor

    def __init__(self, extract: nn.Module, nodes: Sequence[str], setting: str) -> None:
        super().__init__()
        self.extract, self.nodes, self.setting = extract, tuple(nodes), setting
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).reshape(1, 3, 1, 1))

    def normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Centre and scale pictures so, channel by channel."""
        self.mean.copy_(torch.tensor(mean).reshape(1, 3, 1, 1))
        self.std.copy_(torch.tensor(std).reshape(1, 3, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Raises `ConfigError` for pictures too small for the deepest layer."""
        try:
            found = self.extract((with_channels(x, 3) - self.mean) / self.std)
        except (RuntimeError, AssertionError) as error:
            if not _TOO_SMALL.search(str(error)):
                raise
            height, width = x.shape[2:]
            raise ConfigError(
                f"{self.setting}: {width} x {height} pixels do not fit the network ({str(error).splitlines()[0]}); "
                f"choose earlier {self.setting}.layers, another network, or another image size"
            ) from None
        return [found[node] for node in self.nodes]


def with_channels(x: Tensor, channels: int) -> Tensor:
    """Images (B, 1 or 3, H, W) with so many channels: grey repeated, or RGB as ITU-R 601 luma."""
    if x.shape[1] == channels:
        return x
    if channels == 3:
        return x.expand(-1, 3, -1, -1)
    return (x * x.new_tensor(_LUMA).reshape(1, 3, 1, 1)).sum(1, keepdim=True)


def unknown_layer(layer: str, network: str, known: Sequence[str], setting: str) -> ConfigError:
    """What to tell about a layer that is not there."""
    return ConfigError(f"{setting}.layers: {network} has no layer {layer!r}; choose among {_shown(known)}")


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _extractor(classifier: Any, layers: Sequence[str], name: str, setting: str) -> tuple[fx.GraphModule, list[str]]:
    """The part of a classifier that the layers need, and the node of each layer."""
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    for module in classifier.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # or the layer after a wanted one would overwrite its output
    first_of_train, in_eval = extraction.get_graph_node_names(classifier, suppress_diff_warning=True)
    aliases = _vgg_aliases(classifier) if name.startswith("vgg") else {}
    known = {**_numbered(classifier), **aliases}
    nodes = [_node_of(known.get(layer, layer), in_eval[1:]) for layer in layers]
    for layer, node in zip(layers, nodes, strict=True):
        if node is None:
            parts = dict.fromkeys(".".join(node.split(".")[:2]) for node in in_eval[1:])
            raise unknown_layer(layer, name, [*aliases, *parts], setting)
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


def _numbered(classifier: Any) -> dict[str, str]:
    """The modules that lie one after the other, by their place."""
    inner = getattr(classifier, "features", None)
    names = [name for name, _ in (classifier if inner is None else inner).named_children()]
    return {str(i): name if inner is None else f"features.{name}" for i, name in enumerate(names)}


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


def _fetched(entry: Any, name: str, setting: str) -> dict[str, Tensor]:
    """torchvision's own weights. `weights_only`: from their files torch builds tensors and nothing else."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch announces downloads on stdout, which is the user's
            tensors = entry.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:
        raise ConfigError(
            f"{setting}: cannot download the weights {entry.name} of {name} ({getattr(error, 'reason', error)}); "
            "give weights of another name, a local .safetensors file, or random"
        ) from None
    except Exception:
        # torch's messages here advise to trust the file, and span lines.
        raise ConfigError(
            f"{setting}: the weights {entry.name} of {name} are damaged or more than weights; "
            f"delete their file in {torch.hub.get_dir()}, or give a local .safetensors file, or random"
        ) from None
    # DenseNet's files are older than its modules' names (norm.1 for norm1), which torchvision mends as it loads them.
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1", key): tensors[key] for key in tensors}


def _read_safetensors(path: Path, keys: Any, setting: str) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in set(keys) & set(file.keys())}
    except (OSError, safetensors.SafetensorError):
        raise ConfigError(
            f"{setting}: cannot read the weights {path}; give a .safetensors file with a state dict, or random"
        ) from None


def _load(into: ClassifierFeatures, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load what the kept part of the network needs; the rest of a state dict does not matter."""
    own = into.extract.state_dict()
    for key, value in own.items():
        # Only training reads the former, and old files lack it; the latter are tracing's own, the same for all weights.
        if key.endswith("num_batches_tracked") or key.startswith("_tensor_constant"):
            continue
        given = tensors.get(key)
        if given is None or given.shape != value.shape or not given.isfinite().all():
            problem = "has no" if given is None else "has another shape or values that are no numbers for"
            raise ConfigError(f"{into.setting}: {source} {problem} {key}; give weights of this network, or random")
        own[key] = given.float() if value.is_floating_point() else given
    into.extract.load_state_dict(own)
