"""Wide pictures: a grey weave, and the same with a small dot somewhere."""

from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH, DOT = 40, 150, 5


def weave(rng: np.random.Generator) -> np.ndarray:
    """A normal picture, uint8 (HEIGHT, WIDTH)."""
    rows, columns = np.arange(HEIGHT)[:, None] / 4, np.arange(WIDTH) / 3
    waves = 40 * np.sin(columns + rng.uniform(0, 6)) * np.cos(rows + rng.uniform(0, 6))
    return (125 + waves + rng.normal(0, 5, (HEIGHT, WIDTH))).clip(0, 255).astype(np.uint8)


def dotted(rng: np.random.Generator, top: int, left: int) -> np.ndarray:
    """One with a dot at (top, left), the colour the place is least like."""
    picture = weave(rng)
    place = picture[top : top + DOT, left : left + DOT]
    place[:] = 255 if place.mean() < 125 else 0
    return picture


def write_wide(folder: Path, normals: int = 160, dots: int = 30) -> Path:
    """PNGs in `folder`/good and `folder`/dot."""
    rng = np.random.default_rng(0)
    for kind in ("good", "dot"):
        (folder / kind).mkdir(parents=True)
    for i in range(normals):
        Image.fromarray(weave(rng)).save(folder / "good" / f"{i:03}.png")
    for i in range(dots):
        top, left = rng.integers(HEIGHT - DOT), rng.integers(WIDTH - DOT)
        Image.fromarray(dotted(rng, top, left)).save(folder / "dot" / f"{i:03}.png")
    return folder
