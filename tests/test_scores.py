"""Laws over all scores, on a trained detector and real digits."""

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from anomaly_vae.data import open_pictures
from anomaly_vae.model import ModelSpec, normalise
from anomaly_vae.observations import Observation, gaussian_blur, observe
from anomaly_vae.scores import ScoreSpec, measure, measure_map

KINDS = [
    "negative_elbo",
    "reconstruction",
    "reconstruction_probability",
    "kl",
    "importance_weighted",
    "likelihood_regret",
    "input_complexity",
    "likelihood_ratio",
    "typicality",
    "bc_likelihood",
    "squared_error",
    "absolute_error",
    "relative_error",
    "local_maximum",
    "top_k",
    "local_surprise",
    "ssim",
    "msgms",
    "generator_residual",
    "simple_activation_path",
    "normalised_activation_path",
    "encoder_difference",
    "mahalanobis",
    "gaussian_mixture",
    "nearest_neighbours",
    "latent_path",
    "gradient",
    "energy_projection",
    "inpainting",
    "synthetic_defect",
    "unfamiliar_features",
    "unfamiliar_shape",
    "unfamiliar_texture",
    "unfamiliar_view",
]
UNTRAINED = {"synthetic_defect", "unfamiliar_features", "unfamiliar_view"}
"""They ask networks of their own, which have learned nothing in the model at hand."""
CLAIMED = [kind for kind in KINDS if kind not in UNTRAINED]
FEEL_NO_DEFECT = {"kl", "mahalanobis", "gaussian_mixture", "nearest_neighbours"}
"""They know the code alone, which a small defect hardly moves."""
MAPPED = [
    "negative_elbo",
    "reconstruction",
    "reconstruction_probability",
    "importance_weighted",
    "squared_error",
    "absolute_error",
    "relative_error",
    "local_maximum",
    "top_k",
    "local_surprise",
    "ssim",
    "msgms",
    "generator_residual",
    "gradient",
    "energy_projection",
    "inpainting",
    "synthetic_defect",
    "unfamiliar_shape",
    "unfamiliar_texture",
]
NEED_BOUND = {
    "negative_elbo",
    "importance_weighted",
    "likelihood_regret",
    "input_complexity",
    "likelihood_ratio",
    "typicality",
    "bc_likelihood",
    "gradient",
}
ADAPTER = TypeAdapter(ScoreSpec)
CPU = torch.device("cpu")


BRIEF = {"likelihood_regret": {"steps": 20, "samples": 2}, "energy_projection": {"steps": 15}}


def made(kind, **settings):
    return ADAPTER.validate_python({"kind": kind, **BRIEF.get(kind, {}), **settings})


@pytest.fixture(scope="module")
def normals(digits_folder, tiny_spec):
    pictures = open_pictures(digits_folder, tiny_spec.data, tiny_spec.image)
    return pictures.images([i for i, item in enumerate(pictures.items) if item.normal][::6])


@pytest.fixture(scope="module")
def damaged(normals):
    """A square of the opposite grey in a corner, where digits leave room."""
    pictures = normals.clone()
    corner = pictures[:, :, 11:15, 1:5]
    corner[:] = torch.where(corner > 127, 0, 255)
    return pictures


@pytest.fixture
def model(tiny_detector):
    """The trained model with a critic and other networks beside it, which some scores want."""
    trained = tiny_detector.members[0].model
    more = {"critic": {"network": {"kind": "conv", "norm": "group"}}, "marker": {}, "views": {}}
    model = ModelSpec.parse({**trained.spec.model_dump(), **more}).build(trained.shape, 0)
    model.load_state_dict(trained.state_dict(), strict=False)
    return model.eval()


def observed(model, images):
    return Observation(model, normalise(images, CPU))


def references(model, score, images, rows=None):
    with torch.inference_mode():
        statistic = score.statistic(observed(model, images))
    if statistic is None:
        return {}
    found = score.fit(statistic.double().numpy()[:rows])
    assert all(value.dtype == np.float32 for value in found.values())
    return {name: torch.from_numpy(value) for name, value in found.items()}


def columns(model, score, images, rows=None):
    fitted = references(model, score, images, rows)

    def of(other):
        with torch.inference_mode():
            return score(observed(model, other), fitted)

    return of


def test_the_list_is_whole():
    kinds = {member["properties"]["kind"]["const"] for member in ADAPTER.json_schema()["$defs"].values()}
    assert kinds == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_score_says_what_it_costs(kind):
    assert "Cost: " in type(made(kind)).__doc__.replace("\n", " ")


def test_offline_are_those_that_search():
    assert {kind for kind in KINDS if made(kind).offline} == {"likelihood_regret", "energy_projection"}


@pytest.mark.parametrize("kind", [kind for kind in CLAIMED if kind != "kl"])
def test_every_score_is_higher_on_inverted_pictures_than_on_normals(kind, model, normals):
    score = columns(model, made(kind), normals)
    inverted, usual = score(255 - normals), score(normals)
    assert (inverted[:, None] > usual[None]).float().mean() > 0.95
    assert usual.shape == (len(normals),)


@pytest.mark.parametrize("kind", [kind for kind in CLAIMED if kind not in FEEL_NO_DEFECT])
def test_scores_grow_with_a_defect(kind, model, normals, damaged):
    score = columns(model, made(kind), normals)
    before, after = score(normals), score(damaged)
    assert (after[:, None] > before[None]).float().mean() > 0.75


@pytest.mark.parametrize("kind", ["squared_error", "absolute_error", "local_maximum", "reconstruction", "top_k"])
def test_errors_grow_with_every_defect(kind, model, normals, damaged):
    score = columns(model, made(kind), normals)
    assert (score(damaged) > score(normals)).float().mean() > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_the_same_alone_and_in_company(kind, model, normals):
    few = normals[:24]
    score = columns(model, made(kind), normals)
    together, alone = score(few), torch.cat([score(image[None]) for image in few])
    spread = together.quantile(0.75) - together.quantile(0.25)
    # What has learned nothing tells no pictures apart, so its rounding has no spread to be held against.
    tolerance = 1e-6 if kind in UNTRAINED else 1e-5 * spread
    assert (together - alone).abs().max() <= tolerance
    torch.testing.assert_close(score(few), together, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_blank_pictures_have_finite_scores(kind, model, normals):
    blank = torch.cat([torch.full_like(normals[:1], grey) for grey in (0, 100, 255)])
    score, fitted = made(kind), references(model, made(kind), normals)
    assert torch.isfinite(columns(model, score, normals)(blank)).all()
    with torch.inference_mode():
        found = score.map(observed(model, blank), fitted)
    assert found is None or torch.isfinite(found).all()
    # A reference of blank pictures alone is a poor one, but no reason to fall over.
    assert torch.isfinite(columns(model, score, blank)(normals[:4])).all()


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Only one sample")
def test_few_normals_are_enough_to_fit(kind, rows, model, normals):
    score = made(kind)
    with torch.inference_mode():
        if score.statistic(observed(model, normals[:2])) is None:
            return
    of = columns(model, score, normals, rows)
    inverted, usual = of(255 - normals[20:60]), of(normals[20:60])
    assert torch.isfinite(usual).all()
    if rows == 8:
        assert (inverted[:, None] > usual[None]).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_hot_where_the_defect_is(kind, model, normals, damaged):
    score, fitted = made(kind), references(model, made(kind), normals)
    with torch.inference_mode():
        seen = observed(model, damaged)
        found = score.map(seen, fitted)
        assert (found is not None) == (kind in MAPPED)
        if found is None:
            return
        again = measure_map(score, seen, fitted)
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    assert found.shape == (len(damaged), 16, 16)
    assert (found >= 0).all()
    if kind in UNTRAINED:
        return
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[11:15, 1:5] = True
    assert (found[:, inside].mean(1) > found[:, ~inside].mean(1)).float().mean() > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_leaves_the_model_as_it_was(kind, model, normals):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    columns(model, made(kind), normals[:8])(normals[:8])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


OTHERS = {
    "spherical": {"latent": {"kind": "von_mises_fisher", "size": 6}, "likelihood": {"kind": "continuous_bernoulli"}},
    "mixture": {"latent": {"kind": "mixture", "size": 6, "components": 2}, "likelihood": {"kind": "laplace"}},
    "learned": {"likelihood": {"kind": "gaussian", "sigma": "learned"}, "network": {"kind": "mlp", "hidden": [20]}},
    "linear": {"latent": {"kind": "point", "size": 6}, "network": {"kind": "linear"}},
    "skips": {"network": {"kind": "conv", "channels": [6, 8], "skips": True}},
    "bernoulli": {"likelihood": {"kind": "bernoulli"}},
    "classes": {"condition": {"size": 3, "classes": ["a", "b"]}},
}


@pytest.mark.parametrize("other", OTHERS)
def test_every_model_gives_a_score_or_says_what_it_lacks(other, normals):
    spec = ModelSpec.parse({"latent": {"kind": "gaussian", "size": 6}, **OTHERS[other]})
    model = spec.build((1, 16, 16), 0).eval()
    refused = set()
    for kind in KINDS:
        score = made(kind)
        reason = score.refusal(spec)
        if reason is not None:
            assert "set model." in reason
            assert "\n" not in reason
            refused.add(kind)
            continue
        with torch.inference_mode():
            x = normalise(normals[:6], CPU)
            seen = observe(model, x)
            statistic = score.statistic(seen)
            found = {} if statistic is None else score.fit(statistic.double().numpy())
            fitted = {name: torch.from_numpy(value) for name, value in found.items()}
            scores, heat = measure(score, seen, fitted), measure_map(score, seen, fitted)
        assert scores.shape == (6,)
        assert torch.isfinite(scores).all(), kind
        assert heat is None or (heat.shape == (6, 16, 16) and (heat >= 0).all()), kind
    absent = {"generator_residual", "synthetic_defect", "unfamiliar_features", "unfamiliar_view"}
    lacking = {"linear": NEED_BOUND | {"kl"}, "skips": NEED_BOUND, "bernoulli": {"likelihood_ratio"}}
    assert refused == absent | lacking.get(other, set())


def test_negative_elbo_is_its_two_parts_in_nats(model, normals):
    whole, missed, kl = (
        columns(model, made(kind), normals)(normals) for kind in ("negative_elbo", "reconstruction", "kl")
    )
    torch.testing.assert_close(whole, missed + kl)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 40.0])
def test_blur_keeps_a_constant_and_spreads_a_point(sigma):
    constant = torch.full((2, 20, 30), 0.7)
    torch.testing.assert_close(gaussian_blur(constant, sigma), constant)
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    blurred = gaussian_blur(point, sigma)[0]
    assert blurred[20, 20] == blurred.max() < 1
    torch.testing.assert_close(blurred, blurred.T)
