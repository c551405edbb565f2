"""Pictures of any size through the graph are, byte for byte, those that `decode` makes."""

import io

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image

from anomaly_vae import ImageSpec, decode
from anomaly_vae.onnx_pictures import Nodes, fitted

SIZES = [
    (24, 40), (24, 39), (7, 5), (40, 24), (47, 80), (48, 80), (49, 81), (95, 160), (96, 160), (97, 161), (191, 323),
    (193, 321), (400, 90), (90, 400), (385, 641), (701, 699), (31, 29), (200, 41), (33, 640), (640, 33),
]  # fmt: skip


def session_of(spec: ImageSpec) -> onnxruntime.InferenceSession:
    nodes = Nodes("p")
    found = fitted(nodes, "images", "original", spec)
    nodes.nodes.append(helper.make_node("Identity", [found], ["seen"]))
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.UINT8, ["b", "c", "h", "w"]),
        helper.make_tensor_value_info("original", TensorProto.INT64, [2]),
    ]
    outputs = [helper.make_tensor_value_info("seen", TensorProto.UINT8, ["b", spec.channels, spec.height, spec.width])]
    graph = helper.make_graph(nodes.nodes, "pictures", inputs, outputs, nodes.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString())


def planes(pixels: np.ndarray) -> np.ndarray:
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    place = io.BytesIO()
    Image.fromarray(pixels).save(place, kind)
    return place.getvalue()


@pytest.mark.parametrize("fit", ["stretch", "crop", "letterbox"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size_is_fitted_as_decode_fits_it(fit, channels):
    spec = ImageSpec(height=24, width=40, channels=channels, fit=fit, background=(10, 200, 77))
    session, rng = session_of(spec), np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3) if i % 2 else (height, width), dtype=np.uint8)
        given = {"images": planes(pixels)[None], "original": np.zeros(2, np.int64)}
        found = session.run(None, given)[0][0]
        np.testing.assert_array_equal(found, decode(encoded(pixels, "PNG"), spec).numpy(), str((height, width)))


def test_pictures_of_a_batch_do_not_see_each_other():
    spec = ImageSpec(height=24, width=40, channels=3)
    session, rng = session_of(spec), np.random.default_rng(0)
    images, original = rng.integers(0, 256, (5, 3, 100, 133), dtype=np.uint8), np.zeros(2, np.int64)
    together = session.run(None, {"images": images, "original": original})[0]
    for image, found in zip(images, together, strict=True):
        alone = session.run(None, {"images": image[None], "original": original})[0][0]
        np.testing.assert_array_equal(alone, found)


@pytest.mark.parametrize("size", [(240, 400), (97, 161), (385, 643), (1000, 1001), (30, 50)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_that_its_decoder_reduced_is_fitted_as_decode_fits_it(size, channels):
    """libjpeg reduces in the DCT, whoever calls it; the graph must be told what the file's own size was."""
    spec = ImageSpec(height=24, width=40, channels=channels)
    session = session_of(spec)
    y, x = np.mgrid[: size[0], : size[1]]
    pixels = np.stack([127 + 120 * np.sin(x / 9), 127 + 120 * np.cos(y / 7), (x + y) % 256], 2).astype(np.uint8)
    data = encoded(pixels, "JPEG")
    picture = Image.open(io.BytesIO(data))
    factor = max(one for one in (1, 2, 4, 8) if one == 1 or min(size[0] / 24, size[1] / 40) >= 2 * one)
    picture.draft("L" if channels == 1 else "RGB", (size[1] // factor, size[0] // factor))
    given = {"images": planes(np.asarray(picture))[None], "original": np.array(size)}
    np.testing.assert_array_equal(session.run(None, given)[0][0], decode(data, spec).numpy())
