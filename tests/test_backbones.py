"""Feature maps instead of pixels: aligned, standardised, frozen, kept whole in the bundle, or refused in a line."""

import copy

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import write_digits
from PIL import Image
from pydantic import TypeAdapter
from test_perceptual import cached, offline, one_line  # noqa: F401 - offline is a fixture

from anomaly_vae import Detector
from anomaly_vae.backbones import Backbone, BackboneSpec
from anomaly_vae.bundle import read_bundle
from anomaly_vae.classifying import classify
from anomaly_vae.describing import bundle_facts, facts_table
from anomaly_vae.engine import Engine
from anomaly_vae.errors import ConfigError
from anomaly_vae.evaluation import evaluate
from anomaly_vae.exploring import explore
from anomaly_vae.fabric import make_fabric
from anomaly_vae.fitting import Fitting
from anomaly_vae.model import ModelSpec
from anomaly_vae.objectives import Objective
from anomaly_vae.recipe import DetectorSpec
from anomaly_vae.torchvision_compat import import_torchvision
from anomaly_vae.training import train

OWN = {"kind": "own", "width": 8, "channels": 40}
RESNET = {"kind": "torchvision", "name": "resnet18", "weights": None, "layers": ["layer1", "layer2"], "channels": 30}
BOTH = pytest.mark.parametrize("backbone", [OWN, RESNET], ids=["own", "torchvision"])
SPEC = TypeAdapter(BackboneSpec)


def build(backbone, shape=(1, 32, 32)) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SPEC.validate_python(backbone).build(shape)


def pictures(channels=1, size=32, count=6):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def model_of(backbone, **more):
    return {
        "backbone": backbone,
        "network": {"kind": "conv", "width": 16},
        "latent": {"kind": "gaussian", "size": 8},
        "likelihood": {"kind": "gaussian", "squash": False},
        **more,
    }


def spec_of(backbone, *overrides, **more):
    spec = DetectorSpec.parse({
        "image": {"height": 16, "width": 16, "channels": 1},
        "model": model_of(backbone, **more),
        "training": {"steps": 300, "batch_size": 32, "checkpoint_seconds": 0},
    })  # fmt: skip
    return spec.with_overrides(list(overrides))


@pytest.fixture(scope="module")
def trained(digits_folder, tmp_path_factory):
    """The digits 0-3 by a backbone of its own."""
    path = tmp_path_factory.mktemp("features") / "own"
    train(spec_of(OWN), digits_folder, path, device="cpu")
    return path


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("few"), count=160)


# --- maps -----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_maps_lie_on_one_grid(backbone, stride):
    one = build({**backbone, "stride": stride}, (1, 32, 48))
    assert one.shape == (backbone["channels"], 32 // stride, 48 // stride)
    assert one(torch.rand(2, 1, 32, 48)).shape == (2, *one.shape)


@BOTH
def test_a_changed_block_changes_the_features_around_it_and_no_others(backbone):
    layers = {"layers": ["layer1"]} if backbone is RESNET else {}
    one = build({**backbone, **layers, "channels": None}, (1, 128, 128))
    x = torch.full((1, 1, 128, 128), 0.5)
    changed = x.clone()
    changed[..., 84:92, 36:44] = 1.0
    moved = (one(changed) - one(x)).abs().sum(1)[0]
    assert moved[20:24, 8:12].min() > 0
    far = torch.ones_like(moved, dtype=torch.bool)
    far[11:, :20] = False
    assert moved[far].max() < 1e-4 * moved.max()
    # The middle of what moved is the middle of the block: 88 and 40 px are the edges of the cells 22 and 10.
    rows, columns = moved.sum(1), moved.sum(0)
    place = torch.arange(32) + 0.5
    assert abs(float((rows * place).sum() / rows.sum()) - 22) < 0.75
    assert abs(float((columns * place).sum() / columns.sum()) - 10) < 0.75


@BOTH
def test_grey_is_seen_as_the_colour_it_is(backbone):
    grey, colour = build(backbone), build(backbone, (3, 32, 32))
    x = pictures()
    if backbone is RESNET:
        assert torch.allclose(grey(x), colour(x.repeat(1, 3, 1, 1)), atol=1e-4)
    assert colour(pictures(3)).shape == (6, *colour.shape)
    assert colour(pictures(3)).isfinite().all()


@BOTH
def test_features_are_standardised_by_the_pictures_they_are_measured_on(backbone):
    one, x = build(backbone), pictures(count=20)
    assert not one.measured
    one.prepare(iter(torch.split(x, 7)))
    assert one.measured
    values = one(x).transpose(0, 1).flatten(1)
    assert values.mean(1).abs().max() < 1e-3
    wide = values.std(1, correction=0)
    # Channels that these pictures hardly move are left small.
    assert wide.max() < 1.001
    assert wide.median() > 0.999


@BOTH
def test_features_depend_on_the_picture_alone_and_give_no_gradient(backbone):
    one, x = build(backbone).train(), pictures()
    assert not any(part.training for part in one.modules())
    assert not one(x.requires_grad_()).requires_grad
    assert torch.allclose(one(x[:1]), one(x)[:1], atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(one(x), build(backbone)(x))


@BOTH
def test_the_seed_draws_the_channels(backbone):
    spec = ModelSpec.parse(model_of({**backbone, "channels": 20}))
    one, same, other = (spec.build((1, 32, 32), seed).backbone for seed in (0, 0, 1))
    assert torch.equal(one.chosen, same.chosen)
    assert not torch.equal(one.chosen, other.chosen)
    assert len(one.chosen.unique()) == 20
    everything = build({**backbone, "channels": None})
    assert torch.equal(everything.chosen, torch.arange(everything.shape[0]))


def test_layers_go_by_name_or_place():
    named, placed = (build({**RESNET, "layers": layers}) for layers in (["layer1", "layer2"], [4, 5]))
    assert torch.equal(named(pictures()), placed(pictures()))
    squeezenet = {"kind": "torchvision", "name": "squeezenet1_1", "weights": None}
    named, placed = (build({**squeezenet, "layers": [layer]}) for layer in ("features.3", 3))
    assert torch.equal(named(pictures()), placed(pictures()))


# --- learning and standing still ------------------------------------------------------------------------------------


class Arrays:
    """Pictures as a source of batches."""

    def __init__(self, images):
        self.images = images

    def batches(self, batch_size, order=None, drop_last=False):
        order = np.arange(len(self.images)) if order is None else order
        for start in range(0, len(order) - len(order) % batch_size if drop_last else len(order), batch_size):
            part = order[start : start + batch_size]
            yield part, self.images[torch.from_numpy(part)]


def states(backbone, steps, **more):
    """The backbone's weights after each epoch of a training, and what the training tells."""
    spec = spec_of(backbone, f"training.steps={steps}", "training.batch_size=10", **more)
    objective = Objective(spec.objective, spec.model.build((1, 16, 16), 0))
    source, rows = Arrays(pictures(size=16, count=30)), np.arange(30)
    fitting = Fitting(make_fabric("cpu", "32-true", None), objective, spec.training, source, rows[:20], rows[20:], 0)
    found = [copy.deepcopy(objective.model.backbone.state_dict())]
    fitted = fitting.run(None, lambda _: found.append(copy.deepcopy(objective.model.backbone.state_dict())))
    return found, fitted


def same(one, other, *but):
    return all(torch.equal(one[name], other[name]) for name in one if name not in but)


def test_its_own_backbone_learns_and_then_stands_still():
    found, fitted = states({**OWN, "share": 0.4}, 20)
    heads = [name for name in found[0] if name.endswith("weight")]
    assert not any(torch.equal(found[0][name], found[4][name]) for name in heads)
    assert all(same(found[i], found[10]) for i in range(5, 11))
    assert not same(found[3], found[4])
    # Before there are features their losses are none.
    assert [np.isnan(row["held_out"]) for row in fitted.history] == [True] * 4 + [False] * 6
    assert fitted.epoch > 4
    assert fitted.active_units >= 0


def test_a_classifier_stands_still_from_the_start():
    found, _ = states(RESNET, 6)
    assert same(found[0], found[1], "mean", "std", "measured")
    assert same(found[1], found[-1])


@pytest.mark.parametrize("views", [False, True])
def test_what_it_learns_it_can_do(views):
    one, x = build({**OWN, "views": views}, (1, 16, 16)), torch.zeros(64, 1, 16, 16)
    x[:, :, 3:8, 3:6] = 1.0  # the eight views of it are eight pictures
    optimizer = torch.optim.AdamW(one.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        loss = one.loss(x, torch.Generator().manual_seed(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert not any(part.training for part in one.modules())


def test_pictures_that_are_not_square_are_learnt_from_too():
    one = build({**OWN, "stride": 8}, (3, 37, 50))
    assert one.loss(torch.rand(2, 3, 37, 50), torch.Generator().manual_seed(0)).isfinite()
    assert one(torch.rand(2, 3, 37, 50)).shape == (2, 40, 4, 6)


def test_courses_begin_when_the_backbone_has_learnt():
    spec = spec_of({**OWN, "share": 0.5})
    objective = Objective(spec.objective, spec.model.build((1, 16, 16), 0)).train()
    assert list(objective.learners(0.49)) == [objective.model.backbone]
    assert objective.learners(0.5) is None
    x, noise = pictures(size=16), torch.zeros(6, 8)
    # The weight of the KL rises from 0 over the share of training that is left.
    latent = spec.model.latent
    start, end = (objective(x, noise, progress, 0) for progress in (0.5, 1.0))
    assert latent.weight_at(0.0) < latent.weight_at(1.0)
    assert start.total < end.total
    greedy = spec.with_overrides(["objective.course.kind=greedy", "training.select=last"])
    assert len(Objective(greedy.objective, greedy.model.build((1, 16, 16), 0)).learners(0.5)) == 2


def test_damage_is_done_to_the_picture_and_the_target_is_clean():
    spec = spec_of(OWN, "objective.corruption=[{kind: noise, sigma: 5}]")
    objective = Objective(spec.objective, spec.model.build((1, 16, 16), 0)).train()
    x, seen = pictures(size=16), []
    objective.model.backbone.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    objective(x, torch.zeros(6, 8), 0.9, 0)
    (clean, target), (damaged, _) = seen
    assert torch.equal(clean, x)
    assert damaged.std() > 2
    assert torch.equal(target, objective.model.view(x))


# --- detectors ------------------------------------------------------------------------------------------------------


def test_it_tells_other_digits_and_its_heat_is_as_large_as_the_picture(trained, digits_folder):
    engine = Engine(Detector.load(trained), "cpu")
    assert evaluate(engine, digits_folder).quality.auroc > 0.75
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    judged = engine.detector.judge(images, heat=True)
    assert judged.heat.shape == (3, 16, 16)
    assert engine.detector.judge(images).score == judged.score


def test_the_heat_is_where_the_damage_is(tmp_path):
    """Stripes with a blot: the hottest place is inside it."""
    generator = np.random.default_rng(0)
    (tmp_path / "data" / "good").mkdir(parents=True)
    stripes = 128 + 60 * np.sin(np.arange(32) / 2)[None, :] * np.ones((32, 1))

    def drawn():
        return np.clip(np.roll(stripes, generator.integers(12), 1) + generator.normal(0, 6, (32, 32)), 0, 255)

    for i in range(60):
        Image.fromarray(drawn().astype(np.uint8)).save(tmp_path / "data" / "good" / f"{i:02}.png")
    spec = spec_of(OWN, "image={height: 32, width: 32, channels: 1}", "training.steps=100", "calibration.few_normals=0",
                   "calibration.alpha=0.2")  # fmt: skip
    detector = train(spec, tmp_path / "data", tmp_path / "b", device="cpu").detector
    picture = drawn()
    picture[20:26, 6:12] = 20
    heat = detector.judge(torch.from_numpy(picture.astype(np.uint8))[None, None], heat=True).heat[0]
    row, column = np.unravel_index(np.argmax(heat), heat.shape)
    assert 17 <= row < 29
    assert 3 <= column < 15


def test_it_survives_an_interruption_to_the_bit(few, tmp_path):
    spec = spec_of(OWN, "training.steps=30", "calibration.few_normals=0", "calibration.alpha=0.2")

    class Cut(Exception):
        pass

    whole = train(spec, few, tmp_path / "whole", device="cpu").detector
    for epochs in (1, 3, 9):  # while the backbone learns, still, and after it

        def cut(member, members, progress, epochs=epochs):
            if progress.epoch == epochs:
                raise Cut

        with pytest.raises(Cut):
            train(spec, few, tmp_path / "cut", device="cpu", report=cut)
    again = train(spec, few, tmp_path / "cut", device="cpu").detector
    for name, value in whole.members[0].model.state_dict().items():
        assert torch.equal(value, again.members[0].model.state_dict()[name]), name


def test_a_bundle_wants_no_weights_but_its_own(few, tmp_path, offline):  # noqa: F811
    state = import_torchvision().models.resnet18(weights=None).state_dict()
    file = tmp_path / "resnet.safetensors"
    safetensors.torch.save_file({name: tensor for name, tensor in state.items() if "fc" not in name}, file)
    torch.save(state, cached(offline, "resnet18"))
    images = torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8)
    scores = []
    for weights in (str(file), "DEFAULT"):
        spec = spec_of({**RESNET, "weights": weights}, "training.steps=10", "calibration.few_normals=0",
                       "calibration.alpha=0.2")  # fmt: skip
        before = train(spec, few, tmp_path / weights[-4:], device="cpu").detector
        (file if weights == str(file) else cached_file(offline)).unlink()
        loaded = Detector.load(tmp_path / weights[-4:])
        assert loaded.judge(images).score == before.judge(images).score
        weight = loaded.members[0].model.backbone.network.extract.state_dict()["conv1.weight"]
        assert torch.equal(weight, state["conv1.weight"])
        scores.append(before.judge(images).score)
    assert scores[0] == scores[1]


def cached_file(offline):  # noqa: F811
    return next(offline.iterdir())


@BOTH
def test_a_bundle_is_read_on_the_meta_device(backbone):
    spec = ModelSpec.parse(model_of(backbone))
    with torch.device("meta"):
        empty = spec.build((3, 32, 32), 0)
    full = spec.build((3, 32, 32), 5).eval()
    empty.load_state_dict(full.state_dict(), assign=True)
    x = pictures(3)
    assert torch.equal(empty.eval().view(x), full.view(x))


def test_what_shows_pictures_leaves_out_those_it_cannot_make(trained, few, tmp_path):
    engine = Engine(Detector.load(trained), "cpu")
    explored = explore(engine, trained, tmp_path / "page", few)
    assert any("features of a backbone" in note for note in explored.notes)
    assert "extremes.png" in explored.files
    assert not {"reconstructions.png", "samples.png", "traversals.png"} & set(explored.files)
    assert explore(engine, trained, tmp_path / "alone").usage is not None
    with pytest.raises(ConfigError) as error:
        explore(engine, trained, tmp_path / "sums", few, sums=["4-5"])
    one_line(error, "leave out --add")
    measured = classify(engine, few, counts=[10], draws=1, steps=3)
    assert any("backbone" in note for note in measured.notes)
    assert facts_table(trained, bundle_facts(engine.detector, read_bundle(trained))).row_count > 5
