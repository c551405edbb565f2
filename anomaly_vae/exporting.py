"""The verb `export`: a bundle as one ONNX file that takes decoded pictures and gives verdicts.

The file is written only after onnxruntime has judged the bundle's probe images by it as the bundle itself did.
"""

import io
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch
from PIL import Image

from anomaly_vae import __version__
from anomaly_vae.bundle import read_bundle, write_durably
from anomaly_vae.compiled import examples
from anomaly_vae.detector import Detector
from anomaly_vae.errors import AnomalyVaeError, BundleError, ConfigError
from anomaly_vae.exportable import Judging, Verdicts
from anomaly_vae.images import encode_png
from anomaly_vae.judgement import Judgement
from anomaly_vae.onnx_operators import Expressible

if TYPE_CHECKING:
    import onnxruntime

TOLERANCE = 1e-3
"""How far a probe image's score may move, in quartile ranges of the calibration scores; as when a bundle is loaded."""

_OPSET, _IR = 18, 9
_MOST_BYTES = 2**31 - 2**26
"""ONNX files are protocol buffers, which hold no more than two gigabytes."""
_AT_ONCE = 16
_EXACT = "it computes the networks in float64, in which onnxruntime has no convolutions"
_GRADIENTS = "it differentiates, and a graph only goes forward"
_REFUSED = {
    "ssim": "its windows are recorded for one size of batch",
    "msgms": "it averages pixels in float64, for which onnxruntime has no pooling",
    "inpainting": "it deals its masks by a generator of PyTorch's own",
    "input_complexity": "it compresses pictures with bzip2",
    "gradient": _GRADIENTS,
    "likelihood_regret": _GRADIENTS,
    "energy_projection": _GRADIENTS,
    "simple_activation_path": _EXACT,
    "normalised_activation_path": _EXACT,
    "encoder_difference": _EXACT,
    "gaussian_mixture": _EXACT,
    "nearest_neighbours": _EXACT,
    "latent_path": _EXACT,
    "unfamiliar_features": _EXACT,
}
"""Kinds of scores that a graph cannot give, and why."""

Floats = npt.NDArray[np.float64]


class ExportError(AnomalyVaeError):
    """The exported graph does not judge as the bundle does; nothing was written."""

    exit_code = 1


@dataclass(frozen=True)
class Exported:
    """A file that `export` wrote. `moved`: how far its scores of the probe images lie from the bundle's, in quartile
    ranges of the calibration scores; `allowed`: how far they might."""

    path: str
    version: str
    bytes: int
    probes: int
    moved: float
    allowed: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """What there is to tell people."""
        yield f"{self.path}: {self.bytes / 1e6:.1f} MB, from bundle {self.version}"
        yield (
            f"onnxruntime scores its {self.probes} probe images within {self.moved:.1g} quartile ranges of the "
            f"bundle's own scores ({self.allowed:g} allowed)"
        )


def export(
    bundle: Path,
    to: str = "onnx",
    out: Path | None = None,
    tolerance: float = TOLERANCE,
    alpha: float | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write `bundle` as a file of the format `to` (default place: beside it, as BUNDLE.onnx).

    `alpha`: another false-alarm rate than the bundle's own. Raises `ConfigError` for what cannot be exported, and
    `ExportError` where the graph's scores of the bundle's probe images are not those that the bundle keeps of them.
    """
    if to != "onnx":
        raise ConfigError(f"no bundle can be exported to {to!r}; use --to onnx")
    if not tolerance > 0:
        raise ConfigError(f"tolerance must be above 0, not {tolerance:g}")
    _check_installed()
    out = _place(bundle, out, overwrite)
    detector = Detector.load(bundle)
    detector = detector if alpha is None else detector.with_policy(alpha)
    stored = _stored_scores(bundle)
    _check_exportable(detector)
    data = _graph(detector, tolerance)
    moved = check(detector, stored, data, tolerance)
    try:
        write_durably(out, data)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; make room or choose another --out") from None
    return Exported(str(out), detector.version, len(data), len(stored), moved, tolerance)


def check(detector: Detector, stored: Floats, data: bytes, tolerance: float) -> float:
    """How far the graph `data` moves the `stored` scores of the probes, in quartile ranges.

    Raises `ExportError` where a score moves by more than `tolerance`, and where p-values, verdicts, parts or heat are
    not those that belong to them: of probes alone and together, and of pictures of another size.
    """
    assert detector.probes is not None
    session = _session(data)
    probes = detector.probes.images
    unit = detector.calibration.unit
    found = _judged(session, probes.numpy(), _AT_ONCE)
    moved = float(np.abs(found["score"] - stored).max()) / unit
    alone = _judged(session, probes[:4].numpy(), 1)
    between = float(np.abs(alone["score"] - found["score"][:4]).max()) / unit
    if not max(moved, between) <= tolerance:
        raise ExportError(
            f"the exported graph moves scores of the bundle's probe images by {max(moved, between):.2g} quartile "
            f"ranges, {tolerance:g} allowed; nothing was written: score with the bundle itself, or allow more with "
            "--tolerance"
        )
    _check_rest(detector, found, probes, tolerance * unit, tolerance)
    # What was never seen goes other ways through a graph, and far out it is only to be as right as far out it can be.
    strange = examples(detector, 8) if detector.spec.tiling is None else probes[:2]
    _check_close(_judged(session, strange.numpy(), 3), detector.judge(strange, heat=True), tolerance, unit)
    for width, height in _OTHER_SIZES:
        pictures = [_resized(image, width, height) for image in probes[:2].numpy()]
        seen = torch.stack([detector.prepare(encode_png(picture)) for picture in pictures])
        given = _judged(session, np.stack(pictures), 2)
        _check_close(given, detector.judge(seen, heat=True), tolerance, unit)
    return moved


_OTHER_SIZES = ((101, 75), (60, 190))


def _check_rest(
    detector: Detector, found: dict[str, npt.NDArray[Any]], probes: torch.Tensor, slack: float, tolerance: float
) -> None:
    """That p-values are ranks of those scores, verdicts those of the p-values, parts and heat the detector's own."""
    pieces = [detector.judge(part, heat=True) for part in torch.split(probes, _AT_ONCE)]
    for i, judged in enumerate(pieces):
        part = slice(i * _AT_ONCE, i * _AT_ONCE + len(judged))
        _check_close({name: values[part] for name, values in found.items()}, judged, tolerance, slack / tolerance)
    calibration, policy = detector.calibration, detector.policy
    if not calibration.crossed and not np.array_equal(found["p_value"], calibration.p_values(found["score"])):
        raise _differs("p-values")
    if not np.array_equal(found["outlier"], calibration.outliers(found["p_value"], policy.alpha, policy.mode)):
        raise _differs("verdicts")


def _check_close(found: dict[str, npt.NDArray[Any]], judged: Judgement, tolerance: float, unit: float) -> None:
    """That a graph says what the detector says, far out to within a share of what it says."""
    if not np.allclose(found["score"], judged.score, rtol=tolerance, atol=tolerance * unit, equal_nan=True):
        raise _differs("scores")
    for i, (name, column) in enumerate(judged.parts.items()):
        scale = float(np.abs(column).max())
        if not np.allclose(found["parts"][:, i], column, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
            raise _differs(f"the part {name}")
    assert judged.heat is not None
    if not np.allclose(found["heat"], judged.heat, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise _differs("heat maps")


def _differs(what: str) -> ExportError:
    return ExportError(
        f"the exported graph gives other {what} than the bundle; nothing was written: score with the bundle itself"
    )


def _resized(image: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint8]:
    planes = [np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC)) for plane in image]
    return np.stack(planes)


def _judged(
    session: "onnxruntime.InferenceSession", images: npt.NDArray[np.uint8], at_once: int
) -> dict[str, npt.NDArray[Any]]:
    """The graph's outputs by name, of images (N, C, H, W) taken so many at once."""
    try:
        parts = [session.run(None, {"images": images[i : i + at_once]}) for i in range(0, len(images), at_once)]
    except Exception as error:  # it raises its own kinds
        raise _impossible(error) from None
    return {name: np.concatenate(own) for name, own in zip(Verdicts._fields, zip(*parts, strict=True), strict=True)}


def _session(data: bytes) -> "onnxruntime.InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it raises its own kinds
        raise _impossible(error) from None


def _graph(detector: Detector, tolerance: float) -> bytes:
    """The whole graph, from pictures of any size to verdicts, as the bytes of a file."""
    import onnx

    from anomaly_vae.onnx_graph import completed

    found = onnx.load_from_string(_recorded(detector))
    del found.opset_import[:]
    found.opset_import.append(onnx.helper.make_opsetid("", _OPSET))
    found.ir_version, found.producer_name, found.producer_version = _IR, "anomaly-vae", __version__
    completed(found.graph, detector)
    facts = onnx.StringStringEntryProto(key="anomaly_vae", value=json.dumps(_facts(detector, tolerance)))
    found.metadata_props.append(facts)
    onnx.checker.check_model(found)
    data: bytes = found.SerializeToString()
    return data


def _recorded(detector: Detector) -> bytes:
    """The graph of all that comes after the picture has its size."""
    judging, some = Judging(detector).eval(), examples(detector, 3)
    if detector.spec.tiling is not None:
        assert detector.probes is not None
        some = detector.probes.images[:3]
    axes = {name: {0: "batch"} for name in ("seen", *Verdicts._fields)}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "recorded.onnx"
        try:
            with torch.no_grad(), Expressible(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                # That this way of recording is old-fashioned is known; the newer one takes forty times as long.
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    judging, (some,), place, dynamo=False, opset_version=_OPSET, do_constant_folding=False,
                    input_names=["seen"], output_names=list(Verdicts._fields), dynamic_axes=axes,
                )  # fmt: skip
        except Exception as error:  # whatever a recorder cannot do
            raise _impossible(error) from None
        return place.read_bytes()


def _impossible(error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ConfigError(f"this bundle cannot be exported to ONNX ({reason}); score with the bundle itself")


def _facts(detector: Detector, tolerance: float) -> dict[str, Any]:
    """What whoever uses the file must know of it."""
    image, policy = detector.image, detector.policy
    return {
        "version": detector.version,
        "parts": list(detector.spec.parts),
        "alpha": policy.alpha,
        "mode": policy.mode,
        "threshold": policy.threshold,
        "expected_false_alarm_rate": policy.expected_false_alarm_rate,
        "calibration_images": detector.calibration.n,
        "heat_scale": detector.judge(torch.zeros((1, *_shape(detector)), dtype=torch.uint8)).heat_scale,
        "image": image.model_dump(mode="json", include={"height", "width", "channels", "fit", "background"}),
        "tolerance": tolerance,
    }


def _shape(detector: Detector) -> tuple[int, int, int]:
    return detector.image.channels, detector.image.height, detector.image.width


def _check_exportable(detector: Detector) -> None:
    if any(expert.model.latent.kind == "von_mises_fisher" for expert in detector.spec.experts.values()):
        raise ConfigError(
            "codes on a sphere cannot be exported: their draws need functions that ONNX has not; train with "
            "-o model.latent.kind=gaussian"
        )
    if detector.wants_classes:
        raise ConfigError(
            "a detector that must be told the class of every picture cannot be exported; train one with "
            "-o model.condition.scoring=marginalised"
        )
    for name, expert in detector.spec.experts.items():
        for score in expert.scores:
            kind = getattr(score, "kind")  # noqa: B009 - every member has it
            if kind in _REFUSED:
                place = f"beside.{name}.scores" if name else "scores"
                raise ConfigError(
                    f"the score {score.column} cannot be exported: {_REFUSED[kind]}; remove it from {place} and train "
                    "again"
                )
    if detector.probes is None:
        raise ConfigError(
            "the bundle keeps no probe images to check an export by; train it again with probes: 32, its default"
        )
    held = _held(detector)
    if held > _MOST_BYTES:
        raise ConfigError(
            f"this bundle holds {held / 2**30:.1f} GiB and an ONNX file 2 at most; train with a smaller network, or "
            "a smaller `kept` of its scores"
        )


def _held(detector: Detector) -> int:
    """Bytes of weights and references."""
    tensors = [one for member in detector.members for model in member.models() for one in model.state_dict().values()]
    for member in detector.members:
        for expert in (one for of_kind in member.experts.values() for one in of_kind):
            tensors += [one for own in expert.references.of_scores.values() for one in own.values()]
    return sum(one.numel() * one.element_size() for one in tensors)


def _stored_scores(bundle: Path) -> Floats:
    files = read_bundle(bundle).files
    probes = safetensors.numpy.load(files["probes.safetensors"]) if "probes.safetensors" in files else {}
    return np.asarray(probes.get("scores", np.zeros(0)), np.float64)


def _check_installed() -> None:
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"export needs {' and '.join(missing)}; install them with: pip install 'anomaly-vae[onnx]'")


def _place(bundle: Path, out: Path | None, overwrite: bool) -> Path:
    if not bundle.is_dir():
        raise BundleError(f"{bundle} is no bundle; give the folder that `train --out` wrote")
    out = bundle.resolve().with_name(f"{bundle.resolve().name}.onnx") if out is None else out
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {out}; give --out the name of a file in a folder that there is")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists already; choose another --out, or pass --overwrite to replace it")
    return out
