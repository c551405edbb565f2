import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch.nn import functional as F

from anomaly_vae import von_mises_fisher as vmf

SIZES = (2, 3, 4, 8, 20, 64, 200, 512)
KAPPAS = (1e-3, 0.1, 1.0, 5.0, 11.0, 30.0, 300.0, 1e4)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def resultant(kappa, m):
    """E[mu.z], by Bessel functions or, where these vanish, by their series."""
    if kappa <= 50:
        above, below = special.hyp0f1(m / 2 + 1, kappa**2 / 4), special.hyp0f1(m / 2, kappa**2 / 4)
        return kappa / m * above / below
    return special.ive(m / 2, kappa) / special.ive(m / 2 - 1, kappa)


def closed_kl(kappa, m):
    if kappa <= 50:
        return kappa * resultant(kappa, m) - np.log(special.hyp0f1(m / 2, kappa**2 / 4))
    log_bessel = np.log(special.ive(m / 2 - 1, kappa)) + kappa
    log_ratio = (m / 2 - 1) * np.log(kappa / 2) - log_bessel - special.gammaln(m / 2)
    return kappa * resultant(kappa, m) + log_ratio


def share_nearer(cos, kappa, m):
    """The probability that mu.z exceeds `cos`, by sums over a grid; the substitution keeps m = 2 bounded."""
    angles = np.linspace(0, np.pi, 400_001)
    density = np.exp(kappa * (np.cos(angles) - 1)) * np.sin(angles) ** (m - 2)
    cdf = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return np.interp(np.arccos(np.clip(cos, -1, 1)), angles, cdf / cdf[-1])


@pytest.mark.parametrize("m", SIZES)
def test_kl_is_the_closed_form(m):
    ours = vmf.kl_to_uniform(column(*KAPPAS), m)
    assert ours.shape == (len(KAPPAS), 1)
    np.testing.assert_allclose(ours[:, 0], [closed_kl(kappa, m) for kappa in KAPPAS], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("m", SIZES)
def test_kl_never_falls_and_is_nothing_for_the_uniform_law(m):
    kappa = torch.logspace(-3, 4, 200, dtype=torch.float64)[:, None].requires_grad_()
    kl = vmf.kl_to_uniform(kappa, m)
    kl.sum().backward()
    assert (kl >= 0).all()
    assert (kl.diff(dim=0) > -1e-12).all()
    assert (kappa.grad > 0).all()
    assert abs(float(vmf.kl_to_uniform(column(0.0), m))) < 1e-11


@pytest.mark.parametrize("m", [2, 3, 20, 200])
def test_derivatives_by_kappa_are_those_of_the_values(m):
    kappa = column(0.2, 3.0, 40.0, 900.0).requires_grad_()
    mu, noise = unit(4, m), normal(4, m, seed=1)
    torch.autograd.gradcheck(lambda k: vmf.kl_to_uniform(k, m), kappa, eps=1e-5, rtol=1e-4)
    torch.autograd.gradcheck(lambda k: vmf.sample(mu, k, noise), kappa, eps=1e-5, rtol=1e-4, atol=1e-7)
    z = vmf.sample(mu, kappa, noise).detach()
    torch.autograd.gradcheck(lambda k: vmf.log_prob(z, mu, k), kappa, eps=1e-5, rtol=1e-4)


@pytest.mark.parametrize("m", [2, 3, 8, 20])
def test_density_is_that_of_scipy(m):
    mu = unit(1, m)
    for kappa in (0.1, 1.0, 30.0, 300.0, 1e4):
        z = vmf.sample(mu, column(kappa), normal(50, m, seed=1))
        law = stats.vonmises_fisher(mu[0].numpy(), kappa)
        ours = vmf.log_prob(z, mu, column(kappa))
        assert ours.shape == (50, 1)
        np.testing.assert_allclose(ours[:, 0], law.logpdf(z.numpy()), rtol=1e-9, atol=1e-8)


def test_density_keeps_its_digits_in_single_precision():
    mu, kappa = unit(20, 5), column(*[1e4] * 20)
    z = vmf.sample(mu, kappa, normal(20, 5, seed=1))
    single = vmf.log_prob(z.float(), mu.float(), kappa.float())
    torch.testing.assert_close(single.double(), vmf.log_prob(z, mu, kappa), atol=1e-4, rtol=0)


def test_uniform_density_is_one_over_the_area():
    areas = {2: 2 * math.pi, 3: 4 * math.pi, 4: 2 * math.pi**2, 5: 8 * math.pi**2 / 3}
    for m, area in areas.items():
        assert vmf.log_uniform(m) == pytest.approx(-math.log(area), abs=1e-12)
        barely = vmf.log_prob(unit(5, m), unit(5, m, seed=1), column(*[1e-9] * 5))
        np.testing.assert_allclose(barely, vmf.log_uniform(m), atol=1e-8)


@pytest.mark.parametrize("m", [2, 3, 8, 64])
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 11.0, 1e3])
def test_a_draw_inverts_the_distribution_function(m, kappa):
    mu, deviates = unit(1, m), torch.linspace(-4, 4, 41, dtype=torch.float64)[:, None]
    across = F.normalize(normal(41, m, seed=1) - (normal(41, m, seed=1) * mu).sum(1, keepdim=True) * mu, dim=1)
    z = vmf.sample(mu, column(kappa), deviates * mu + across)
    np.testing.assert_allclose(
        share_nearer((z * mu).sum(1).numpy(), kappa, m), stats.norm.sf(deviates[:, 0]), rtol=2e-3, atol=1e-7
    )


@pytest.mark.parametrize("m", [2, 3, 20])
@pytest.mark.parametrize("kappa", [0.5, 12.0, 500.0])
def test_many_draws_have_the_moments_and_the_kl_of_the_law(m, kappa):
    count, mu = 30_000, unit(1, m)
    z = vmf.sample(mu, column(kappa), normal(count, m, seed=2))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(count).double(), rtol=0, atol=1e-12)
    along = (z * mu).sum(1)
    a = resultant(kappa, m)
    error = 5 / count**0.5
    assert abs(float(along.mean()) - a) < error * float(along.std())
    side = F.normalize(normal(1, m, seed=3) - (normal(1, m, seed=3) * mu).sum() * mu, dim=1)
    projected = (z * side).sum(1)
    assert abs(float(projected.mean())) < error * float(projected.std())
    squares, expected = projected.square(), a / kappa  # E[(z.side)^2] = A(kappa) / kappa
    assert abs(float(squares.mean()) - expected) < error * float(squares.std())
    ratio = vmf.log_prob(z, mu, column(kappa)) - vmf.log_uniform(m)
    assert abs(float(ratio.mean() - vmf.kl_to_uniform(column(kappa), m))) < error * float(ratio.std())


@pytest.mark.parametrize("m", [2, 3, 8])
@pytest.mark.parametrize("kappa", [0.5, 20.0])
def test_gradients_are_unbiased(m, kappa):
    """E[(a.z)^2] is known, and with it the derivatives by mu, on the sphere, and by kappa."""
    count, a, pole = 30_000, unit(1, m, seed=1), unit(1, m)
    mu = pole.repeat(count, 1).requires_grad_()
    kappas = torch.full((count, 1), kappa, dtype=torch.float64, requires_grad=True)
    (vmf.sample(mu, kappas, normal(count, m, seed=4)) * a).sum(1).square().sum().backward()

    def expected(k, c):
        side = resultant(k, m) / k
        return side + (1 - m * side) * c**2

    cos = float((a * pole).sum())
    tangent = a - cos * pole
    by_mu = (mu.grad * tangent).sum(1)
    exact = float(2 * cos * (1 - m * resultant(kappa, m) / kappa) * tangent.square().sum())
    assert abs(float(by_mu.mean()) - exact) < 5 * float(by_mu.std()) / count**0.5
    by_kappa = (expected(kappa + 1e-4, cos) - expected(kappa - 1e-4, cos)) / 2e-4
    assert abs(float(kappas.grad.mean()) - by_kappa) < 5 * float(kappas.grad.std()) / count**0.5


def test_no_axis_is_special():
    mu, noise, kappa = unit(10, 6), normal(10, 6, seed=1), column(*[7.0] * 10)
    turn = torch.linalg.qr(normal(6, 6, seed=2))[0]
    torch.testing.assert_close(vmf.sample(mu @ turn, kappa, noise @ turn), vmf.sample(mu, kappa, noise) @ turn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [2, 3, 20, 200])
def test_extremes_stay_on_the_sphere(m, dtype):
    axis = torch.eye(m, dtype=dtype)[:1]
    noises = [0 * axis, axis, -axis, 40 * axis, -40 * axis, 1e-30 * axis, torch.ones(1, m, dtype=dtype)]
    for pole in (axis, -axis, unit(1, m).to(dtype), 0 * axis):
        for kappa in (1e-3, 1.0, 1e4, 1e8):
            mu = pole.repeat(len(noises), 1).requires_grad_()
            kappas = torch.full((len(noises), 1), kappa, dtype=dtype, requires_grad=True)
            z, kl = vmf.sample(mu, kappas, torch.cat(noises)), vmf.kl_to_uniform(kappas, m)
            logs = vmf.log_prob(z, mu, kappas)
            assert z.dtype == kl.dtype == logs.dtype == dtype
            (z.sum() + kl.sum() + logs.sum()).backward()
            assert (z.norm(dim=1) - 1).abs().max() < 1e-6
            assert all(values.isfinite().all() for values in (kl, logs, mu.grad, kappas.grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [2, 7, 32, 129])
def test_a_row_does_not_see_its_batch(m, dtype):
    mu, noise = unit(33, m).to(dtype), normal(33, m, seed=1).to(dtype)
    kappa = (normal(33, 1, seed=2) * 3).exp().to(dtype)
    z, kl, logs = vmf.sample(mu, kappa, noise), vmf.kl_to_uniform(kappa, m), vmf.log_prob(noise, mu, kappa)
    for i in range(33):
        for rows in (slice(i, i + 1), slice(i, 33), slice(0, i + 1)):
            assert torch.equal(vmf.sample(mu[rows], kappa[rows], noise[rows]), z[rows])
            assert torch.equal(vmf.kl_to_uniform(kappa[rows], m), kl[rows])
            assert torch.equal(vmf.log_prob(noise[rows], mu[rows], kappa[rows]), logs[rows])


def test_leading_dimensions_broadcast():
    mu, kappa, noise = unit(5, 4), column(1.0, 2.0, 3.0, 4.0, 5.0), normal(3, 5, 4, seed=1)
    several = vmf.sample(mu, kappa, noise)
    assert torch.equal(several, torch.stack([vmf.sample(mu, kappa, row) for row in noise]))
    assert vmf.log_prob(several, mu, kappa).shape == (3, 5, 1)


def test_mixed_precision_spoils_nothing():
    mu, kappa, noise = unit(5, 4).float(), column(1.0, 2.0, 3.0, 4.0, 5.0).float(), normal(5, 4, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = vmf.sample(mu, kappa, noise), vmf.kl_to_uniform(kappa, 4)
    assert torch.equal(mixed[0], vmf.sample(mu, kappa, noise))
    assert torch.equal(mixed[1], vmf.kl_to_uniform(kappa, 4))
