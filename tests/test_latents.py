"""Laws over all latent laws: finite gradients, KLs that match their definition, and what each law is there for."""

import math

import pytest
import torch
from pydantic import TypeAdapter

from anomaly_vae.latent_laws import LatentLaw, MixtureLaw, Step
from anomaly_vae.latents import GaussianLatentSpec, LatentSpec
from anomaly_vae.posteriors import DiagonalGaussian
from anomaly_vae.seeds import generator_of

SIZE = 5
LAWS = {
    "point": {"kind": "point"},
    "point, normal prior": {"kind": "point", "prior": "normal"},
    "sparse l1": {"kind": "sparse"},
    "sparse rate": {"kind": "sparse", "penalty": "rate", "rate": 0.1},
    "contractive exact": {"kind": "contractive", "exact": 100},
    "contractive estimated": {"kind": "contractive", "exact": 0, "probes": 2},
    "gaussian": {"kind": "gaussian"},
    "gaussian free bits": {"kind": "gaussian", "free_bits": 0.5},
    "spherical": {"kind": "von_mises_fisher"},
    "mixture": {"kind": "mixture", "components": 3},
    "adversarial": {"kind": "adversarial"},
}


def spec_of(name: str, **more):
    return TypeAdapter(LatentSpec).validate_python({"size": SIZE, **LAWS[name], **more})


@pytest.fixture(params=LAWS)
def spec(request):
    return spec_of(request.param)


def built(spec) -> LatentLaw:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spec.build()


def encoder_of(spec) -> torch.nn.Linear:
    encoder = torch.nn.Linear(7, spec.encoder_outputs)
    torch.nn.init.normal_(encoder.weight, std=0.5, generator=generator_of(0, "weights", 0))
    torch.nn.init.zeros_(encoder.bias)
    return encoder


def step_of(spec, law, encoder, count=64) -> Step:
    x = torch.randn(count, 7, generator=generator_of(0, "x", 0)).requires_grad_()
    noise = torch.randn(count, SIZE, generator=generator_of(0, "noise", 0))
    posterior = law.posterior(encoder(x))
    return Step(posterior, posterior.at(noise), x, noise)


def test_every_law_has_a_cost_with_finite_gradients(spec):
    law, encoder = built(spec), encoder_of(spec)
    step = step_of(spec, law, encoder)
    assert step.z.shape == step.posterior.mu.shape == (64, SIZE)
    cost = law.cost(step)
    assert cost.shape == ()
    (cost + step.z.square().mean()).backward()
    for weight in encoder.parameters():
        assert torch.isfinite(weight.grad).all()
        assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_encodings_stay_finite(spec, scale):
    law = built(spec)
    encoded = (scale * torch.randn(4, spec.encoder_outputs, generator=generator_of(0, "e", 0))).requires_grad_()
    posterior = law.posterior(encoded)
    z = posterior.at(torch.randn(4, SIZE, generator=generator_of(0, "n", 0)))
    assert torch.isfinite(z).all()
    if law.has_kl:
        kl = law.kl(posterior, z).sum()
        assert torch.isfinite(kl)
        kl.backward()
        assert torch.isfinite(encoded.grad).all()


def test_the_code_involves_no_chance_and_the_draw_only_its_noise(spec):
    law, encoder = built(spec), encoder_of(spec)
    first, again = step_of(spec, law, encoder), step_of(spec, law, encoder)
    assert torch.equal(first.z, again.z)
    other = first.posterior.at(torch.randn(64, SIZE, generator=generator_of(1, "noise", 0)))
    assert torch.equal(other, first.z) is not first.posterior.random


def test_settings_and_laws_agree_on_what_they_have(spec):
    law = built(spec)
    assert law.has_kl == spec.has_kl
    assert law.has_prior == spec.has_prior
    assert law.comparable == spec.comparable
    assert law.size == spec.size == SIZE
    if not law.has_kl:
        with pytest.raises(ValueError, match="no KL"):
            law.kl(law.posterior(torch.zeros(1, spec.encoder_outputs)), torch.zeros(1, SIZE))


@pytest.mark.parametrize("name", [name for name in LAWS if spec_of(name).has_kl])
def test_kl_matches_monte_carlo(name):
    """KL = E_q[log q - log p], by many draws of z from q and densities written down anew."""
    spec = spec_of(name)
    law, encoder = built(spec), encoder_of(spec)
    posterior = law.posterior(encoder(torch.randn(3, 7, generator=generator_of(0, "x", 0))))
    draws = torch.stack([posterior.at(torch.randn(3, SIZE, generator=generator_of(1, "n", i))) for i in range(1500)])
    expected = (log_q(law, posterior, draws) - log_p(law, draws)).mean(0)
    kl = torch.stack([law.kl(posterior, z).sum(1) for z in draws[: 1500 if name == "mixture" else 1]]).mean(0)
    torch.testing.assert_close(kl, expected.to(kl), atol=0.06, rtol=0.03)
    assert (kl >= 0).all()


def log_q(law, posterior, z):
    if isinstance(posterior, DiagonalGaussian):
        return torch.distributions.Normal(posterior.mu, (0.5 * posterior.logvar).exp()).log_prob(z).sum(-1)
    from scipy.stats import vonmises_fisher

    columns = [
        torch.from_numpy(vonmises_fisher(mu.double().numpy() / mu.double().norm().item(), kappa.item()).logpdf(
            (own.double() / own.double().norm(dim=1, keepdim=True)).numpy()))
        for mu, kappa, own in zip(posterior.mu.detach(), posterior.kappa.detach(), z.detach().unbind(1), strict=True)
    ]  # fmt: skip
    return torch.stack(columns, 1)


def log_p(law, z):
    if isinstance(law, MixtureLaw):
        parts = torch.distributions.Independent(torch.distributions.Normal(law.means, (0.5 * law.logvars).exp()), 1)
        weights = torch.distributions.Categorical(logits=law.logits)
        return torch.distributions.MixtureSameFamily(weights, parts).log_prob(z)
    if law.project(torch.full((1, SIZE), 9.0)).norm() < 2:
        return torch.full(z.shape[:-1], -math.log(2 * math.pi ** (SIZE / 2) / math.gamma(SIZE / 2)))
    return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)


@pytest.mark.parametrize("name", [name for name in LAWS if spec_of(name).has_prior])
def test_draws_from_the_prior_are_where_the_law_wants_them(name):
    law = built(spec_of(name))
    z = law.draw(5000, generator_of(0, "prior", 0))
    assert z.shape == (5000, SIZE)
    torch.testing.assert_close(law.project(z), z)
    if isinstance(law, MixtureLaw):
        torch.testing.assert_close(z.mean(0), law.means.mean(0).detach(), atol=0.1, rtol=0)
    else:
        torch.testing.assert_close(z.mean(0), torch.zeros(SIZE), atol=0.06, rtol=0)
    assert torch.equal(z, law.draw(5000, generator_of(0, "prior", 0)))


def test_kl_of_the_prior_is_nothing():
    zeros = torch.zeros(2, SIZE)
    assert torch.equal(built(spec_of("gaussian")).kl(DiagonalGaussian(zeros, zeros), zeros), zeros)


def test_free_bits_take_the_pull_off_small_dimensions_only():
    mu = torch.tensor([[0.01, 3.0]], requires_grad=True)
    posterior = DiagonalGaussian(mu, torch.zeros(1, 2))
    law = GaussianLatentSpec(size=2, free_bits=0.5).build()
    law.cost(Step(posterior, mu, mu, mu)).backward()
    assert mu.grad[0, 0] == 0
    assert mu.grad[0, 1] == pytest.approx(3.0)


def test_the_weight_warms_up():
    law = GaussianLatentSpec(beta=4.0, warmup=0.5)
    assert [law.weight_at(p) for p in (0, 0.25, 0.5, 1)] == [0, 2, 4, 4]
    assert GaussianLatentSpec(beta=4.0, warmup=0.0).weight_at(0) == 4


def test_the_weight_can_go_in_cycles():
    """Fu et al. 2019: each cycle starts at 0 and rises over its share `warmup`."""
    law = GaussianLatentSpec(beta=2.0, warmup=0.5, cycles=4)
    assert [law.weight_at(p) for p in (0, 0.0625, 0.125, 0.24)] == pytest.approx([0, 1, 2, 2])
    assert [law.weight_at(p) for p in (0.25, 0.3125, 0.5, 0.99, 1.0)] == pytest.approx([0, 1, 0, 2, 2])


def test_the_sparse_rate_costs_nothing_at_its_target_alone():
    spec = spec_of("sparse rate")
    law = built(spec)

    def cost(rate):
        z = torch.full((8, SIZE), float(rate))
        return law.cost(Step(law.posterior(z), z, z, z)).item()

    assert cost(0.1) == pytest.approx(0, abs=1e-6)
    assert cost(0.05) > 0.01 < cost(0.2)
    expected = SIZE * (0.1 * math.log(0.1 / 0.3) + 0.9 * math.log(0.9 / 0.7))
    assert cost(0.3) == pytest.approx(expected, rel=1e-5)


def test_the_jacobian_is_exact_and_its_estimate_unbiased():
    """Of a linear encoder dh/dx is its weight, for every picture."""
    encoder = encoder_of(spec_of("contractive exact"))
    truth = encoder.weight.square().sum().item()
    exact = built(spec_of("contractive exact"))
    assert exact.cost(step_of(None, exact, encoder)).item() == pytest.approx(truth, rel=1e-5)
    estimated = built(spec_of("contractive estimated"))
    assert estimated.cost(step_of(None, estimated, encoder, 20_000)).item() == pytest.approx(truth, rel=0.02)


def test_a_critic_learns_from_its_own_cost_alone():
    spec = spec_of("adversarial")
    law, encoder = built(spec), encoder_of(spec)
    step = step_of(spec, law, encoder)
    law.cost(step).backward(retain_graph=True)
    assert encoder.weight.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in law.critic.parameters())
    before = encoder.weight.grad.clone()
    law.critic_cost(step).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in law.critic.parameters())
    assert torch.equal(encoder.weight.grad, before)


def test_active_latents_are_those_that_tell_pictures_apart(spec):
    law = built(spec)
    mu = torch.randn(500, SIZE, generator=generator_of(0, "mu", 0)) * torch.tensor([1.0, 1.0, 1.0, 1e-4, 0.0])
    kl = 0.5 * mu**2
    assert law.active(mu, kl if spec.kind == "gaussian" else None).tolist() == [True, True, True, False, False]
