"""The one door to torchvision, which opens although torch and torchvision come from different builds.

torch's CPU build and PyPI's torchvision (built for CUDA) do not match: its compiled operators do not load, and its
import stops at `operator torchvision::nms does not exist`. Nothing here needs those operators, only their names.
"""

import importlib
import re
import sys
import threading
from types import ModuleType

import torch

from anomaly_vae.errors import ConfigError

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_MISSING = re.compile(r"operator torchvision::\w+ does not exist")
_lock = threading.Lock()
_declared: list[torch.library.Library] = []  # a library's operators vanish with it


def import_torchvision() -> ModuleType:
    """torchvision, with the names of missing operators declared if, and only if, its import fails for want of them.

    In that case box operators and `torchvision.io` cannot run; models, transforms and data sets can. Raises
    `ConfigError` when torchvision is not installed.
    """
    with _lock:
        try:
            return importlib.import_module("torchvision")
        except ModuleNotFoundError:
            raise ConfigError("torchvision is not installed; run: pip install torchvision") from None
        except RuntimeError as error:
            if not _MISSING.search(str(error)):
                raise
        _forget_half_imported()
        _declare_missing()
        return importlib.import_module("torchvision")


def _declare_missing() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)  # type: ignore[no-untyped-call]
    _declared.append(library)


def _forget_half_imported() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
