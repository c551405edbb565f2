import pytest
import torch

from anomaly_vae.latents import GaussianLatentSpec, Posterior


def posteriors(count=5, size=3):
    generator = torch.Generator().manual_seed(0)
    return Posterior(
        torch.randn(count, size, generator=generator).double(), torch.randn(count, size, generator=generator).double()
    )


def test_kl_matches_monte_carlo():
    posterior = posteriors()
    noise = torch.randn(200_000, 1, 3, generator=torch.Generator().manual_seed(1)).double()
    z = posterior.at(noise)
    sigma = (0.5 * posterior.logvar).exp()
    log_q = torch.distributions.Normal(posterior.mu, sigma).log_prob(z)
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close((log_q - log_p).mean(0), posterior.kl(), atol=0.03, rtol=0.02)


def test_kl_of_the_prior_is_nothing():
    zeros = torch.zeros(2, 4)
    assert torch.equal(Posterior(zeros, zeros).kl(), zeros)


def test_beta_warms_up():
    law = GaussianLatentSpec(beta=4.0, warmup=0.5)
    assert [law.beta_at(p) for p in (0, 0.25, 0.5, 1)] == [0, 2, 4, 4]
    assert GaussianLatentSpec(beta=4.0, warmup=0.0).beta_at(0) == 4


def test_free_bits_take_the_pull_off_small_dimensions_only():
    mu = torch.tensor([[0.01, 3.0]], requires_grad=True)
    posterior = Posterior(mu, torch.zeros(1, 2))
    GaussianLatentSpec(size=2, free_bits=0.5).cost(posterior).backward()
    assert mu.grad[0, 0] == 0
    assert mu.grad[0, 1] == pytest.approx(3.0)


def test_extreme_encodings_stay_finite():
    posterior = GaussianLatentSpec(size=1).posterior(torch.tensor([[5.0, 1e6], [5.0, -1e6]]))
    assert torch.isfinite(posterior.kl()).all()
