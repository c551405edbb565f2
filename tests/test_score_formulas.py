"""Scores whose values can be known otherwise: closed forms, bounds, and what a perfect reconstruction is worth."""

import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from sklearn.covariance import LedoitWolf
from torch.nn import functional as F

from anomaly_vae.data import open_pictures
from anomaly_vae.debiased_scores import compressed_bits, most_likely
from anomaly_vae.likelihoods import Bernoulli, ContinuousBernoulli, Gaussian, Laplace
from anomaly_vae.model import ModelSpec, normalise
from anomaly_vae.observations import Observation
from anomaly_vae.scores import ScoreSpec
from anomaly_vae.structure_scores import similarity
from anomaly_vae.whitening import distance, fit_whitening

ADAPTER = TypeAdapter(ScoreSpec)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def normals(digits_folder, tiny_spec):
    pictures = open_pictures(digits_folder, tiny_spec.data, tiny_spec.image)
    return pictures.images([i for i, item in enumerate(pictures.items) if item.normal][::12])


@pytest.fixture
def model(tiny_detector):
    return tiny_detector.members[0].model


def scored(model, images, kind, fit_on=None, **settings):
    score = ADAPTER.validate_python({"kind": kind, **settings})
    with torch.inference_mode():
        fitted = {}
        if fit_on is not None:
            found = score.fit(score.statistic(Observation(model, normalise(fit_on, CPU))).double().numpy())
            fitted = {name: torch.from_numpy(value) for name, value in found.items()}
        return score(Observation(model, normalise(images, CPU)), fitted)


def log_weights(model, x, noise):
    """log p(x, z) / q(z given x) for z of standard normal noise, written out; (B,)."""
    posterior = model.encode(x)
    z = posterior.at(noise)
    log_x = model.likelihood.log_prob(model.decode(z), x).double().flatten(1).sum(1)
    log_prior = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    log_q = torch.distributions.Normal(posterior.mu, (0.5 * posterior.logvar).exp()).log_prob(z).sum(1)
    return log_x + log_prior - log_q


def test_one_importance_weighted_draw_is_the_one_draw_estimate_of_the_elbo(model, normals):
    noise = torch.randn(1, model.law.size, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        expected = -log_weights(model, normalise(normals, CPU), noise)
    torch.testing.assert_close(
        scored(model, normals, "importance_weighted", samples=1, seed=7), expected, rtol=1e-5, atol=1e-3
    )


def test_more_draws_tighten_the_bound(model, normals):
    """log 1/K sum p(x, z_k) / q(z_k given x) is at least the ELBO and grows with K (Burda et al. 2016)."""
    elbo, few, many = (
        -scored(model, normals, kind, samples=samples).mean()
        for kind, samples in [("negative_elbo", 200), ("importance_weighted", 4), ("importance_weighted", 200)]
    )
    assert elbo < few < many


def test_elbo_is_what_its_definition_says(model, normals):
    generator, x = torch.Generator().manual_seed(0), normalise(normals[:24], CPU)
    with torch.inference_mode():
        draws = [log_weights(model, x, torch.randn(len(x), model.law.size, generator=generator)) for _ in range(200)]
    weights = torch.stack(draws)
    ours = -scored(model, normals[:24], "negative_elbo", samples=200)
    bound = weights.logsumexp(0) - math.log(len(weights))
    assert (bound >= weights.mean(0)).all()
    assert (ours - weights.mean(0)).abs().mean() < 0.1 * weights.std(0).mean()


@pytest.mark.parametrize("latent", ["von_mises_fisher", "mixture"])
def test_weights_average_to_the_elbo_under_every_law(latent, normals):
    spec = ModelSpec.parse({"latent": {"kind": latent, "size": 5}, "network": {"kind": "mlp", "hidden": [16]}})
    seen = Observation(spec.build((1, 16, 16), 0).eval(), normalise(normals[:20], CPU))
    with torch.inference_mode():
        weights, elbo = seen.log_weights(400, 3), -seen.negative_elbo(400, 3)
    assert (weights.mean(0) - elbo).abs().max() < 4 * float(weights.std(0).max()) / math.sqrt(400) + 1e-6


def test_regret_is_no_less_than_nothing_and_grows_with_steps(model, normals):
    short, long = (scored(model, normals[:12], "likelihood_regret", steps=n, samples=2) for n in (5, 25))
    assert (short >= 0).all()
    assert (long >= short).all()
    assert long.mean() > short.mean() + 1


def test_the_gradient_is_that_of_finite_differences(model, normals):
    x = normalise(normals[:1], CPU).double()
    double = Observation(model, x.float()).exact.model
    step, found = 1e-5, []
    with torch.no_grad():
        for place in range(256):
            shift = torch.zeros(256, dtype=torch.float64)
            shift[place] = step
            up, down = (Observation(double, x + sign * shift.reshape(x.shape)).negative_elbo(2, 0) for sign in (1, -1))
            found.append(((up - down) / (2 * step)).item())
    assert scored(model, normals[:1], "gradient").item() == pytest.approx(float(np.linalg.norm(found)), rel=1e-3)


def test_a_perfect_reconstruction_has_no_error(model, normals):
    class Perfect(Observation):
        @property
        def reconstruction(self):
            return self.x

        @property
        def exact(self):
            return self

    seen = Perfect(model, normalise(normals, CPU))
    with torch.inference_mode():
        for kind in ("squared_error", "top_k", "ssim", "msgms", "simple_activation_path"):
            assert ADAPTER.validate_python({"kind": kind})(seen, {}).abs().max() < 1e-12, kind


def test_ssim_of_constants_is_their_luminance():
    dark, light = (torch.full((1, 1, 12, 12), grey, dtype=torch.float64) for grey in (0.2, 0.6))
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4)
    torch.testing.assert_close(similarity(dark, light, 1.5), torch.full_like(dark, expected))


def test_top_k_lies_between_mean_and_maximum(model, normals):
    mean, whole = scored(model, normals, "squared_error"), scored(model, normals, "top_k", share=1)
    torch.testing.assert_close(whole, mean)
    with torch.inference_mode():
        largest = Observation(model, normalise(normals, CPU)).squared_error.double().flatten(1).amax(1)
    torch.testing.assert_close(scored(model, normals, "top_k", share=1e-6), largest)
    assert (scored(model, normals, "top_k") < largest).all()


def test_mahalanobis_of_the_fitted_normals_averages_their_dimension(model, normals):
    for kind, size in {"mahalanobis": 12, "encoder_difference": 12, "latent_path": 3}.items():
        assert scored(model, normals, kind, normals).mean().item() == pytest.approx(size, rel=0.3), kind


@pytest.mark.parametrize(("rows", "size"), [(400, 6), (8, 30), (300, 3)])
def test_whitening_is_that_of_ledoit_and_wolf(rows, size):
    generator = np.random.default_rng(0)
    values = generator.normal(size=(rows, size)) @ generator.normal(size=(size, size)) + 3
    fitted = {name: torch.from_numpy(value) for name, value in fit_whitening(values).items()}
    ours = distance(torch.from_numpy(values), fitted).numpy()
    standard = (values - values.mean(0)) / values.std(0)
    np.testing.assert_allclose(ours, LedoitWolf().fit(standard).mahalanobis(standard), rtol=1e-3)


def test_the_nearest_neighbour_of_a_fitted_normal_is_itself(model, normals):
    assert scored(model, normals, "nearest_neighbours", normals, neighbours=1).max() < 1e-4
    alone = scored(model, normals[:5], "nearest_neighbours", normals[5:])
    assert (alone > 0.1).all()


def test_one_component_is_the_mahalanobis_distance(model, normals):
    """A single Gaussian in whitened coordinates is half the distance, up to its own spread and a constant."""
    single = scored(model, normals, "gaussian_mixture", normals, components=1)
    whole = scored(model, normals, "mahalanobis", normals)
    assert np.corrcoef(single, whole)[0, 1] > 0.98


def test_typicality_counts_both_sides(model, normals):
    nll = scored(model, normals, "negative_elbo")
    torch.testing.assert_close(
        scored(model, normals, "typicality", normals), (nll - nll.mean()).abs(), rtol=1e-4, atol=1e-3
    )


def test_simple_pictures_compress():
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32), np.uint8)
    ramp = np.tile(np.arange(32, dtype=np.uint8), (1, 32, 1))
    assert compressed_bits(np.zeros_like(noise)) < compressed_bits(ramp) < 0.5 * compressed_bits(noise)
    assert compressed_bits(noise) >= 8 * noise.size


def test_complexity_forgives_noise_some_of_its_nats(model, normals):
    noise = torch.randint(0, 256, normals.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    gap, plain = (
        scored(model, noise, kind).mean() - scored(model, normals, kind).mean()
        for kind in ("input_complexity", "negative_elbo")
    )
    assert gap < plain - 100


def test_the_background_is_a_density(model, normals):
    """Of a picture of noise with independent neighbours it is the Gaussian that was fitted to its values."""
    noise = torch.randn(60, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.5
    images = (noise.clamp(0, 1) * 255).round().to(torch.uint8)
    background = scored(model, images, "likelihood_ratio", images) - scored(model, images, "negative_elbo")
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.1**2)
    assert background.mean().item() / 256 == pytest.approx(-entropy, abs=0.1)


def test_perfect_reconstructions_are_worth_the_most_their_law_can_give():
    grid = torch.linspace(-150, 150, 60001, dtype=torch.float64)[None, None, :, None]
    x = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    for law in (Bernoulli(), ContinuousBernoulli(), Gaussian(0.1, squash=True), Laplace(0.1, squash=False)):
        searched = law.log_prob(grid.expand(1, 1, 60001, 5), x.expand(1, 1, 60001, 5)).amax(2).flatten()
        found = most_likely(law, CPU)[(x * 255).round().long()]
        torch.testing.assert_close(found, searched, rtol=0, atol=5e-2)
    assert most_likely(Gaussian("learned", squash=True), CPU).std() < 1e-6


@pytest.mark.parametrize("likelihood", ["gaussian", "continuous_bernoulli", "bernoulli"])
def test_bc_likelihood_is_never_better_than_perfect_and_forgives_contrast(likelihood, normals):
    spec = ModelSpec.parse({"likelihood": {"kind": likelihood}, "network": {"kind": "mlp", "hidden": [16]}})
    model = spec.build((1, 16, 16), 0).eval()
    usual = scored(model, normals, "bc_likelihood", normals)
    faint = scored(model, normals // 2, "bc_likelihood", normals)
    assert (usual >= 0).all()
    plain = scored(model, normals // 2, "negative_elbo") - scored(model, normals, "negative_elbo")
    assert (faint - usual).abs().mean() < 0.2 * plain.abs().mean() + 0.02 * usual.mean()


def test_relative_error_forgives_contrast():
    spec = ModelSpec.parse({"network": {"kind": "linear"}, "latent": {"kind": "point", "size": 2},
                            "likelihood": {"kind": "gaussian", "squash": False}})  # fmt: skip
    model = spec.build((1, 16, 16), 0).eval()
    for stage in (*model.encoder.stages, *model.decoder.stages):
        stage[0 if stage in model.decoder.stages else 1].bias.data.zero_()
    x = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    errors = scored(model, x, "relative_error"), scored(model, x / 2, "relative_error")
    torch.testing.assert_close(*errors, rtol=1e-2, atol=0)


def test_inpainting_hides_every_pixel_once_and_does_not_look(model, normals):
    """A model that gives back what it is shown errs exactly by what was hidden."""

    class Mirror(Observation):
        @property
        def reconstruction(self):
            return self.x

        def of(self, x):
            return Mirror(self.model, x)

    x = normalise(normals, CPU)
    found = ADAPTER.validate_python({"kind": "inpainting"}).map(Mirror(model, x), {})
    expected = ((x - x.mean((2, 3), keepdim=True)) ** 2).mean(1)
    torch.testing.assert_close(found.float(), expected)


def test_projection_ends_where_the_model_can_draw(model, normals):
    score = ADAPTER.validate_python({"kind": "energy_projection", "steps": 30})
    damaged = normals[:8].clone()
    damaged[:, :, 11:15, 1:5] = 255
    with torch.inference_mode():
        seen = Observation(model, normalise(damaged, CPU))
        moved = (seen.x - score._moved(seen)).float()
        after = Observation(model, moved)
        assert (F.relu(-moved) == 0).all()
        assert (after.squared_error.mean((1, 2)) < 0.8 * seen.squared_error.mean((1, 2))).all()
