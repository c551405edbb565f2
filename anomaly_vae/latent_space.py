"""A latent space by numbers: draws, codes, walks, sums and maps to the plane. Pictures of them: `exploring`.

Codes are posterior means mu (n, D); decoded pictures are the likelihood's mean as uint8 (n, C, H, W).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anomaly_vae.member import normalise
from anomaly_vae.model import AutoEncoder
from anomaly_vae.scores import Observation
from anomaly_vae.seeds import generator_of

Plane = npt.NDArray[np.float64]

_AT_ONCE = 32
_TSNE_INPUTS = 50
LEAST_FOR_MAPS = 10


def codes(model: AutoEncoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior means and the KL in nats of each latent, both (n, D) on the CPU, of uint8 images (n, C, H, W)."""
    with torch.inference_mode():
        seen = [Observation(model, normalise(batch, model.device)).posterior for batch in torch.split(images, _AT_ONCE)]
        return torch.cat([one.mu.cpu() for one in seen]), torch.cat([one.kl().cpu() for one in seen])


def decode(model: AutoEncoder, z: Tensor) -> Tensor:
    """The mean picture of each latent z (n, D), a few at a time: uint8 (n, C, H, W) on the CPU."""
    with torch.inference_mode():
        means = [
            model.likelihood.mean(model.decode(part.to(model.device)).float()).cpu()
            for part in torch.split(z, _AT_ONCE)
        ]
        return (torch.cat(means).clamp(0, 1) * 255).round().to(torch.uint8)


def reconstruct(model: AutoEncoder, images: Tensor) -> Tensor:
    """What the model makes of uint8 images (n, C, H, W), without chance: the decoded posterior means."""
    return decode(model, codes(model, images)[0])


def draw_prior(model: AutoEncoder, count: int, seed: int) -> Tensor:
    """Latents (count, D) from the prior N(0, I)."""
    return torch.randn(count, model.spec.latent.size, generator=generator_of(seed, "prior", 0))


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


def by_information(kl: Tensor) -> list[int]:
    """Latents with the largest mean KL (D,) first; ties in their own order."""
    return [int(unit) for unit in torch.sort(kl, descending=True, stable=True).indices]


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
