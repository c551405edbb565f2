"""Corruptions keep shapes, follow their generator, change what their mask says and as much as their settings say."""

import pytest
import torch
from pydantic import TypeAdapter

from anomaly_vae import corruptions
from anomaly_vae.corruptions import (
    CorruptionSpec,
    DropoutSpec,
    MasksSpec,
    NoiseSpec,
    StrokesSpec,
    corrupt,
)
from anomaly_vae.errors import ConfigError

ADAPTER = TypeAdapter(CorruptionSpec)
MEMBERS = [
    {"kind": "noise"},
    {"kind": "noise", "sigma": 0.5},
    {"kind": "dropout"},
    {"kind": "dropout", "rate": 0.6},
    {"kind": "masks"},
    {"kind": "masks", "rectangles": 1, "sides": [0.5, 1.0], "fills": ["noise"]},
    {"kind": "masks", "rectangles": 8, "fills": ["colour"], "probability": 0.7},
    {"kind": "strokes"},
    {"kind": "strokes", "fills": ["colour"], "opacity": [1, 1]},
    {"kind": "strokes", "fills": ["brightness"], "opacity": [0.01, 0.02]},
    {"kind": "strokes", "fills": ["piece"], "area": [0.3, 0.9], "probability": 0.7},
    {"kind": "strokes", "softness": 1.0},
    {"kind": "strokes", "shapes": ["blots", "fibres"], "softness": 0.5, "probability": 0.7},
]
NOTHING = [
    {"kind": "noise", "sigma": 0},
    {"kind": "dropout", "rate": 0},
    {"kind": "masks", "probability": 0},
    {"kind": "strokes", "probability": 0},
]
SHAPES = [(8, 3, 32, 32), (1, 1, 16, 16), (1, 3, 40, 24), (5, 1, 17, 64), (2, 4, 1, 30), (3, 1, 1, 1)]

every_member = pytest.mark.parametrize("fields", MEMBERS, ids=str)


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(*shape, low=0.2, high=0.8):
    """Pictures without pure black or white, so that every way of changing a pixel shows."""
    return low + (high - low) * torch.rand(shape, generator=chance(99))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_member
def test_shape_type_and_range_hold(fields, shape, dtype):
    spec = ADAPTER.validate_python(fields)
    x = torch.rand(shape, generator=chance()).to(dtype)
    x[0] = x[0].round()  # black and white, where a range is left first
    before = x.clone()
    images, mask = spec.apply(x, chance(1))
    assert torch.equal(x, before)
    assert images.data_ptr() != x.data_ptr()
    assert images.shape == shape
    assert mask.shape == (shape[0], 1, *shape[2:])
    assert images.dtype == mask.dtype == dtype
    assert torch.isfinite(images).all()
    assert ((mask == 0) | (mask == 1)).all()
    if spec.kind != "noise":
        assert images.min() >= 0
        assert images.max() <= 1


@every_member
def test_chance_comes_from_the_generator_alone(fields):
    spec, x = ADAPTER.validate_python(fields), pictures(8, 3, 32, 32)
    before = torch.random.get_rng_state()
    one, other = spec.apply(x, chance(1)), spec.apply(x, chance(2))
    torch.rand(3)
    again = spec.apply(x, chance(1))
    torch.random.set_rng_state(before)
    assert torch.equal(one.images, again.images)
    assert torch.equal(one.mask, again.mask)
    assert not torch.equal(one.images, other.images)
    assert torch.equal(one.images, spec(x, chance(1)))


@every_member
def test_the_global_generator_is_left_alone(fields):
    before = torch.random.get_rng_state()
    ADAPTER.validate_python(fields)(pictures(2, 1, 16, 16), chance())
    assert torch.equal(torch.random.get_rng_state(), before)


@every_member
def test_chance_is_spent_by_shape_alone(fields):
    spec, spent = ADAPTER.validate_python(fields), []
    for x in (pictures(4, 3, 32, 32), torch.zeros(4, 3, 32, 32)):
        generator = chance()
        spec(x, generator)
        spent.append(generator.get_state())
    assert torch.equal(*spent)


@every_member
def test_a_sequence_of_draws_differs(fields):
    spec, x, generator = ADAPTER.validate_python(fields), pictures(8, 3, 32, 32), chance()
    assert not torch.equal(spec(x, generator), spec(x, generator))


@every_member
def test_memory_layout_does_not_matter(fields):
    spec, x = ADAPTER.validate_python(fields), pictures(4, 3, 32, 20)
    assert torch.equal(spec(x.to(memory_format=torch.channels_last), chance()), spec(x, chance()))


@every_member
@pytest.mark.parametrize("black_channels", [0, 1, 3])
def test_the_mask_is_where_pixels_changed(fields, black_channels):
    if fields["kind"] == "noise":
        pytest.skip("noise marks nothing")
    x = pictures(16, 3, 32, 32)
    x[:, :black_channels] = 0
    images, mask = ADAPTER.validate_python(fields).apply(x, chance())
    assert torch.equal(mask.bool(), (images != x).any(1, keepdim=True))
    assert black_channels == 3 or mask.any()


@pytest.mark.parametrize("fields", NOTHING, ids=str)
def test_probability_zero_does_nothing(fields):
    x = pictures(8, 3, 32, 32)
    images, mask = ADAPTER.validate_python(fields).apply(x, chance())
    assert torch.equal(images, x)
    assert not mask.any()


@pytest.mark.parametrize("kind", ["masks", "strokes"])
@pytest.mark.parametrize("probability", [0.2, 0.7, 1.0])
def test_probability_is_the_share_of_pictures_touched(kind, probability):
    spec = ADAPTER.validate_python({"kind": kind, "probability": probability})
    touched = spec.apply(pictures(2000, 1, 16, 16), chance()).mask.flatten(1).any(1)
    assert touched.float().mean().item() == pytest.approx(probability, abs=0.045)  # 4 standard errors


@pytest.mark.parametrize("sigma", [0.05, 0.4])
def test_noise_has_its_sigma_no_bias_and_no_mask(sigma):
    x = torch.ones(16, 3, 64, 64)
    images, mask = NoiseSpec(sigma=sigma).apply(x, chance())
    assert (images - x).mean().item() == pytest.approx(0, abs=0.01 * sigma)
    assert (images - x).std().item() == pytest.approx(sigma, rel=0.01)
    assert not mask.any()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.95])
def test_dropout_blacks_out_its_rate_in_all_channels(rate):
    x = pictures(16, 3, 64, 64)
    images, mask = DropoutSpec(rate=rate).apply(x, chance())
    assert mask.mean().item() == pytest.approx(rate, abs=0.01)
    assert torch.equal(images, x * (1 - mask))


def bounding_boxes(mask):
    """Height, width, top and left of the marked part of each (B, 1, H, W) mask."""
    rows, columns = mask[:, 0].any(2), mask[:, 0].any(1)
    return rows.sum(1), columns.sum(1), rows.int().argmax(1), columns.int().argmax(1)


def test_one_rectangle_is_one_rectangle_of_the_asked_size_anywhere():
    mask = MasksSpec(rectangles=1, sides=(0.25, 0.5)).apply(pictures(3000, 1, 16, 32), chance()).mask.bool()
    height, width, top, left = bounding_boxes(mask)
    assert torch.equal(mask.sum((1, 2, 3)), height * width)
    assert (height.min(), height.max(), width.min(), width.max()) == (4, 8, 8, 16)
    assert (top.min(), left.min(), (top + height).max(), (left + width).max()) == (0, 0, 16, 32)
    centre = (top + height / 2).mean().item()
    assert centre == pytest.approx(8, abs=0.25)


def test_rectangles_are_one_to_as_many_as_asked():
    x = pictures(2000, 1, 64, 64)
    share = [
        MasksSpec(rectangles=n, sides=(0.1, 0.1)).apply(x, chance()).mask.sum((1, 2, 3)).div(36) for n in (1, 2, 4)
    ]
    # Overlap takes a little from each; the mean count of 1..n is (n + 1) / 2.
    assert share[0].unique().tolist() == [1]
    assert share[1].mean().item() == pytest.approx(1.5, abs=0.06)
    assert share[2].mean().item() == pytest.approx(2.5, abs=0.12)
    assert share[2].min() == 1
    assert share[2].max() == 4


@pytest.mark.parametrize("fill", ["colour", "noise"])
def test_masks_are_filled_as_asked(fill):
    images, mask = MasksSpec(sides=(0.3, 0.3), fills=(fill,)).apply(pictures(50, 3, 32, 32), chance())
    colours = [image[:, where[0].bool()].unique(dim=1).shape[1] for image, where in zip(images, mask, strict=True)]
    assert set(colours) == {1} if fill == "colour" else min(colours) > 50


def test_brightness_goes_up_and_down_by_the_same_amount_everywhere():
    x = pictures(400, 3, 16, 16, low=0.5, high=0.5)
    images, mask = StrokesSpec(area=(0.3, 0.3), fills=("brightness",), opacity=(1, 1)).apply(x, chance())
    change = (images - x).sum((2, 3)) / mask.sum((2, 3))
    torch.testing.assert_close(images - x, change[:, :, None, None] * mask)
    assert change.abs().min() >= 0.1 - 1e-6
    assert change.abs().max() <= 0.5 + 1e-6
    assert (change > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("kind", ["masks", "strokes"])
def test_fills_are_equally_likely(kind):
    spec = ADAPTER.validate_python({"kind": kind})
    chosen = corruptions._chosen(torch.zeros(3000, 1, 1, 1), spec.fills, chance())
    shares = {fill: where.float().mean().item() for fill, where in chosen.items()}
    assert sum(shares.values()) == pytest.approx(1)
    for fill, share in shares.items():
        assert share == pytest.approx(1 / len(spec.fills) if fill in spec.fills else 0, abs=0.04)


def test_corrupt_applies_in_order_and_unites_masks():
    x, specs = pictures(8, 3, 32, 32), (MasksSpec(), DropoutSpec(rate=0.2), NoiseSpec(), StrokesSpec())
    generator = chance()
    images, united = x, torch.zeros(8, 1, 32, 32)
    for spec in specs:
        images, mask = spec.apply(images, generator)
        united = ((united + mask) > 0).float()
    done = corrupt(x, specs, chance())
    assert torch.equal(done.images, images)
    assert torch.equal(done.mask, united)
    assert not torch.equal(corrupt(x, specs[::-1], chance()).images, images)


def test_without_corruptions_a_copy_comes_back():
    x = pictures(2, 1, 16, 16)
    done = corrupt(x, (), chance())
    assert torch.equal(done.images, x)
    assert done.images.data_ptr() != x.data_ptr()
    assert not done.mask.any()


@pytest.mark.parametrize(
    ("spec", "fields", "named"),
    [
        (NoiseSpec, {"sigma": -1}, "sigma"),
        (DropoutSpec, {"rate": 1}, "rate"),
        (MasksSpec, {"sides": [0.5, 0.2]}, r"sides must be \[low, high\]"),
        (MasksSpec, {"fills": []}, "fills"),
        (MasksSpec, {"fills": ["piece"]}, "fills"),
        (StrokesSpec, {"area": [0, 0.2]}, "area"),
        (StrokesSpec, {"opacity": [1, 0.2]}, r"opacity must be \[low, high\]"),
        (StrokesSpec, {"probability": 1.5}, "probability"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(spec, fields, named):
    with pytest.raises(ConfigError, match=named):
        spec.parse(fields)


@every_member
def test_settings_survive_being_written(fields):
    spec = ADAPTER.validate_python(fields)
    assert ADAPTER.validate_python(spec.model_dump(mode="json")) == spec
