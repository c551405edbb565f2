"""Members as arrays for a bundle, and back."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from anomaly_vae.expert import Expert, References
from anomaly_vae.expert_spec import ExpertSpec
from anomaly_vae.member import Member
from anomaly_vae.networks import Shape
from anomaly_vae.recipe import DetectorSpec


def packed_members(members: Sequence[Member]) -> tuple[dict[str, Tensor], dict[str, npt.NDArray[Any]]]:
    """Weights, and references, each by the place that `unpacked_member` looks for them in."""
    weights: dict[str, Tensor] = {}
    numbers: dict[str, npt.NDArray[Any]] = {}
    for i, member in enumerate(members):
        for place, expert in _places(i, member):
            for name, tensor in expert.model.state_dict().items():
                weights[f"{place}.{name}"] = tensor.detach().cpu().contiguous()
            numbers |= {f"{place}.{name}": array for name, array in _pack_references(expert.references).items()}
    return weights, numbers


def _pack_references(references: References) -> dict[str, npt.NDArray[Any]]:
    packed: dict[str, npt.NDArray[Any]] = {"heat_scales": references.heat_scales}
    packed |= {f"scale.{kind}": knots for kind, knots in references.scales.items()}
    for kind, tensors in references.of_scores.items():
        packed |= {f"score.{kind}.{name}": tensor.cpu().numpy() for name, tensor in tensors.items()}
    return packed


def _places(i: int, member: Member) -> Iterator[tuple[str, Expert]]:
    """Each expert of member i and under what name its tensors are kept."""
    for kind, experts in member.experts.items():
        for seed, expert in enumerate(experts):
            yield _place(i, kind, seed), expert


def _place(i: int, kind: str, seed: int) -> str:
    return f"{i}/{kind}/{seed}"


def unpacked_member(
    spec: DetectorSpec, i: int, weights: dict[str, Tensor], numbers: dict[str, npt.NDArray[Any]]
) -> Member:
    shape = spec.shape
    experts = {
        kind: tuple(_unpack_expert(own, shape, _place(i, kind, seed), weights, numbers) for seed in range(own.ensemble))
        for kind, own in spec.experts.items()
    }
    return Member(experts)


def _unpack_expert(
    spec: ExpertSpec, shape: Shape, place: str, weights: dict[str, Tensor], numbers: dict[str, npt.NDArray[Any]]
) -> Expert:
    # On the meta device a spec that claims gigabytes costs nothing until its weights turn out to be there.
    with torch.device("meta"):
        model = spec.model.build(shape, seed=0)
    own = {name.removeprefix(f"{place}."): tensor for name, tensor in weights.items() if name.startswith(f"{place}.")}
    wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    if wanted != {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}:
        raise ValueError("the weights do not fit its own spec")
    model.load_state_dict(own, assign=True)
    model.lay_channels_last()
    of_scores: dict[str, dict[str, Tensor]] = {}
    for name, array in numbers.items():
        if name.startswith(f"{place}.score."):
            kind, part = name.removeprefix(f"{place}.score.").split(".")
            of_scores.setdefault(kind, {})[part] = torch.from_numpy(array)
    scales = {kind: numbers[f"{place}.scale.{kind}"] for kind in spec.columns}
    return Expert(spec, model.eval(), References(of_scores, scales, numbers[f"{place}.heat_scales"]))
