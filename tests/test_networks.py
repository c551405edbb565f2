"""Networks keep shapes, for any size, mirror themselves stage by stage, and learn."""

import pytest
import torch
from pydantic import TypeAdapter

from anomaly_vae.model import ModelSpec
from anomaly_vae.networks import ConvSpec, NetworkSpec

ADAPTER = TypeAdapter(NetworkSpec)
CONV = [
    {"kind": "conv", "width": 4},
    {"kind": "conv", "width": 4, "norm": "group", "residual": 1, "dropout": 0.1, "activation": "silu"},
    {"kind": "conv", "channels": [4, 8], "norm": "none", "features": 32},
    {"kind": "conv", "width": 4, "residual": 1, "features": 8, "latent_skips": True},
]
SKIPS = [
    {"kind": "conv", "width": 4, "skips": True},
    {"kind": "conv", "width": 4, "skips": True, "latent_skips": True, "residual": 1, "norm": "group"},
]
FLAT = [
    {"kind": "mlp", "hidden": [16]},
    {"kind": "mlp", "hidden": [16, 8], "dropout": 0.1, "activation": "tanh"},
    {"kind": "mlp", "hidden": [16, 8, 12], "latent_skips": True},
    {"kind": "mlp", "hidden": []},
    {"kind": "linear"},
]
SPECS = [*CONV, *SKIPS, *FLAT]
SHAPES = [(1, 16, 16), (1, 28, 28), (3, 33, 47), (3, 17, 23), (1, 100, 30), (3, 128, 128), (13, 16, 16)]
TABLES = [(7, 1, 1), (1, 1, 7), (1, 1, 1)]
CASES = [(f, s) for f in SPECS for s in SHAPES] + [(f, s) for f in FLAT for s in TABLES]
MIRRORED = [(fields, shape) for fields, shape in CASES if fields not in SKIPS]


def images(shape, seed=0):
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed))


def pair(fields, shape, outputs=10, latents=5):
    """An encoder, which looks at one channel more than is decoded, and its decoder, weights from seed 0, evaluating."""
    network = ADAPTER.validate_python(fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = network.encoder((shape[0] + 1, *shape[1:]), outputs)
        return encoder.eval(), network.decoder(latents, shape).eval()


@pytest.mark.parametrize("latents", [1, 5])
@pytest.mark.parametrize(("fields", "shape"), CASES, ids=str)
def test_decoder_gives_back_the_encoders_shape(fields, shape, latents):
    encoder, decoder = pair(fields, shape, latents=latents)
    for mode in (True, False):
        maps = encoder.train(mode).activations(images((shape[0] + 1, *shape[1:])))
        assert maps[-1].shape == (2, 10)
        assert decoder.train(mode)(torch.rand(2, latents), maps).shape == (2, *shape)


@pytest.mark.parametrize(("fields", "shape"), CASES, ids=str)
def test_activations_end_in_the_output_and_follow_the_stages(fields, shape):
    encoder, decoder = pair(fields, shape)
    x = images((shape[0] + 1, *shape[1:]))
    found = encoder.activations(x)
    assert len(found) == len(encoder.stages) == len(decoder.stages)
    assert torch.equal(found[-1], encoder(x))
    for stage, before, after in zip(encoder.stages, [x, *found], found, strict=False):
        assert torch.equal(stage(before), after)


@pytest.mark.parametrize(("fields", "shape"), MIRRORED, ids=str)
def test_each_stage_has_its_mirror(fields, shape):
    encoder, decoder = pair(fields, shape, outputs=5, latents=5)
    taken = images((shape[0] + 1, *shape[1:]))
    for k, stage in enumerate(encoder.stages):
        given = stage(taken)
        back = decoder.stages[len(decoder.stages) - 1 - k](given)
        assert back.shape == (taken.shape if k else (2, *shape))
        taken = given


@pytest.mark.parametrize(
    ("fields", "low", "high"),
    [
        ({"kind": "conv", "width": 4, "activation": "tanh"}, -1, 1),
        ({"kind": "conv", "width": 4, "norm": "none", "residual": 1, "activation": "relu"}, 0, torch.inf),
        ({"kind": "mlp", "hidden": [16, 8], "activation": "relu"}, 0, torch.inf),
        ({"kind": "mlp", "hidden": [16, 8], "activation": "tanh"}, -1, 1),
    ],
    ids=str,
)
def test_every_stage_but_the_outermost_ends_in_the_activation(fields, low, high):
    """Weights so large that an output without the activation leaves the activation's range."""
    encoder, decoder = pair(fields, (1, 28, 28), outputs=5, latents=5)
    with torch.no_grad():
        for weight in (*encoder.parameters(), *decoder.parameters()):
            weight.mul_(30)
    maps, outputs = encoder.activations(images((2, 28, 28))), []
    h = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    for stage in decoder.stages:
        h = stage(h)
        outputs.append(h)
    for hidden in (*maps[:-1], *outputs[:-1]):
        assert low <= hidden.min() <= hidden.max() <= high
    for bare in (maps[-1], outputs[-1]):
        assert bare.min() < low or bare.max() > high


def test_only_skips_see_the_input():
    for fields in SPECS:
        assert ADAPTER.validate_python(fields).sees_input == (fields in SKIPS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fields", SKIPS, ids=str)
def test_skips_use_every_map_but_the_bottleneck(fields, shape):
    encoder, decoder = pair(fields, shape)
    maps, z = encoder.activations(images((shape[0] + 1, *shape[1:]))), torch.rand(2, 5)
    plain = decoder(z, maps)
    for i in range(len(maps)):
        changed = [m + 1 if i == j else m for j, m in enumerate(maps)]
        used = i < len(maps) - 2  # the last two are the lowest resolution's and the head's
        assert torch.equal(decoder(z, changed), plain) == (not used)


@pytest.mark.parametrize("fields", SKIPS, ids=str)
def test_skips_ask_for_the_maps(fields):
    _, decoder = pair(fields, (1, 16, 16))
    with pytest.raises(ValueError, match=r"encoder\.activations"):
        decoder(torch.rand(2, 5))


@pytest.mark.parametrize(("fields", "shape"), MIRRORED, ids=str)
def test_without_skips_the_decoder_is_a_function_of_z(fields, shape):
    encoder, decoder = pair(fields, shape)
    maps, z = encoder.activations(images((shape[0] + 1, *shape[1:]))), torch.rand(2, 5)
    assert torch.equal(decoder(z), decoder(z, maps))


@pytest.mark.parametrize("fields", [*CONV, *SKIPS, *FLAT[:3]], ids=str)
def test_latent_skips_bring_z_to_every_stage(fields):
    """Each stage's output is cut off the graph: only what a latent skip adds still depends on z."""
    encoder, decoder = pair(fields, (1, 28, 28))
    z, inputs = torch.rand(2, 5, requires_grad=True), []
    for stage in decoder.stages:
        stage.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        stage.register_forward_hook(lambda _, given, output: output.detach())
    decoder(z, [m.detach() for m in encoder.activations(images((2, 28, 28)))])
    for h in inputs[1:]:
        assert h.requires_grad == fields.get("latent_skips", False)
        if h.requires_grad:
            (gradient,) = torch.autograd.grad(h.sum(), z, retain_graph=True)
            assert gradient.abs().min() > 0


def test_the_default_network_is_its_plain_chain_of_convolutions():
    encoder, decoder = pair({"kind": "conv"}, (1, 28, 28), outputs=10, latents=5)
    weights = [tuple(p.shape) for p in encoder.parameters() if p.dim() > 1]
    assert weights == [(16, 2, 4, 4), (32, 16, 4, 4), (10, 32 * 7 * 7)]
    weights = [tuple(p.shape) for p in decoder.parameters() if p.dim() > 1]
    assert weights == [(32 * 7 * 7, 5), (32, 16, 4, 4), (16, 1, 4, 4)]


@pytest.mark.parametrize("side", [16, 20, 31, 32, 64, 100, 128, 255, 512])
def test_planned_halvings_end_at_four_to_seven_pixels(side):
    halvings = len(ConvSpec().plan((3, side, side)))
    assert 4 <= side >> halvings <= 7


def test_too_many_halvings_are_refused_by_name():
    with pytest.raises(ValueError, match=r"network\.channels"):
        ConvSpec(channels=(8,) * 6).plan((1, 32, 32))


def test_a_single_pixel_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match="mlp or linear"):
        ConvSpec().plan((7, 1, 1))


def test_skips_need_more_than_the_bottleneck():
    with pytest.raises(ValueError, match=r"network\.skips"):
        ConvSpec(skips=True).plan((1, 12, 12))


@pytest.mark.parametrize("fields", SPECS, ids=str)
def test_every_network_learns_one_batch(fields):
    encoder, decoder = pair(fields, (1, 16, 16), outputs=8, latents=8)
    x = images((1, 4, 4)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    seen = torch.cat((x, torch.ones_like(x)), 1)
    optimizer = torch.optim.Adam([*encoder.train().parameters(), *decoder.train().parameters()], 1e-2)
    losses = []
    for _ in range(120):
        maps = encoder.activations(seen)
        loss = (decoder(maps[-1], maps) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < x.var() / 2 < losses[0]  # half of what the best constant leaves


def test_weights_follow_the_seed_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, same, other = (ModelSpec().build((1, 16, 16), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
