"""Models over features that cannot be: each is refused in one line that names the remedy."""

import numpy as np
import pytest
import yaml
from test_backbones import OWN, RESNET, build, few, model_of, spec_of  # noqa: F401 - few is a fixture
from test_perceptual import offline, one_line  # noqa: F401 - offline is a fixture

from anomaly_vae import VAEOutlierDetector
from anomaly_vae.errors import ConfigError
from anomaly_vae.recipe import DetectorSpec
from anomaly_vae.score_base import refusal
from anomaly_vae.training import train


@pytest.mark.parametrize(("more", "words"), [
    ({"likelihood": {"kind": "gaussian"}}, ("squash to false",)),
    ({"likelihood": {"kind": "bernoulli"}}, ("gaussian or laplace",)),
    ({"likelihood": {"kind": "continuous_bernoulli"}}, ("gaussian or laplace",)),
    ({"marker": {}}, ("model.marker", "leave")),
    ({"views": {}}, ("model.views", "leave")),
    ({"backbone": {"kind": "own", "share": 0.9}}, ("share",)),
    ({"backbone": {"kind": "own", "stride": 3}}, ("stride",)),
    ({"backbone": {"kind": "torchvision", "layers": []}}, ("layers",)),
    ({"backbone": {"kind": "other"}}, ("backbone",)),
])  # fmt: skip
def test_models_that_cannot_be(more, words):
    with pytest.raises(ConfigError) as error:
        DetectorSpec.parse({"model": model_of(OWN) | more})
    one_line(error, *words)


@pytest.mark.parametrize(("overrides", "words"), [
    (["objective.perceptual={}"], ("objective.perceptual", "leave out")),
    (["objective.encoder_steps=3"], ("encoder_steps to 0",)),
    (["model.backbone.stride=16"], ("32 px", "smaller model.backbone.stride")),
    *[([f"scores=[{{kind: {kind}}}]"], (kind, "features", "remove")) for kind in
      ("ssim", "msgms", "input_complexity", "bc_likelihood", "energy_projection", "inpainting")],
    (["scores=[{kind: synthetic_defect}]"], ("marker",)),
])  # fmt: skip
def test_settings_that_do_not_go_with_features(overrides, words):
    with pytest.raises(ConfigError) as error:
        spec_of(OWN, *overrides)
    one_line(error, *words)


@pytest.mark.parametrize(("changes", "words"), [
    ({"name": "resnet1"}, ("model.backbone:", "no classifier", "alexnet")),
    ({"layers": ["layer9"]}, ("model.backbone.layers", "layer9", "layer1")),
    ({"layers": ["fc"]}, ("fc", "no map")),
    ({"name": "swin_t", "layers": ["features.1"]}, ("features.1 of swin_t", "no map")),
    ({"name": "squeezenet1_1", "layers": ["features.8"]}, ("16 x 16 pixels", "earlier model.backbone.layers")),
])  # fmt: skip
def test_networks_that_cannot_be(changes, words):
    with pytest.raises(ConfigError) as error:
        build({**RESNET, **changes}, (1, 16, 16))
    one_line(error, *words)


def test_weights_that_cannot_be_had_are_one_line(few, tmp_path, offline):  # noqa: F811
    for weights, words in (("DEFAULT", "cannot download"), ("no.safetensors", "cannot read"), ("x", "no weights 'x'")):
        with pytest.raises(ConfigError) as error:
            train(spec_of({**RESNET, "weights": weights}, "training.steps=4"), few, tmp_path / weights, device="cpu")
        one_line(error, "model.backbone:", words)


def test_rows_of_numbers_are_no_pictures():
    overrides = ("model.backbone={kind: own}", "model.likelihood.squash=false")
    with pytest.raises(ConfigError) as error:
        VAEOutlierDetector(overrides=overrides).fit(np.random.default_rng(0).normal(size=(40, 5)))
    one_line(error, "leave out model.backbone")


def test_scores_of_features_are_those_of_any_model():
    spec = spec_of(OWN)
    assert {"negative_elbo", "relative_error", "local_maximum", "mahalanobis"} <= set(spec.columns)
    assert spec.mapped == () or all(refusal(score, spec.model) is None for score in spec.mapped)
    assert DetectorSpec.parse(yaml.safe_load(yaml.safe_dump(spec.model_dump(mode="json")))) == spec
