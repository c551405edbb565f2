"""Laws of the latent space, and of the pictures and the page that `explore` makes of it."""

import io
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import TINY, write_digits
from forked import command
from PIL import Image

from anomaly_vae import Detector, explore_page, latent_space
from anomaly_vae.data import open_pictures
from anomaly_vae.engine import Engine
from anomaly_vae.errors import ConfigError, DataError
from anomaly_vae.explore_sections import Measured, _divide, labels_of, traversals
from anomaly_vae.exploring import PAGE, alphas_of, explore
from anomaly_vae.grids import Row, grid_png
from anomaly_vae.latent_space import Codes, Usage
from anomaly_vae.latents import GaussianLatentSpec, PointSpec
from anomaly_vae.looking import look_at
from anomaly_vae.model import normalise
from anomaly_vae.observations import Observation
from anomaly_vae.training import train

ALWAYS = {"samples", "reconstructions", "extremes", "interpolation", "arithmetic-1-8-good", "traversals"}
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def model(tiny_detector):
    return tiny_detector.members[0].model


@pytest.fixture
def images(digits_folder, tiny_detector):
    return open_pictures(digits_folder, TINY.data, tiny_detector.image).images(range(0, 1797, 100))


@pytest.fixture(scope="module")
def some_digits(tmp_path_factory):
    """Of the pictures that the detector knows so many that a map of them takes a moment."""
    return write_digits(tmp_path_factory.mktemp("some"), count=300)


@pytest.fixture(scope="module")
def explored(tiny_bundle, some_digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("explored") / "out"
    engine = Engine(Detector.load(tiny_bundle), "cpu")
    return explore(engine, tiny_bundle, out, some_digits, sums=["8-good"], seed=3)


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
    assert (explored.training_pictures, explored.test_pictures) == (96, 204)
    assert len(explored.kl) == 12
    assert all(kl >= 0 for kl in explored.kl)
    json.dumps(explored.to_dict(), allow_nan=False)


def test_the_same_seed_writes_the_same_bytes(explored, tiny_bundle, some_digits, tmp_path):
    engine = Engine(Detector.load(tiny_bundle), "cpu")
    again = explore(engine, tiny_bundle, tmp_path / "again", some_digits, sums=["8-good"], seed=3)
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
        return command("explore", tiny_bundle, *arguments)

    done = run("--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == ["samples.png", "traversals.png", PAGE]
    done = run("--out", tmp_path / "sum", "--data", digits_folder, "--add", "9-none")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --add '9-none'")
    assert "known here: 4, 5, 6, 7, 8, 9, good" in done.stderr
    assert not (tmp_path / "sum").exists()


def test_a_second_look_removes_its_own_old_pictures_and_no_others(tiny_bundle, some_digits, tmp_path):
    engine, out = Engine(Detector.load(tiny_bundle), "cpu"), tmp_path / "out"
    explore(engine, tiny_bundle, out, some_digits, sums=["8-good"])
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


def assert_finite(charts):
    for chart in charts.values():
        assert chart["data"]
        for trace in chart["data"]:
            values = [value for value in trace["y"] if value is not None]
            assert values
            assert np.isfinite(values).all()


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
