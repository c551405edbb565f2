"""How much memory another bundle takes, at most about, and how much there is."""

import ctypes
import gc
import sys
from pathlib import Path

from anomaly_vae import DetectorSpec, glance

_COPIES, _LAYERS, _BESIDE = 4, 24, 64 << 20
_TILES_AT_ONCE = 32
_WIDTH = 32
_CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def needed(bundle: Path, max_batch: int) -> int:
    """Bytes that loading and warming a bundle takes for a moment.

    Its files four times (as read, unpacked, on the device, in the recording), and at the finest resolution that a model
    sees, for a whole batch, 24 layers of float32 as wide as its first, and 64 MiB. Measured beside a bundle that was
    there already: 516 MiB where this tells 671, and 95 where it tells 644. Raises `BundleError` or `ConfigError`.
    """
    found = glance(bundle)
    spec = DetectorSpec.parse(found.description["spec"], str(bundle))
    rows = max_batch if spec.tiles is None else _TILES_AT_ONCE
    return _COPIES * found.size + rows * max(_layers(spec)) * 4 * _LAYERS + _BESIDE


def _layers(spec: DetectorSpec) -> list[int]:
    """For each kind of model, the numbers in its first layer's output."""
    sizes = []
    for expert in spec.experts.values():
        _, height, width = expert.model.seen(spec.shape)
        wide = getattr(expert.model.network, "width", _WIDTH)
        sizes.append(height * width * (wide if isinstance(wide, int) else _WIDTH))
    return sizes


def available(device: str) -> int | None:
    """Bytes that a process may still take on a device, `cpu` meaning this machine; None where nobody tells."""
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [size for size in (_of_machine(Path("/proc/meminfo")), *of_groups(Path("/sys/fs/cgroup"))) if size]
    return min(found) if found else None


def release() -> None:
    """Give what nobody holds any more back to the system: Python's cycles, the allocators' free lists."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            return  # another C library gives it back by itself, or not at all


def _of_machine(path: Path) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def of_groups(root: Path) -> list[int]:
    """What the container's limit leaves; pages of files, which the system gives up when it must, count as free."""
    found = []
    for limit, used in _CGROUPS:
        try:
            most, taken = (root / limit).read_text().strip(), int((root / used).read_text())
            statistics = dict(line.split() for line in (root / used).with_name("memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most.isdigit():
            found.append(max(1, int(most) - taken + int(statistics.get("inactive_file", 0))))
    return found
