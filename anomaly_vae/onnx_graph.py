"""A recorded graph, completed: pictures of any size go in, and heat is made only where it is asked for."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from anomaly_vae.detector import Detector
from anomaly_vae.onnx_pictures import Nodes, fitted

_SEEN, _HEAT = "seen", "heat"


def completed(graph: onnx.GraphProto, detector: Detector) -> None:
    """Change `graph`, which takes `seen` (pictures of the detector's size), into one with these inputs:

    `images` uint8 (B, 1 or 3, any height and width); `original` int64 (2,), and `want_heat` bool (), which may be left
    out: see `fitted`, and without heat its output is of shape (0, 0, 0).
    """
    _heat_on_demand(graph)
    nodes = Nodes("picture.")
    found = fitted(nodes, "images", "original", detector.image)
    nodes.nodes.append(helper.make_node("Identity", [found], [_SEEN], "picture"))
    after = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes.nodes, *after])
    defaults = [
        numpy_helper.from_array(np.zeros(2, np.int64), "original"),
        numpy_helper.from_array(np.array(True), "want_heat"),
    ]
    graph.initializer.extend([*nodes.constants, *defaults])
    del graph.input[:]
    graph.input.extend([
        helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", "channels", "height", "width"]),
        helper.make_tensor_value_info("original", TensorProto.INT64, [2]),
        helper.make_tensor_value_info("want_heat", TensorProto.BOOL, []),
    ])  # fmt: skip
    # The recorder's own guesses would contradict heat that is not there.
    del graph.value_info[:]
    outputs = {one.name: one.type.tensor_type.elem_type for one in graph.output}
    shapes: dict[str, list[str | int | None]] = {
        "parts": ["batch", len(detector.spec.parts)],
        _HEAT: [None, None, None],
    }
    del graph.output[:]
    graph.output.extend(
        helper.make_tensor_value_info(name, kind, shapes.get(name, ["batch"])) for name, kind in outputs.items()
    )


def _heat_on_demand(graph: onnx.GraphProto) -> None:
    """Move what only heat needs into a branch: onnxruntime computes a whole graph whatever is asked of it."""
    needed = {one.name for one in graph.output if one.name != _HEAT}
    always, only_heat = list[onnx.NodeProto](), list[onnx.NodeProto]()
    for node in reversed(graph.node):
        wanted = any(name in needed for name in node.output)
        (always if wanted else only_heat).append(node)
        if wanted:
            needed.update(node.input)
            needed.update(name for branch in node.attribute for inner in branch.g.node for name in inner.input)
    for node in only_heat:
        node.output[:] = ["heat.map" if name == _HEAT else name for name in node.output]
    nothing = helper.make_node("Constant", [], ["heat.none"], value=numpy_helper.from_array(np.zeros((0, 0, 0), "f4")))
    then = helper.make_graph(only_heat[::-1], "heat.made", [], [_float("heat.map")])
    otherwise = helper.make_graph([nothing], "heat.left", [], [_float("heat.none")])
    del graph.node[:]
    graph.node.extend(always[::-1])
    graph.node.append(helper.make_node("If", ["want_heat"], [_HEAT], _HEAT, then_branch=then, else_branch=otherwise))


def _float(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
