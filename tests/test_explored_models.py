"""`explore` over models: every law of z, conditional ones, those with skips."""

import json
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import TINY, write_digits
from PIL import Image
from test_exploring import ALWAYS, Page, assert_finite, reconstructed

from anomaly_vae import Detector, latent_space
from anomaly_vae.data import open_pictures
from anomaly_vae.engine import Engine
from anomaly_vae.errors import ConfigError
from anomaly_vae.exploring import PAGE, explore
from anomaly_vae.latents import LatentSpec
from anomaly_vae.looking import look_at
from anomaly_vae.model import Context, ModelSpec, normalise
from anomaly_vae.observations import Observation, observe
from anomaly_vae.training import train

LAWS = {spec.model_fields["kind"].default: "" for spec in get_args(get_args(LatentSpec)[0])}
"""Every law of z, and variants of some, with the settings they are built by."""
LAWS |= {"point, normal": "prior: normal", "sparse, rate": "penalty: rate"}


def latent_of(law):
    kind = law.split(",")[0]
    return "model.latent={" + ", ".join(filter(None, [f"kind: {kind}", "size: 6", LAWS[law]])) + "}"


def made(folder, place, overrides):
    """A detector of few pictures and steps, and where its bundle lies."""
    spec = TINY.with_overrides(
        ["model.network={kind: mlp, hidden: [24]}", "training.steps=20", "training.select=last",
         "calibration.few_normals=0", "probes=12", "scores=[{kind: squared_error}]", "verdict=squared_error",
         *overrides]
    )  # fmt: skip
    train(spec, folder, place, device="cpu")
    return Engine(Detector.load(place), "cpu"), place


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), count=160)


@pytest.fixture(scope="module", params=LAWS)
def lawful(request, few_digits, tmp_path_factory):
    """An engine for each law, its bundle, and what explore made of it with pictures."""
    place = tmp_path_factory.mktemp("lawful")
    engine, bundle = made(few_digits, place / "bundle", [latent_of(request.param)])
    return request.param, engine, bundle, explore(engine, bundle, place / "out", few_digits, sums=["8-good"])


def charts_of(done):
    text = (done.out / PAGE).read_text()
    return json.JSONDecoder().raw_decode(text.partition("const charts = ")[2])[0]


def test_every_law_has_every_section_and_its_own_words(lawful):
    law, engine, _, done = lawful
    module, words = engine.detector.members[0].model.law, Page((done.out / PAGE).read_text()).text
    assert set(done.files) == {f"{name}.png" for name in ALWAYS} | {PAGE}
    for name in done.files[:-1]:
        with Image.open(done.out / name) as picture:
            assert np.asarray(picture).std() > 5
    charts = charts_of(done)
    assert set(charts) == {"by-class", "by-verdict", "latents", "curves"}
    assert_finite(charts)
    assert f"Loss and {module.cost_name} while training" in words
    assert module.cost_name in [trace["name"] for trace in charts["curves"]["data"]]
    assert ("Ghosh" in words) == (not module.has_prior)
    assert (f"drawn from {latent_space.prior_of(engine.detector.members[0].model)}" in words) == module.has_prior
    assert any("unit sphere" in note for note in done.notes) == (law == "von_mises_fisher")
    assert "None" not in " ".join(done.notes)
    machine = json.loads(json.dumps(done.to_dict(), allow_nan=False))
    assert len(machine["usage"]) == 6
    assert (machine["kl"] == machine["usage"]) == (law == "gaussian") == (machine["quantity"] == "KL")
    assert ("KL of each latent" if law == "gaussian" else "Variance of the code of each latent") in words
    assert f"{machine['active_units']} of 6 latents are active" in words


def test_every_law_needs_no_more_pictures_than_its_probes(lawful, tmp_path):
    _, engine, bundle, _ = lawful
    done = explore(engine, bundle, tmp_path / "out")
    assert done.files == ["samples.png", "traversals.png", PAGE]
    assert any("12 probe pictures" in note for note in done.notes)
    assert_finite(charts_of(done))


def test_every_law_draws_codes_that_it_allows(lawful):
    _, engine, _, _ = lawful
    model = engine.detector.members[0].model
    if not model.law.has_prior:
        assert latent_space.prior_of(model) is None
        with pytest.raises(ValueError, match="no prior"):
            latent_space.draw_prior(model, 3, 0)
        return
    z = latent_space.draw_prior(model, 50, 0)
    torch.testing.assert_close(model.law.project(z), z)
    assert torch.equal(z, latent_space.draw_prior(model, 50, 0))
    assert not torch.equal(z, latent_space.draw_prior(model, 50, 1))


def test_a_law_without_prior_and_probes_has_no_samples_and_says_so(few_digits, tmp_path):
    engine, bundle = made(few_digits, tmp_path / "bundle", ["model.latent={kind: point, size: 4}", "probes=0"])
    done = explore(engine, bundle, tmp_path / "out")
    assert done.files == [PAGE]
    assert any("samples need the codes" in note for note in done.notes)
    assert (done.kl, done.usage, done.quantity, done.active_units) == (None, None, None, None)


def test_codes_of_a_sphere_are_decoded_on_it():
    model = ModelSpec.parse({"latent": {"kind": "von_mises_fisher", "size": 5}}).build((1, 16, 16), 0).eval()
    z = torch.nn.functional.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    assert (latent_space.decode(model, 7 * z).int() - latent_space.decode(model, z).int()).abs().max() <= 1


@pytest.mark.parametrize("count", [4, 60])
def test_draws_like_codes_have_their_mean_and_covariance(count):
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    mu = torch.randn(count, 6, generator=torch.Generator().manual_seed(1)) @ mix + 3
    z = latent_space.draw_like(mu, 100_000, 0)
    scale = float(mu.T.cov().diag().max())
    assert (z.mean(0) - mu.mean(0)).abs().max() < 0.02 * scale**0.5
    assert (z.T.cov() - mu.T.cov()).abs().max() < 0.03 * scale


@pytest.fixture(scope="module", params=["marginalised", "given"])
def conditional(request, tmp_path_factory):
    """A conditional bundle for digits 0, 1 and 2; where classes are not given there are abnormal pictures too."""
    place = tmp_path_factory.mktemp("conditional")
    folder = write_digits(place / "digits", normal="", count=200)
    for digit in "3456789" if request.param == "given" else "3456":
        for path in (folder / digit).iterdir():
            path.unlink()
        (folder / digit).rmdir()
    overrides = ["data.normal=[0, 1, 2]", f"model.condition={{scoring: {request.param}}}", "model.latent.size=6"]
    engine, bundle = made(folder, place / "bundle", overrides)
    return request.param, engine, bundle, folder


def test_a_conditional_bundle_shows_every_class(conditional, tmp_path):
    scoring, engine, bundle, folder = conditional
    done = explore(engine, bundle, tmp_path / "out", folder, sums=["1-0"])
    sections = ALWAYS - {"arithmetic-1-8-good"} | {"arithmetic-1-1-0", "every-class"}
    assert set(done.files) == {f"{name}.png" for name in sections} | {PAGE}
    assert_finite(charts_of(done))
    words = Page((done.out / PAGE).read_text()).text
    whose = "its own class" if scoring == "given" else "most probable"
    assert any("3 classes" in note and whose in note for note in done.notes)
    for phrase in ("The same code, every class", "A row for each class", "class of the picture that it starts from"):
        assert phrase in words
    with Image.open(done.out / "samples.png") as picture:
        rows = 3
        assert picture.height == 16 + rows * 64 + (rows - 1) * 4
    alone = explore(engine, bundle, tmp_path / "alone")
    assert alone.files == ["samples.png", "traversals.png", PAGE]


def test_a_picture_is_decoded_as_its_class(conditional):
    scoring, engine, _, folder = conditional
    detector, model = engine.detector, engine.detector.members[0].model
    pictures = open_pictures(folder, detector.spec.data, detector.image)
    looked, _ = look_at(engine, pictures, 0)
    rows = np.arange(0, len(looked.index), 7)
    images, codes = looked.images(rows), looked.codes.at(rows)
    x = normalise(images, torch.device("cpu"))
    with torch.inference_mode():
        if scoring == "given":
            assert [model.classes[k] for k in codes.label] == [looked.label(row) for row in rows]
            mu = observe(model, x, codes.label).code
        else:
            seen = observe(model, x)
            assert torch.equal(codes.label, seen.weights.argmax(0))
            mu = seen.code
        torch.testing.assert_close(codes.mu, mu, rtol=1e-4, atol=1e-5)
        wanted = model.likelihood.mean(model.decode(mu, Context(model.embed(codes.label)))) * 255
        other = model.likelihood.mean(model.decode(mu, Context(model.embed((codes.label + 1) % 3)))) * 255
    shown = latent_space.reconstruct(model, images, codes).float()
    assert (shown - wanted).abs().max() <= 0.51
    assert (shown - other).abs().max() > 0.51


def test_a_walk_keeps_its_class(conditional, monkeypatch, tmp_path):
    _, engine, bundle, folder = conditional
    asked, decode = [], latent_space.decode
    monkeypatch.setattr(latent_space, "decode", lambda model, z, label: asked.append(label) or decode(model, z, label))
    explore(engine, bundle, tmp_path / "out", folder, sums=["1-0"])
    steps = [label for label in asked if len(label) in (5, 9, 11)]  # alphas, stops of a traversal, an interpolation
    assert len(steps) > 12
    assert all(len(set(label.tolist())) == 1 for label in steps)


def test_no_more_classes_than_fit_are_shown():
    from anomaly_vae.explore_sections import _of_how_many, _shown_classes

    many = SimpleNamespace(classes=tuple("abcdefghijkl"))
    assert [name for _, name in _shown_classes(many)] == list("abcdefghij")
    assert "first 10 of 12" in _of_how_many(many)


@pytest.fixture(scope="module")
def skipping(few_digits, tmp_path_factory):
    network = "model.network={kind: conv, width: 8, skips: true}"
    return made(few_digits, tmp_path_factory.mktemp("skipping") / "bundle", [network])


def test_with_skips_only_what_needs_no_code_alone(skipping, few_digits, tmp_path):
    engine, bundle = skipping
    done = explore(engine, bundle, tmp_path / "out", few_digits)
    assert done.files == ["reconstructions.png", "extremes.png", PAGE]
    charts = charts_of(done)
    assert set(charts) == {"by-class", "by-verdict", "curves"}
    assert_finite(charts)
    assert sum("has skips" in note for note in done.notes) == 1
    assert explore(engine, bundle, tmp_path / "alone").files == [PAGE]
    with pytest.raises(ConfigError, match="skips=false") as caught:
        explore(engine, bundle, tmp_path / "sums", few_digits, sums=["8-good"])
    assert "\n" not in str(caught.value)


def test_with_skips_a_reconstruction_is_the_one_that_scores_see(skipping, few_digits):
    detector = skipping[0].detector
    model = detector.members[0].model
    images = open_pictures(few_digits, detector.spec.data, detector.image).images(range(40))
    with torch.inference_mode():
        seen = Observation(model, normalise(images, torch.device("cpu"))).reconstruction * 255
    assert (reconstructed(model, images).float() - seen.clamp(0, 255)).abs().max() <= 0.51
