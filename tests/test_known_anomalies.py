"""Known anomalies: read apart from all else, shown to training alone, and reported beside kinds nobody showed."""

import json
from collections.abc import Iterator
from pathlib import Path
from shutil import copy

import numpy as np
import pytest
import torch
from conftest import TINY, write_digits
from forked import command
from PIL import Image
from torch import nn

from anomaly_vae import ConfigError, DataError, Detector
from anomaly_vae.bundle import read_bundle
from anomaly_vae.console import evaluation_table, kinds_table, out
from anomaly_vae.data import DataSpec, open_pictures, split
from anomaly_vae.describing import bundle_facts, facts_table
from anomaly_vae.engine import Engine
from anomaly_vae.evaluation import Evaluation, evaluate
from anomaly_vae.exposure import ExposureSpec
from anomaly_vae.known import open_known
from anomaly_vae.listing import list_pictures
from anomaly_vae.model import ModelSpec
from anomaly_vae.objectives import Objective, ObjectiveSpec
from anomaly_vae.training import Trained, train

BRIEF = TINY.with_overrides(["training.steps=40", "training.checkpoint_seconds=0"])
SHOWN = 30


def picture(path: Path, value: int = 9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)
    return path


def show(root: Path, kind: str, into: str, count: int = SHOWN) -> list[Path]:
    """Move some pictures of a kind into `known_anomalies/`."""
    place = root / "known_anomalies" / into
    place.mkdir(parents=True)
    return [path.rename(place / path.name) for path in sorted((root / kind).glob("*.png"))[:count]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Normals 0-3, kinds 4-9, of which some 8s are known; one of them lies in the test as well."""
    root = write_digits(tmp_path_factory.mktemp("known"))
    copy(show(root, "8", "8")[0], root / "8" / "again.png")
    return root


def trained(root: Path, place: Path, *overrides: str) -> Trained:
    made = train(TINY.with_overrides(overrides), root, place, device="cpu")
    assert made is not None
    return made


@pytest.fixture(scope="module")
def exposed(folder, tmp_path_factory) -> Trained:
    return trained(folder, tmp_path_factory.mktemp("bundles") / "exposed")


@pytest.fixture(scope="module")
def ignorant(folder, tmp_path_factory) -> Trained:
    return trained(folder, tmp_path_factory.mktemp("bundles") / "ignorant", "objective.exposure=null")


def judged(made: Trained, root: Path) -> Evaluation:
    return evaluate(Engine(Detector.load(made.path), "cpu", 64), root)


@pytest.fixture(scope="module")
def found(exposed, folder) -> Evaluation:
    return judged(exposed, folder)


def flat(root: Path) -> None:
    picture(root / "a.png")


def kinds(root: Path) -> None:
    picture(root / "good" / "a.png")
    picture(root / "scratch" / "b.png")


def mvtec(root: Path) -> None:
    picture(root / "train" / "good" / "a.png")
    picture(root / "test" / "scratch" / "b.png")


@pytest.mark.parametrize("make", [flat, kinds, mvtec])
def test_every_layout_may_have_them(tmp_path, make):
    make(tmp_path)
    before = list_pictures(tmp_path, DataSpec()).items
    picture(tmp_path / "known_anomalies" / "x.png")
    picture(tmp_path / "known_anomalies" / "dent" / "deep" / "y.png")
    picture(tmp_path / "known_anomalies" / "dent" / "deep" / "y_mask.png")
    listing = list_pictures(tmp_path, DataSpec())
    assert listing.items == before
    assert {item.key: item.label for item in listing.known} == {
        "known_anomalies/dent/deep/y.png": "dent",
        "known_anomalies/x.png": "known_anomalies",
    }
    assert not any(item.normal for item in listing.known)
    assert "known_anomalies: 2 pictures, for training alone" in listing.notes


def test_a_manifest_calls_them_known(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    text = "path,label,split\na.png,good,train\nb.png,dent,known\nc.png,dent,test\n"
    (tmp_path / "manifest.csv").write_text(text)
    listing = list_pictures(tmp_path, DataSpec())
    assert [item.key for item in listing.items] == ["a.png", "c.png"]
    assert [(item.key, item.label, item.split) for item in listing.known] == [("b.png", "dent", None)]
    (tmp_path / "manifest.csv").write_text("path,split\na.png,\nb.png,known\n")
    assert [item.label for item in list_pictures(tmp_path, DataSpec()).known] == ["known_anomalies"]
    (tmp_path / "manifest.csv").write_text(text.replace("b.png,dent", "b.png,good"))
    with pytest.raises(DataError, match="line 3: a known anomaly of the normal label 'good'"):
        list_pictures(tmp_path, DataSpec())


def test_groups_and_official_parts_reach_them(tmp_path):
    mvtec(tmp_path)
    picture(tmp_path / "known_anomalies" / "p7_x.png")
    picture(tmp_path / "train" / "good" / "p8_x.png")
    assert [item.group for item in list_pictures(tmp_path, DataSpec(group=r"(p\d)_")).known] == ["p7"]
    assert len(list_pictures(tmp_path, DataSpec(part="train")).known) == 1
    assert not list_pictures(tmp_path, DataSpec(part="test")).known


def test_they_are_in_no_part_of_a_split(folder):
    pictures = open_pictures(folder, DataSpec(), BRIEF.image)
    assert not any(item.key.startswith("known_anomalies") for item in pictures.items)
    parts = split(pictures, seed=0)
    assert not any(pictures.items[i].label == "known_anomalies" for i in [*parts.pool, *parts.test_abnormal])


def test_they_and_their_copies_are_in_no_test(exposed, found, folder):
    keys = {item.key for item in found.cases.pictures.items}
    assert "8/again.png" not in keys
    assert not any(key.startswith("known_anomalies") for key in keys)
    listing = list_pictures(folder, DataSpec())
    eights = sum(item.label == "8" for item in listing.items)
    assert {kind.kind: kind.n for kind in found.kinds}["8"] == eights - 1
    assert exposed.metrics["known_anomalies"] == {"8": SHOWN}


def test_calibration_is_that_of_normals_alone(exposed, ignorant):
    assert exposed.detector.calibration.n == ignorant.detector.calibration.n
    assert len(exposed.detector.seen) == len(ignorant.detector.seen) + SHOWN


def test_group_mates_of_known_anomalies_are_no_test(tmp_path):
    root = write_digits(tmp_path / "d", count=700)
    for path in sorted((root / "8").glob("*.png"))[:6]:
        path.rename(path.with_name(f"p1_{path.name}"))
    picture_of = sorted((root / "8").glob("p1_*.png"))[0]
    place = root / "known_anomalies" / "8"
    place.mkdir(parents=True)
    picture_of.rename(place / picture_of.name)
    spec = BRIEF.with_overrides([r"data.group=(p\d)_"])
    pictures = open_pictures(root, spec.data, spec.image)
    known = open_known(spec, root, pictures, split(pictures, seed=0).pool, lambda line: None)
    assert known is not None
    mates = [i for i, item in enumerate(pictures.items) if item.group == "p1"]
    assert len(mates) == 5
    assert np.isin(pictures.fingerprints[mates], known.seen).all()


def test_the_known_kind_is_found_better_and_others_not_worse(found, ignorant, folder):
    before, after = ({kind.kind: kind.auroc for kind in one.kinds} for one in (judged(ignorant, folder), found))
    assert after["8"] > before["8"] + 0.015
    for kind in "45679":
        assert after[kind] > before[kind] - 0.05
    assert found.alarms_as_promised


def test_kinds_are_told_apart(found, exposed, ignorant, folder):
    assert {kind.kind for kind in found.kinds if kind.known} == {"8"}
    assert found.unseen is not None
    assert found.unseen.n == found.n_abnormal - sum(kind.n for kind in found.kinds if kind.known)
    assert found.unseen.flagged == sum(kind.flagged for kind in found.kinds if not kind.known)
    told = json.loads(json.dumps(found.to_dict()))
    assert told["known_kinds"] == ["8"]
    assert told["unseen"]["detection_rate"] == found.unseen.flagged / found.unseen.n
    assert 0.9 < told["unseen"]["auroc"] <= 1
    with out.capture() as shown:
        out.print(evaluation_table(found))
        out.print(kinds_table(found))
    assert "of kinds not shown in training" in shown.get()
    assert "in training" in shown.get()
    assert "unseen" in shown.get()
    plain = judged(ignorant, folder)
    assert plain.known_kinds == ()
    assert plain.unseen is None
    assert not any(kind.known for kind in plain.kinds)


def test_the_bundle_remembers_them(exposed):
    detector = Detector.load(exposed.path)
    assert detector.known_kinds == detector.with_policy(0.1).known_kinds == ("8",)
    facts = bundle_facts(detector, read_bundle(exposed.path))
    assert facts["known_kinds"] == ["8"]
    with out.capture() as shown:
        out.print(facts_table(exposed.path, facts))
    assert "8 (outlier exposure)" in shown.get()


def test_of_unknown_kind_nothing_is_claimed(tmp_path):
    root = write_digits(tmp_path / "d", count=900)
    show(root, "8", ".", 10)
    said: list[str] = []
    made = train(BRIEF, root, tmp_path / "b", device="cpu", say=said.append)
    assert "10 known anomalies of 1 kind are used (outlier exposure)" in said
    assert made is not None
    evaluation = judged(made, root)
    assert evaluation.unseen is None
    assert {kind.known for kind in evaluation.kinds} == {None}
    with out.capture() as shown:
        out.print(kinds_table(evaluation))
    assert "put them into known_anomalies/KIND/" in " ".join(shown.get().split())


def test_without_exposure_the_folder_changes_no_weight(folder, tmp_path):
    root = write_digits(tmp_path / "d", count=900)
    train(BRIEF, root, tmp_path / "without", device="cpu")
    place = root / "known_anomalies" / "8"
    place.mkdir(parents=True)
    for path in sorted((folder / "known_anomalies" / "8").iterdir()):
        copy(path, place / path.name)
    off = BRIEF.with_overrides(["objective.exposure=null"])
    for name, spec in {"off": off, "on": BRIEF}.items():
        train(spec, root, tmp_path / name, device="cpu")
    without, off_, on = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("without", "off", "on"))
    assert without == off_
    assert without != on


def test_interrupted_it_goes_on_to_the_same_weights(folder, tmp_path):
    whole = train(BRIEF, folder, tmp_path / "whole", device="cpu")

    class Killed(Exception):
        pass

    def kill(model, models, progress):
        if progress.epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        train(BRIEF, folder, tmp_path / "again", device="cpu", report=kill)
    again = train(BRIEF, folder, tmp_path / "again", device="cpu")
    assert whole is not None
    assert again is not None
    assert again.detector.version == whole.detector.version


def test_two_processes_share_the_anomalies_of_a_step():
    exposure = ExposureSpec()
    assert exposure.count(64, 1) == 16
    for batch, world in ((64, 3), (2, 2), (33, 4)):
        assert exposure.count(batch, world) % world == 0
        assert exposure.count(batch, world) >= world


def test_a_copy_of_a_normal_is_no_anomaly(tmp_path):
    root = write_digits(tmp_path / "d", count=700)
    show(root, "8", "8", 3)
    pictures = open_pictures(root, BRIEF.data, BRIEF.image)
    used = split(pictures, seed=0).pool
    copy(root / pictures.items[used[0]].key, root / "known_anomalies" / "8" / "normal.png")
    (root / "known_anomalies" / "8" / "torn.png").write_bytes(b"torn")
    said: list[str] = []
    known = open_known(BRIEF, root, pictures, used, said.append)
    assert known is not None
    assert known.counts == {"8": 3}
    assert "skipped 1 of known_anomalies/ that lie among the normal pictures as well" in said
    assert any("unreadable" in line and "torn.png" in line for line in said)


@pytest.mark.parametrize(("overrides", "says"), [
    (["model.condition={}", "data.normal=[good,5]"], "leave out model.condition"),
    (["tiles={side: 16}", "model.network.width=4"], "leave out tiles"),
    (["objective.course.kind=greedy", "training.select=last"], "objective.course.kind=joint"),
])  # fmt: skip
def test_what_cannot_learn_from_them_refuses_in_one_line(folder, tmp_path, overrides, says):
    with pytest.raises(ConfigError, match=says) as caught:
        train(BRIEF.with_overrides(overrides), folder, tmp_path / "b", device="cpu")
    assert "\n" not in str(caught.value)
    assert "objective.exposure" in str(caught.value)


def objective(**settings: object) -> Objective:
    corruption = ({"kind": "strokes"},) if "marker" in settings else ()
    model = ModelSpec.parse(
        {"network": {"kind": "conv", "width": 4}, "latent": {"kind": "gaussian", "size": 4}, **settings}
    )
    return Objective(ObjectiveSpec.parse({"corruption": corruption}), model.build((1, 16, 16), 0))


def norms(model: nn.Module) -> Iterator[torch.Tensor]:
    return (tensor.clone() for name, tensor in model.named_buffers() if "running" in name or "tracked" in name)


@pytest.mark.parametrize("settings", [{}, {"marker": {"width": 4}}])
def test_normals_keep_their_loss_and_their_statistics(settings):
    """The term is added, and nothing that normals leave behind in the model depends on the anomalies."""
    x, known, noise = torch.rand(6, 1, 16, 16), torch.rand(3, 1, 16, 16), torch.zeros(6, 4)
    ours, theirs = objective(**settings).train(), objective(**settings).train()
    plain, more = ours(x, noise, 0.5, 1), theirs(x, noise, 0.5, 1, None, known)
    assert torch.equal(plain.reconstruction, more.reconstruction)
    assert more.total > plain.total
    assert all(torch.equal(*pair) for pair in zip(norms(ours.model), norms(theirs.model), strict=True))
    assert all(part.training for part in theirs.modules())
    held = ours.eval()(x, noise, 1.0, 1, None, known).total
    assert torch.equal(held, ours(x, noise, 1.0, 1).total)


def test_beyond_its_margin_an_anomaly_costs_nothing():
    model = objective().model.eval()
    x, known = torch.rand(4, 1, 16, 16), torch.rand(2, 1, 16, 16)
    costs = [ExposureSpec(margin=margin).loss(model, known, x).item() for margin in (1e-6, 1.0, 3.0)]
    assert costs == sorted(costs)
    assert costs[2] - costs[1] == pytest.approx(0.3 * 2.0, rel=0.2)
    with torch.no_grad():
        near = model.likelihood.mean(model.decode(model.encode(x).mu))
    assert ExposureSpec(margin=1e-6).loss(model, known * 0 + 1e3, near).item() == 0


def test_the_command_line_tells_of_them(exposed, folder):
    done = command("evaluate", exposed.path, "--data", folder, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "of kinds not shown in training" in done.stdout
    assert "unseen" in done.stdout
