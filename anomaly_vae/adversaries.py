"""Learning against a critic with one optimiser and one step (Goodfellow et al. 2014, the non-saturating losses).

The critic's loss sees the generator's output cut off from its gradient; the generator's loss goes through the critic
`frozen`. Their sum therefore gives each the gradient of its own loss alone, and a run stays resumable to the bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_R1 = 1.0


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """What `module` computes meanwhile has gradients to its input and none to its weights."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """What the critic minimises, in nats: the cross-entropy of telling `real` from `fake`, and a gradient penalty.

    The penalty on real data (R1, Mescheder et al. 2018) is what makes such a game come to rest instead of circling.
    """
    real = real.detach().requires_grad_()
    logits = critic(real).float()
    (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    penalty = gradient.float().flatten(1).square().sum(1).mean()
    told = F.softplus(-logits).mean() + F.softplus(critic(fake.detach()).float()).mean()
    return 0.5 * (told + _R1 * penalty)


def generator_loss(fake: Tensor) -> Tensor:
    """What the generator minimises: -log of the probability that the critic takes its output for real."""
    return F.softplus(-fake.float()).mean()
