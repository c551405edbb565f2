"""Settings: what a user writes wrongly is named in one line."""

import pytest

from anomaly_vae.errors import ConfigError
from anomaly_vae.expert_spec import ExpertSpec
from anomaly_vae.presets import configs_folder, preset_names, read_preset
from anomaly_vae.recipe import DetectorSpec
from anomaly_vae.spec import override, parse_yaml


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_parses_and_says_its_name(name):
    spec = read_preset(name)
    assert spec.preset == name
    assert DetectorSpec.parse(spec.model_dump(mode="json")) == spec


def test_vae_preset_is_the_default_spec():
    """The plain VAE is what the library takes where nothing is said."""
    assert read_preset("vae").model_copy(update={"preset": "custom"}) == DetectorSpec()


def test_default_is_novelty_and_defect_together():
    default, novelty, defect = (read_preset(name) for name in ("default", "novelty", "defect"))
    for name in ExpertSpec.model_fields:
        assert getattr(default, name) == getattr(novelty, name), name
        assert getattr(default.beside["defect"], name) == getattr(defect, name), name


def test_shipped_files_are_found():
    assert {"default", "lecture-conv", "lecture-mlp"} <= set(preset_names())
    assert (configs_folder() / "service.yaml").is_file()


@pytest.mark.parametrize(("override", "says"), [
    ("model.latent.sizes=3", "model.latent.sizes: no such setting"),
    ("model.latent.size=0", "greater than or equal to 1"),
    ("verdict=magic", "verdict 'magic' is not among the scores: fused"),
    ("fusion.parts=[nll]", "fusion.parts names nll"),
    ("split.calibrate=0.79", "leave at least 20%"),
    ("scores=[{kind: kl}, {kind: kl}]", "scores lists a kind twice"),
    ("training.steps", "not of the form key.sub=value"),
    ("training.steps=[1", "mend the YAML"),
    ("image={height: 16, width: 16, channels: 2}", "image.channels"),
])  # fmt: skip
def test_mistakes_are_one_line_that_names_the_field(override, says):
    with pytest.raises(ConfigError) as caught:
        DetectorSpec().with_overrides([override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_network_that_cannot_take_the_image_dies_when_read():
    with pytest.raises(ConfigError, match="list fewer"):
        DetectorSpec().with_overrides(
            ["image={height: 16, width: 16, channels: 1}", "model.network.channels=[8,8,8,8,8]"]
        )


def test_exponents_are_numbers():
    assert parse_yaml("[1e-3, 3, .5, -2E+2, a, true]", "") == [0.001, 3, 0.5, -200.0, "a", True]


def test_unknown_preset_lists_the_known():
    with pytest.raises(ConfigError, match=r"no preset 'best'.*default"):
        read_preset("best")


def test_another_kind_leaves_the_former_ones_settings_behind():
    data = {"latent": {"kind": "gaussian", "beta": 2.0}, "other": 1}
    assert override(data, ["latent.kind=point", "latent.size=3"]) == {
        "latent": {"kind": "point", "size": 3},
        "other": 1,
    }
    assert override(data, ["latent.kind=gaussian"]) == data
    assert data["latent"]["beta"] == 2.0
