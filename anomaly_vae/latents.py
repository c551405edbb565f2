"""Settings of the law of z; the laws themselves are modules of `latent_laws`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from anomaly_vae.latent_laws import (
    AdversarialLaw,
    ContractiveLaw,
    GaussianLaw,
    LatentLaw,
    MixtureLaw,
    PointLaw,
    SparseLaw,
    SphericalLaw,
)
from anomaly_vae.spec import Spec


class _LatentSpec(Spec):
    """`size`: latents. The cost's weight rises from 0 over the share `warmup` of each of `cycles` equal parts of
    training (one: linear warm-up; several: the cyclical schedule of Fu et al. 2019).
    """

    size: int = Field(32, ge=1, le=4096)
    warmup: float = Field(0.1, ge=0, le=1)
    cycles: int = Field(1, ge=1, le=100)

    has_kl: ClassVar[bool] = False
    comparable: ClassVar[bool] = True

    @property
    def has_prior(self) -> bool:
        """Whether z can be drawn without codes of pictures."""
        return self.has_kl

    @property
    def encoder_outputs(self) -> int:
        """How many numbers the encoder gives for each image."""
        return self.size

    @property
    def full_weight(self) -> float:
        """The cost's weight once warm."""
        return 0.0

    def weight_at(self, progress: float) -> float:
        """The cost's weight when the share `progress` of training is done."""
        part = progress * self.cycles % 1.0 if progress < 1 else 1.0
        return self.full_weight * min(1.0, part / self.warmup) if self.warmup else self.full_weight


class PointSpec(_LatentSpec):
    """A plain code. `prior: normal` says that the decoder is trained on z ~ N(0, I), as a generator is."""

    kind: Literal["point"] = "point"
    prior: Literal["none", "normal"] = "none"

    @property
    def has_prior(self) -> bool:
        return self.prior == "normal"

    def build(self) -> LatentLaw:
        """The law as a module."""
        return PointLaw(self.size, self.prior)


class _PenaltySpec(_LatentSpec):
    weight: float = Field(1.0, ge=0)

    @property
    def full_weight(self) -> float:
        return self.weight


class SparseSpec(_PenaltySpec):
    """`penalty: l1` of the code, or `rate`: a mean activation of `rate` for each latent."""

    kind: Literal["sparse"] = "sparse"
    penalty: Literal["l1", "rate"] = "l1"
    rate: float = Field(0.05, gt=0, lt=1)

    def build(self) -> LatentLaw:
        """The law as a module."""
        return SparseLaw(self.size, self.rate if self.penalty == "rate" else None)


class ContractiveSpec(_PenaltySpec):
    """Squared Frobenius norm of dh/dx: exact up to `exact` latents, else estimated from `probes` directions."""

    kind: Literal["contractive"] = "contractive"
    exact: int = Field(16, ge=0, le=4096)
    probes: int = Field(1, ge=1, le=64)

    def build(self) -> LatentLaw:
        """The law as a module."""
        return ContractiveLaw(self.size, self.exact, self.probes)


class AdversarialSpec(_PenaltySpec):
    """`hidden`: width of the critic's two layers."""

    kind: Literal["adversarial"] = "adversarial"
    comparable: ClassVar[bool] = False

    @property
    def has_prior(self) -> bool:
        return True

    hidden: int = Field(128, ge=1, le=4096)

    def build(self) -> LatentLaw:
        """The law as a module."""
        return AdversarialLaw(self.size, self.hidden)


class _VariationalSpec(_LatentSpec):
    """`beta` weighs the KL (beta-VAE, Higgins et al. 2017)."""

    beta: float = Field(1.0, ge=0)
    has_kl: ClassVar[bool] = True

    @property
    def encoder_outputs(self) -> int:
        return 2 * self.size

    @property
    def full_weight(self) -> float:
        return self.beta


class GaussianLatentSpec(_VariationalSpec):
    """`free_bits`: the KL in nats that each latent, averaged over a batch, has for nothing (Kingma et al. 2016)."""

    kind: Literal["gaussian"] = "gaussian"
    free_bits: float = Field(0.0, ge=0)

    def build(self) -> LatentLaw:
        """The law as a module."""
        return GaussianLaw(self.size, self.free_bits)


class SphericalSpec(_VariationalSpec):
    """Latents on the unit sphere in `size` dimensions."""

    kind: Literal["von_mises_fisher"] = "von_mises_fisher"
    size: int = Field(32, ge=2, le=4096)

    @property
    def encoder_outputs(self) -> int:
        return self.size + 1

    def build(self) -> LatentLaw:
        """The law as a module."""
        return SphericalLaw(self.size)


class MixtureSpec(_VariationalSpec):
    """A prior of `components` Gaussians."""

    kind: Literal["mixture"] = "mixture"
    components: int = Field(10, ge=1, le=1000)

    def build(self) -> LatentLaw:
        """The law as a module."""
        return MixtureLaw(self.size, self.components)


LatentSpec = Annotated[
    PointSpec | SparseSpec | ContractiveSpec | GaussianLatentSpec | SphericalSpec | MixtureSpec | AdversarialSpec,
    Field(discriminator="kind"),
]
