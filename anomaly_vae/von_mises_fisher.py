"""The von Mises-Fisher law on the unit sphere S^{m-1}, for hyperspherical VAEs (Davidson et al. 2018).

Its density is proportional to exp(kappa mu.z), so only the angle theta between z and mu is not uniform: its density is
proportional to exp(kappa cos theta) sin^{m-2} theta. That is a law on an interval, so nothing here needs Bessel
functions, nor rejection sampling, after which a draw would no longer be a smooth function of its noise.

Tensors are (..., m) and (..., 1) with m >= 2, whose leading dimensions broadcast; the rows do not see each other.
Results have the dtype of mu or kappa, while the angle is solved in float64. Gradients are exact and finite, but
attached to values found without autograd, so a function here can be differentiated once, not twice.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_REACH = 16.0  # standard deviations about the mode that the window of integration spans
_NODES = 64  # of Gauss-Legendre; less than a standard deviation apart, which leaves errors of 1e-12
_CELLS = 128  # of the grid on which the search for an angle starts
_STEPS = 2  # of Newton's that end it
_EXTREME = 8.0  # noise beyond this many standard deviations, rarer than 1e-15, counts as this
_TINY = 1e-30


def sample(mu: Tensor, kappa: Tensor, noise: Tensor) -> Tensor:
    """The unit vector (..., m) that standard normal `noise` (..., m) decides; mu (..., m) is unit, kappa (..., 1) > 0.

    The part of the noise along mu decides the angle, by inversion of its distribution function; the part across mu,
    which is independent of it, the direction. So no axis is special: whatever rotates mu and noise rotates the draw.

    The derivative by kappa is that of the draw itself (implicit reparameterisation, Figurnov et al. 2018). The one by
    mu turns the draw along with mu by the smallest rotation: an unbiased gradient of every expectation, and a bounded
    one, which the draw's own derivative is not.
    """
    with torch.no_grad():
        pole = _wide(mu)
        pole = pole / _norm(pole)
        along = (pole * _wide(noise)).sum(-1, keepdim=True)
        across = _across(pole, _wide(noise))
        angle, slope = _angle(-along, kappa, mu.shape[-1])
        cos, sin = angle.cos(), angle.sin()
        z = cos * pole + sin * across
        z = z / _norm(z)
        by_kappa = (cos * across - sin * pole) * slope
    turned = _change(mu)
    moved = cos * turned - (turned * z).sum(-1, keepdim=True) * pole + by_kappa * _change(kappa)
    return (z + moved).to(mu.dtype)


def kl_to_uniform(kappa: Tensor, m: int) -> Tensor:
    """KL of the law to the uniform one on the sphere in R^m, in nats, (..., 1) like kappa; never negative."""
    with torch.no_grad():
        law = _law(kappa, m)
        whole = _integral(law, law.low, law.high)
        # -kappa E[1 - cos] - log integral of exp(-kappa (1 - cos)) sin^{m-2}: without the kappa that would cancel.
        value = -law.kappa * whole.mean - (whole.log_mass + law.peak) + _log_sines(m)
        slope = law.kappa * whole.variance
    return (_like(value.clamp_min(0), kappa) + _like(slope, kappa) * _change(kappa)).to(kappa.dtype)


def log_prob(z: Tensor, mu: Tensor, kappa: Tensor) -> Tensor:
    """Log-density (..., 1) of unit vectors z (..., m) with respect to the surface of the sphere."""
    m = mu.shape[-1]
    with torch.no_grad():
        law = _law(kappa, m)
        whole = _integral(law, law.low, law.high)
        log_mass, slope = _like(whole.log_mass + law.peak, kappa), _like(-whole.mean, kappa)
    # 1 - mu.z is half the squared chord, which keeps its digits where kappa is large.
    versine = 0.5 * (_wide(z) - _wide(mu)).square().sum(-1, keepdim=True)
    logs = -_wide(kappa) * versine - (log_mass + slope * _change(kappa)) - _log_area(m - 1)
    return logs.to(mu.dtype)


def log_uniform(m: int) -> float:
    """Log-density of the uniform law with respect to the surface of the sphere in R^m: minus the log of its area."""
    return -_log_area(m)


class _Law(NamedTuple):
    """Laws of the angle, in float64, (..., 1). `peak`: the log-density's unnormalised maximum, from which `_height`
    counts; `low`, `high`: the window, in radians, outside which there is nothing."""

    m: int
    kappa: Tensor
    mode: Tensor
    peak: Tensor
    low: Tensor
    high: Tensor


class _Integral(NamedTuple):
    """Over an interval of angles: the log of the integral of exp(`_height`), and there the mean and the variance of
    1 - cos theta; (..., 1)."""

    log_mass: Tensor
    mean: Tensor
    variance: Tensor


def _law(kappa: Tensor, m: int) -> _Law:
    # Apple's GPUs have no float64: there the few numbers of a batch's angles are worked out on the CPU.
    kappa = kappa.detach().to("cpu" if kappa.device.type == "mps" else kappa.device, torch.float64)
    powers = m - 2
    root = powers + (powers**2 + 4 * kappa.square()).sqrt()
    cos = 2 * kappa / root.clamp_min(_TINY)  # of the mode, where kappa sin^2 = (m - 2) cos
    sin2 = 2 * powers / root.clamp_min(_TINY)
    mode = 2 * (sin2.sqrt() / (1 + cos)).atan()
    curvature = kappa * cos + (powers / sin2 if powers else 0.0)
    reach = _REACH / curvature.clamp_min(_TINY).sqrt()
    peak = -2 * kappa * (mode / 2).sin().square()
    if powers:
        peak = peak + powers * mode.sin().log()
    return _Law(m, kappa, mode, peak, (mode - reach).clamp_min(0), (mode + reach).clamp_max(math.pi))


def _height(law: _Law, angle: Tensor) -> tuple[Tensor, Tensor]:
    """The log-density of the angle less its maximum, and 1 - cos theta."""
    versine = 2 * (angle / 2).sin().square()
    height = -law.kappa * versine - law.peak
    if law.m > 2:
        height = height + (law.m - 2) * angle.sin().clamp_min(0).log()
    return height, versine


def _integral(law: _Law, start: Tensor, end: Tensor) -> _Integral:
    nodes, weights = _rule(law.kappa.device)
    height, versine = _height(law, start + (end - start) * nodes)
    top = height.amax(-1, keepdim=True)
    mass = (height - top).exp() * weights
    total = mass.sum(-1, keepdim=True)
    mass = mass / total
    mean = (mass * versine).sum(-1, keepdim=True)
    variance = (mass * (versine - mean).square()).sum(-1, keepdim=True)
    return _Integral(top + total.log() + (end - start).abs().clamp_min(_TINY).log(), mean, variance)


@cache
def _rule(device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss and Legendre on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return torch.as_tensor((nodes + 1) / 2, device=device), torch.as_tensor(weights / 2, device=device)


def _angle(normal: Tensor, kappa: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The angle at the quantile of the standard normal deviate, and its derivative by kappa; (..., 1)."""
    law = _law(kappa, m)
    normal = normal.to(law.kappa).clamp(-_EXTREME, _EXTREME)
    # Mass is counted from the nearer end, so that both tails keep their digits.
    start, end = torch.where(normal < 0, law.low, law.high), torch.where(normal < 0, law.high, law.low)
    share = torch.special.log_ndtr(-normal.abs())
    whole, side = _integral(law, law.low, law.high), (end - start).sign()
    angle = _guess(law, start, end, share.exp())
    part, pace = _progress(law, start, angle)
    for _ in range(_STEPS):
        # Newton's steps from log mass to log distance, which is nearly straight at an end where the density vanishes.
        distance = (angle - start).abs().clamp_min(_TINY)
        distance = distance * (pace / distance * (share + whole.log_mass - part.log_mass)).exp()
        angle = start + side * torch.minimum(distance, (end - start).abs())
        part, pace = _progress(law, start, angle)
    return _like(angle, kappa), _like(side * pace * (part.mean - whole.mean), kappa)


def _progress(law: _Law, start: Tensor, angle: Tensor) -> tuple[_Integral, Tensor]:
    """What lies between start and angle, and how far the angle moves for each unit of its log mass."""
    part = _integral(law, start, angle)
    return part, (part.log_mass - _height(law, angle)[0]).exp()


def _guess(law: _Law, start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """The angle between which and `start` the share lies, for a density that is straight between points of a grid."""
    steps = torch.linspace(0, 1, _CELLS + 1, dtype=share.dtype, device=share.device)
    density = _height(law, start + (end - start) * steps)[0].exp()
    mass = density[..., :-1] + density[..., 1:]
    below = torch.cat([torch.zeros_like(share), mass.cumsum(-1)], -1)
    target = share * below[..., -1:]
    cell = (torch.searchsorted(below, target.contiguous()) - 1).clamp(0, _CELLS - 1)
    left, right = density.gather(-1, cell), density.gather(-1, cell + 1)
    rest = ((target - below.gather(-1, cell)) / (left + right).clamp_min(_TINY)).clamp(0, 1)
    slant = ((1 - rest) * left.square() + rest * right.square()).sqrt()
    into = rest * (left + right) / (left + slant).clamp_min(_TINY)
    return start + (end - start) * (cell + into) / _CELLS


def _across(pole: Tensor, noise: Tensor) -> Tensor:
    """The direction (..., m) of the noise at right angles to the pole; some direction where the noise has none."""
    rest = noise - (pole * noise).sum(-1, keepdim=True) * pole
    axis = torch.zeros_like(pole).scatter(-1, pole.abs().argmin(-1, keepdim=True), 1.0)
    other = axis - (pole * axis).sum(-1, keepdim=True) * pole
    rest = torch.where(_norm(rest) > 1e-6 * _norm(noise) + _TINY, rest, other)
    return rest / _norm(rest)


def _norm(vectors: Tensor) -> Tensor:
    return vectors.square().sum(-1, keepdim=True).sqrt().clamp_min(_TINY)


def _change(values: Tensor) -> Tensor:
    """Nothing, with the derivative of the values: what attaches a known derivative to a value."""
    return _wide(values - values.detach())


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.device.type == "mps" else values.double()


def _like(values: Tensor, other: Tensor) -> Tensor:
    """On the other's device, as wide as that allows."""
    return values.to(other.device, torch.float32 if other.device.type == "mps" else torch.float64)


def _log_sines(m: int) -> float:
    """Log of the integral of sin^{m-2} from 0 to pi."""
    return 0.5 * math.log(math.pi) + math.lgamma((m - 1) / 2) - math.lgamma(m / 2)


def _log_area(m: int) -> float:
    """Log of the area of the unit sphere in R^m, m >= 1 (two points)."""
    return math.log(2) + m / 2 * math.log(math.pi) - math.lgamma(m / 2)
