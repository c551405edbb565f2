"""Laws over all likelihoods."""

import pytest
import torch
from pydantic import TypeAdapter

from anomaly_vae.likelihoods import MIN_LOG_SCALE, LikelihoodSpec

ADAPTER = TypeAdapter(LikelihoodSpec)
DENSITIES = [
    {"kind": "gaussian", "sigma": 0.2},
    {"kind": "gaussian", "sigma": "optimal"},
    {"kind": "gaussian", "sigma": "learned"},
    {"kind": "gaussian", "sigma": 0.1, "squash": False},
    {"kind": "laplace", "scale": 0.2},
    {"kind": "laplace", "scale": "optimal"},
    {"kind": "laplace", "scale": "learned"},
]
ALL = [*DENSITIES, {"kind": "bernoulli"}, {"kind": "continuous_bernoulli"}]


def outputs(law, count=9):
    """Decoder outputs for `count` images of one pixel: logits from -4 to 4, and a scale where one is learned."""
    location = torch.linspace(-4, 4, count)
    scale = torch.linspace(-2.5, -0.5, count)
    return torch.stack([location, scale][: law.outputs_per_channel], 1).view(count, -1, 1, 1).double()


def build(fields):
    return ADAPTER.validate_python(fields).build().double()


@pytest.mark.parametrize("fields", DENSITIES, ids=str)
def test_densities_on_the_line_integrate_to_one(fields):
    law = build(fields)
    output, x = outputs(law), torch.linspace(-30, 30, 600_001).double()
    for row in output:
        density = law.log_prob(row.expand(1, -1, 1, len(x)).contiguous(), x.view(1, 1, 1, -1)).exp()
        assert torch.trapezoid(density.flatten(), x).item() == pytest.approx(1, abs=1e-5)


def test_continuous_bernoulli_integrates_to_one_and_knows_its_mean():
    law = build({"kind": "continuous_bernoulli"})
    x = torch.linspace(0, 1, 20_001).double()
    for logit in (-30.0, -3.0, -0.1001, -0.0999, 0.0, 1e-4, 0.0999, 0.1001, 2.0, 30.0):
        output = torch.full((1, 1, 1, len(x)), logit).double()
        density = law.log_prob(output, x.view(1, 1, 1, -1)).exp().flatten()
        assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-4)
        mean = torch.trapezoid(density * x, x).item()
        assert law.mean(output[..., :1]).item() == pytest.approx(mean, abs=1e-4)


def test_a_black_pixel_is_worth_a_bounded_number_of_nats():
    law = build({"kind": "continuous_bernoulli"})
    output = torch.tensor([-30.0, -300.0, -3e4]).view(3, 1, 1, 1)
    worth = law.log_prob(output, torch.zeros(3, 1, 1, 1)).flatten()
    assert worth.max() < 3.1, "log of the density at black: that of a mean of 1/20"
    assert worth.max() - worth.min() < 0.2
    steep = torch.tensor([-300.0, -25.0, 25.0, 300.0]).view(4, 1, 1, 1).requires_grad_()
    mean = law.mean(steep)
    torch.testing.assert_close(mean.flatten(), torch.tensor([0.05, 0.05, 0.95, 0.95]), atol=0.01, rtol=0)
    mean.sum().backward()
    assert torch.isfinite(steep.grad).all()


def test_bernoulli_sums_to_one():
    law = build({"kind": "bernoulli"})
    output = outputs(law)
    total = sum(law.log_prob(output, torch.full_like(output, value)).exp() for value in (0.0, 1.0))
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("fields", ALL, ids=str)
def test_gradients_are_finite_and_pull_the_mean_towards_x(fields):
    law = build(fields)
    output = outputs(law).requires_grad_()
    x = torch.full((len(output), 1, 1, 1), 0.5).double()
    law.log_prob(output, x).sum().backward()
    assert torch.isfinite(output.grad).all()
    location = output.grad[:, 0, 0, 0]
    below = law.mean(output).flatten() < 0.5 - 1e-6
    above = law.mean(output).flatten() > 0.5 + 1e-6
    assert (location[below] > 0).all()
    assert (location[above] < 0).all()


@pytest.mark.parametrize("fields", ALL, ids=str)
def test_deviation_is_zero_at_the_mean_and_grows(fields):
    law = build(fields)
    output = outputs(law)
    mean = law.mean(output)
    assert law.deviation(output, mean).abs().max() < 1e-12
    assert (law.deviation(output, mean + 0.2) > law.deviation(output, mean + 0.1)).all()


@pytest.mark.parametrize(("fields", "statistic"), [
    ({"kind": "gaussian", "sigma": "optimal"}, lambda error: error.square().mean().sqrt()),
    ({"kind": "laplace", "scale": "optimal"}, lambda error: error.abs().mean()),
])  # fmt: skip
def test_optimal_scale_is_the_maximum_of_the_likelihood(fields, statistic):
    law = build(fields)
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(64, 1, 8, 8, generator=generator).double()
    x = torch.rand(64, 1, 8, 8, generator=generator).double()
    for _ in range(300):
        law.observe(output, x)
    assert law.log_scale.exp().item() == pytest.approx(statistic(x - law.mean(output)).item(), rel=0.02)
    best = law.log_prob(output, x).mean()
    for factor in (0.8, 1.25):
        other = build({**fields, next(k for k in fields if k != "kind"): law.log_scale.exp().item() * factor})
        assert other.log_prob(output, x).mean() < best


def test_scale_never_shrinks_below_its_bound():
    law = build({"kind": "gaussian", "sigma": "optimal"})
    output = torch.zeros(4, 1, 8, 8).double()
    for _ in range(200):
        law.observe(output, law.mean(output))
    assert law.log_scale.item() >= MIN_LOG_SCALE


def test_evaluation_does_not_move_the_scale():
    law = build({"kind": "gaussian", "sigma": "optimal"})
    before = law.log_scale.clone()
    law.log_prob(outputs(law), torch.zeros(9, 1, 1, 1).double())
    assert torch.equal(law.log_scale, before)


@pytest.mark.parametrize(
    "fields",
    [{"kind": "gaussian", "sigma": 0.0}, {"kind": "laplace", "scale": -1.0}, {"kind": "gaussian", "sigma": "best"}],
)
def test_impossible_scales_are_refused(fields):
    with pytest.raises(ValueError):
        ADAPTER.validate_python(fields)
