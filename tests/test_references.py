"""Which pictures are references of a score that owes nothing to the model: training ones too, and no others."""

import dataclasses

import numpy as np
import torch
from test_shape_scores import pictures, seen
from wide import write_wide

from anomaly_vae.data import open_pictures
from anomaly_vae.detector import Detector
from anomaly_vae.dividing import divide
from anomaly_vae.dividing import references_of as choose_references
from anomaly_vae.estimator import _shown
from anomaly_vae.model import normalise
from anomaly_vae.observations import Marginal
from anomaly_vae.scores import measure, measure_map
from anomaly_vae.shape_scores import UnfamiliarShape
from anomaly_vae.training import train

CPU = torch.device("cpu")

WITH_SHAPE = (
    "scores=[{kind: unfamiliar_shape}, {kind: relative_error}]", "fusion.parts=[unfamiliar_shape]",
    "training.steps=2", "training.epochs=null",
)  # fmt: skip


def outlines_in(kept):
    """The outlines that references stand for, (n, D)."""
    codes, directions, mean = (np.asarray(kept[name]) for name in ("codes", "directions", "mean"))
    return codes @ directions + mean


def references_of(bundle, k=0):
    """The outlines that a bundle's member keeps."""
    return outlines_in(Detector.load(bundle).members[k].experts[""][0].references.of_scores["unfamiliar_shape"])


def as_rows(found):
    """Sorted, so that the order does not matter."""
    return found[np.lexsort(found.round(3).T[::-1])]


def test_training_pictures_are_references_too_and_calibration_pictures_are_not(digits_folder, tiny_spec, tmp_path):
    spec = tiny_spec.with_overrides(list(WITH_SHAPE))
    train(spec, digits_folder, tmp_path / "b", device="cpu")
    opened = open_pictures(digits_folder, spec.data, spec.image)
    part = divide(spec, opened)[0][0]
    score = UnfamiliarShape()

    def rows(indices):
        return score.statistic(seen(normalise(opened.images(indices), torch.device("cpu")))).numpy()

    wanted = score.fit(np.concatenate([rows(part.fit), rows(part.train)]))
    whole = wanted["codes"] @ wanted["directions"] + wanted["mean"]
    np.testing.assert_allclose(references_of(tmp_path / "b"), whole, atol=1e-4)


def test_trimmed_training_gives_no_references(digits_folder, tiny_spec, tmp_path):
    """What is left out of training as not normal must not come back as a reference."""
    spec = tiny_spec.with_overrides([*WITH_SHAPE, "training.trim={share: 0.1}"])
    done = train(spec, digits_folder, tmp_path / "b", device="cpu")
    assert len(references_of(tmp_path / "b")) == done.metrics["pictures"]["fit"][0]


def test_references_are_of_other_groups_than_what_is_fitted(digits_folder, tiny_spec):
    opened = open_pictures(digits_folder, tiny_spec.data, tiny_spec.image)
    part = divide(tiny_spec, opened)[0][0]
    assert np.array_equal(choose_references(part, opened, 10**6), part.train)
    assert len(choose_references(part, opened, 10)) == 10
    mixed = dataclasses.replace(part, fit=part.train[:5])
    assert np.array_equal(choose_references(mixed, opened, 10**6), part.train[5:])
    # Where fitting has pictures of every group, nothing is left, which must be no error.
    nothing = choose_references(dataclasses.replace(part, fit=part.train), opened, 10**6)
    assert len(nothing) == 0
    assert list(opened.batches(64, nothing)) == []


def test_with_folds_and_tiles_references_are_all_of_a_members_own_tiles_and_none_it_calibrates(tiny_spec, tmp_path):
    folder = write_wide(tmp_path / "few", normals=30, dots=0)
    spec = tiny_spec.with_overrides(
        [*WITH_SHAPE, "image={height: 40, width: 150, channels: 1}", "tiles={side: 32}", "data.normal=[good]",
         "data.test_fraction=0", "calibration.few_normals=100", "calibration.folds=3"]
    )  # fmt: skip
    train(spec, folder, tmp_path / "b", device="cpu")
    opened = open_pictures(folder, spec.data, spec.image)
    parts, crossed = divide(spec, opened)
    assert crossed
    assert len(parts) == 3
    score, tiling = UnfamiliarShape(), spec.tiling
    for k, part in enumerate(parts):
        tiles = [tiling.cut(image) for image in opened.images(np.concatenate([part.fit, part.train]))]
        rows = score.statistic(seen(normalise(torch.cat(tiles), CPU))).numpy()
        assert len(rows) == tiling.count * (30 - len(part.calibrate))
        found, wanted = references_of(tmp_path / "b", k), outlines_in(score.fit(rows))
        np.testing.assert_allclose(as_rows(found), as_rows(wanted), atol=1e-3)


def test_what_asks_no_model_is_asked_once_however_many_classes_there_are(tiny_spec, monkeypatch):
    classes = ("a", "b", "c")
    model = tiny_spec.with_overrides([f"model.condition={{size: 4, classes: {list(classes)}}}"]).model
    marginal = Marginal(model.build((1, 28, 28), 0).eval(), pictures(4).float())
    score, calls = UnfamiliarShape(), []
    references = {name: torch.from_numpy(value) for name, value in score.fit(score.statistic(marginal).numpy()).items()}
    measured = UnfamiliarShape._residual
    monkeypatch.setattr(
        UnfamiliarShape, "_residual", lambda self, *given: calls.append(given) or measured(self, *given)
    )
    alone = seen(pictures(4).float())
    torch.testing.assert_close(measure(score, marginal, references), score(alone, references))
    assert len(calls) == 2, "one for the classes together, one for the picture alone"
    torch.testing.assert_close(measure_map(score, marginal, references), score.map(alone, references))
    assert len(calls) == 4


class Recording:
    """Images that remember how many rows were taken at a time."""

    def __init__(self, images):
        self.images, self.taken = images, []

    def __getitem__(self, rows):
        found = self.images[rows]
        self.taken.append(len(found))
        return found


def test_rows_of_the_estimator_are_cut_as_they_are_asked_for_and_as_often():
    images = Recording(torch.arange(400.0).reshape(400, 1, 1, 1))
    batches = _shown(images, np.arange(100, 400))
    for _ in range(2):
        one = batches()
        images.taken.clear()
        assert len(next(one).images) == 64
        assert images.taken == [64]
        rest = torch.cat([batch.images for batch in one]).flatten()
        assert rest.tolist() == list(range(164, 400))
