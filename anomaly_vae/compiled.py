"""Scores as one native call: PyTorch records what Python does to a batch, and plays it back without Python.

While a recording plays, request threads run; step by step, Python's lock would go to and fro between them and the
model. A recording is made anew wherever a bundle is loaded, and never stored. It sees numbers, not the program: where a
score decides by the pictures at hand, it repeats the decision it saw. So it is trusted only where it gives the scores
that Python gives, for batches of several sizes of pictures that it has not seen; elsewhere Python goes on.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anomaly_vae.detector import Detector
from anomaly_vae.expert import Expert
from anomaly_vae.images import masked
from anomaly_vae.member import Member, Native

AT_ONCE = 16
"""Larger batches are cut: on a CPU they are slower, and this is the largest that has been tried."""

_MOST_SIDES = 4
_RECORDED = 3
_TRIED = ((0, 1), (1, 2), (3, 3), (1, AT_ONCE))
"""Where batches of the examples begin and how many they hold: each kind of picture comes first in one."""

_AGREEMENT = 1e-5
"""How far a recording may stand from Python, in standard deviations of normals or as a share of z: less than what a
float32 score may move with its batch. Measured on one thread are differences of exactly 0."""


class Scoring(nn.Module):
    """All scores of some experts beside one another: uint8 images as the models see them -> float64 (B, columns).

    The last columns are the `latents` of the first one's code.
    """

    def __init__(self, experts: Sequence[Expert], latents: Sequence[int] = ()) -> None:
        super().__init__()
        self.experts, self.latents = tuple(experts), list(latents)
        self.models = nn.ModuleList(expert.model for expert in experts)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of images (B, C, H, W)."""
        first, *others = self.experts
        columns, code = first.columns_and_code(images)
        watched = [code[:, self.latents].double()] if self.latents else []
        return torch.cat([columns, *(expert.columns(images) for expert in others), *watched], 1)


def recorded(detector: Detector) -> Detector:
    """The same detector, whose members score by native calls wherever these agree with Python. On a CPU only."""
    if detector.device.type != "cpu" or detector.wants_classes:
        return detector
    with torch.inference_mode():
        pictures = examples(detector, 1 + AT_ONCE + _RECORDED)
        latents = [detector.watched, *[()] * (len(detector.members) - 1)]
        pairs = zip(detector.members, latents, strict=True)
        return detector.scored_by([_recorded(member, pictures, watched) for member, watched in pairs])


def examples(detector: Detector, count: int) -> Tensor:
    """Pictures as the models see them, uint8 (count, C, H, W): in turn one of the bundle's probes, noise, another probe
    and an even grey; noise instead of probes that there are not."""
    spec, generator = detector.spec, torch.Generator().manual_seed(0)
    found = torch.randint(256, (count, *spec.shape), dtype=torch.uint8, generator=generator)
    found[3::4] = torch.linspace(0, 255, len(found[3::4]))[:, None, None, None].byte()
    if detector.probes is None:
        return found
    seen = masked(detector.probes.images, detector.image)
    if spec.tiling is not None:
        seen = torch.cat([spec.tiling.cut(image) for image in seen[:count]])
    known = found[::2]
    known[: len(seen)] = seen[: len(known)]
    return found


def _recorded(member: Member, pictures: Tensor, latents: Sequence[int]) -> Member:
    experts = [expert for of_kind in member.experts.values() for expert in of_kind]
    scoring = Scoring(experts, latents) if member.native is None else member.native.columns
    if not isinstance(scoring, Scoring):
        return member
    playing = _recording(scoring.eval(), pictures)
    if playing is None:
        return member
    exact = member.native is None or member.native.exact
    return replace(member, native=Native(_SideBySide(playing), exact))


def _recording(scoring: Scoring, pictures: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What plays back `scoring`; None where it cannot be recorded, or plays something else."""
    try:
        with warnings.catch_warnings():
            # That recording is old-fashioned, which is known, and may have missed a decision, which is tested below.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(scoring, (pictures[-_RECORDED:],), check_trace=False)  # type: ignore[no-untyped-call]
            # Folding batch norms into convolutions would move scores by up to 1e-4 quartile ranges, for 4% of the time.
            playing = _freed(torch.jit.freeze(traced, optimize_numerics=False), traced)
        return playing if all(_agree(scoring, playing, pictures[i : i + size]) for i, size in _TRIED) else None
    except Exception:  # whatever a recorder cannot do, Python can
        return None


def _freed(frozen: Any, traced: Any) -> Callable[[Tensor], Tensor]:
    """`frozen` as a function that takes its weights along when it goes.

    PyTorch keeps the code of all modules that were ever recorded, weights that were frozen into it and all, until the
    process ends. So the code is copied into a function, which is nobody's but ours, and the modules' own is emptied.
    """
    graph = frozen.graph.copy()
    itself, *_ = graph.inputs()
    if itself.uses():
        found: Callable[[Tensor], Tensor] = frozen
        return found
    graph.eraseInput(0)
    playing: Callable[[Tensor], Tensor] = torch._C._create_function_from_graph("playing", graph)
    for part in (*frozen.modules(), *traced.modules()):
        for name in part._c._method_names():
            _empty(part._c._get_method(name).graph)
    return playing


def _empty(graph: Any) -> None:
    for _ in list(graph.outputs()):
        graph.eraseOutput(0)
    for node in reversed(list(graph.nodes())):
        node.destroy()


def _agree(scoring: Scoring, playing: Callable[[Tensor], Tensor], images: Tensor) -> bool:
    sizes = [*(len(expert.spec.columns) for expert in scoring.experts), len(scoring.latents)]
    expected = torch.split(scoring(images), sizes, 1)
    # The first call of a recording only watches; from the second on it is what will serve.
    for played in (playing(images), playing(images)):
        *columns, code = torch.split(played, sizes, 1)
        if not torch.allclose(code, expected[-1], rtol=_AGREEMENT, atol=_AGREEMENT):
            return False
        for expert, ours, theirs in zip(scoring.experts, columns, expected[:-1], strict=True):
            z, wanted = expert.standing(ours.numpy()), expert.standing(theirs.numpy())
            if not np.allclose(z, wanted, rtol=_AGREEMENT, atol=_AGREEMENT, equal_nan=True):
                return False
    return True


class _SideBySide:
    """A recording played over the parts of a batch at once, each by one thread on one core.

    Threads that share every single operation wait for one another some hundred times a batch, each time for the one
    that the system has just put off for a request. Parts wait once. With many cores parts would be too small to be
    quick; there operations are shared.
    """

    def __init__(self, playing: Callable[[Tensor], Tensor]) -> None:
        cores = torch.get_num_threads()
        self._playing, self._sides = playing, cores if cores <= _MOST_SIDES else 1
        self._pool = _alone(self._sides) if self._sides > 1 else None
        # What a thread sets is its own, and from then on that of new threads: for those it was not meant.
        torch.set_num_threads(cores)

    def __call__(self, images: Tensor) -> Tensor:
        """Scores (B, columns) of uint8 images."""
        size = min(AT_ONCE, -(-len(images) // self._sides))
        parts = torch.split(images, size)
        if self._pool is None or len(parts) == 1:
            return torch.cat([self._playing(part) for part in parts])
        return torch.cat(list(self._pool.map(self._part, parts)))

    def _part(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._playing(images)


def _alone(threads: int) -> ThreadPoolExecutor:
    """Threads that share no operation with others."""
    pool, all_there = ThreadPoolExecutor(threads, "judge"), threading.Barrier(threads)

    def begin() -> None:
        torch.set_num_threads(1)
        all_there.wait()

    for started in [pool.submit(begin) for _ in range(threads)]:
        started.result()
    return pool
