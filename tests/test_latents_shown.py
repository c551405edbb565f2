"""Latent arithmetic on drawn faces and on real digits, by the command that makes the documents' pictures."""

import json
import subprocess

from conftest import ROOT
from forked import command
from PIL import Image
from test_faces_exercise import write_faces


def run(*options: str) -> subprocess.CompletedProcess:
    return command(*options, script=ROOT / "benchmarks" / "latents.py")


def test_a_difference_of_codes_makes_drawn_faces_smile(tmp_path):
    faces = write_faces(tmp_path / "faces", 40)
    small = ["model.network.channels=[16,32]", "model.latent.size=32", "objective.perceptual=null"]
    words = [word for setting in [*small, "objective.augmentation=null"] for word in ("-o", setting)]
    options = ["--faces", str(faces), "--people", "30", "--side", "32", "--epochs", "70", "--as-they-are", *words]
    done = run(*options, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "latents.json").read_text())["faces"]
    assert found["people"] == [30, 10]
    assert found["classifier_accuracy_on_held_out_pictures"] > 0.9
    by_alpha = {row["alpha"]: row for row in found["by_alpha"]}
    assert by_alpha[0.0]["held_out_called_smiling"] < 0.3, "what is not shifted does not smile"
    assert by_alpha[1.5]["held_out_called_smiling"] > 0.7
    assert found["chosen_alpha"] in found["by_alpha"]
    for name in ("faces-rebuilt", "faces-smile", "faces-map"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 20


def test_digits_in_two_latents(real_images, tmp_path):
    done = run("--mnist", str(real_images / "mnist"), "--steps", "300", "--held", "600", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    two, many = json.loads((tmp_path / "out" / "latents.json").read_text())["digits"]
    assert (two["latents"], many["latents"]) == (2, 28)
    assert max(two["squared_error_held_out"], many["squared_error_held_out"]) < 0.064, "the mean digit has 0.067"
    assert len(list((tmp_path / "out").glob("digits-*.png"))) == 6


def test_absent_data_is_said_and_too_few_people_refused(tmp_path):
    done = run("--faces", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0
    assert "not measured here" in done.stderr
    done = run("--faces", str(write_faces(tmp_path / "faces", 4)), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "--people" in done.stderr
