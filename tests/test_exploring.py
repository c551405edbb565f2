"""Laws of the latent space, and of the pictures and the page that `explore` makes of it."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import TINY, write_digits
from PIL import Image

from anomaly_vae import Detector, explore_page, latent_space
from anomaly_vae.data import open_pictures
from anomaly_vae.engine import Engine
from anomaly_vae.errors import ConfigError, DataError
from anomaly_vae.explore_sections import Measured, _divide, labels_of, traversals
from anomaly_vae.exploring import PAGE, alphas_of, explore
from anomaly_vae.grids import Row, grid_png
from anomaly_vae.latent_space import Codes, Usage
from anomaly_vae.latents import GaussianLatentSpec, LatentSpec, PointSpec
from anomaly_vae.looking import look_at
from anomaly_vae.model import Context, ModelSpec, normalise
from anomaly_vae.observations import Observation, observe
from anomaly_vae.training import train

LAWS = {spec.model_fields["kind"].default: "" for spec in get_args(get_args(LatentSpec)[0])}
"""Every law of z, and variants of some, with the settings they are built by."""
LAWS |= {"point, normal": "prior: normal", "sparse, rate": "penalty: rate"}
ALWAYS = {"samples", "reconstructions", "extremes", "interpolation", "arithmetic-1-8-good", "traversals"}
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def model(tiny_detector):
    return tiny_detector.members[0].model


@pytest.fixture
def images(digits_folder, tiny_detector):
    return open_pictures(digits_folder, TINY.data, tiny_detector.image).images(range(0, 1797, 100))


@pytest.fixture(scope="module")
def explored(tiny_bundle, digits_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("explored") / "out"
    engine = Engine(Detector.load(tiny_bundle), "cpu")
    return explore(engine, tiny_bundle, out, digits_folder, sums=["8-good"], seed=3)


def test_a_reconstruction_is_the_one_that_scores_see(model, images):
    with torch.inference_mode():
        seen = Observation(model, normalise(images, torch.device("cpu"))).reconstruction * 255
    assert (reconstructed(model, images).float() - seen.clamp(0, 255)).abs().max() <= 0.51


def reconstructed(model, images):
    return latent_space.reconstruct(model, images, latent_space.codes(model, images))


def test_adding_nothing_gives_the_plain_reconstruction(model, images):
    codes = latent_space.codes(model, images).mu
    direction = latent_space.difference(codes[:5], codes[5:])
    assert direction.norm() > 0.1
    moved = latent_space.add(codes, direction, [0.0, 2.0])
    assert torch.equal(latent_space.decode(model, moved[:, 0]), reconstructed(model, images))
    torch.testing.assert_close(moved[:, 1], codes + 2 * direction)
    # The whole difference carries one mean onto the other.
    torch.testing.assert_close((codes[5:] + direction).mean(0), codes[:5].mean(0))


def test_an_interpolation_ends_at_the_two_reconstructions(model, images):
    codes = latent_space.codes(model, images).mu
    walk = latent_space.interpolate(codes[0], codes[1], 7)
    assert torch.equal(walk[0], codes[0])
    assert torch.equal(walk[-1], codes[1])
    torch.testing.assert_close(walk[3], (codes[0] + codes[1]) / 2)
    ends = latent_space.decode(model, walk)[[0, -1]].int()
    assert (ends - reconstructed(model, images[:2]).int()).abs().max() <= 1


def test_a_traversal_moves_through_its_latent_alone(model, images):
    start = latent_space.codes(model, images).mu[0]
    values = torch.linspace(-3, 3, 5)
    for unit in (0, model.spec.latent.size - 1):
        walk = latent_space.traverse(start, unit, values)
        assert torch.equal(walk[:, unit], values)
        others = [i for i in range(len(start)) if i != unit]
        assert torch.equal(walk[:, others], start[others].expand(5, -1))


def test_latents_come_in_the_order_of_what_they_tell():
    law, kl = GaussianLatentSpec(size=4).build(), torch.tensor([[0.1, 3.0, 0.0, 3.0]])
    usage = Usage.of(law, Codes(torch.zeros(1, 4), kl))
    assert (usage.order, usage.quantity, usage.unit) == ([1, 3, 0, 2], "KL", "nats")
    assert usage.active.tolist() == [True, True, False, True]
    mu = torch.tensor([[0.0, -2.0, 1.0], [0.1, 2.0, 1.0]])
    usage = Usage.of(PointSpec(size=3).build(), Codes(mu))
    assert (usage.order, usage.quantity, usage.unit) == ([1, 0, 2], "variance of the code", "")
    assert usage.active.tolist() == [False, True, False]
    torch.testing.assert_close(usage.values, torch.tensor([0.0025, 4.0, 0.0]))


def test_the_prior_is_standard_normal_and_seeded(model):
    drawn = latent_space.draw_prior(model, 4000, 0)
    assert drawn.mean().abs() < 0.02
    assert abs(float(drawn.std()) - 1) < 0.02
    assert torch.equal(drawn, latent_space.draw_prior(model, 4000, 0))
    assert not torch.equal(drawn, latent_space.draw_prior(model, 4000, 1))


def test_maps_keep_apart_what_is_apart():
    generator = torch.Generator().manual_seed(0)
    clusters = torch.randn(60, 8, generator=generator) + 30 * (torch.arange(60) % 2)[:, None]
    plane, shares = latent_space.pca_plane(clusters)
    assert shares[0] > 0.9
    for points in (plane, latent_space.tsne_plane(clusters, 0)):
        nearest = [np.argsort(((points - one) ** 2).sum(1))[1] for one in points]
        assert all((i - j) % 2 == 0 for i, j in enumerate(nearest))


@pytest.mark.parametrize("codes", [torch.zeros(12, 3), torch.randn(12, 1), torch.randn(70, 80)])
def test_maps_take_collapsed_single_and_many_latents(codes):
    assert np.isfinite(latent_space.pca_plane(codes)[0]).all()
    assert np.isfinite(latent_space.tsne_plane(codes, 0)).all()


@pytest.mark.parametrize("shape", [(1, 16, 24), (3, 24, 16), (3, 200, 300)])
def test_a_grid_shows_each_picture_as_it_is(shape):
    picture = np.zeros(shape, np.uint8)
    picture[-1, : shape[1] // 2] = 250  # upper half: white where grey, blue where colour
    drawn = np.asarray(Image.open(io.BytesIO(grid_png([Row("", [picture]), Row("", [picture])]))))
    width, height = explore_page_size(shape)
    cell = drawn[8 : 8 + height, 8 : 8 + width]
    top, bottom = cell[: height // 2 - 1], cell[height // 2 + 1 :]
    assert (top[..., 2] == 250).all()
    assert (top[..., 0] == (250 if shape[0] == 1 else 0)).all()
    assert (bottom == 0).all()
    assert (drawn[:8] == 255).all()


def explore_page_size(shape):
    from anomaly_vae.grids import shown_size

    return shown_size(np.zeros(shape, np.uint8))


def test_explore_makes_every_picture_and_says_what_it_looked_at(explored):
    wanted = {"samples", "reconstructions", "extremes", "interpolation", "arithmetic-1-8-good", "traversals"}
    assert {f"{name}.png" for name in wanted} | {PAGE} == set(explored.files)
    for name in explored.files[:-1]:
        with Image.open(explored.out / name) as picture:
            assert np.asarray(picture).std() > 20
    assert (explored.training_pictures, explored.test_pictures) == (576, 1221)
    assert len(explored.kl) == 12
    assert all(kl >= 0 for kl in explored.kl)
    json.dumps(explored.to_dict(), allow_nan=False)


def test_the_same_seed_writes_the_same_bytes(explored, tiny_bundle, digits_folder, tmp_path):
    engine = Engine(Detector.load(tiny_bundle), "cpu")
    again = explore(engine, tiny_bundle, tmp_path / "again", digits_folder, sums=["8-good"], seed=3)
    for name in explored.files:
        assert (explored.out / name).read_bytes() == (again.out / name).read_bytes(), name
    other = explore(engine, tiny_bundle, tmp_path / "other", seed=4)
    assert (explored.out / "samples.png").read_bytes() != (other.out / "samples.png").read_bytes()


class Page(HTMLParser):
    """Which tags a browser would see, where they point, and the scripts' text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.scripts, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags[-1:] == ["script"] and self.scripts:
            self.scripts[-1] += data
        self.text += data


def test_the_page_needs_nothing_from_elsewhere(explored):
    text = (explored.out / PAGE).read_text()
    page = Page(text)
    assert page.links
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in page.links)
    assert "link" not in page.tags
    assert "default-src 'none'" in text
    assert sum(script.count("plotly.js v") for script in page.scripts) == 1
    for title in ("Samples from the prior", "Latents by class", "KL of each latent", "Loss and KL while training"):
        assert title in page.text


def test_names_with_html_are_inert():
    members = np.array([0, 1])
    chart = explore_page.maps_chart(
        [("x", "y", np.zeros((2, 2)))], [explore_page.Series(HOSTILE, members, "red", "circle")], [HOSTILE, "</script>"]
    )
    section = explore_page.Section("name", HOSTILE, f"{HOSTILE} </script>", chart=chart)
    text = explore_page.page(HOSTILE, HOSTILE, [HOSTILE], [section], None)
    tags = Page(text).tags
    assert "img" not in tags
    assert tags.count("script") == 2
    # Plotly reads a little HTML by itself: it gets the names escaped once more.
    assert all("<" not in trace["name"] + "".join(trace["text"]) for trace in chart["data"])
    assert HOSTILE not in text


def test_a_hostile_folder_name_goes_all_the_way(tiny_bundle, digits_folder, tmp_path):
    good = tmp_path / "data" / "good"
    good.mkdir(parents=True)
    (tmp_path / "data" / HOSTILE).mkdir()
    for target, source in ((good, "good"), (tmp_path / "data" / HOSTILE, "7")):
        for path in sorted((digits_folder / source).iterdir())[:12]:
            (target / path.name).write_bytes(path.read_bytes())
    engine = Engine(Detector.load(tiny_bundle), "cpu")
    done = explore(engine, tiny_bundle, tmp_path / "out", tmp_path / "data", sums=[f"{HOSTILE}-good"])
    text = (done.out / PAGE).read_text()
    assert HOSTILE not in text
    assert "x onerror" in text
    assert all("/" not in name and "<" not in name for name in done.files)


def test_without_pictures_only_what_needs_none(tiny_bundle, tmp_path):
    done = explore(Engine(Detector.load(tiny_bundle), "cpu"), tiny_bundle, tmp_path / "out")
    assert done.files == ["samples.png", "traversals.png", PAGE]
    assert any("Without --data" in note and "32 probe pictures" in note for note in done.notes)
    assert len(done.kl) == 12
    with pytest.raises(ConfigError, match="--data"):
        explore(Engine(Detector.load(tiny_bundle), "cpu"), tiny_bundle, tmp_path / "sum", sums=["8-good"])


def test_pictures_are_training_pictures_by_their_content(tiny_bundle, tiny_detector, digits_folder):
    pictures = open_pictures(digits_folder, TINY.data, tiny_detector.image)
    looked, _ = look_at(Engine(tiny_detector, "cpu"), pictures, 0)
    assert np.isin(pictures.fingerprints[looked.index[looked.training]], tiny_detector.seen).all()
    assert not np.isin(pictures.fingerprints[looked.index[~looked.training]], tiny_detector.seen).any()


def test_no_more_pictures_than_said_are_looked_at(monkeypatch, tiny_detector, digits_folder):
    monkeypatch.setattr("anomaly_vae.looking.MOST_LOOKED_AT", 50)
    pictures = open_pictures(digits_folder, TINY.data, tiny_detector.image)
    looked, remarks = look_at(Engine(tiny_detector, "cpu"), pictures, 0)
    assert (int(looked.training.sum()), int((~looked.training).sum())) == (25, 25)
    assert any("576 training and 1,221 test pictures" in line for line in remarks)


def test_shown_pictures_and_their_groups_are_in_no_mean(tiny_detector, digits_folder):
    pictures = open_pictures(digits_folder, TINY.data, tiny_detector.image)
    items = tuple(replace(item, group=str(i % 20)) for i, item in enumerate(pictures.items))
    pictures = replace(pictures, items=items)
    shown, wanted, other = _divide(pictures, "8", "good", 0)
    assert {pictures.items[i].label for i in wanted} == {"8"}
    assert {pictures.items[i].label for i in [*shown, *other]} == {"good"}
    groups = {pictures.items[i].group for i in shown}
    assert not groups & {pictures.items[i].group for i in [*wanted, *other]}
    one_group = replace(pictures, items=tuple(replace(item, group="one") for item in items))
    with pytest.raises(DataError, match="left to average"):
        _divide(one_group, "8", "good", 0)


@pytest.mark.parametrize("text", ["smiling", "smiling-sad", "neutral-neutral", "-", ""])
def test_unknown_names_are_one_line_that_lists_the_known(text):
    with pytest.raises(ConfigError, match="known here: a-b, neutral, smiling") as caught:
        labels_of(text, {"smiling", "neutral", "a-b"})
    assert "\n" not in str(caught.value)


def test_a_walk_goes_as_far_as_codes_do(monkeypatch, tiny_detector, digits_folder):
    pictures = open_pictures(digits_folder, TINY.data, tiny_detector.image)
    looked, _ = look_at(Engine(tiny_detector, "cpu"), pictures.select(range(0, 1797, 30)), 0)
    walks = []
    monkeypatch.setattr(
        latent_space, "traverse", lambda z, unit, values: walks.append((unit, values)) or z.repeat(len(values), 1)
    )
    model = tiny_detector.members[0].model
    measured = Measured(looked.codes, "the pictures")
    usage = Usage.of(model.law, looked.codes)
    traversals(model, usage, looked, measured, 0)
    assert [unit for unit, _ in walks] == usage.order
    mu = looked.codes.mu
    for unit, values in walks:
        torch.testing.assert_close(values.mean(), mu[:, unit].mean(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(values[-1] - values[0], 6 * mu[:, unit].std(correction=0))


def test_names_may_hold_dashes():
    assert labels_of("a-b-smiling", {"smiling", "a-b"}) == ("a-b", "smiling")
    assert labels_of("smiling-a-b", {"smiling", "a-b"}) == ("smiling", "a-b")


def test_alphas_are_numbers():
    assert alphas_of("-1, 0.5,2") == [-1, 0.5, 2]
    for text in ("", "a", "1,", "nan", "inf", ",".join(["1"] * 11)):
        with pytest.raises(ConfigError, match="--alpha"):
            alphas_of(text)


def test_a_place_with_other_things_is_left_alone(tiny_bundle, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    engine = Engine(Detector.load(tiny_bundle), "cpu")
    for place in (tmp_path, tiny_bundle, tmp_path / "thesis.txt"):
        with pytest.raises(ConfigError, match="choose another --out"):
            explore(engine, tiny_bundle, place)
    explore(engine, tiny_bundle, tmp_path / "out")
    explore(engine, tiny_bundle, tmp_path / "out")


def test_folds_and_colour_on_a_folder_all_of_whose_pictures_were_trained_on(tmp_path):
    folder = write_digits(tmp_path / "digits", count=90) / "good"
    spec = TINY.with_overrides(
        ["image.channels=3", "image.height=16", "image.width=24", "training.steps=20", "calibration.folds=2",
         "data.test_fraction=0"]
    )  # fmt: skip
    train(spec, folder, tmp_path / "bundle", device="cpu")
    done = explore(Engine(Detector.load(tmp_path / "bundle"), "cpu"), tmp_path / "bundle", tmp_path / "out", folder)
    assert done.test_pictures == 0
    assert any("holds 2 models" in note for note in done.notes)
    assert any("no test picture" in note for note in done.notes)
    assert "extremes.png" not in done.files


def test_the_command(tiny_bundle, digits_folder, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "anomaly_vae", "explore", tiny_bundle, *arguments]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True)

    done = run("--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == ["samples.png", "traversals.png", PAGE]
    done = run("--out", tmp_path / "sum", "--data", digits_folder, "--add", "9-none")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --add '9-none'")
    assert "known here: 4, 5, 6, 7, 8, 9, good" in done.stderr
    assert not (tmp_path / "sum").exists()


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


def assert_finite(charts):
    for chart in charts.values():
        assert chart["data"]
        for trace in chart["data"]:
            values = [value for value in trace["y"] if value is not None]
            assert values
            assert np.isfinite(values).all()


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


def test_a_second_look_removes_its_own_old_pictures_and_no_others(tiny_bundle, digits_folder, tmp_path):
    engine, out = Engine(Detector.load(tiny_bundle), "cpu"), tmp_path / "out"
    explore(engine, tiny_bundle, out, digits_folder, sums=["8-good"])
    for name in ("mine.png", "notes.txt"):
        (out / name).write_bytes(b"mine")
    (tmp_path / "outside.png").write_bytes(b"mine")
    assert (out / "arithmetic-1-8-good.png").exists()
    explore(engine, tiny_bundle, out)
    assert {path.name for path in out.iterdir()} == {"samples.png", "traversals.png", PAGE, "mine.png", "notes.txt"}
    (out / PAGE).write_text('<meta name="anomaly-vae-files" content="../outside.png notes.txt">')
    explore(engine, tiny_bundle, out)
    assert {path.name for path in out.iterdir()} == {"samples.png", "traversals.png", PAGE, "mine.png", "notes.txt"}
    assert (tmp_path / "outside.png").exists()


@pytest.mark.parametrize("missing", [["latent"], ["latent", "reconstruction"]])
def test_curves_leave_out_what_was_never_computed(missing):
    row = {"epoch": 1, "loss": 2.0, "held_out": 3.0, "reconstruction": 4.0, "latent": 5.0}
    chart = explore_page.curves_chart([row | dict.fromkeys(missing)], 1, "penalty", "an image")
    assert_finite({"curves": chart})
    assert len(chart["data"]) == 4 - len(missing)
    assert "yaxis2" not in chart["layout"]
    assert "yaxis2" in explore_page.curves_chart([row], 1, "penalty", "an image")["layout"]


def test_coarse_pictures_fill_their_place_in_a_grid():
    """A model that sees shrunken pictures decodes small ones; they stand beside whole ones at the same size."""
    whole, coarse = np.zeros((3, 64, 64), np.uint8), np.full((3, 16, 16), 255, np.uint8)
    drawn = np.asarray(Image.open(io.BytesIO(grid_png([Row("", [whole]), Row("", [coarse])]))).convert("L"))
    black, white = (drawn == 0).sum(), (drawn == 255).sum()
    alone = np.asarray(Image.open(io.BytesIO(grid_png([Row("", [whole]), Row("", [whole])]))).convert("L"))
    assert drawn.shape == alone.shape
    assert black == (alone == 0).sum() / 2
    assert white == drawn.size - black
