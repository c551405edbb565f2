"""What training minimises: losses, courses, critics and remedies each move what they are there for."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from anomaly_vae.errors import ConfigError
from anomaly_vae.fabric import make_fabric
from anomaly_vae.fitting import Fitting, rarity_weights
from anomaly_vae.latent_laws import MixtureLaw
from anomaly_vae.objectives import Objective
from anomaly_vae.recipe import DetectorSpec
from anomaly_vae.seeds import generator_of

MLP = {"network": {"kind": "mlp", "hidden": [32]}, "likelihood": {"kind": "gaussian"}}
CONV = {"network": {"kind": "conv", "width": 8, "norm": "group"}, "likelihood": {"kind": "gaussian"}}


class Arrays:
    """Float pictures as a source of batches."""

    def __init__(self, images):
        self.images = images

    def batches(self, batch_size, order=None, drop_last=False):
        order = np.arange(len(self.images)) if order is None else order
        end = len(order) - len(order) % batch_size if drop_last else len(order)
        for start in range(0, end, batch_size):
            part = order[start : min(start + batch_size, end)]
            yield part, self.images[torch.from_numpy(part)]


@pytest.fixture(scope="module")
def digits():
    """The first 400 digits, floats (400, 1, 8, 8) in [0, 1], and their classes."""
    data = load_digits()
    return torch.from_numpy(data.images[:400] / 16).float()[:, None], data.target[:400].astype(np.int64)


def fit(images, model, objective=None, labels=None, **training):
    """A model trained on the first 300 pictures, held out the rest; and what `Fitting` says of it."""
    training = {"steps": 300, "batch_size": 50, "patience": None, "select": "last", **training}
    spec = DetectorSpec.parse({"model": model, "objective": objective or {}, "training": training})
    objective = Objective(spec.objective, spec.model.build(tuple(images.shape[1:]), 0))
    fabric = make_fabric("cpu", "32-true", None)
    train, held = np.arange(300), np.arange(300, len(images))
    fitting = Fitting(fabric, objective, spec.training, Arrays(images), train, held, 0, labels=labels)
    return objective.model, fitting.run(None, lambda progress: None)


def error(model, images, label=None):
    with torch.inference_mode():
        posterior, context = model.read(images, label)
        return (model.likelihood.mean(model.decode(posterior.mu, context)) - images).square().mean().item()


def test_a_linear_autoencoder_spans_the_subspace_of_pca(digits):
    images, _ = digits
    model = {
        "network": {"kind": "linear"},
        "latent": {"kind": "point", "size": 3},
        "likelihood": {"kind": "gaussian", "squash": False, "sigma": 1.0},
    }
    fitted, _ = fit(images, model, steps=3000, learning_rate=0.02, weight_decay=0.0)
    decoder = next(weight for weight in fitted.decoder.parameters() if weight.dim() == 2)
    found = np.linalg.qr(decoder.detach().numpy())[0]
    pca = PCA(3).fit(images[:300].flatten(1).numpy())
    cosines = np.linalg.svd(pca.components_ @ found)[1]
    assert cosines.min() > 0.999, "cosines of the principal angles between the two subspaces"
    flat = images[300:].flatten(1).numpy()
    pca_error = np.square(pca.inverse_transform(pca.transform(flat)) - flat).mean()
    assert error(fitted, images[300:]) == pytest.approx(pca_error, rel=0.005)


@pytest.mark.parametrize("kind", ["nll", "mse", "mae", "bce"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_every_loss_is_what_its_name_says(digits, kind, reduction):
    images = digits[0][:6]
    spec = DetectorSpec.parse(
        {"model": MLP | {"latent": {"kind": "point", "size": 3}}, "objective": {"loss": {"kind": kind, "weight": 2.0}}}
    ).with_overrides([f"objective.loss.reduction={reduction}"])
    model = spec.model.build((1, 8, 8), 0)
    output = model.decode(model.encode(images).mu)
    mean = model.likelihood.mean(output)
    expected = {
        "nll": -model.likelihood.log_prob(output, images),
        "mse": (mean - images) ** 2,
        "mae": (mean - images).abs(),
        "bce": -(images * mean.log() + (1 - images) * (1 - mean).log()),
    }[kind].flatten(1)
    expected = 2 * (expected.sum(1) if reduction == "sum" else expected.mean(1)).mean()
    torch.testing.assert_close(spec.objective.loss.of(model, output, images), expected, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_no_likelihood_still_reports_nats(digits):
    """The lecture's loss and the true ELBO stand side by side."""
    model = MLP | {"latent": {"kind": "gaussian", "size": 8}}
    fitted, found = fit(digits[0], model, {"loss": {"kind": "mse", "weight": 10.0}})
    with torch.inference_mode():
        output = fitted.decode(fitted.encode(digits[0][:300]).at(torch.randn(8, generator=generator_of(0, "z", 0))))
        nats = -fitted.likelihood.log_prob(output, digits[0][:300]).flatten(1).sum(1).mean().item()
    row = found.history[-1]
    assert row["reconstruction"] == pytest.approx(nats, abs=3)
    assert row["loss"] > row["reconstruction"] + 10, "the two are different things"
    assert error(fitted, digits[0][300:]) < digits[0].var().item() / 2


def test_the_sparse_rate_reaches_its_target(digits):
    latent = {"kind": "sparse", "penalty": "rate", "rate": 0.1, "size": 40, "weight": 100.0}
    model, _ = fit(digits[0], MLP | {"latent": latent}, steps=300)
    free, _ = fit(digits[0], MLP | {"latent": latent | {"weight": 0.0}}, steps=300)
    rate, rate_free = (one.encode(digits[0]).mu.mean().item() for one in (model, free))
    assert rate == pytest.approx(0.1, abs=0.03)
    assert rate_free > 0.3


def test_l1_empties_the_code(digits):
    latent = {"kind": "sparse", "size": 40, "weight": 3.0}
    sizes = []
    for weight in (0.0, 3.0):
        model, _ = fit(digits[0], MLP | {"latent": latent | {"weight": weight}}, steps=300)
        sizes.append(model.encode(digits[0]).mu.abs())
    small = [(size < 0.05 * sizes[0].mean()).float().mean().item() for size in sizes]
    assert small[1] > 0.5 > small[0]


@pytest.mark.parametrize("exact", [0, 100])
def test_contraction_at_least_halves_the_jacobian(digits, exact):
    latent = {"kind": "contractive", "size": 6, "exact": exact, "weight": 1.0}
    norms = []
    for weight in (0.0, 1.0):
        model, _ = fit(digits[0], MLP | {"latent": latent | {"weight": weight}})
        jacobian = torch.func.jacrev(lambda x, model=model: model.encode(x).mu.sum(0))(digits[0][300:])
        norms.append(jacobian.square().sum().item() / 100)
    assert norms[1] < norms[0] / 2


def test_the_mixture_uses_several_components(digits):
    model, _ = fit(digits[0], MLP | {"latent": {"kind": "mixture", "size": 4, "components": 5}}, steps=600)
    assert isinstance(model.law, MixtureLaw)
    with torch.inference_mode():
        shares = model.law.joint(model.encode(digits[0]).mu).softmax(1).mean(0)
    assert (shares > 0.1).sum() >= 2


def test_free_bits_keep_latents_active(digits):
    latent = {"kind": "gaussian", "size": 8, "beta": 30.0, "warmup": 0.0}
    active = [fit(digits[0], MLP | {"latent": latent | {"free_bits": bits}})[1].active_units for bits in (0.0, 0.3)]
    assert active[0] < 8
    assert active[1] == 8


def test_the_adversarial_code_takes_the_shape_of_its_prior(digits):
    def shape(weight):
        latent = {"kind": "adversarial", "size": 4, "weight": weight}
        model, _ = fit(digits[0], MLP | {"latent": latent}, steps=400, betas=[0.5, 0.999])
        code = model.encode(digits[0][:300]).mu
        return (code.mean(0).abs().max() + (code.std(0) - 1).abs().max()).item()

    assert shape(100.0) < 0.3 < shape(0.0)


def test_greedy_pretraining_learns_one_pair_at_a_time(digits):
    model = {"network": {"kind": "mlp", "hidden": [32, 16]}, "latent": {"kind": "point", "size": 8}}
    spec = DetectorSpec.parse(
        {"model": model, "objective": {"course": {"kind": "greedy", "share": 0.6}}, "training": {"select": "last"}}
    )
    objective = Objective(spec.objective, spec.model.build((1, 8, 8), 0))
    objective.train()
    noise = torch.zeros(20, 8)
    for k, progress in enumerate((0.1, 0.3, 0.5)):
        objective.zero_grad()
        objective(digits[0][:20], noise, progress, 0).total.backward()
        moved = {name for name, weight in objective.model.named_parameters() if weight.grad is not None}
        learners = {id(weight) for module in objective.learners(progress) for weight in module.parameters()}
        expected = {name for name, weight in objective.model.named_parameters() if id(weight) in learners}
        assert moved == expected
        assert {name.split(".")[2] for name in moved if name.startswith("encoder")} == {str(k)}
        assert {name.split(".")[2] for name in moved if name.startswith("decoder")} == {str(2 - k)}
    assert objective.learners(0.7) is None
    fitted, _ = fit(digits[0], model, {"course": {"kind": "greedy", "share": 0.6}}, steps=600)
    assert error(fitted, digits[0][300:]) < digits[0].var().item() / 2


def test_a_generator_learns_first_and_stands_still_after(digits):
    model = CONV | {
        "latent": {"kind": "point", "size": 8, "prior": "normal"},
        "critic": {"network": {"kind": "conv", "width": 8, "norm": "group"}, "features": 0},
    }
    images = torch.nn.functional.interpolate(digits[0], size=(16, 16))
    terms = {"loss": {"kind": "mse"}, "adversary": {}, "course": {"kind": "generator_first", "share": 0.5}}
    spec = DetectorSpec.parse({"model": model, "objective": terms, "training": {"select": "last"}})
    objective = Objective(spec.objective, spec.model.build((1, 16, 16), 0))
    first, then = ({id(module) for module in objective.learners(progress)} for progress in (0.1, 0.6))
    assert first == {id(objective.model.decoder), id(objective.model.critic)}
    assert id(objective.model.encoder) in then
    assert not first & then
    fitted, found = fit(images, model, terms, steps=400)
    assert np.isnan(found.history[0]["reconstruction"])
    assert np.isfinite(found.history[-1]["reconstruction"])
    assert error(fitted, images[300:]) < images.var().item()


def test_critics_leave_scores_determined(digits):
    model = CONV | {
        "latent": {"kind": "gaussian", "size": 8},
        "critic": {"network": {"kind": "conv", "width": 8, "norm": "group"}, "features": 0},
    }
    images = torch.nn.functional.interpolate(digits[0], size=(16, 16))
    runs = [fit(images, model, {"loss": {"kind": "mse"}, "adversary": {}}, steps=20)[0] for _ in range(2)]
    first, second = (one.features(images[:4]) for one in runs)
    assert torch.equal(first, second)
    assert error(runs[0], images[:4]) == error(runs[1], images[:4])


def test_extra_encoder_steps_move_the_encoder_alone(digits):
    model = MLP | {"latent": {"kind": "gaussian", "size": 8}}
    plain, _ = fit(digits[0], model, steps=6)
    extra, _ = fit(digits[0], model, {"encoder_steps": 3, "encoder_share": 1.0}, steps=6)
    start = DetectorSpec.parse({"model": model}).model.build((1, 8, 8), 0)

    def moved(one, part):
        pairs = zip(getattr(one, part).parameters(), getattr(start, part).parameters(), strict=True)
        return sum((now - then).abs().sum().item() for now, then in pairs)

    assert moved(extra, "encoder") > 2 * moved(plain, "encoder")
    assert moved(extra, "decoder") < 1.5 * moved(plain, "decoder")


def test_a_conditional_model_draws_the_class_it_is_told(digits):
    images, labels = digits
    model = MLP | {
        "latent": {"kind": "gaussian", "size": 3, "beta": 3.0},
        "condition": {"size": 4, "classes": [str(i) for i in range(10)]},
    }
    fitted, _ = fit(images, model, labels=labels, steps=1000)
    means = torch.stack([images[labels == i].mean(0) for i in range(10)])
    label = torch.arange(10)
    with torch.inference_mode():
        drawn = fitted.likelihood.mean(fitted.decode(torch.zeros(10, 3), fitted.read(images[:10], label)[1]))
    nearest = torch.cdist(drawn.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == label).sum() >= 9
    with pytest.raises(ValueError, match="conditional"):
        fitted.encode(images[:2])


def test_rare_pictures_come_more_often():
    codes = torch.randn(1000, 3, generator=generator_of(0, "codes", 0))
    codes[:20] += 6
    weights = rarity_weights(codes, 10, 0.01)
    assert weights.sum().item() == pytest.approx(1)
    assert weights[:20].mean() > 10 * weights[20:].mean()
    flat = rarity_weights(codes, 10, 1e6)
    assert flat.max() < 1.01 * flat.min()


def test_resampling_helps_the_rare(digits):
    """One picture in thirty of another kind: with resampling they are rebuilt better."""
    images, labels = digits
    common, rare = images[labels == 0][:30], images[labels == 4][:40]
    mixed = torch.cat([common.repeat(10, 1, 1, 1)[:290], rare[:10], rare[10:]])
    model = MLP | {"latent": {"kind": "gaussian", "size": 4}}
    errors = []
    for rarity in (None, {"bins": 10, "smoothing": 0.01}):
        fitted, _ = fit(mixed, model, steps=450, rarity=rarity)
        errors.append(error(fitted, rare[:10]))
    assert errors[1] < 0.9 * errors[0]


def test_trimming_rebuilds_what_does_not_belong_worse(digits):
    """One training picture in ten of another kind: trimmed, they are left out, and it shows."""
    images, labels = digits
    common, odd = images[labels == 0], images[labels == 4][:30]
    mixed = torch.cat([common[:40].repeat(10, 1, 1, 1)[:270], odd, common[40:]])
    model = MLP | {"latent": {"kind": "gaussian", "size": 4}}
    errors = []
    for trim in (None, {"share": 0.1, "after": 0.1}):
        fitted, _ = fit(mixed, model, steps=600, trim=trim)
        errors.append((error(fitted, odd), error(fitted, common[:40])))
    assert errors[1][0] > 1.1 * errors[0][0]
    assert errors[1][1] < 1.05 * errors[0][1]


def test_scores_that_nobody_chose_follow_the_model():
    kinds = DetectorSpec().with_overrides(["model.latent.kind=point"]).parts
    assert "negative_elbo" not in kinds
    assert "kl" not in kinds
    assert "relative_error" in kinds
    assert "negative_elbo" in DetectorSpec().parts


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["model.latent.kind=point", "scores=[{kind: negative_elbo}]", "verdict=negative_elbo"], "no bound.*point"),
        (["model.latent.kind=point", "scores=[{kind: kl}]", "verdict=kl"], "no KL"),
        (["model.network.skips=true", "scores=[{kind: negative_elbo}]", "verdict=negative_elbo"], "no bound.*skips"),
        (["scores=[{kind: generator_residual}]", "verdict=generator_residual"], "model.critic"),
        (
            ["model.latent.kind=contractive", "scores=[{kind: reconstruction}]", "verdict=reconstruction"],
            "network.norm",
        ),
        (["objective.adversary={}"], "set model.critic"),
        (["model.critic={}"], "objective.adversary"),
        (["objective.course.kind=greedy"], "training.select to last"),
        (["objective.course.kind=generator_first", "model.critic={}"], "objective.adversary|adversary"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(overrides, remedy):
    with pytest.raises(ConfigError, match=remedy):
        DetectorSpec().with_overrides(overrides)
