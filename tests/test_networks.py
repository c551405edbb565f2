"""Networks keep shapes, for any size, and learn."""

import pytest
import torch
from pydantic import TypeAdapter

from anomaly_vae.model import ModelSpec
from anomaly_vae.networks import ConvSpec, NetworkSpec

ADAPTER = TypeAdapter(NetworkSpec)
SPECS = [
    {"kind": "conv", "width": 4},
    {"kind": "conv", "width": 4, "norm": "group", "residual": 1, "dropout": 0.1, "activation": "silu"},
    {"kind": "conv", "channels": [4, 8], "norm": "none", "features": 32},
    {"kind": "mlp", "hidden": [16]},
    {"kind": "mlp", "hidden": [16, 8], "dropout": 0.1, "activation": "tanh"},
]
SHAPES = [(1, 16, 16), (3, 17, 23), (1, 28, 28), (3, 33, 64), (1, 100, 30)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fields", SPECS, ids=str)
def test_decoder_gives_back_the_encoders_shape(fields, shape):
    network = ADAPTER.validate_python(fields)
    encoded = network.encoder(shape, 10)(torch.rand(2, *shape))
    assert encoded.shape == (2, 10)
    assert network.decoder(5, shape)(torch.rand(2, 5)).shape == (2, *shape)


@pytest.mark.parametrize("side", [16, 20, 31, 32, 64, 100, 128, 255, 512])
def test_planned_halvings_end_at_four_to_seven_pixels(side):
    halvings = len(ConvSpec().plan((3, side, side)))
    assert 4 <= side >> halvings <= 7


def test_too_many_halvings_are_refused_by_name():
    with pytest.raises(ValueError, match=r"network\.channels"):
        ConvSpec(channels=(8,) * 6).plan((1, 32, 32))


@pytest.mark.parametrize("fields", SPECS, ids=str)
def test_every_network_learns_one_batch(fields):
    model = ModelSpec.model_validate({"network": fields, "latent": {"size": 8, "beta": 0.01}}).build(
        (1, 16, 16), seed=0
    )
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(8, 1, 4, 4, generator=generator)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(120):
        loss = model(x, torch.randn(8, 8, generator=generator), 0.01).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[1] - 0.2  # nats a pixel, sigma having followed the error


def test_weights_follow_the_seed_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, same, other = (ModelSpec().build((1, 16, 16), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
