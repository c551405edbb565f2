"""Strokes, blots and fibres: where they lie, how large, faint and soft they are, and what they are filled with."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from test_corruptions import chance, pictures

from anomaly_vae import corruptions
from anomaly_vae.corruptions import StrokesSpec


@pytest.mark.parametrize(("side", "area"), [(16, (0.1, 0.3)), (128, (0.001, 1 / 3)), (128, (0.02, 0.02))])
def test_strokes_cover_their_area(side, area):
    spec = StrokesSpec(area=area, fills=("colour",))
    share = spec.apply(pictures(300, 1, side, side), chance()).mask.mean((1, 2, 3)).double()
    low, high = area
    step = 1 / side**2
    assert share.max() <= high
    assert share.min() >= 0.9 * low - 2 * step  # the histogram's steps may cost a few pixels
    mean = (high - low) / (torch.tensor(high) / low).log().item() if high > low else low
    assert share.mean().item() == pytest.approx(mean, rel=0.2)  # of the log-uniform law


@pytest.mark.parametrize("count", [1, 2, 40, 400, 4096])
def test_highest_marks_the_highest_and_never_none(count):
    noise = torch.randn(500, 64, 64, generator=chance())
    marked = corruptions._highest(noise, torch.full((500,), float(count)))
    assert marked.sum((1, 2)).min() >= max(1, 0.9 * count - 2)
    assert marked.sum((1, 2)).max() <= count
    lowest_marked = torch.where(marked, noise, torch.inf).amin((1, 2))
    highest_unmarked = torch.where(marked, -torch.inf, noise).amax((1, 2))
    assert (lowest_marked > highest_unmarked).all()


def test_strokes_come_in_many_scales():
    """Specks and blots: the edges of a mask for its area spread over more than a factor of 10."""
    mask = StrokesSpec(area=(0.1, 0.1), fills=("colour",)).apply(pictures(200, 1, 128, 128), chance()).mask[:, 0]
    edges = mask.diff(dim=1).abs().sum((1, 2)) + mask.diff(dim=2).abs().sum((1, 2))
    assert edges.quantile(0.95) > 10 * edges.quantile(0.05)
    assert (edges < 2.5 * mask.sum((1, 2))).all()  # patches: independent pixels would have 3.6 edges each


def test_strokes_lie_in_all_directions_and_places():
    mask = StrokesSpec(area=(0.1, 0.2), fills=("colour",)).apply(pictures(3000, 1, 24, 24), chance()).mask[:, 0]
    often = mask.mean(0)
    assert often.min() > 0.7 * often.mean()
    assert often.max() < 1.3 * often.mean()
    rows, columns = mask.diff(dim=1).abs().sum((1, 2)), mask.diff(dim=2).abs().sum((1, 2))
    lying, standing = (columns < 0.7 * rows).float().mean(), (rows < 0.7 * columns).float().mean()
    assert min(lying, standing) > 0.1
    assert abs(lying - standing) < 0.05


def test_fibres_are_long_thin_whole_and_few():
    spec = StrokesSpec(shapes=("fibres",), fills=("colour",))
    mask = spec.apply(pictures(200, 1, 96, 128), chance()).mask[:, 0] > 0
    assert mask.any(2).any(1).all()
    depth = torch.tensor([ndimage.distance_transform_edt(one.numpy()).max() for one in mask])
    assert depth.max() < 2 * 128 * 0.1 / 2  # where they cross it is deeper than in one alone
    assert depth.quantile(0.1) <= 2
    assert depth.quantile(0.9) > 3
    reach = torch.maximum(mask.any(1).sum(1), mask.any(2).sum(1))
    assert reach.float().quantile(0.8) > 90
    pieces = torch.tensor([ndimage.label(one.numpy(), np.ones((3, 3)))[1] for one in mask])
    assert pieces.float().mean() < 2.5  # up to three, that may be cut by the picture's edge or cross
    assert pieces.max() <= 6


def test_fibres_lie_in_all_directions_and_places():
    spec = StrokesSpec(shapes=("fibres",), fills=("colour",))
    mask = spec.apply(pictures(3000, 1, 24, 24), chance()).mask[:, 0]
    often = mask.mean(0)
    assert often.min() > 0.3 * often.mean()  # less in the corners, since all pass through the picture
    assert often.max() < 1.6 * often.mean()


def test_some_strokes_are_fibres_and_some_blots():
    both, blots = (
        StrokesSpec(shapes=shapes, fills=("colour",), area=(0.2, 0.2)) for shapes in (("blots", "fibres"), ("blots",))
    )
    x = pictures(400, 1, 64, 64)
    area = both.apply(x, chance()).mask.mean((1, 2, 3))
    assert ((area - 0.2).abs() < 0.005).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert ((blots.apply(x, chance()).mask.mean((1, 2, 3)) - 0.2).abs() < 0.005).all()


@pytest.mark.parametrize("fill", ["colour", "brightness", "piece"])
def test_opacity_bounds_the_change(fill):
    x = pictures(64, 1, 32, 32)
    faint, solid = (StrokesSpec(area=(0.3, 0.3), fills=(fill,), opacity=(o, o)).apply(x, chance()) for o in (0.25, 1.0))
    torch.testing.assert_close(faint.images - x, 0.25 * (solid.images - x), atol=1e-6, rtol=0)
    mixed = StrokesSpec(area=(0.3, 0.3), fills=(fill,), opacity=(0.25, 1.0)).apply(x, chance()).images
    ratio = ((mixed - x).abs().sum((1, 2, 3)) / (solid.images - x).abs().sum((1, 2, 3))).clamp(0, 1)
    assert ratio.min() >= 0.25 - 1e-4
    assert ratio.min() < 0.35
    assert ratio.max() > 0.9


@pytest.mark.parametrize("shape", [(6, 3, 16, 16), (6, 1, 16, 40)], ids=str)
def test_pieces_come_from_one_other_picture(shape):
    """Each picture has its own grey levels, so every pasted pixel tells where it is from."""
    x = torch.arange(shape[0]).view(-1, 1, 1, 1) / 10 + 0.09 * torch.rand(shape, generator=chance())
    images, mask = StrokesSpec(area=(0.5, 0.5), fills=("piece",), opacity=(1, 1)).apply(x, chance())
    sources = set()
    for i, (image, where) in enumerate(zip(images, mask[:, 0].bool(), strict=True)):
        pasted = image[:, where]
        (source,) = set((pasted * 10).floor().int().unique().tolist())
        assert source != i
        original = x[source].flatten(1).T
        assert all((pixel == original).all(1).any() for pixel in pasted.T)  # whole pixels, channels together
        sources.add((source - i) % shape[0])
    assert len(sources) > 1


def test_pieces_are_turned_flipped_and_shifted():
    """On a ramp down the rows, every turn and flip of a piece shows in the direction of its slope."""
    ramp = torch.linspace(0, 1, 32)[:, None].expand(400, 1, 32, 32).contiguous()
    pieces = corruptions._pieces(ramp, torch.ones(400, dtype=torch.bool), chance())[:, 0]
    still = corruptions._pieces(ramp, torch.zeros(400, dtype=torch.bool), chance())
    assert torch.equal(still, ramp)
    down, right = pieces[:, 1:] - pieces[:, :-1], pieces[:, :, 1:] - pieces[:, :, :-1]
    for slope, flat in ((down, right), (right, down)):
        for sign in (1, -1):
            facing = ((sign * slope[:, 0, 0]) > 0) & (flat[:, 0, 0] == 0)
            assert facing.float().mean().item() == pytest.approx(0.25, abs=0.08)
    corner = pieces[:, 0, 0]
    assert len(corner.unique()) == 32
    assert down.abs().max() <= 1 / 31 + 1e-6  # no seam
    assert right.abs().max() <= 1 / 31 + 1e-6


def test_a_picture_alone_gives_its_own_pieces():
    x = pictures(1, 1, 24, 24)
    images, mask = StrokesSpec(area=(0.3, 0.3), fills=("piece",), opacity=(1, 1)).apply(x, chance())
    assert mask.any()
    assert torch.isin(images, x).all()


def test_softness_takes_the_edge_off_strokes():
    """Same chance, same places: at full softness the change grows from the edge inwards instead of jumping."""
    x = torch.zeros(64, 1, 64, 64)
    fields = {"fills": ["colour"], "area": [0.1, 0.3], "opacity": [1, 1]}
    hard, soft = (
        StrokesSpec.model_validate({**fields, "softness": softness}).apply(x, chance()) for softness in (0, 1)
    )
    assert (soft.images <= hard.images).all()
    assert (soft.mask <= hard.mask).all()
    inner = hard.mask.bool() & ~torch.nn.functional.max_pool2d(1 - hard.mask, 5, 1, 2).bool()
    edge = hard.mask.bool() & ~inner
    share = (soft.images / hard.images.clamp_min(1e-6)).clamp(0, 1)
    assert share[edge].mean() < 0.7 * share[inner].mean()
