"""What training minimises: a reconstruction loss and the cost of the code; critics, features and courses on top."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from anomaly_vae.adversaries import critic_loss, frozen, generator_loss
from anomaly_vae.augmentation import AugmentationSpec
from anomaly_vae.corruptions import CorruptionSpec, corrupt
from anomaly_vae.exposure import ExposureSpec
from anomaly_vae.latent_laws import Step
from anomaly_vae.marking import focal_loss
from anomaly_vae.model import AutoEncoder, Context, ModelSpec, beside
from anomaly_vae.perceptual import PerceptualSpec
from anomaly_vae.spec import Spec


class LossSpec(Spec):
    """The reconstruction loss of an image; `weight` is the lectures' alpha.

    `nll`: -log p(x given z) in nats, which makes reconstruction + KL the negative ELBO. `mse`, `mae`: squared and
    absolute error; `bce`: cross-entropy in nats; each summed over pixels and channels, or their `mean`.
    """

    kind: Literal["nll", "mse", "mae", "bce"] = "nll"
    weight: float = Field(1.0, ge=0)
    reduction: Literal["sum", "mean"] = "sum"

    def of(self, model: AutoEncoder, output: Tensor, x: Tensor) -> Tensor:
        """Weighted loss, mean over the batch, shape (); `output` is the decoder's."""
        if self.kind == "nll":
            values = -model.likelihood.log_prob(output, x)
        else:
            mean = model.likelihood.mean(output)
            values = _PER_PIXEL[self.kind](mean, x)
        per_image = values.flatten(1)
        return self.weight * (per_image.sum(1) if self.reduction == "sum" else per_image.mean(1)).mean()


def _cross_entropy(mean: Tensor, x: Tensor) -> Tensor:
    """Written out: PyTorch's own is forbidden under mixed precision and where x is above 1 by a rounding."""
    mean = mean.float()
    return -(x * mean.clamp_min(1e-6).log() + (1 - x) * (1 - mean).clamp_min(1e-6).log())


_PER_PIXEL = {
    "mse": lambda mean, x: (mean - x) ** 2,
    "mae": lambda mean, x: (mean - x).abs(),
    "bce": _cross_entropy,
}


class AdversarySpec(Spec):
    """How the critic of `model.critic` takes part, each weight per image.

    `weight`: the decoder's gain from fooling it, by reconstructions and by samples (VAE-GAN, Larsen et al. 2016);
    `features`: squared difference of the critic's features of picture and reconstruction, summed over features.
    """

    weight: float = Field(1.0, ge=0)
    features: float = Field(1.0, ge=0)


class CourseSpec(Spec):
    """The order of learning. `joint`: all parts at once.

    `greedy`: over the first `share` of training one pair of stages after the other, from the pixels inwards, each
    rebuilding what it is given (stacked autoencoder, Bengio et al. 2007); then all together.
    `generator_first`: over the first `share` decoder and critic alone, as a GAN (DCGAN, Radford et al. 2016); then the
    encoder alone, so that decoded codes give pictures back (f-AnoGAN, Schlegl et al. 2019).
    """

    kind: Literal["joint", "greedy", "generator_first"] = "joint"
    share: float = Field(0.5, gt=0, lt=1)


class ObjectiveSpec(Spec):
    """All terms. `augmentation` makes other views of a picture, `corruption` damages what the encoder sees of it.

    `exposure`: how known anomalies take part, where there are any; null: not at all.
    `encoder_steps`: more steps of the encoder alone for each step of all, over the first
    `encoder_share` of training (He et al. 2019, against posterior collapse).
    """

    loss: LossSpec = Field(default_factory=LossSpec)
    perceptual: PerceptualSpec | None = None
    adversary: AdversarySpec | None = None
    augmentation: AugmentationSpec | None = None
    corruption: tuple[CorruptionSpec, ...] = ()
    exposure: ExposureSpec | None = Field(default_factory=ExposureSpec)
    course: CourseSpec = Field(default_factory=CourseSpec)
    encoder_steps: int = Field(0, ge=0, le=100)
    encoder_share: float = Field(0.3, ge=0, le=1)

    def comparable(self, model: ModelSpec) -> bool:
        """Whether held-out losses of different epochs can be held against each other."""
        return self.course.kind == "joint" and self.adversary is None and model.latent.comparable

    def has_parts(self, model: ModelSpec) -> bool:
        """Whether some weights take no part in some steps."""
        return self.course.kind != "joint" or (model.backbone is not None and model.backbone.learns)

    def problem(self, model: ModelSpec) -> str | None:
        """Why it cannot be minimised by such a model; None where it can."""
        return next((says for wrong, says in self._rules(model) if wrong), None)

    def _rules(self, model: ModelSpec) -> Iterator[tuple[bool, str]]:
        """What must not be, and what to do about it."""
        critic, network, latent, kind = model.critic, model.network, model.latent, self.course.kind
        greedy, first = kind == "greedy", kind == "generator_first"
        skips = network.sees_input or getattr(network, "latent_skips", False)
        yield (
            critic is None and (first or self.adversary is not None),
            "objective.adversary and generator_first need a critic; set model.critic",
        )
        yield (
            critic is not None and self.adversary is None,
            "model.critic would never learn; set objective.adversary",
        )
        yield (
            model.marker is not None and all(one.kind == "noise" for one in self.corruption),
            "model.marker learns from made-up defects; list some in objective.corruption, such as [{kind: strokes}]",
        )
        yield (
            (model.marker is not None or model.views is not None) and (first or greedy),
            "model.marker and model.views learn beside the rest; set objective.course.kind to joint",
        )
        yield (
            model.backbone is not None and self.perceptual is not None,
            "objective.perceptual compares pictures, and model.backbone gives features; leave out one of them",
        )
        yield (
            model.backbone is not None and model.backbone.learns and self.encoder_steps > 0,
            "the encoder cannot begin while model.backbone learns; set objective.encoder_steps to 0",
        )
        yield (
            self.loss.kind == "bce" and not getattr(model.likelihood, "squash", True),
            "bce wants pictures between 0 and 1 from the decoder; set model.likelihood.squash to true",
        )
        yield (
            self.adversary is not None and network.sees_input,
            "a critic's samples have no picture to skip from; set model.network.skips to false",
        )
        yield (
            first and not latent.has_prior,
            "generator_first draws z from a prior; set model.latent.prior to normal, or another latent law",
        )
        yield (
            first and self.encoder_steps > 0,
            "generator_first fits the encoder alone anyway; set objective.encoder_steps to 0",
        )
        yield (
            first and critic is not None and getattr(critic.network, "norm", "none") == "batch",
            "the critic must stand still while the encoder learns; set model.critic.network.norm to group",
        )
        yield (
            greedy and skips,
            "greedy pre-training takes one pair of stages at a time; set the network's skips to false",
        )
        yield (
            greedy and (model.condition is not None or self.adversary is not None or not latent.comparable),
            "greedy pre-training knows neither classes nor critics; leave out model.condition and critics",
        )
        yield (
            greedy and (latent.kind == "contractive" or bool(self.corruption)),
            "greedy pre-training rarely sees the picture; leave out objective.corruption and contractive codes",
        )


class Loss(NamedTuple):
    """Training loss: `total` is what is minimised, per pixel; the parts are means per image, as measured.

    `reconstruction`: -log p(x given z) in nats, whatever loss is minimised; `latent`: the cost of the code, unweighted.
    NaN where a course does not compute them.
    """

    total: Tensor
    reconstruction: Tensor
    latent: Tensor


class Objective(nn.Module):
    """A model and what it minimises. Only the model's own state is kept with a detector."""

    def __init__(self, spec: ObjectiveSpec, model: AutoEncoder) -> None:
        super().__init__()
        self.spec, self.model = spec, model
        self.perceptual = spec.perceptual.build(model.shape[0]) if spec.perceptual else None

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        progress: float,
        seed: int,
        label: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Loss:
        """Loss of a batch of pictures x (B, C, H, W) in [0, 1] when the share `progress` of training is done.

        `noise` (B, D) is standard normal and decides the draw of z, `seed` all other chance; `known` (K, C, H, W) are
        known anomalies. In eval mode only what can be held against other pictures is summed: no corruption, no critics,
        no known anomalies, the course's last part.
        """
        course, backbone = self.spec.course, self.model.backbone
        if self.training and self.spec.augmentation is not None:
            x = self.spec.augmentation(x, torch.Generator(x.device).manual_seed(seed + 2))
        if backbone is not None and (progress < backbone.share or not (self.training or backbone.measured)):
            nothing = x.new_full((), math.nan)
            # Before there are features, nothing of them can be held against other pictures.
            alone = backbone.loss(x, torch.Generator(x.device).manual_seed(seed)) if self.training else nothing
            return Loss(alone, nothing, nothing)
        progress = self._rest(progress)
        if self.training and progress < course.share and course.kind != "joint":
            generator = torch.Generator(x.device).manual_seed(seed)
            x = self.model.perceive(x)
            return self._greedy(x, noise, progress) if course.kind == "greedy" else self._generate(x, generator, label)
        return self._reconstruct(x, noise, progress, seed, label, known)

    def learners(self, progress: float) -> Sequence[nn.Module] | None:
        """The modules that learn at this point; None: all of them."""
        model, course = self.model, self.spec.course
        if model.backbone is not None and progress < model.backbone.share:
            return [model.backbone]
        progress = self._rest(progress)
        if course.kind == "greedy" and progress < course.share:
            k = self._pair(progress)
            inner = [model.law] if k == len(model.encoder.stages) - 1 else []
            return [model.encoder.stages[k], model.decoder.stages[-1 - k], *inner]
        if course.kind == "generator_first":
            assert model.critic is not None
            embedding = [model.embedding] if model.classes else []
            return [model.decoder, model.critic, *embedding] if progress < course.share else [model.encoder, model.law]
        return None

    def _rest(self, progress: float) -> float:
        """How much is done of what remains when the backbone has learnt."""
        share = self.model.backbone.share if self.model.backbone is not None else 0.0
        return (progress - share) / (1 - share)

    def _pair(self, progress: float) -> int:
        """Which pair of stages learns, 0 at the pixels."""
        count = len(self.model.encoder.stages)
        return min(int(progress / self.spec.course.share * count), count - 1)

    def _reconstruct(
        self, pictures: Tensor, noise: Tensor, progress: float, seed: int, label: Tensor | None, known: Tensor | None
    ) -> Loss:
        model, law, x = self.model, self.model.law, self.model.perceive(pictures)
        generator_fixed = self.spec.course.kind == "generator_first"
        if generator_fixed:
            # What is fitted is the encoder; the generator must answer as it will when scoring.
            model.decoder.eval()
        seen, mask = x, None
        if self.training and self.spec.corruption:
            damaged, mask = corrupt(pictures, self.spec.corruption, torch.Generator(x.device).manual_seed(seed))
            seen = model.perceive(damaged)
        # Gradients with respect to the picture are wanted even where the rest is only measured.
        with torch.enable_grad() if law.wants_gradient else nullcontext():
            seen = seen.detach().clone().requires_grad_() if law.wants_gradient else seen
            posterior, context = model.read(seen, label)
            posterior = posterior.float()
            z = posterior.at(noise)
            step = Step(posterior, z, seen, noise)
            cost = law.cost(step)
        output = model.decode(z, context).float()
        if self.training:
            model.likelihood.observe(output, x)
        nll = -model.likelihood.log_prob(output, x).flatten(1).sum(1).mean()
        total = self.spec.loss.of(model, output, x)
        for term in self._terms(x, model.likelihood.mean(output), label):
            total = total + term
        if self.training or law.comparable:
            total = total + model.spec.latent.weight_at(progress) * cost
        total = total / x[0].numel()
        if self.training:
            for term in self._learning_beside(x, seen, mask, output, seed):
                total = total + term
            for term in self._critics(x, step, context, output, progress, seed, label):
                total = total + term
            # After all else: what normalises the normals' batches must not change any more.
            if known is not None and self.spec.exposure is not None:
                total = total + self._exposed(known, x, seed)
        return Loss(total, nll.detach(), cost.detach())

    def _learning_beside(
        self, x: Tensor, seen: Tensor, mask: Tensor | None, output: Tensor, seed: int
    ) -> Iterator[Tensor]:
        """Neither shares a weight with the rest, and the optimiser's steps do not depend on a loss's scale."""
        model = self.model
        if model.marker is not None and mask is not None:
            yield focal_loss(model.mark(seen, output), mask[:, 0].float())
        if model.views is not None:
            yield model.views.loss(x, torch.Generator(x.device).manual_seed(seed + 3))

    def _exposed(self, known: Tensor, x: Tensor, seed: int) -> Tensor:
        """The cost of known anomalies, augmented as the normals are but never damaged."""
        assert self.spec.exposure is not None
        if self.spec.augmentation is not None:
            known = self.spec.augmentation(known, torch.Generator(x.device).manual_seed(seed + 4))
        return self.spec.exposure.loss(self.model, self.model.perceive(known), x)

    def _terms(self, x: Tensor, mean: Tensor, label: Tensor | None) -> Iterator[Tensor]:
        """Reconstruction terms beside the pixels' own."""
        if self.perceptual is not None:
            yield self.perceptual(mean, x)
        if self.spec.adversary is not None and self.spec.adversary.features:
            yield self.spec.adversary.features * self._feature_error(x, mean, label)

    def _feature_error(self, x: Tensor, mean: Tensor, label: Tensor | None) -> Tensor:
        with torch.no_grad():
            wanted = self.model.features(x, label).float()
        with frozen(self.model):
            got = self.model.features(mean, label).float()
        return (got - wanted).square().flatten(1).sum(1).mean()

    def _critics(
        self, x: Tensor, step: Step, context: Context, output: Tensor, progress: float, seed: int, label: Tensor | None
    ) -> Iterator[Tensor]:
        """Terms of the game with critics; a critic's own loss is not divided by pixels, as it concerns no others."""
        law_critic = self.model.law.critic_cost(step)
        if law_critic is not None:
            yield law_critic
        adversary = self.spec.adversary
        if adversary is None or self.spec.course.kind == "generator_first":
            return
        generator = torch.Generator(x.device).manual_seed(seed + 1)
        drawn = self.model.law.draw(len(x), generator)
        # The encoder is no party to the game: it would learn to please the critic instead of describing the picture.
        z = torch.cat([step.z.detach(), drawn.to(step.z)])
        twice = Context(None if context.embedded is None else context.embedded.repeat(2, 1), ())
        fake = self.model.likelihood.mean(self.model.decode(z, twice).float())
        yield adversary.weight * self._fooled(fake, twice) / x[0].numel()
        yield self._told_apart(x, fake.detach(), context, twice)

    def _fooled(self, fake: Tensor, context: Context) -> Tensor:
        assert self.model.critic is not None
        embedded = None if context.embedded is None else context.embedded.detach()
        with frozen(self.model.critic):
            return generator_loss(self.model.critic(beside(fake, embedded)))

    def _told_apart(self, x: Tensor, fake: Tensor, real_context: Context, fake_context: Context) -> Tensor:
        assert self.model.critic is not None
        return critic_loss(self.model.critic, beside(x, real_context.embedded), beside(fake, fake_context.embedded))

    def _generate(self, x: Tensor, generator: torch.Generator, label: Tensor | None) -> Loss:
        """A step of the GAN: decoder and critic against each other, without an encoder."""
        model, adversary = self.model, self.spec.adversary
        assert adversary is not None
        context = Context(model.embed(label))
        z = model.law.draw(len(x), generator)
        fake = model.likelihood.mean(model.decode(z, context).float())
        total = adversary.weight * self._fooled(fake, context) + self._told_apart(x, fake.detach(), context, context)
        nothing = total.new_full((), math.nan)
        return Loss(total, nothing, nothing)

    def _greedy(self, x: Tensor, noise: Tensor, progress: float) -> Loss:
        """A step of the pair of stages whose turn it is: rebuild what the stages before it make of x."""
        model, k = self.model, self._pair(progress)
        stages, last = model.encoder.stages, len(model.encoder.stages) - 1
        # What stands still must answer always the same: no dropout, and statistics that do not move.
        stages[:k].eval()
        with torch.no_grad():
            given = x
            for stage in stages[:k]:
                given = stage(given)
        stages[:k].train()
        hidden, cost = stages[k](given), given.new_zeros(())
        if k == last:
            posterior = model.law.posterior(hidden).float()
            hidden = posterior.at(noise)
            cost = model.law.cost(Step(posterior, hidden, given, noise))
        rebuilt = model.decoder.stages[last - k](hidden).float()
        nothing = x.new_full((), math.nan)
        if k == 0:
            model.likelihood.observe(rebuilt, x)
            error = self.spec.loss.of(model, rebuilt, x)
        else:
            error = F.mse_loss(rebuilt, given.float(), reduction="none").flatten(1).sum(1).mean()
        return Loss((error + model.spec.latent.weight_at(progress) * cost) / given[0].numel(), nothing, nothing)
