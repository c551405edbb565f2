"""The perceptual loss: zero for equal pictures, frozen, the same from the same seed, and read without unpickling."""

import copy
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from anomaly_vae import Detector
from anomaly_vae.bundle import Bundle, read_bundle, write_bundle
from anomaly_vae.errors import AnomalyVaeError, BundleError, ConfigError
from anomaly_vae.perceptual import PerceptualSpec
from anomaly_vae.pretrained import IMAGENET_MEAN, IMAGENET_STD
from anomaly_vae.torchvision_compat import import_torchvision

RANDOM = {"kind": "torchvision", "name": "squeezenet1_1", "weights": "random"}
SMALL = {"network": RANDOM, "layers": {"features.1": 1.0, "features.3": 0.5}}


def spec_of(network: dict[str, object], *layers: str) -> PerceptualSpec:
    return PerceptualSpec.parse({"network": network, "layers": dict.fromkeys(layers or SMALL["layers"], 1.0)})


def pictures(channels: int, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(seed))


def one_line(error: pytest.ExceptionInfo[AnomalyVaeError], *words: str) -> None:
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.fixture(params=["torchvision", "bundle"])
def small(request: pytest.FixtureRequest, tiny_bundle: Path) -> PerceptualSpec:
    if request.param == "torchvision":
        return PerceptualSpec.parse(SMALL)
    return PerceptualSpec.parse({"network": {"kind": "bundle", "path": tiny_bundle}, "layers": {0: 1.0, 1: 0.5}})


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """torch's folder of weights, empty, on a machine that reaches nothing; torch makes it."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_pictures_cost_nothing_and_others_something(small, channels):
    loss, x = small.build(channels), pictures(channels)
    assert loss(x.clone(), x) == 0
    reconstruction = pictures(channels, seed=1).requires_grad_()
    value = loss(reconstruction, x)
    value.backward()
    assert value.shape == ()
    assert value > 0
    assert reconstruction.grad.isfinite().all()
    assert (reconstruction.grad != 0).any(dim=(1, 2, 3)).all()


def test_only_the_reconstruction_gets_a_gradient(small):
    x, reconstruction = pictures(1).requires_grad_(), pictures(1, seed=1).requires_grad_()
    small.build(1)(reconstruction, x).backward()
    assert x.grad is None
    assert reconstruction.grad is not None


def test_nearer_pictures_cost_less(small):
    loss, x, other = small.build(1), pictures(1), pictures(1, seed=1)
    costs = [float(loss(x.lerp(other, share), x)) for share in (0.03, 0.1, 0.3, 1.0)]
    assert costs == sorted(costs)


def test_the_loss_is_half_the_mean_square_of_each_layer_weighed():
    torchvision = import_torchvision()
    spec = PerceptualSpec.parse(SMALL | {"weight": 7.0})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.squeezenet1_1(weights=None).eval()
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    x, y = pictures(1), pictures(1, seed=1)
    expected = torch.zeros(())
    with torch.no_grad():
        for depth, weight in ((2, 1.0), (4, 0.5)):
            a, b = (net.features[:depth]((images.repeat(1, 3, 1, 1) - mean) / std) for images in (x, y))
            expected += 7 * weight * ((a - b) ** 2).sum() / (2 * a[0].numel()) / len(x)
    assert torch.allclose(spec.build(1)(y, x), expected, rtol=1e-5)


def test_the_loss_is_a_mean_over_the_batch(small):
    loss, x, y = small.build(3), pictures(3), pictures(3, seed=1)
    each = torch.stack([loss(y[i : i + 1], x[i : i + 1]) for i in range(3)])
    assert torch.allclose(loss(y, x), each.mean(), rtol=1e-5)


def test_mixed_precision_gives_float32(small):
    x, y = pictures(1), pictures(1, seed=1)
    loss = small.build(1)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(y, x)
    assert value.dtype == torch.float32
    assert torch.allclose(value, loss(y, x), rtol=0.1)


def test_other_shapes_are_refused(small):
    loss = small.build(1)
    for y, x in ((pictures(1), pictures(1, 16)), (pictures(3), pictures(3)), (pictures(1)[0], pictures(1)[0])):
        with pytest.raises(ValueError, match="images of shapes"):
            loss(y, x)
    with pytest.raises(ConfigError) as error:
        small.build(2)
    one_line(error, "use 1 or 3")


# --- frozen ---------------------------------------------------------------------------------------------------------


def test_training_changes_nothing(small):
    loss, model = small.build(1), nn.Conv2d(1, 1, 3, padding=1)
    whole = nn.ModuleDict({"model": model, "loss": loss}).train()
    before = copy.deepcopy(loss.state_dict())
    assert not any(module.training for module in loss.modules())
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.1)
    x = pictures(1)
    start = model.weight.clone()
    loss(model(x), x).backward()
    optimizer.step()
    assert not torch.equal(model.weight, start)
    assert before.keys() == loss.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


def test_batch_norms_and_dropout_stay_quiet():
    network = {"kind": "torchvision", "name": "mobilenet_v3_small", "weights": "random"}
    loss, x, y = spec_of(network, "features.2", "classifier").build(3), pictures(3), pictures(3, seed=1)
    whole = nn.Sequential(loss).train()
    assert whole.training
    assert loss(y, x) == loss(y, x)
    assert torch.allclose(loss(y[:1], x[:1]), loss(y[:1].repeat(3, 1, 1, 1), x[:1].repeat(3, 1, 1, 1)), rtol=1e-5)


def test_only_what_the_layers_need_is_kept():
    for layer, count in (("features.1", 64 * (3 * 9 + 1)), ("classifier", 1_235_496)):
        assert sum(p.numel() for p in spec_of(RANDOM, layer).build(3).parameters()) == count


def test_the_same_seed_is_the_same_network_and_the_global_generator_is_left_alone():
    x, y = pictures(3), pictures(3, seed=1)
    torch.manual_seed(5)
    first = PerceptualSpec.parse(SMALL).build(3)(y, x)
    drawn = torch.rand(4)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(4))
    assert torch.equal(first, PerceptualSpec.parse(SMALL).build(3)(y, x))
    assert not torch.equal(first, PerceptualSpec.parse(SMALL | {"network": {**RANDOM, "seed": 1}}).build(3)(y, x))


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layer", "deeper"), [
    ("squeezenet1_1", "features.0", "features.3"),
    ("resnet18", "layer1.0.bn2", "layer1.1"),
    ("resnet18", "layer1", "layer2"),
    ("densenet121", "features.norm5", "classifier"),
    ("inception_v3", "Conv2d_1a_3x3.bn", "Conv2d_3b_1x1"),
])  # fmt: skip
def test_features_are_the_module_s_own_output_though_the_next_one_works_in_place(name, layer, deeper):
    torchvision = import_torchvision()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.get_model(name, weights=None).eval()
    found: list[Tensor] = []
    net.get_submodule(layer).register_forward_hook(lambda module, args, output: found.append(output.clone()))
    loss = spec_of({"kind": "torchvision", "name": name, "weights": "random"}, layer, deeper).build(3)
    x = pictures(3, 96)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        if name == "inception_v3":
            net.transform_input = True
        net((x - mean) / std)
        assert torch.allclose(loss.features(x)[0], found[0], atol=1e-5)


@pytest.mark.parametrize(("name", "aliases"), [
    ("vgg11", {"relu2_1": "features.4", "conv3_2": "features.8", "pool1": "features.2"}),
    ("vgg11_bn", {"relu2_1": "features.6", "conv3_2": "features.11", "pool1": "features.3"}),
])  # fmt: skip
def test_vggs_know_the_usual_names(name, aliases):
    network = {"kind": "torchvision", "name": name, "weights": "random"}
    features = spec_of(network, *aliases, *aliases.values()).build(1).features(pictures(1))
    for aliased, named in zip(features[:3], features[3:], strict=True):
        assert torch.equal(aliased, named)


@pytest.mark.parametrize(("network", "words"), [
    ({"kind": "torchvision", "name": "vgg11", "weights": "random"}, ("no layer 'relu9_9'", "relu1_1", "pool5")),
    (RANDOM, ("no layer 'relu9_9'", "features.1", "classifier.3")),
    ({"kind": "bundle"}, ("no layer 'relu9_9'", "0, 1")),
])  # fmt: skip
def test_unknown_layers_are_told_the_known_ones(network, words, tiny_bundle):
    if network["kind"] == "bundle":
        network = {**network, "path": str(tiny_bundle)}
    with pytest.raises(ConfigError) as error:
        spec_of(network, "relu9_9").build(1)
    one_line(error, *words)


@pytest.mark.parametrize(("name", "layer", "size"), [("vgg11", "pool5", 16), ("vit_b_32", "encoder.layers", 32)])
def test_pictures_too_small_for_a_layer(name, layer, size):
    loss = spec_of({"kind": "torchvision", "name": name, "weights": "random"}, layer).build(1)
    with pytest.raises(ConfigError) as error:
        loss(pictures(1, size), pictures(1, size))
    one_line(error, f"{size} x {size} pixels", "choose earlier perceptual.layers")


@pytest.mark.parametrize("layers", [{}, {"relu1_1": 0.0}, {"relu1_1": float("nan")}])
def test_layers_have_positive_weights(layers):
    with pytest.raises(ConfigError, match="layers"):
        PerceptualSpec.parse({"layers": layers})


def test_specs_survive_yaml(small):
    assert PerceptualSpec.parse(yaml.safe_load(yaml.safe_dump(small.model_dump(mode="json")))) == small


# --- weights --------------------------------------------------------------------------------------------------------


def test_a_local_state_dict_loads(tmp_path):
    network = {"kind": "torchvision", "name": "vgg11", "seed": 3}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state = import_torchvision().models.vgg11(weights=None).state_dict()
    path = tmp_path / "vgg11.safetensors"
    # The classifier is no part of what is compared, so it may be missing.
    safetensors.torch.save_file({name: value for name, value in state.items() if "features" in name}, path)
    drawn = spec_of({**network, "weights": "random"}, "relu1_1", "pool3").build(1)
    loaded = spec_of({**network, "weights": str(path), "seed": 4}, "relu1_1", "pool3").build(1)
    x = pictures(1)
    for a, b in zip(drawn.features(x), loaded.features(x), strict=True):
        assert torch.equal(a, b)


def test_files_that_are_no_weights_of_the_network(tmp_path):
    state = spec_of(RANDOM).build(3).features.extract.state_dict()
    name = next(iter(state))
    wrong = {
        "missing": None,
        "text": b"not a tensor",
        "other": safetensors.torch.save({"some": torch.zeros(2)}),
        "shape": safetensors.torch.save({**state, name: torch.zeros(2)}),
        "nan": safetensors.torch.save({**state, name: torch.full_like(state[name], torch.nan)}),
    }
    for kind, data in wrong.items():
        path = tmp_path / f"{kind}.safetensors"
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ConfigError) as error:
            spec_of({**RANDOM, "weights": str(path)}).build(3)
        one_line(error, f"{kind}.safetensors", "random", "give")


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(ConfigError) as error:
        spec_of({**RANDOM, "name": "fcn_resnet50"}).build(3)
    one_line(error, "no classifier 'fcn_resnet50'", "alexnet")
    for weights in ("IMAGENET22K", "weights.pth"):
        with pytest.raises(ConfigError) as error:
            spec_of({**RANDOM, "weights": weights}).build(3)
        one_line(error, f"no weights '{weights}'", "IMAGENET1K_V1", "random", ".safetensors")


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"])
def test_without_a_network_named_weights_are_one_line(offline, weights, capfd):
    with pytest.raises(ConfigError) as error:
        spec_of({**RANDOM, "weights": weights}).build(3)
    one_line(error, "cannot download the weights IMAGENET1K_V1 of squeezenet1_1", "a local .safetensors file", "random")
    assert not capfd.readouterr().out


def cached(offline: Path, name: str) -> Path:
    offline.mkdir(parents=True)
    return offline / import_torchvision().models.get_model_weights(name)["DEFAULT"].url.rsplit("/", 1)[1]


@pytest.mark.parametrize("name", ["squeezenet1_1", "densenet121"])
def test_named_weights_come_from_torch_s_cache(offline, name):
    layers = {"squeezenet1_1": "features.3", "densenet121": "features.denseblock1"}
    network = {"kind": "torchvision", "name": name, "weights": "random"}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        state = import_torchvision().models.get_model(name, weights=None).state_dict()
    old = {"norm1": "norm.1", "norm2": "norm.2", "conv1": "conv.1", "conv2": "conv.2"}
    for key in [key for key in state if "denselayer" in key]:
        *before, module, kind = key.split(".")
        state[".".join((*before, old[module], kind))] = state.pop(key)
    torch.save(state, cached(offline, name))
    x = pictures(3)
    found, wanted = (
        spec_of({**network, **change}, layers[name]).build(3).features(x)[0]
        for change in ({"weights": "DEFAULT"}, {"seed": 2})
    )
    assert torch.equal(found, wanted)


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("write", [torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap))])
def test_a_weights_file_runs_no_code(offline, tmp_path, write):
    write({"features.0.weight": _Trap(tmp_path / "sprung")}, cached(offline, "squeezenet1_1"))
    with pytest.raises(ConfigError) as error:
        spec_of({**RANDOM, "weights": "DEFAULT"}).build(3)
    one_line(error, "damaged or more than weights", "delete")
    assert not (tmp_path / "sprung").exists()


# --- bundles --------------------------------------------------------------------------------------------------------


def test_a_bundle_s_features_are_its_first_encoder_s(tiny_bundle):
    spec = PerceptualSpec.parse({"network": {"kind": "bundle", "path": tiny_bundle}, "layers": {"1": 1.0, "0": 1.0}})
    x = pictures(1, 16)
    with torch.no_grad():
        expected = Detector.load(tiny_bundle).members[0].model.encoder.activations(x)
        deep, shallow = spec.build(1).features(x)
    assert torch.allclose(deep, expected[1], atol=1e-5)
    assert torch.allclose(shallow, expected[0], atol=1e-5)


def test_a_bundle_sees_other_sizes_and_colours_as_its_own(tiny_bundle):
    loss = PerceptualSpec.parse({"network": {"kind": "bundle", "path": tiny_bundle}, "layers": {"0": 1.0}}).build(3)
    grey = pictures(1, 16)
    with torch.no_grad():
        own = loss.features(grey)[0]
        assert torch.allclose(loss.features(grey.repeat(1, 3, 1, 1))[0], own, atol=1e-5)
        flat = torch.full((1, 1, 40, 24), 0.3)
        assert torch.allclose(loss.features(flat)[0], loss.features(flat[..., :16, :16])[0], atol=1e-5)


def changed(bundle: Path, to: Path, **model: object) -> PerceptualSpec:
    """The loss of a copy of the bundle whose model says something else."""
    old = read_bundle(bundle)
    description = copy.deepcopy(old.description)
    description["spec"]["model"] |= model
    write_bundle(to, Bundle(description, old.files, {}))
    return PerceptualSpec.parse({"network": {"kind": "bundle", "path": to}, "layers": {"0": 1.0}})


def test_a_conditional_bundle_is_refused(tiny_bundle, tmp_path):
    with pytest.raises(ConfigError) as error:
        changed(tiny_bundle, tmp_path / "b", condition={"size": 2, "classes": ["0", "1"]}).build(1)
    one_line(error, "unconditional")


def test_a_bundle_that_is_none_or_not_as_it_says(tiny_bundle, tmp_path):
    with pytest.raises(BundleError) as error:
        spec_of({"kind": "bundle", "path": tmp_path}, "0").build(1)
    one_line(error, "no bundle", "give the folder")
    with pytest.raises(BundleError) as error:
        changed(tiny_bundle, tmp_path / "b", network={"kind": "conv", "width": 13}).build(1)
    one_line(error, "restore")
