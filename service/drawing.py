"""The pictures that an answer carries beside its verdict, as PNGs."""

from typing import TYPE_CHECKING, Literal

from anomaly_vae import ImageSpec, encode_png, heatmap_png, overlay_png
from service.options import Options
from service.tickets import Scored, Ticket

if TYPE_CHECKING:
    from torch import Tensor

Style = Literal["png", "overlay"]
_SMALL = 256


def pictures(options: Options, scored: Scored, ticket: Ticket, spec: ImageSpec, data: bytes) -> dict[str, bytes | None]:
    """By the names that answers give them; None for a reconstruction where no model makes any. `data`: the file."""
    found: dict[str, bytes | None] = {}
    if options.heat in ("png", "overlay"):
        found["heatmap_png"] = heat_png(options.heat, scored, ticket, spec, data)
    if options.reconstruction:
        made = scored.also["reconstruction"]
        found["reconstruction_png"] = None if made is None else encode_png(_enlarged(made))
    return found


def heat_png(style: Style, scored: Scored, ticket: Ticket, spec: ImageSpec, data: bytes) -> bytes:
    """The heat map of a picture that was judged with one."""
    assert scored.heat is not None
    if style == "overlay":
        return overlay_png(scored.heat, scored.heat_scale, spec, data)
    return heatmap_png(scored.heat, scored.heat_scale, ticket.image.numpy())


def _enlarged(image: "Tensor") -> "Tensor":
    """By a whole factor, as heat maps are, so that people see small ones."""
    factor = max(1, -(-_SMALL // min(image.shape[1:])))
    return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
