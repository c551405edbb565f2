"""A latent space by numbers: draws, codes, walks, sums and maps to the plane. Pictures of them: `exploring`.

Codes are posterior means mu (n, D); decoded pictures are the likelihood's mean as uint8 (n, C, H, W). Whatever is
decoded is first brought to the nearest z that the law of z allows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anomaly_vae.latent_laws import GaussianLaw, LatentLaw
from anomaly_vae.member import Batch
from anomaly_vae.model import AutoEncoder, Context
from anomaly_vae.observations import Marginal, Observation
from anomaly_vae.seeds import generator_of

Plane = npt.NDArray[np.float64]
Rows = Sequence[int] | npt.NDArray[np.int64] | npt.NDArray[np.bool_]

_AT_ONCE = 32
_TSNE_INPUTS = 50
LEAST_FOR_MAPS = 10

STANDARD_NORMAL = "the prior N(0, I)"
_PRIORS = {
    "gaussian": STANDARD_NORMAL,
    "point": STANDARD_NORMAL,
    "adversarial": STANDARD_NORMAL,
    "von_mises_fisher": "the prior, uniform on the unit sphere",
    "mixture": "the prior, a learned mixture of {components} Gaussians",
}


class Codes(NamedTuple):
    """What the encoder makes of n pictures, on the CPU.

    `mu` (n, D): posterior means. `kl` (n, D): nats; None where the law has no KL that falls apart into latents.
    `label` (n,): the class, as the model's number, that a picture is decoded with; None for models without classes.
    """

    mu: Tensor
    kl: Tensor | None = None
    label: Tensor | None = None

    def at(self, rows: Rows) -> "Codes":
        """Those of some pictures."""
        i = torch.from_numpy(np.asarray(rows))
        return Codes(self.mu[i], None if self.kl is None else self.kl[i], None if self.label is None else self.label[i])

    @classmethod
    def join(cls, parts: Sequence["Codes"]) -> "Codes":
        """Those of all parts, one after the other."""
        kl = [one.kl for one in parts if one.kl is not None]
        label = [one.label for one in parts if one.label is not None]
        mu = torch.cat([one.mu for one in parts])
        return cls(mu, torch.cat(kl) if kl else None, torch.cat(label) if label else None)


@dataclass(frozen=True)
class Usage:
    """How much each latent tells of pictures: `values` (D,) of `quantity` in `unit`; which are `active`, bool (D,)."""

    values: Tensor
    quantity: str
    unit: str
    active: Tensor

    @classmethod
    def of(cls, law: LatentLaw, codes: Codes) -> Self:
        """The mean KL where it falls apart into latents; for other laws the variance of the code over the pictures."""
        active = law.active(codes.mu, codes.kl)
        if codes.kl is not None:
            return cls(codes.kl.mean(0), "KL", "nats", active)
        return cls(codes.mu.var(0, correction=0), "variance of the code", "", active)

    @property
    def order(self) -> list[int]:
        """Latents that tell most first; ties in their own order."""
        return [int(unit) for unit in torch.sort(self.values, descending=True, stable=True).indices]


def codes(model: AutoEncoder, images: Tensor, label: Tensor | None = None) -> Codes:
    """Codes of uint8 images (n, C, H, W); a class that `label` (n,) does not give is the most probable one."""
    with torch.inference_mode():
        return Codes.join([_codes(model, batch) for batch in _batches(images, label)])


def _codes(model: AutoEncoder, batch: Batch) -> Codes:
    seen, label = batch.seen_by(model), batch.label
    if isinstance(seen, Marginal):
        label = seen.weights.argmax(0).cpu()
        of_classes = [kl for kl in map(_kl, seen.of_classes) if kl is not None]
        kl = seen.mean(of_classes) if of_classes else None
    else:
        kl = _kl(seen)
    return Codes(seen.code.cpu(), None if kl is None else kl.cpu(), label)


def _kl(seen: Observation) -> Tensor | None:
    """The KL in nats of each latent (B, D), where there is one."""
    law = seen.model.law
    if not law.has_kl:
        return None
    kl = law.kl(seen.posterior, seen.code)
    return kl if kl.shape[1] == law.size and (law.size > 1 or isinstance(law, GaussianLaw)) else None


def _batches(images: Tensor, label: Tensor | None) -> Iterator[Batch]:
    labels = repeat(None) if label is None else torch.split(label, _AT_ONCE)
    for part, given in zip(torch.split(images, _AT_ONCE), labels, strict=False):
        yield Batch(part, given)


def decode(model: AutoEncoder, z: Tensor, label: Tensor | None = None) -> Tensor:
    """The mean picture of each latent z (n, D), a few at a time: uint8 (n, C, H, W) on the CPU.

    `label` (n,): the classes, which conditional models need.
    """
    with torch.inference_mode():
        return _bytes([_decode(model, batch.images, batch.label) for batch in _batches(z, label)])


def _decode(model: AutoEncoder, z: Tensor, label: Tensor | None) -> Tensor:
    context = Context(model.embed(None if label is None else label.to(model.device)))
    return model.likelihood.mean(model.decode(model.law.project(z.to(model.device)), context).float())


def _bytes(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures in [0, 1] as uint8 on the CPU."""
    return (torch.cat([part.cpu() for part in pictures]).clamp(0, 1) * 255).round().to(torch.uint8)


def reconstruct(model: AutoEncoder, images: Tensor, of: Codes) -> Tensor:
    """What the model makes of uint8 images (n, C, H, W) with codes `of`, without chance: the decoded posterior means.

    A decoder with skips sees the pictures themselves too.
    """
    if not model.spec.network.sees_input:
        return decode(model, of.mu, of.label)
    with torch.inference_mode():
        return _bytes([batch.seen_by(model).reconstruction for batch in _batches(images, of.label)])


def prior_of(model: AutoEncoder) -> str | None:
    """The law's prior in words; None where it has none."""
    latent = model.spec.latent
    return _PRIORS[latent.kind].format(**latent.model_dump()) if model.law.has_prior else None


def draw_prior(model: AutoEncoder, count: int, seed: int) -> Tensor:
    """Latents (count, D) from the prior; raises ValueError for laws without one."""
    with torch.inference_mode():
        return model.law.draw(count, generator_of(seed, "prior", 0))


def draw_like(mu: Tensor, count: int, seed: int) -> Tensor:
    """Latents (count, D) from the Gaussian with the mean and covariance of codes mu (n, D), n > 1.

    Ex-post density estimation (Ghosh et al. 2020, section 4). A mixture of the centred codes under normal weights has
    exactly their covariance, which therefore need not be of full rank.
    """
    wide = mu.double()
    weights = torch.randn(count, len(mu), generator=generator_of(seed, "fitted", 0), dtype=torch.float64)
    return (wide.mean(0) + weights @ (wide - wide.mean(0)) / math.sqrt(len(mu) - 1)).float()


def traverse(z: Tensor, unit: int, values: Tensor) -> Tensor:
    """`z` (D,) with latent `unit` set to each of `values` (n,), all others as they are: (n, D)."""
    walk = z.repeat(len(values), 1)
    walk[:, unit] = values
    return walk


def interpolate(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """Points (steps, D) on the straight line between two latents (D,), both ends exactly included."""
    return torch.lerp(first, last, torch.linspace(0, 1, steps)[:, None])


def difference(wanted: Tensor, other: Tensor) -> Tensor:
    """Mean of the codes `wanted` (n, D) minus that of `other` (m, D): a direction (D,), as in DFC-VAE (Hou 2017)."""
    return wanted.double().mean(0).sub(other.double().mean(0)).float()


def add(z: Tensor, direction: Tensor, alphas: Sequence[float]) -> Tensor:
    """z + alpha direction for codes z (n, D) and each alpha: (n, len(alphas), D)."""
    return z[:, None] + torch.tensor(alphas)[:, None] * direction


def pca_plane(mu: Tensor) -> tuple[Plane, tuple[float, float]]:
    """The two directions of largest variance: points (n, 2) and their shares of the variance."""
    from sklearn.decomposition import PCA

    wide = mu.double().numpy()
    if wide.shape[1] == 1:
        wide = np.concatenate([wide, np.zeros_like(wide)], 1)
    fitted = PCA(2, svd_solver="full")
    with np.errstate(invalid="ignore"):  # the shares of no variance at all
        points = fitted.fit_transform(wide)
    first, second = np.nan_to_num(fitted.explained_variance_ratio_)
    return np.asarray(points, np.float64), (float(first), float(second))


def tsne_plane(mu: Tensor, seed: int) -> Plane:
    """t-SNE (van der Maaten and Hinton 2008) of codes (n, D) to (n, 2); near neighbours stay near, distances lie."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    wide = mu.double().numpy()
    if min(wide.shape) > _TSNE_INPUTS:
        wide = PCA(_TSNE_INPUTS, svd_solver="full").fit_transform(wide)
    start = pca_plane(mu)[0]
    # A start of this spread is what scikit-learn's own `init="pca"` takes; a collapsed space has none.
    start = (start / max(float(start[:, 0].std()), 1e-12) * 1e-4).astype(np.float32)
    perplexity = min(30.0, (len(wide) - 1) / 3)
    fitted = TSNE(2, perplexity=perplexity, init=start, random_state=seed % 2**32, n_jobs=1)
    return np.asarray(fitted.fit_transform(wide), np.float64)
