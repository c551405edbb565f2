"""Training: resumable to the bit, honest about what went wrong, right about what it may look at."""

import hashlib
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import write_digits
from forked import begun, command

from anomaly_vae import BundleError, CalibrationError, Detector, TrainingError
from anomaly_vae.data import open_pictures
from anomaly_vae.dividing import divide
from anomaly_vae.training import train

SETTINGS = [
    "image={height: 16, width: 16, channels: 1}",
    "model.network.width=8",
    "model.network.dropout=0.1",
    "model.latent.size=8",
    "training.epochs=25",
    "training.checkpoint_seconds=0",
    "training.batch_size=32",
]


def words(data: Path, out: Path, *more: str) -> list[str]:
    settings = [word for setting in SETTINGS for word in ("-o", setting)]
    fixed = ["train", "--data", str(data), "--out", str(out), "--device", "cpu", "--preset", "vae"]
    return [*fixed, *settings, *more]


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(bundle / "weights.safetensors")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("small"), count=900)


def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(small, tmp_path):
    command(*words(small, tmp_path / "whole")).check_returncode()
    kills = 0
    checkpoint = tmp_path / ".cut.training" / "member0.safetensors"
    for _ in range(3):
        with Path(os.devnull).open("w") as nowhere:
            process = begun(words(small, tmp_path / "cut"), nowhere, nowhere)
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns > before:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
        assert not (tmp_path / "cut").exists()
    assert kills == 3
    done = command(*words(small, tmp_path / "cut"))
    assert done.returncode == 0, done.stderr
    assert "going on with the interrupted training" in done.stderr
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert Detector.load(tmp_path / "whole").version == Detector.load(tmp_path / "cut").version
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_an_interrupted_training_of_other_settings_is_not_mixed_in(small, tmp_path, tiny_spec):
    short = tiny_spec.with_overrides(["training.epochs=1", "training.checkpoint_seconds=0"])

    def stop(member, members, progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(short, small, tmp_path / "b", device="cpu", report=stop)
    with pytest.raises(TrainingError, match="--restart"):
        train(short.with_overrides(["seed=1"]), small, tmp_path / "b", device="cpu")
    train(short.with_overrides(["seed=1"]), small, tmp_path / "b", device="cpu", restart=True)
    assert Detector.load(tmp_path / "b").spec.seed == 1


def test_same_seed_same_bundle_other_seed_other(small, tmp_path, tiny_spec):
    short = tiny_spec.with_overrides(["training.epochs=2"])
    versions = []
    for i, seed in enumerate((3, 3, 4)):
        trained = train(short.with_overrides([f"seed={seed}"]), small, tmp_path / str(i), device="cpu")
        versions.append(trained.detector.version)
    assert versions[0] == versions[1] != versions[2]


def test_few_normals_are_folded_and_every_calibration_image_is_unseen_by_its_member(tmp_path, tiny_spec):
    folder = write_digits(tmp_path / "few", count=150)
    spec = tiny_spec.with_overrides(["training.epochs=3"])
    pictures = open_pictures(folder, spec.data, spec.image)
    parts, crossed = divide(spec, pictures)
    assert crossed
    assert len(parts) == 5
    calibrated = np.concatenate([part.calibrate for part in parts])
    assert len(np.unique(calibrated)) == len(calibrated)
    for part in parts:
        assert not set(part.calibrate) & set(part.train) | set(part.calibrate) & set(part.fit)
        assert not set(part.train) & set(part.fit)
        np.testing.assert_array_equal(
            np.sort(np.concatenate([part.train, part.fit, part.calibrate])), np.sort(calibrated)
        )
    detector = train(spec, folder, tmp_path / "b", device="cpu").detector
    assert len(detector.members) == 5
    assert detector.policy.bound > 2 * detector.policy.alpha  # what is proven for K folds is more than twice alpha
    assert detector.policy.threshold is None
    loaded = Detector.load(tmp_path / "b")
    images = pictures.images(calibrated[:5])
    assert loaded.judge(images).score == detector.judge(images).score


def test_groups_never_straddle_and_claim_no_band(tmp_path, tiny_spec):
    folder = write_digits(tmp_path / "grouped", count=800)
    spec = tiny_spec.with_overrides(
        ["training.epochs=1", r"data.group='(\d\d)\d\d\.png'", "calibration.few_normals=20"]
    )
    for path in folder.rglob("*.png"):  # 40 groups of consecutive digits
        path.rename(path.with_name(f"{int(path.stem) // 20:02}{path.stem[-2:]}.png"))
    pictures = open_pictures(folder, spec.data, spec.image)
    (part,), crossed = divide(spec, pictures)
    assert not crossed
    names = [{pictures.items[i].group for i in side} for side in (part.train, part.fit, part.calibrate)]
    assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]
    detector = train(spec, folder, tmp_path / "b", device="cpu").detector
    assert detector.calibration.groups == len(names[2])
    assert detector.policy.band is None


def test_an_alpha_that_cannot_be_kept_is_refused_before_training(small, tmp_path, tiny_spec):
    spec = tiny_spec.with_overrides(["calibration.alpha=0.001"])

    def report(member, members, progress):
        raise AssertionError("it trained")

    with pytest.raises(CalibrationError, match="needs 999 calibration images"):
        train(spec, small, tmp_path / "b", device="cpu", report=report)


def test_a_diverging_loss_is_said_with_the_remedy(small, tmp_path, tiny_spec):
    spec = tiny_spec.with_overrides(["training.learning_rate=1e30", "training.clip_norm=null", "training.warmup=0"])
    with pytest.raises(TrainingError, match=r"no longer a number in epoch .* -o training\.learning_rate="):
        train(spec, small, tmp_path / "b", device="cpu")


def test_collapse_is_said_with_the_remedy(small, tmp_path, tiny_spec):
    spec = tiny_spec.with_overrides(["model.latent.beta=10000", "model.latent.warmup=0", "training.epochs=8"])
    trained = train(spec, small, tmp_path / "b", device="cpu")
    assert any("collapse in member" in line and "free_bits" in line for line in trained.notes)


def test_best_epoch_is_the_one_with_the_lowest_held_out_loss(small, tmp_path, tiny_spec):
    for select in ("best", "last"):
        spec = tiny_spec.with_overrides(["training.epochs=30", f"training.select={select}"])
        (one,) = train(spec, small, tmp_path / select, device="cpu").metrics["members"]
        losses = [row["held_out"] for row in one["history"]]
        assert one["epoch"] == (int(np.argmin(losses)) + 1 if select == "best" else 30)
        assert one["held_out_loss"] == losses[one["epoch"] - 1]


def test_an_existing_bundle_stays(tiny_bundle, small, tiny_spec):
    with pytest.raises(BundleError, match="--overwrite"):
        train(tiny_spec, small, tiny_bundle, device="cpu")


def test_tensorboard_logs_can_be_read(small, tmp_path, tiny_spec):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(
        tiny_spec.with_overrides(["training.epochs=3"]),
        small,
        tmp_path / "b",
        device="cpu",
        tensorboard=tmp_path / "tb",
    )
    (events,) = (tmp_path / "tb").rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events)).Reload()
    assert [event.step for event in log.Scalars("member0/loss")] == [1, 2, 3]


def test_pictures_renamed_meanwhile_are_another_run(tmp_path, tiny_spec):
    """The parts depend on the order of the names; going on would train on calibration pictures."""
    folder = write_digits(tmp_path / "digits", count=700)
    short = tiny_spec.with_overrides(["training.epochs=2", "training.checkpoint_seconds=0"])

    def stop(member, members, progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(short, folder, tmp_path / "b", device="cpu", report=stop)
    for path in sorted((folder / "good").iterdir()):
        path.rename(path.with_name(f"{hash_of(path.name)}.png"))
    with pytest.raises(TrainingError, match="--restart"):
        train(short, folder, tmp_path / "b", device="cpu")


def hash_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def test_a_checkpoint_without_its_description_is_not_adopted(small, tmp_path, tiny_spec):
    short = tiny_spec.with_overrides(["training.epochs=2"])
    work = tmp_path / ".b.training"

    def keep(member, members, progress):
        if progress.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(short.with_overrides(["training.checkpoint_seconds=0"]), small, tmp_path / "b", device="cpu", report=keep)
    assert (work / "member0.safetensors").exists()
    (work / "run.yaml").unlink()
    adopted = train(short.with_overrides(["seed=9"]), small, tmp_path / "b", device="cpu").detector.version
    fresh = train(short.with_overrides(["seed=9"]), small, tmp_path / "c", device="cpu").detector.version
    assert adopted == fresh


def test_copies_do_not_count_as_calibration(tmp_path, tiny_spec):
    folder = write_digits(tmp_path / "digits", count=900)
    for path in sorted((folder / "good").iterdir()):
        for i in range(2):
            (folder / "good" / f"copy{i}_{path.name}").write_bytes(path.read_bytes())
    pictures = open_pictures(folder, tiny_spec.data, tiny_spec.image)
    (part,), _ = divide(tiny_spec, pictures)
    assert len(np.unique(pictures.fingerprints[part.calibrate])) == len(part.calibrate)
    assert len(part.calibrate) < 0.1 * len(pictures)


def test_an_epoch_is_at_most_a_tenth_of_the_budget(small, tmp_path, tiny_spec):
    spec = tiny_spec.with_overrides(["training.steps=20", "training.batch_size=8", "training.patience=null"])
    (one,) = train(spec, small, tmp_path / "b", device="cpu").metrics["members"]
    assert one["epochs"] == 10


@pytest.mark.parametrize("place", ["file/b", "mine"])
def test_an_impossible_place_is_refused_before_training(small, tmp_path, tiny_spec, place):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "mine").mkdir()

    def report(member, members, progress):
        raise AssertionError("it trained")

    with pytest.raises(BundleError, match="choose another --out"):
        train(tiny_spec, small, tmp_path / place, device="cpu", overwrite=True, report=report)


def test_copies_of_a_picture_share_a_fold(tmp_path, tiny_spec):
    folder = write_digits(tmp_path / "few", count=150)
    for path in sorted((folder / "good").iterdir())[:20]:
        (folder / "good" / f"copy_of_{path.name}").write_bytes(path.read_bytes())
    pictures = open_pictures(folder, tiny_spec.data, tiny_spec.image)
    parts, _ = divide(tiny_spec, pictures)
    for part in parts:
        known = pictures.fingerprints[np.concatenate([part.train, part.fit])]
        assert not np.isin(pictures.fingerprints[part.calibrate], known).any()
