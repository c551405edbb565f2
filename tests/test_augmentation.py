"""Augmentation: views of the same picture, drawn by a generator alone."""

import pytest
import torch

from anomaly_vae.augmentation import AugmentationSpec

SPECS = [
    {},
    {"flip": True},
    {"flip_vertical": True},
    {"shift": 0.2},
    {"rotate": 20},
    {"zoom": 0.2},
    {"brightness": 0.3},
    {"flip": True, "shift": 0.1, "rotate": 90, "zoom": 0.1, "brightness": 0.1},
]


def drawn(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=[(8, 3, 16, 16), (8, 1, 20, 12)])
def x(request):
    return torch.rand(request.param, generator=drawn(0))


@pytest.mark.parametrize("settings", SPECS)
def test_views_are_pictures_and_the_generator_decides(settings, x):
    spec, before = AugmentationSpec(**settings), x.clone()
    view = spec(x, drawn(1))
    assert view.shape == x.shape
    assert torch.equal(x, before)
    assert view.min() >= 0
    assert view.max() <= 1
    assert torch.equal(view, spec(x, drawn(1)))
    assert torch.equal(view, spec(x, drawn(2))) is not any(settings.values())


def test_a_mirrored_picture_is_mirrored_exactly(x):
    view = AugmentationSpec(flip=True)(x, drawn(3))
    turned = [torch.equal(after, before.flip(2)) for after, before in zip(view, x, strict=True)]
    kept = [torch.equal(after, before) for after, before in zip(view, x, strict=True)]
    assert all(a != b for a, b in zip(turned, kept, strict=True))
    assert 0 < sum(turned) < len(x)


def test_a_shift_moves_and_a_quarter_turn_turns():
    dot = torch.zeros(200, 1, 17, 17)
    dot[:, :, 8, 8] = 1
    places = AugmentationSpec(shift=0.25)(dot, drawn(0)).flatten(1).argmax(1)
    rows, columns = places // 17, places % 17
    for offset in (rows - 8, columns - 8):
        assert offset.abs().max() <= 5
        assert offset.min() < -2
        assert offset.max() > 2
    bar = torch.zeros(500, 1, 17, 17)
    bar[:, :, 8, 2:15] = 1
    turned = AugmentationSpec(rotate=90)(bar, drawn(0))
    upright = turned[:, 0, 2:15, 8].min(1).values
    assert (upright > 0.5).any(), "some bars stand upright"
    assert turned.sum((1, 2, 3)).mean().item() == pytest.approx(13, rel=0.1)


def test_zoom_changes_size_about_evenly():
    square = torch.zeros(300, 1, 32, 32)
    square[:, :, 10:22, 10:22] = 1
    areas = AugmentationSpec(zoom=0.3)(square, drawn(0)).sum((1, 2, 3)) / 144
    assert areas.min() < 0.6
    assert areas.max() > 1.5
