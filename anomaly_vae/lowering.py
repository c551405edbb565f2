"""Models that compute in bfloat16 what bears it: the convolutions between pictures and codes, and most of their time.

What sees the picture itself, what makes the code, and marker, views, critic and backbone stay as they are: there three
digits would move scores by some tenths of a quartile range; here it is some thousandths.
"""

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from anomaly_vae.model import AutoEncoder

_Convolution = nn.Conv2d | nn.ConvTranspose2d


def lowered(model: AutoEncoder) -> AutoEncoder | None:
    """A copy of a trained model that computes its inner convolutions in bfloat16; None where it has none."""
    if model.spec.network.kind != "conv":
        return None
    model = copy.deepcopy(model)
    inner, outer = model.encoder.stages, model.decoder.stages
    for stages, first, end in ((inner, 1, len(inner) - 1), (outer, 1, len(outer))):
        for i in range(first, end):
            stages[i] = _Low(stages[i])
    inner[-1] = _Single(inner[-1])
    model.lay_channels_last()
    return model.eval()


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` computes bfloat16 faster than float32, instead of imitating it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Older versions of PyTorch cannot tell.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


class _Low(nn.Module):
    """A stage in bfloat16, its batch norms folded; float64 is still computed as such, for scores that want it."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.exact = stage
        self.low = _folded(copy.deepcopy(stage)).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.exact(x) if x.dtype == torch.float64 else self.low(x.bfloat16())
        return found


class _Single(nn.Module):
    """A stage in float32 behind one in bfloat16."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.stage(x if x.dtype == torch.float64 else x.float())
        return found


def _folded(stage: nn.Module) -> nn.Module:
    """`stage` with each batch norm that follows a convolution as part of that: one rounding less, and less work."""
    for block in [module for module in stage.eval().modules() if isinstance(module, nn.Sequential)]:
        for (name, before), (norm, after) in pairwise(list(block.named_children())):
            if isinstance(before, _Convolution) and isinstance(after, nn.BatchNorm2d):
                fused = fuse_conv_bn_eval(before, after, transpose=isinstance(before, nn.ConvTranspose2d))
                setattr(block, name, fused)
                setattr(block, norm, nn.Identity())
    return stage
