"""Detectors of several kinds of models: novelty and defect together, ensembles, and the networks that learn beside."""

import numpy as np
import pytest
import torch
from conftest import write_digits
from torch.nn import functional as F

from anomaly_vae import Detector, DetectorSpec
from anomaly_vae.corruptions import MasksSpec, StrokesSpec, corrupt
from anomaly_vae.data import open_pictures
from anomaly_vae.engine import Engine
from anomaly_vae.errors import ConfigError, TrainingError
from anomaly_vae.evaluation import evaluate
from anomaly_vae.expert import Expert
from anomaly_vae.expert_spec import ExpertSpec
from anomaly_vae.learned_scores import UnfamiliarFeatures
from anomaly_vae.marking import MarkerSpec, focal_loss
from anomaly_vae.member import Batch
from anomaly_vae.metrics import detection
from anomaly_vae.observations import observe
from anomaly_vae.presets import read_preset
from anomaly_vae.seeds import generator_of
from anomaly_vae.training import train
from anomaly_vae.viewing import COUNT, ViewsSpec, view

SMALL = [
    "image={height: 16, width: 16, channels: 1}",
    "beside_from=0",
    "model.side=16",
    "model.network.width=8",
    "model.views={width: 8, side: 16}",
    "training.steps=250",
    "training.batch_size=32",
    "beside.defect.model.network.width=8",
    "beside.defect.model.marker.width=8",
    "beside.defect.training.steps=120",
    "beside.defect.ensemble=2",
]
SOME = [*SMALL, "calibration.few_normals=20", "calibration.alpha=0.05"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, digits_folder):
    """The default recipe, small: novelty, and beside it two models of defect."""
    path = tmp_path_factory.mktemp("experts") / "both"
    train(read_preset("default", SMALL), digits_folder, path, device="cpu")
    return path


@pytest.fixture(scope="module")
def some_digits(tmp_path_factory):
    """Fewer of them, where it does not matter how well they are told apart; with `SOME` they are not divided anew."""
    return write_digits(tmp_path_factory.mktemp("some") / "digits", count=400)


@pytest.fixture(scope="module")
def detector(bundle):
    return Detector.load(bundle)


@pytest.fixture(scope="module")
def digits(digits_folder, detector):
    """Normal and abnormal pictures, uint8."""
    pictures = open_pictures(digits_folder, detector.spec.data, detector.image)
    normal = np.array([item.normal for item in pictures.items])
    return pictures.images(np.flatnonzero(normal)[::6]), pictures.images(np.flatnonzero(~normal)[::9])


def test_scores_are_named_after_their_expert(detector, digits):
    judged = detector.judge(digits[0][:4])
    assert list(judged.parts) == list(detector.spec.parts)
    assert {"relative_error", "unfamiliar_view", "defect.local_maximum", "defect.synthetic_defect"} <= set(judged.parts)


def test_a_kind_that_stands_twice_has_a_name_and_settings_of_its_own(digits):
    scores = [{"kind": "top_k"}, {"kind": "top_k", "name": "wide", "share": 1.0}, {"kind": "squared_error"}]
    spec = ExpertSpec.parse({"scores": scores, "fusion": {"parts": ["top_k", "wide"]}})
    assert spec.columns == ("top_k", "wide", "squared_error")
    expert = Expert.fit(spec, spec.model.build((1, 8, 8), 0), lambda: iter([Batch(digits[0][:20])]), 0.05)
    with torch.inference_mode():
        top, wide, mean = expert.judge(Batch(digits[0][:6]), None).columns.T
    np.testing.assert_allclose(wide, mean, rtol=1e-5)
    assert (top > wide).all()
    assert ExpertSpec.parse(spec.model_dump(mode="json")) == spec
    with pytest.raises(ConfigError, match="lists a kind twice: top_k, top_k; give one of them a name"):
        ExpertSpec.parse({"scores": [{"kind": "top_k"}, {"kind": "top_k", "share": 1.0}]})


def test_an_ensemble_is_averaged(detector, digits):
    member = detector.members[0]
    first, second = member.experts["defect"]
    assert not torch.equal(next(first.model.parameters()), next(second.model.parameters()))
    with torch.inference_mode():
        each = [expert.judge(Batch(digits[0][:8]), None).columns for expert in (first, second)]
    names = [f"defect.{kind}" for kind in first.spec.columns]
    judged = detector.judge(digits[0][:8])
    np.testing.assert_allclose(np.stack([judged.parts[name] for name in names], 1), np.mean(each, 0), rtol=1e-6)


def test_the_verdict_fuses_the_fused(detector, digits):
    member, spec = detector.members[0], detector.spec
    with torch.inference_mode():
        z = []
        for name, experts in member.experts.items():
            own = np.mean([expert.judge(Batch(digits[1][:8]), None).z for expert in experts], 0)
            z.append(spec.experts[name].fusion.fuse(own))
    loudest = np.maximum(*z)
    np.testing.assert_allclose(detector.judge(digits[1][:8]).score, loudest, rtol=1e-6)


def test_advice_names_the_setting_of_the_kind_of_model_that_went_wrong(digits_folder, tmp_path):
    wild = [*SMALL, "training.steps=20", "beside.defect.training={learning_rate: 1e30, clip_norm: null, steps: 40}"]
    with pytest.raises(TrainingError, match=r": -o beside\.defect\.training\.learning_rate=2\.5e\+29$"):
        train(read_preset("default", wild), digits_folder, tmp_path / "b", device="cpu")


def test_pictures_too_small_for_parts_get_no_defect_models(some_digits, tmp_path):
    said: list[str] = []
    brief = [*SOME, "beside_from=17", "training.steps=20"]
    made = train(read_preset("default", brief), some_digits, tmp_path / "b", device="cpu", say=said.append)
    assert made is not None
    assert list(Detector.load(made.path).members[0].experts) == [""]
    assert "left out defect: for pictures from 17 px on (beside_from)" in said


def test_saved_and_loaded_it_judges_alike(bundle, detector, digits):
    again = Detector.load(bundle).judge(digits[1][:16], heat=True)
    once = detector.judge(digits[1][:16], heat=True)
    assert again.score == once.score
    np.testing.assert_array_equal(again.heat, once.heat)
    assert once.heat.shape == (16, 16, 16)


def test_both_kinds_of_oddness_are_found(detector, digits):
    normal, other = digits
    damaged = normal.clone()
    damaged[:, :, 2:6, 9:13] = 255 - damaged[:, :, 2:6, 9:13]
    scores = {name: detector.judge(images).score for name, images in zip("nod", (normal, other, damaged), strict=True)}
    assert detection(scores["n"], scores["o"]).auroc > 0.9
    assert detection(scores["n"], scores["d"]).auroc > 0.95


def test_one_score_of_an_expert_can_be_the_verdict(some_digits, tmp_path):
    spec = read_preset("default", [*SOME, "verdict=defect.synthetic_defect", "training.steps=20",
                                   "beside.defect.training.steps=20"])  # fmt: skip
    trained = train(spec, some_digits, tmp_path / "one", device="cpu")
    judged = trained.detector.judge(torch.zeros(1, 1, 16, 16, dtype=torch.uint8))
    assert judged.score == judged.parts["defect.synthetic_defect"]


def test_resuming_ends_with_the_same_weights(some_digits, tmp_path):
    """Killed within the second kind of model."""
    short = [*SOME, "training.steps=30", "beside.defect.training.steps=40", "beside.defect.ensemble=1",
             "beside.defect.training.checkpoint_seconds=0", "training.checkpoint_seconds=0"]  # fmt: skip
    spec = read_preset("default", short)
    whole = train(spec, some_digits, tmp_path / "whole", device="cpu")

    class Killed(Exception):
        pass

    def kill(model, models, progress):
        assert models == 2
        if model == 1 and progress.epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        train(spec, some_digits, tmp_path / "again", device="cpu", report=kill)
    again = train(spec, some_digits, tmp_path / "again", device="cpu")
    assert again.detector.version == whole.detector.version


def test_evaluation_reports_every_part(bundle, some_digits):
    found = evaluate(Engine(Detector.load(bundle), "cpu", 32), some_digits)
    assert set(found.parts) == set(Detector.load(bundle).spec.parts)
    assert found.alarms_as_promised


@pytest.mark.parametrize(("override", "says"), [
    ("verdict=defect.kl", "verdict 'defect.kl' is not among the scores"),
    ("beside.defect.scores=[{kind: negative_elbo}]", "beside.defect"),
    ("beside.defect.objective.corruption=[{kind: noise}]", "made-up defects"),
    ("beside.defect.model.marker=null", "set model.marker={}"),
    ("beside.defect.heat=[squared_errors]", "heat names squared_errors"),
    ("heat=[mahalanobis]", "heat names mahalanobis"),
    ("model.condition={}", "stands alone"),
    ("ensemble=0", "ensemble"),
])  # fmt: skip
def test_mistakes_are_one_line(override, says):
    with pytest.raises(ConfigError) as caught:
        read_preset("default", [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 28, 45), (1, 64, 33), (3, 128, 130)])
def test_a_marker_marks_every_pixel(shape):
    marker = MarkerSpec(width=4).build(*shape).eval()
    x = torch.rand(2, *shape)
    assert marker(x, x, x[:, 0]).shape == (2, *shape[1:])


def test_a_marker_learns_to_find_damage(digits):
    """Of another kind than it has seen: it learns strokes and is shown a square."""
    x = digits[0].float() / 255
    with torch.random.fork_rng():
        torch.manual_seed(0)
        marker, generator = MarkerSpec(width=8).build(1, 16, 16), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(marker.parameters(), 3e-3)
    for _ in range(200):
        images, mask = corrupt(x[:64], [StrokesSpec()], generator)
        loss = focal_loss(marker(images, images, images[:, 0]), mask[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen = x[64:]
    damaged, mask = corrupt(unseen, [MasksSpec(rectangles=1, sides=(0.2, 0.3))], torch.Generator().manual_seed(1))
    with torch.no_grad():
        marks = F.softplus(marker.eval()(damaged, damaged, damaged[:, 0]))
    inside, outside = marks[mask[:, 0] > 0], marks[mask[:, 0] == 0]
    assert detection(outside.numpy(), inside.numpy()).auroc > 0.9


def test_focal_loss_is_cross_entropy_for_the_wholly_wrong_and_nothing_for_the_sure():
    logits, mask = torch.tensor([[[30.0, -30.0]]]), torch.tensor([[[1.0, 0.0]]])
    assert float(focal_loss(logits, mask)) < 1e-6
    assert float(focal_loss(-logits, mask)) == pytest.approx(30.0, rel=1e-3)


def test_the_views_are_eight_different_ones_that_undo_each_other():
    x = torch.rand(3, 1, 8, 8)
    views = [view(x, k) for k in range(COUNT)]
    assert len({one.numpy().tobytes() for one in views}) == COUNT
    for one in views:
        assert any(torch.equal(view(one, k), x) for k in range(COUNT))


def test_views_find_pictures_that_lie_on_their_side(digits):
    x = digits[0].float() / 255
    with torch.random.fork_rng():
        torch.manual_seed(0)
        views = ViewsSpec(width=8, side=16).build(1, 16, 16)
    optimizer = torch.optim.AdamW(views.parameters(), 3e-3)
    for step in range(150):
        loss = views.loss(x[:64], generator_of(0, "views", step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen = x[64:]
    with torch.no_grad():
        upright, lying = views.eval().strangeness(unseen), views.strangeness(view(unseen, 1))
    assert (upright >= 0).all()
    assert detection(upright.numpy(), lying.numpy()).auroc > 0.9


def test_features_of_views_come_view_by_view_and_are_rare_for_other_digits(detector, digits):
    views = detector.members[0].model.views
    x = torch.rand(3, 1, 16, 16)
    with torch.inference_mode():
        found = views.features(x).unflatten(1, (COUNT, -1))
        torch.testing.assert_close(views.network[-1](found[:, 5]), views(view(x, 5)))
        turned = views.features(view(x, 1)).unflatten(1, (COUNT, -1))
    torch.testing.assert_close(turned[:, 0], found[:, 1])
    score, model = UnfamiliarFeatures(), detector.members[0].model
    with torch.inference_mode():
        known, normal, odd = (
            observe(model, model.view(images)) for images in (digits[0][1::2], digits[0][::2], digits[1][:100])
        )
        found = score.fit(score.statistic(known).numpy())
        references = {name: torch.from_numpy(value) for name, value in found.items()}
        assert detection(score(normal, references).numpy(), score(odd, references).numpy()).auroc > 0.8


def test_a_shrunken_model_judges_large_pictures(digits_folder, tmp_path):
    spec = DetectorSpec.parse(
        {
            "image": {"height": 32, "width": 48, "channels": 1},
            "model": {"side": 16, "network": {"kind": "conv", "width": 8}},
            "training": {"steps": 40, "batch_size": 32},
        }
    )
    detector = train(spec, digits_folder, tmp_path / "b", device="cpu").detector
    assert detector.members[0].model.shape == (1, 16, 24)
    judged = detector.judge(torch.randint(0, 255, (2, 1, 32, 48), dtype=torch.uint8), heat=True)
    assert judged.heat.shape == (2, 32, 48)
