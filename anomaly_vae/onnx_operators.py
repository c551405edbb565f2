"""Functions that ONNX has not, or onnxruntime not in float64, in terms of those that there are.

`Expressible` puts them in the others' places while a graph is recorded.
"""

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_LARGEST_SOLVED = 64
"""Unknowns: solving is written out step by step."""


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solutions (B, n, k) of symmetric positive definite systems (B, n, n), by Gauss and Jordan without pivots."""
    size = int(matrix.shape[-1])
    if size > _LARGEST_SOLVED:
        raise ValueError(f"systems of {size} equations, {_LARGEST_SOLVED} at most")
    rows = torch.cat([matrix, right], -1)
    numbers = torch.arange(size)[:, None]
    for i in range(size):
        pivot = rows[:, i : i + 1] / rows[:, i : i + 1, i : i + 1]
        rows = torch.where(numbers == i, pivot, rows - rows[:, :, i : i + 1] * pivot)
    return rows[:, :, size:]


def resized(x: Tensor, size: Any = None, mode: str = "nearest", **others: Any) -> Any:
    """Maps (B, C, h, w) on another grid: by area, and bilinearly in float64, which has no operator."""
    wide = mode == "bilinear" and x.dtype == torch.float64
    if size is None or any(others.values()) or not (mode == "area" or wide):
        return NotImplemented
    weights = _means if mode == "area" else _between
    rows, columns = (weights(int(length), int(to), x) for length, to in zip(x.shape[2:], size, strict=True))
    return rows @ (x @ columns.T)


def pooled(x: Tensor, size: Any) -> Tensor:
    """Means of the pixels (B, C, H, W) under each cell of a coarser grid; one number is that of both its sides."""
    size = list(size) if isinstance(size, (list, tuple)) else [size, size]
    found: Tensor = x.mean((2, 3), keepdim=True) if size == [1, 1] else resized(x, size, "area")
    return found


def patches(x: Tensor, size: int, dilation: int = 1, padding: int = 0, stride: int = 1) -> Any:
    """Neighbourhoods (B, C size^2, places) of each place of x (B, C, H, W) that has a whole one, as `F.unfold`."""
    if (dilation, padding, stride) != (1, 0, 1):
        return NotImplemented
    height, width = (int(side) - size + 1 for side in x.shape[2:])
    taps = [x[:, :, i : i + height, j : j + width] for i, j in product(range(size), repeat=2)]
    return torch.stack(taps, 2).flatten(3).flatten(1, 2)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = (1, 1), padding: Any = (0, 0),
    dilation: Any = (1, 1), groups: int = 1,
) -> Any:  # fmt: skip
    """A convolution in float64, as a sum over the kernel's taps."""
    if x.dtype != torch.float64 or groups != 1:
        return NotImplemented
    (down, across), (rows, columns) = _pair(stride), _pair(dilation)
    top, left = _pair(padding)
    x = F.pad(x, (left, left, top, top))
    kernel = [int(side) for side in weight.shape[2:]]
    height, width = (
        (int(side) - far * (own - 1) - 1) // step + 1
        for side, own, far, step in zip(x.shape[2:], kernel, (rows, columns), (down, across), strict=True)
    )
    found = torch.zeros((), dtype=x.dtype) if bias is None else bias[:, None, None]
    for i, j in product(*map(range, kernel)):
        ends = i * rows + (height - 1) * down + 1, j * columns + (width - 1) * across + 1
        tap, own = x[:, :, i * rows : ends[0] : down, j * columns : ends[1] : across], weight[:, :, i, j]
        if own.shape == (1, 1):
            found = found + tap * own[0, 0]
        else:
            found = found + (own @ tap.flatten(2)).reshape(-1, len(own), height, width)
    return found


def softplus(x: Tensor, beta: float = 1, _threshold: float = 20) -> Any:
    """log(1 + exp(x)), where x may be large."""
    if x.dtype != torch.float64:
        return NotImplemented
    scaled = x * beta
    return (scaled.clamp_min(0) + (-scaled.abs()).exp().log1p()) / beta


def turned(x: Tensor, quarters: int, axes: tuple[int, int]) -> Tensor:
    """Turned by so many right angles, from the first axis towards the second."""
    if quarters % 2:
        return x.transpose(*axes).flip(axes[0] if quarters % 4 == 1 else axes[1])
    return x.flip(axes) if quarters % 4 else x


def transposed(x: Tensor) -> Tensor:
    """Of a batch of matrices each."""
    return x.transpose(-2, -1)


def diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """Of square matrices (B, n, n), (B, n)."""
    if (offset, dim1, dim2, x.dim()) != (0, 1, 2, 3):
        return NotImplemented
    return (x * torch.eye(int(x.shape[2]), dtype=x.dtype)).sum(2)


_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.linalg.solve: solve,
    F.interpolate: resized,
    F.adaptive_avg_pool2d: pooled,
    F.unfold: patches,
    F.conv2d: convolution,
    F.softplus: softplus,
    torch.Tensor.diagonal: diagonal,
    getattr(torch.Tensor.mT, "__get__"): transposed,  # noqa: B009 - its type says nothing of it
    torch.rot90: turned,
}


class Expressible(TorchFunctionMode):
    """Within it, what ONNX cannot say is said otherwise."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        instead = _INSTEAD.get(func)
        found = instead(*args, **kwargs or {}) if instead else NotImplemented
        return func(*args, **kwargs or {}) if found is NotImplemented else found


def _means(length: int, to: int, like: Tensor) -> Tensor:
    """(to, length): the weight of each pixel in each cell."""
    rows = []
    for i in range(to):
        start, end = i * length // to, -(-(i + 1) * length // to)
        rows.append([1 / (end - start) if start <= j < end else 0.0 for j in range(length)])
    return torch.tensor(rows, dtype=like.dtype)


def _between(length: int, to: int, like: Tensor) -> Tensor:
    """(to, length): the weight of each of the two nearest values."""
    rows = [[0.0] * length for _ in range(to)]
    for i, row in enumerate(rows):
        place = max((i + 0.5) * length / to - 0.5, 0.0)
        first = min(int(place), length - 1)
        row[first] += 1 - (place - first)
        row[min(first + 1, length - 1)] += place - first
    return torch.tensor(rows, dtype=like.dtype)


def _pair(value: Any) -> tuple[int, int]:
    both = [int(one) for one in value] if isinstance(value, (list, tuple)) else [int(value)]
    return both[0], both[-1]
