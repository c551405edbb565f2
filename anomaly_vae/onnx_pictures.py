"""`images.decode` after the decoder, as ONNX: pictures of any size become those that models see, to the very byte.

ONNX's own Resize rounds otherwise than Pillow, which works in bytes: it averages blocks of 2, 4 or 8 pixels first, then
goes over rows, rounds, and over columns, with weights of 22 binary digits. Here are the same steps in float64, in which
all of these numbers are exact.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import PIL
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from anomaly_vae.images import ImageSpec

_DIGITS = 2.0**22
"""Pillow's weights are whole multiples of the inverse."""
_TALL_FIRST = 13
_LUMA = (19595.0, 38470.0, 7471.0)
"""Of red, green and blue in a grey level, in 65536ths."""


class Nodes:
    """A graph as it grows. Calling an operator appends its node and returns the name of what it gives."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.nodes, self.constants = prefix, list[onnx.NodeProto](), list[onnx.TensorProto]()

    def __call__(self, operator: str, *inputs: Any, **attributes: Any) -> str:
        """The only output of `operator`; inputs that are no names are constants."""
        name = f"{self.prefix}{len(self.nodes)}"
        names = [one if isinstance(one, str) else self.constant(one) for one in inputs]
        self.nodes.append(helper.make_node(operator, names, [name], **attributes))
        return name

    def constant(self, value: Any) -> str:
        """A tensor of the graph's own: whole numbers as int64, others as float64, arrays as they are."""
        name = f"{self.prefix}c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def cast(self, name: str, kind: int) -> str:
        """`name` as another type."""
        return self("Cast", name, to=kind)

    def either(self, condition: str, then: "Nodes", found: str, otherwise: "Nodes", other: str) -> str:
        """`found` of the graph `then` where the condition holds, else `other` of the graph `otherwise`; uint8."""
        return self("If", condition, then_branch=then.body(found), else_branch=otherwise.body(other))

    def body(self, output: str) -> onnx.GraphProto:
        """The branch of an If that gives `output`."""
        value = helper.make_tensor_value_info(output, TensorProto.UINT8, None)
        return helper.make_graph(self.nodes, f"{self.prefix}body", [], [value], self.constants)


def fitted(nodes: Nodes, images: str, original: str, spec: ImageSpec) -> str:
    """uint8 `images` (B, 1 or 3, any height and width) as those of `spec`, less its region; they keep the batch's axis.

    `original`: int64 height and width of the picture as its file has them, where a decoder has reduced it by 2, 4 or 8
    already; zeros where it has not.
    """
    shape = nodes("Shape", images)
    size = nodes("Slice", shape, [2], [4])
    given = nodes("Where", nodes("Greater", original, [0]), original, size)
    wanted = np.array([spec.height, spec.width])
    same = nodes("And", nodes("Equal", size, wanted), nodes("Equal", given, wanted))
    done = nodes("Equal", nodes("ReduceMin", nodes.cast(same, TensorProto.INT64), keepdims=0), 1)
    grey = _grey(nodes, images, shape) if spec.channels == 1 else _coloured(nodes, images)
    then, work = Nodes(f"{nodes.prefix}t"), Nodes(f"{nodes.prefix}e")
    return nodes.either(done, then, then("Identity", grey), work, _resized(work, grey, size, given, spec))


def _coloured(nodes: Nodes, images: str) -> str:
    return nodes("Expand", images, [1, 3, 1, 1])


def _grey(nodes: Nodes, images: str, shape: str) -> str:
    """Luma of ITU-R 601, as Pillow rounds it."""
    then, colour = Nodes(f"{nodes.prefix}g"), Nodes(f"{nodes.prefix}h")
    weights = np.array(_LUMA).reshape(1, 3, 1, 1)
    products = colour("Mul", colour.cast(images, TensorProto.DOUBLE), weights)
    luma = _over(colour, colour("ReduceSum", products, [1], keepdims=1), 2.0**16)
    is_grey = nodes("Equal", nodes("Gather", shape, 1), 1)
    return nodes.either(is_grey, then, then("Identity", images), colour, colour.cast(luma, TensorProto.UINT8))


def _resized(nodes: Nodes, images: str, size: str, given: str, spec: ImageSpec) -> str:
    box, to = _placement(nodes, nodes.cast(given, TensorProto.DOUBLE), spec)
    factor = _factor(nodes, box, to)
    already = _already(nodes, size, given)
    rest = nodes("Max", nodes("Div", factor, already), [1])
    shrunk = _reduced(nodes, nodes.cast(images, TensorProto.FLOAT), size, rest)
    scale = nodes.cast(nodes("Mul", already, rest), TensorProto.DOUBLE)
    source = nodes.cast(given, TensorProto.DOUBLE)
    first = nodes("Div", nodes("Div", nodes("Sub", source, box), 2.0), scale)
    last = nodes("Div", nodes("Div", nodes("Add", source, box), 2.0), scale)
    # Where a decoder's picture is one of another scale than it may be, this still covers all of it.
    length = nodes("Slice", nodes("Shape", shrunk), [2], [4])
    rows, columns = (_weights(nodes, axis, first, last, length, to) for axis in (0, 1))
    columns = nodes("Transpose", columns, perm=[1, 0])
    down, across = Nodes(f"{nodes.prefix}d"), Nodes(f"{nodes.prefix}a")
    found = nodes.either(
        _tall(nodes, length, to),
        down, _passes(down, shrunk, ("rows", rows), ("columns", columns)),
        across, _passes(across, shrunk, ("columns", columns), ("rows", rows)),
    )  # fmt: skip
    return _on_background(nodes, found, spec) if spec.fit == "letterbox" else found


def _passes(nodes: Nodes, pictures: str, *weights: tuple[str, str]) -> str:
    """Both passes in turn, each rounded; uint8."""
    for axis, own in weights:
        product = nodes("MatMul", own, pictures) if axis == "rows" else nodes("MatMul", pictures, own)
        pictures = _over(nodes, product, _DIGITS)
    return nodes.cast(pictures, TensorProto.UINT8)


def _tall(nodes: Nodes, length: str, to: str) -> str:
    """Whether Pillow goes over columns first, as it does from version 13 on where that leaves less to do."""
    if int(PIL.__version__.split(".")[0]) < _TALL_FIRST:
        return nodes.constant(False)
    fewer = nodes("Sub", length, to)
    rows, columns = (nodes("Squeeze", nodes("Slice", fewer, [i], [i + 1])) for i in (0, 1))
    return nodes("Greater", rows, nodes("Mul", nodes("Max", columns, 0), 2))


def _placement(nodes: Nodes, source: str, spec: ImageSpec) -> tuple[str, str]:
    """Height and width of the centred source region, float64, and of the picture it becomes, int64."""
    wanted = np.array([spec.height, spec.width])
    ratios = nodes("Div", source, wanted.astype(np.float64))
    if spec.fit == "crop":
        scale = nodes("ReduceMin", ratios, keepdims=1)
        return nodes("Min", source, nodes("Mul", scale, wanted.astype(np.float64))), nodes("Identity", wanted)
    if spec.fit == "letterbox":
        scale = nodes("ReduceMax", ratios, keepdims=1)
        rounded = nodes.cast(nodes("Round", nodes("Div", source, scale)), TensorProto.INT64)
        return source, nodes("Min", nodes("Max", rounded, [1]), wanted)
    return source, nodes("Identity", wanted)


def _factor(nodes: Nodes, box: str, to: str) -> str:
    """By how much the picture may be reduced so that twice what is wanted is left; int64 (1,)."""
    room = nodes("Div", box, nodes("Mul", nodes.cast(to, TensorProto.DOUBLE), 2.0))
    least = nodes("ReduceMin", room, keepdims=1)
    found = nodes.constant([1])
    for factor in (2, 4, 8):
        found = nodes("Where", nodes("GreaterOrEqual", least, float(factor)), [factor], found)
    return found


def _already(nodes: Nodes, size: str, given: str) -> str:
    """By how much the decoder has reduced the picture; int64 (1,)."""
    found = nodes.constant([1])
    for factor in (2, 4, 8):
        reduced = nodes("Div", nodes("Add", given, [factor - 1]), [factor])
        alike = nodes("ReduceMin", nodes.cast(nodes("Equal", size, reduced), TensorProto.INT64), keepdims=1)
        smaller = nodes("ReduceMax", nodes.cast(nodes("Less", size, given), TensorProto.INT64), keepdims=1)
        found = nodes("Where", nodes("Equal", nodes("Mul", alike, smaller), [1]), [factor], found)
    return found


def _reduced(nodes: Nodes, images: str, size: str, factor: str) -> str:
    """Means of squares of pixels, float64; those at the right and lower border may be partial. As Pillow's `reduce`."""
    cells = nodes("Div", nodes("Sub", nodes("Add", size, factor), [1]), factor)
    missing = nodes("Sub", nodes("Mul", cells, factor), size)
    padded = nodes("Pad", images, nodes("Concat", np.zeros(6, np.int64), missing, axis=0))
    rows, columns = (nodes("Slice", cells, [i], [i + 1]) for i in (0, 1))
    parts = nodes("Concat", [0], [0], rows, factor, columns, factor, axis=0)
    sums = nodes("ReduceSum", nodes("Reshape", padded, parts), [3, 5], keepdims=0)
    whole = nodes("ConstantOfShape", size, value=helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]))
    counted = nodes("Pad", whole, nodes("Concat", [0, 0], missing, axis=0))
    areas = nodes("Concat", rows, factor, columns, factor, axis=0)
    count = nodes("ReduceSum", nodes("Reshape", counted, areas), [1, 3], keepdims=0)
    # A division by a product with what fits in 32 bits, of which Pillow keeps the whole part.
    inverse = nodes("Floor", nodes("Div", np.float32(2.0**24), count))
    half = nodes("Floor", nodes("Mul", count, np.float32(0.5)))
    product = nodes("Mul", _double(nodes, nodes("Add", sums, half)), _double(nodes, inverse))
    return nodes("Floor", nodes("Mul", product, 2.0**-24))


def _weights(nodes: Nodes, axis: int, first: str, last: str, length: str, to: str) -> str:
    """How much each source pixel along an axis counts in each pixel to be, (to, length), in `_DIGITS`: a triangle."""
    start, end, size, count = (nodes("Slice", one, [axis], [axis + 1]) for one in (first, last, length, to))
    # Pillow takes the region's border as float32.
    low, high = (nodes.cast(one, TensorProto.FLOAT) for one in (start, end))
    scale = nodes("Div", _double(nodes, nodes("Sub", high, low)), _double(nodes, count))
    places = _double(nodes, nodes("Range", 0, nodes("Squeeze", count), 1))
    centres = nodes("Add", _double(nodes, low), nodes("Mul", nodes("Add", places, 0.5), scale))
    pixels = nodes("Add", _double(nodes, nodes("Range", 0, nodes("Squeeze", size), 1)), 0.5)
    distance = nodes("Abs", nodes("Sub", pixels, nodes("Unsqueeze", centres, [1])))
    away = nodes("Mul", distance, nodes("Div", 1.0, nodes("Max", scale, 1.0)))
    triangle = nodes("Max", nodes("Sub", 1.0, away), 0.0)
    share = nodes("Div", triangle, nodes("ReduceSum", triangle, [1], keepdims=1))
    return nodes("Floor", nodes("Add", nodes("Mul", share, _DIGITS), 0.5))


def _over(nodes: Nodes, sums: str, unit: float) -> str:
    """Sums in `unit`s to the nearest whole number, halves up."""
    return nodes("Floor", nodes("Div", nodes("Add", sums, unit / 2), unit))


def _on_background(nodes: Nodes, pictures: str, spec: ImageSpec) -> str:
    wanted = np.array([spec.height, spec.width])
    missing = nodes("Sub", wanted, nodes("Slice", nodes("Shape", pictures), [2], [4]))
    before = nodes("Div", missing, [2])
    pads = nodes("Concat", [0, 0], before, [0, 0], nodes("Sub", missing, before), axis=0)
    colour = np.array(background(spec), np.float32).reshape(1, -1, 1, 1)
    added = nodes("Pad", nodes("Sub", nodes.cast(pictures, TensorProto.FLOAT), colour), pads)
    return nodes.cast(nodes("Add", added, colour), TensorProto.UINT8)


def background(spec: ImageSpec) -> Sequence[int]:
    """The background's value in each of the channels."""
    found = Image.new("RGB", (1, 1), spec.background).convert("L" if spec.channels == 1 else "RGB").getpixel((0, 0))
    return found if isinstance(found, tuple) else (int(found or 0),)


def _double(nodes: Nodes, name: str) -> str:
    return nodes.cast(name, TensorProto.DOUBLE)
