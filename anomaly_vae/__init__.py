"""Calibrated image anomaly detection with variational autoencoders.

`Detector.load(path).judge(images)` is the shortest way in; everything else a program needs is listed in `__all__` and
imported when first used, so that `import anomaly_vae` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomaly_vae.async_client import AsyncClient as AsyncClient
    from anomaly_vae.bundle import glance as glance
    from anomaly_vae.bundle import write_durably as write_durably
    from anomaly_vae.client import Client as Client
    from anomaly_vae.detector import Detector as Detector
    from anomaly_vae.engine import Engine as Engine
    from anomaly_vae.engine import pick_device as pick_device
    from anomaly_vae.errors import AnomalyVaeError as AnomalyVaeError
    from anomaly_vae.errors import BadImage as BadImage
    from anomaly_vae.errors import BundleError as BundleError
    from anomaly_vae.errors import CalibrationError as CalibrationError
    from anomaly_vae.errors import ConfigError as ConfigError
    from anomaly_vae.errors import DataError as DataError
    from anomaly_vae.errors import ServiceError as ServiceError
    from anomaly_vae.errors import TrainingError as TrainingError
    from anomaly_vae.estimator import VAEOutlierDetector as VAEOutlierDetector
    from anomaly_vae.images import ImageSpec as ImageSpec
    from anomaly_vae.images import decode as decode
    from anomaly_vae.images import encode_png as encode_png
    from anomaly_vae.images import peek as peek
    from anomaly_vae.judgement import Judgement as Judgement
    from anomaly_vae.judgement import Policy as Policy
    from anomaly_vae.overlaying import overlay_png as overlay_png
    from anomaly_vae.recipe import DetectorSpec as DetectorSpec
    from anomaly_vae.regions import regions_json as regions_json
    from anomaly_vae.rendering import heatmap_png as heatmap_png
    from anomaly_vae.retrying import Retries as Retries
    from anomaly_vae.seeds import content_hash as content_hash
    from anomaly_vae.spec import Spec as Spec
    from anomaly_vae.spec import dump_yaml as dump_yaml
    from anomaly_vae.spec import override as override
    from anomaly_vae.spec import parse_yaml as parse_yaml
    from anomaly_vae.spec import read_yaml as read_yaml

__version__ = "0.1.0"

_HOME = {
    "AnomalyVaeError": "errors",
    "AsyncClient": "async_client",
    "BadImage": "errors",
    "BundleError": "errors",
    "CalibrationError": "errors",
    "Client": "client",
    "ConfigError": "errors",
    "DataError": "errors",
    "Detector": "detector",
    "DetectorSpec": "recipe",
    "Engine": "engine",
    "ImageSpec": "images",
    "Judgement": "judgement",
    "Policy": "judgement",
    "Retries": "retrying",
    "ServiceError": "errors",
    "Spec": "spec",
    "TrainingError": "errors",
    "VAEOutlierDetector": "estimator",
    "content_hash": "seeds",
    "decode": "images",
    "dump_yaml": "spec",
    "encode_png": "images",
    "glance": "bundle",
    "heatmap_png": "rendering",
    "overlay_png": "overlaying",
    "override": "spec",
    "parse_yaml": "spec",
    "peek": "images",
    "pick_device": "engine",
    "read_yaml": "spec",
    "regions_json": "regions",
    "write_durably": "bundle",
}

_MODULES = ("answers", "drift", "watch_answers")

__all__ = [*sorted(_HOME), *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"anomaly_vae.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'anomaly_vae' has no attribute {name!r}")
    return getattr(import_module(f"anomaly_vae.{_HOME[name]}"), name)
