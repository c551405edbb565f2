"""Laws over all scores, on a trained detector and real digits."""

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from anomaly_vae.data import open_pictures
from anomaly_vae.member import normalise
from anomaly_vae.model import ModelSpec
from anomaly_vae.observations import Observation, gaussian_blur
from anomaly_vae.scores import ScoreSpec

KINDS = [
    "negative_elbo",
    "reconstruction",
    "reconstruction_probability",
    "kl",
    "squared_error",
    "absolute_error",
    "relative_error",
    "local_maximum",
    "generator_residual",
    "mahalanobis",
]
ADAPTER = TypeAdapter(ScoreSpec)


@pytest.fixture(scope="module")
def normals(digits_folder, tiny_spec):
    pictures = open_pictures(digits_folder, tiny_spec.data, tiny_spec.image)
    return pictures.images([i for i, item in enumerate(pictures.items) if item.normal][::6])


@pytest.fixture
def model(tiny_detector):
    """The trained model with a critic beside it, which one score wants."""
    trained = tiny_detector.members[0].model
    spec = ModelSpec.parse({**trained.spec.model_dump(), "critic": {"network": {"kind": "conv", "norm": "group"}}})
    model = spec.build(trained.shape, 0)
    model.load_state_dict(trained.state_dict(), strict=False)
    return model.eval()


def columns(model, score, images):
    with torch.inference_mode():
        seen = Observation(model, normalise(images, torch.device("cpu")))
        statistic = score.statistic(seen)
        found = score.fit(statistic.double().numpy()) if statistic is not None else {}
        references = {name: torch.from_numpy(value) for name, value in found.items()}
        return lambda other: score(Observation(model, normalise(other, torch.device("cpu"))), references)


def test_the_list_is_whole():
    kinds = {member["properties"]["kind"]["const"] for member in ADAPTER.json_schema()["$defs"].values()}
    assert kinds == set(KINDS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kl"])
def test_every_score_is_higher_on_inverted_pictures_than_on_normals(kind, model, normals):
    score = columns(model, ADAPTER.validate_python({"kind": kind}), normals)
    with torch.inference_mode():
        assert score(255 - normals).mean() > score(normals).mean()
        assert score(normals).shape == (len(normals),)


@pytest.mark.parametrize(
    "kind", ["squared_error", "absolute_error", "local_maximum", "reconstruction", "negative_elbo"]
)
def test_errors_grow_with_a_defect(kind, model, normals):
    score = columns(model, ADAPTER.validate_python({"kind": kind}), normals)
    damaged = normals.clone()
    damaged[:, :, 11:14, 1:4] = 255
    with torch.inference_mode():
        assert (score(damaged) > score(normals)).float().mean() > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_the_same_alone_and_in_company(kind, model, normals):
    score = columns(model, ADAPTER.validate_python({"kind": kind}), normals)
    with torch.inference_mode():
        together = score(normals)
        alone = torch.cat([score(image[None]) for image in normals])
    spread = together.quantile(0.75) - together.quantile(0.25)
    assert (together - alone).abs().max() <= 1e-5 * spread


def test_negative_elbo_is_its_two_parts_in_nats(model, normals):
    parts = [columns(model, ADAPTER.validate_python({"kind": kind}), normals)(normals) for kind in KINDS[:2]]
    kl = columns(model, ADAPTER.validate_python({"kind": "kl"}), normals)(normals)
    torch.testing.assert_close(parts[0], parts[1] + kl)


def test_elbo_is_a_bound_on_the_importance_weighted_likelihood(model, normals):
    """log 1/K sum p(x, z_k) / q(z_k given x) is at least the ELBO (Burda et al. 2016)."""
    generator = torch.Generator().manual_seed(0)
    x = normalise(normals[:24], torch.device("cpu"))
    with torch.inference_mode():
        posterior = model.encode(x)
        weights = []
        for _ in range(200):
            z = posterior.at(torch.randn(posterior.mu.shape, generator=generator))
            log_x = model.likelihood.log_prob(model.decode(z), x).double().flatten(1).sum(1)
            log_prior = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
            log_q = torch.distributions.Normal(posterior.mu, (0.5 * posterior.logvar).exp()).log_prob(z).sum(1)
            weights.append(log_x + log_prior - log_q)
        log_w = torch.stack(weights)
        bound = torch.logsumexp(log_w, 0) - np.log(len(weights))
        elbo = log_w.mean(0)
        ours = -columns(model, ADAPTER.validate_python({"kind": "negative_elbo", "samples": 200}), normals)(
            normals[:24]
        )
    assert (bound >= elbo).all()
    assert (ours - elbo).abs().mean() < 0.02 * (bound - elbo).abs().mean() + 0.05 * log_w.std(0).mean()


def test_mahalanobis_of_the_fitted_normals_averages_their_dimension(model, normals):
    score = columns(model, ADAPTER.validate_python({"kind": "mahalanobis"}), normals)
    with torch.inference_mode():
        assert score(normals).mean().item() == pytest.approx(12, rel=0.25)  # 12 latents, up to shrinkage


def test_relative_error_forgives_contrast_and_blank_pictures_are_finite(model, normals):
    score = columns(model, ADAPTER.validate_python({"kind": "relative_error"}), normals)
    with torch.inference_mode():
        assert torch.isfinite(score(torch.zeros_like(normals[:1]))).all()


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 40.0])
def test_blur_keeps_a_constant_and_spreads_a_point(sigma):
    constant = torch.full((2, 20, 30), 0.7)
    torch.testing.assert_close(gaussian_blur(constant, sigma), constant)
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    blurred = gaussian_blur(point, sigma)[0]
    assert blurred[20, 20] == blurred.max() < 1
    torch.testing.assert_close(blurred, blurred.T)
