"""A figure of what a detector makes of pictures: each model's reconstruction, the heat map and the verdict.

python benchmarks/quality_figure.py my.bundle pictures/good/a.png pictures/defect/b.png --out figure.png
"""

import argparse
import sys
from pathlib import Path

import torch

from anomaly_vae import AnomalyVaeError, Detector
from anomaly_vae.expert import Batch
from anomaly_vae.grids import Row, arrays, grid_png
from anomaly_vae.rendering import heatmap


def figure(detector: Detector, files: list[Path]) -> bytes:
    """PNG: a column for each file; with K-fold calibration the reconstructions are the first fold's."""
    images = torch.stack([detector.prepare(path.read_bytes()) for path in files])
    judged = detector.judge(images, heat=True)
    assert judged.heat is not None
    rows = [Row("picture", arrays(images))]
    for name, experts in detector.members[0].experts.items():
        with torch.inference_mode():
            rebuilt = Batch(images).seen_by(experts[0].model).reconstruction
        rebuilt = (rebuilt.clamp(0, 1) * 255).round().to(torch.uint8)
        rows.append(Row(f"rebuilt by {name}" if name else "rebuilt", arrays(rebuilt)))
    hot = [heatmap(heat, judged.heat_scale, image) for heat, image in zip(judged.heat, images.numpy(), strict=True)]
    verdicts = [
        f"{'outlier' if out else 'normal'}, p {p:.3f}" for out, p in zip(judged.outlier, judged.p_value, strict=True)
    ]
    return grid_png([*rows, Row("heat", hot, verdicts)], [path.parent.name for path in files])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--alpha", type=float, help="another false-alarm rate than the bundle's")
    options = parser.parse_args()
    detector = Detector.load(options.bundle)
    detector = detector if options.alpha is None else detector.with_policy(options.alpha)
    options.out.write_bytes(figure(detector, options.pictures))
    print(f"{len(options.pictures)} pictures drawn into {options.out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (AnomalyVaeError, OSError) as error:
        sys.exit(f"error: {error}")
