"""Score pictures by a file that `anomaly-vae export` wrote: with onnxruntime, NumPy and Pillow alone.

    python onnx_scoring.py detector.onnx picture.jpg ...

One line of JSON a picture. Copy what you need: nothing here imports the package that made the file.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Scorer:
    """An exported detector. `facts`: its parts' names, its policy and its image settings."""

    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        # It warns of inputs that may be left out.
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.facts = json.loads(self.session.get_modelmeta().custom_metadata_map["anomaly_vae"])

    def score(self, path: str, heat: bool = False) -> dict:
        """The verdict of a picture file; with `heat` also its map, an array (H, W)."""
        pixels, original = self.decoded(path)
        given = {"images": pixels[None], "original": original, "want_heat": np.array(heat)}
        score, p_value, outlier, parts, heats = self.session.run(None, given)
        verdict = {
            "score": float(score[0]),
            "p_value": float(p_value[0]),
            "outlier": bool(outlier[0]),
            "parts": dict(zip(self.facts["parts"], parts[0].tolist(), strict=True)),
        }
        return verdict | ({"heat": heats[0]} if heat else {})

    def decoded(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """A file's pixels, uint8 (channels, height, width), and its own height and width; upright.

        The graph does all the rest: it brings pictures to their size, and colours to grey or grey to colours.
        """
        picture = Image.open(path)
        width, height = picture.size
        if picture.format == "JPEG":
            # Decoding to a half, a quarter or an eighth is what the detector was trained with, and quicker.
            picture.draft("L" if self.facts["image"]["channels"] == 1 else "RGB", self.reduced(width, height))
        reduced = picture.size
        picture = opaque(picture, tuple(self.facts["image"]["background"]))
        upright = ImageOps.exif_transpose(picture)
        if upright.size != reduced and upright.size == reduced[::-1]:
            width, height = height, width
        pixels = np.asarray(upright)
        planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return np.ascontiguousarray(planes), np.array([height, width])

    def reduced(self, width: int, height: int) -> tuple[int, int]:
        """The least size to decode to, which still leaves twice the pixels that the detector wants."""
        wanted = self.facts["image"]
        ratios = width / wanted["width"], height / wanted["height"]
        room = (max(ratios) if wanted["fit"] == "letterbox" else min(ratios)) / 2
        factor = next(one for one in (8, 4, 2, 1) if one <= room or one == 1)
        return width // factor, height // factor


def opaque(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any picture as mode L or RGB: deep greys by their high bits, transparency over the background."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        found = Image.new("RGB", picture.size, background)
        found.paste(clear, mask=clear.getchannel("A"))
        return found
    return picture if picture.mode in ("L", "RGB") else picture.convert("L" if picture.mode == "1" else "RGB")


def main() -> None:
    """Score the pictures that the command line names."""
    if len(sys.argv) < 3:
        sys.exit("usage: python onnx_scoring.py DETECTOR.onnx PICTURE...")
    scorer = Scorer(sys.argv[1])
    for path in sys.argv[2:]:
        print(json.dumps({"path": str(Path(path)), **scorer.score(path)}))


if __name__ == "__main__":
    main()
