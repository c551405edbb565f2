"""Several processes under torchrun train the model that one trains: the global batch decides, not how it is shared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import write_digits

from anomaly_vae import Detector, Engine

SETTINGS = ("image={height: 16, width: 16, channels: 1}", "training.epochs=4", "training.batch_size=32",
            "model.network.norm=group", "model.network.width=12", "training.precision=32-true")  # fmt: skip
NEAR = 1e-5
"""How far a tensor may move relative to its size: float32 sums of another order, over some steps of AdamW."""


def trained(data: Path, out: Path, processes: int, *more: str) -> Path:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    settings = [word for one in (*SETTINGS, *more) for word in ("-o", one)]
    words = ["train", "--data", str(data), "--out", str(out), "--device", "cpu", "--preset", "vae", *settings]
    alone = [sys.executable] if processes == 1 else run
    done = subprocess.run(
        [*alone, "-m", "anomaly_vae", *words], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), count=700)


def test_two_processes_train_the_model_of_one(digits, tmp_path):
    """Noise of z is drawn for the whole batch; corruptions draw for each process, and agree in law alone."""
    one, two = (trained(digits, tmp_path / str(n), n) for n in (1, 2))
    histories = [json.loads((path / "metrics.json").read_text())["members"][0]["history"] for path in (one, two)]
    for name in ("loss", "reconstruction", "latent", "held_out"):
        columns = [[row[name] for row in history] for history in histories]
        np.testing.assert_allclose(columns[1], columns[0], rtol=1e-5, err_msg=name)
    weights = [safetensors.torch.load_file(path / "weights.safetensors") for path in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert (weights[1][name] - tensor).norm() <= NEAR * tensor.norm(), name
    engines = [Engine(Detector.load(path), "cpu") for path in (one, two)]
    assert engines[1].detector.calibration.n == engines[0].detector.calibration.n > 50
    files = sorted(digits.rglob("*.png"))[::10]
    pictures = torch.stack([engines[0].prepare(path.read_bytes()) for path in files])
    scores = [np.array(engine.judge(pictures).score) for engine in engines]
    low, high = np.quantile(engines[0].detector.calibration.scores[0], [0.25, 0.75])
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=1e-4 * (high - low))
