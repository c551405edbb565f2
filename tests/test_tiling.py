"""Tiles: nothing is left out, a picture's score is that of its oddest tile, and what holds for pictures holds still."""

import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from forked import command
from rich.console import Console
from wide import DOT, HEIGHT, WIDTH, dotted, weave, write_wide

from anomaly_vae import ConfigError, Detector, DetectorSpec, Engine
from anomaly_vae import member as member_module
from anomaly_vae.bundle import Bundle
from anomaly_vae.classifying import classify
from anomaly_vae.describing import bundle_facts, facts_table
from anomaly_vae.evaluation import evaluate
from anomaly_vae.expert import Sample, _fitted
from anomaly_vae.exploring import explore
from anomaly_vae.images import ImageSpec
from anomaly_vae.masking import RegionSpec
from anomaly_vae.member import Batch
from anomaly_vae.seeds import generator_of
from anomaly_vae.surveying import Survey, suggest_image_spec
from anomaly_vae.tiling import TilesSpec, starts, tiling_of
from anomaly_vae.training import train

SIDE = 32
SPEC = DetectorSpec.parse(
    {
        "image": {"height": HEIGHT, "width": WIDTH, "channels": 1},
        "tiles": {"side": SIDE},
        "model": {"network": {"kind": "conv", "width": 8}, "latent": {"kind": "gaussian", "size": 8}},
        "training": {"steps": 200, "batch_size": 32},
        "calibration": {"few_normals": 100},
    }
)


def grey(height, width, region=None):
    image = ImageSpec(height=height, width=width, channels=1)
    return RegionSpec(polygon=region).within(image) if region else image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wide(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, folder):
    path = tmp_path_factory.mktemp("bundles") / "tiled"
    train(SPEC, folder, path, device="cpu")
    return path


@pytest.fixture(scope="module")
def detector(bundle):
    return Detector.load(bundle)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(1)
    pictures = [weave(rng) for _ in range(4)] + [dotted(rng, 3, 9 + 40 * i) for i in range(3)]
    return torch.from_numpy(np.stack(pictures))[:, None]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.89])
@pytest.mark.parametrize("side", [16, 31])
def test_tiles_reach_from_end_to_end_and_share_what_was_asked(side, overlap):
    for length in [*range(side, 4 * side), 333]:
        found = starts(length, side, overlap)
        assert found[0] == 0
        assert found[-1] + side == length
        steps = np.diff(found)
        assert (steps >= 1).all()
        assert (steps <= max(1, math.floor(side * (1 - overlap)))).all()
        # One tile fewer could not do it.
        assert len(found) == 1 or (len(found) - 2) * max(1, math.floor(side * (1 - overlap))) < length - side


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 16), (33, 47), (16, 101), (95, 31)])
def test_every_pixel_lies_in_a_tile_and_stitched_tiles_are_the_map(height, width):
    tiling = tiling_of(grey(height, width), TilesSpec(side=16))
    numbers = torch.arange(height * width).view(height, width)
    tiles = tiling.cut(numbers)
    assert tiles.shape == (tiling.count, 16, 16)
    assert set(tiles.flatten().tolist()) == set(range(height * width))
    some = torch.rand(height, width, generator=generator_of(0, "map", 0))
    torch.testing.assert_close(tiling.stitch(tiling.cut(some)), some)
    assert tiling.cut(some.expand(3, -1, -1)).shape == (tiling.count, 3, 16, 16)


def test_stitching_has_no_seams():
    """Two tiles that disagree blend into each other: no step is anywhere near their difference."""
    tiling = tiling_of(grey(16, 24), TilesSpec(side=16, overlap=0.5))
    assert tiling.count == 2
    row = tiling.stitch(torch.stack([torch.zeros(16, 16), torch.ones(16, 16)]))[7]
    assert row[:8].max() == 0
    assert row[16:].min() == 1
    assert row.diff().min() >= 0
    assert row.diff().max() < 0.2


def test_drawn_tiles_are_tiles_of_their_own_picture_each_at_its_own_place():
    tiling = tiling_of(grey(20, 50), TilesSpec(side=16))
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(50), indexing="ij")
    images = torch.stack([torch.stack([torch.full((20, 50), i), rows, columns]) for i in range(400)])
    tiles = tiling.drawn(images, generator_of(0, "tiles", 7))
    assert torch.equal(tiles, tiling.drawn(images, generator_of(0, "tiles", 7)))
    assert not torch.equal(tiles, tiling.drawn(images, generator_of(0, "tiles", 8)))
    assert (tiles[:, 0] == torch.arange(400)[:, None, None]).all()
    corners = tiles[:, 1:, 0, 0]
    assert torch.equal(tiles[:, 1], corners[:, 0, None, None] + torch.arange(16)[:, None].expand(16, 16))
    assert torch.equal(tiles[:, 2], corners[:, 1, None, None] + torch.arange(16).expand(16, 16))
    assert len({tuple(corner) for corner in corners.tolist()}) > 50
    # Tiles at the border are judged in every picture, so they must be seen: the leftmost are a sixth of all here.
    assert 0.1 < (corners[:, 1] == 0).float().mean() < 0.25


def test_a_region_leaves_out_tiles_in_which_nothing_counts():
    left = ((0.0, 0.0), (0.3, 0.0), (0.3, 1.0), (0.0, 1.0))
    tiling = tiling_of(grey(32, 160, left), TilesSpec(side=32, overlap=0.0))
    assert tiling.corners.tolist() == [[0, 0], [0, 32]]
    assert tiling.stitch(torch.ones(2, 32, 32))[:, 64:].max() == 0
    tiles = tiling.drawn(torch.arange(160).expand(200, 1, 32, 160), generator_of(0, "tiles", 0))
    assert tiles[:, 0, 0, 0].max() < 48
    assert tiles[:, 0, 0, 0].max() > 40


def test_a_score_is_the_largest_of_the_tiles(detector, images):
    """By hand: cut here, judge each tile as a picture of its size, take the maximum of every column."""
    rows, columns = starts(HEIGHT, SIDE, 0.25), starts(WIDTH, SIDE, 0.25)
    tile = DetectorSpec.parse(
        detector.spec.model_dump(mode="json", exclude={"scores"})
        | {"tiles": None, "image": {"height": SIDE, "width": SIDE, "channels": 1}}
    )
    judged = detector.judge(images)
    scale = np.ptp(np.quantile(detector.calibration.scores[0], [0.25, 0.75]))
    with torch.inference_mode():
        for i, image in enumerate(images):
            tiles = torch.stack([image[:, y : y + SIDE, x : x + SIDE] for y in rows for x in columns])
            opinion = detector.members[0].judge(tile, Batch(tiles))
            assert abs(judged.score[i] - opinion.score.max()) <= 1e-5 * scale
            for k, kind in enumerate(detector.spec.parts):
                assert judged.parts[kind][i] == pytest.approx(opinion.columns[:, k].max(), rel=1e-5)
    assert min(judged.score[4:]) > max(judged.score[:4])


def test_a_score_depends_on_no_batch_mates_and_survives_the_disk(detector, bundle, images, tmp_path):
    together = detector.judge(images, heat=True)
    assert [detector.judge(image[None]).score[0] for image in images] == together.score
    assert Engine(Detector.load(bundle), "cpu", max_batch=3).judge(images).score == together.score
    detector.save(tmp_path / "copy")
    again = Detector.load(tmp_path / "copy").judge(images, heat=True)
    assert again.score == together.score
    assert again.parts == together.parts
    np.testing.assert_array_equal(again.heat, together.heat)


def test_tiles_of_one_picture_stay_in_one_fold(detector):
    """What a picture's other tiles are like must not flatter it."""
    expert = detector.members[0].experts[""][0]
    score = next(score for score in expert.spec.scores if score.kind == "mahalanobis")
    rows = np.random.default_rng(0).normal(size=(7 * 3, 8))
    sample = Sample(None)
    sample.add(np.arange(len(rows)) // 3, rows)
    crossed = _fitted(expert.spec, expert.model, {"mahalanobis": sample}, {}, leave_out=1)["mahalanobis"]
    # Of seven pictures with three tiles each, those with the numbers 1 and 6 are left out.
    wanted = score.fit(np.delete(rows, [3, 4, 5, 18, 19, 20], 0))
    assert all(torch.equal(crossed[name], torch.from_numpy(value)) for name, value in wanted.items())


def test_memory_holds_few_tiles_at_once(detector, images, monkeypatch):
    together, sizes = detector.judge(images), []
    monkeypatch.setattr(member_module, "_TILES_AT_ONCE", 3)
    watch = detector.members[0].model.encoder.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    few = detector.judge(images)
    watch.remove()
    assert max(sizes) == 3
    scale = np.ptp(np.quantile(detector.calibration.scores[0], [0.25, 0.75]))
    assert np.abs(np.array(few.score) - together.score).max() <= 1e-5 * scale


def test_a_small_dot_in_a_wide_picture_is_found_where_it_is(detector, folder):
    evaluation = evaluate(Engine(detector, "cpu"), folder)
    assert evaluation.quality.auroc > 0.98
    assert evaluation.detection_rate > 0.9
    assert evaluation.false_alarm_rate < 0.25
    rng = np.random.default_rng(2)
    for top, left in ((0, 0), (20, 70), (HEIGHT - DOT, WIDTH - DOT)):
        picture = torch.from_numpy(dotted(rng, top, left))[None, None]
        heat = detector.judge(picture, heat=True).heat[0]
        assert heat.shape == (HEIGHT, WIDTH)
        row, column = divmod(int(heat.argmax()), WIDTH)
        assert top - 2 <= row < top + DOT + 2
        assert left - 2 <= column < left + DOT + 2


def test_interrupted_and_resumed_ends_with_the_same_weights(folder, tmp_path):
    spec = SPEC.with_overrides(["training.epochs=4", "training.checkpoint_seconds=0", "model.network.dropout=0.1"])
    train(spec, folder, tmp_path / "whole", device="cpu")

    def stop(member, members, progress):
        if progress.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(spec, folder, tmp_path / "cut", device="cpu", report=stop)
    said = []
    train(spec, folder, tmp_path / "cut", device="cpu", say=said.append)
    assert any("going on" in line for line in said)
    whole, cut = (safetensors.torch.load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert Detector.load(tmp_path / "whole").version == Detector.load(tmp_path / "cut").version


def test_few_pictures_are_folded_and_the_size_comes_from_them(tmp_path):
    """Two kinds of models, K folds, `image: null`: one picture is still one row of the calibration."""
    folder, said = write_wide(tmp_path / "few", normals=40, dots=0), []
    spec = SPEC.with_overrides(["image=null", "training.epochs=1", "data.test_fraction=0", "calibration.folds=2"])
    other = {"model": spec.model.model_dump(mode="json"), "training": {"epochs": 1}}
    spec = spec.with_overrides([f"beside={json.dumps({'other': other})}"])
    detector = train(spec, folder, tmp_path / "b", device="cpu", say=said.append).detector
    assert (detector.image.height, detector.image.width) == (HEIGHT, 152)
    assert detector.calibration.n == 40
    assert len(detector.members) == 2
    assert any(line == "tiles: 12 of 32 px a picture" for line in said)


def test_scan_and_info_know_tiles(bundle, detector, folder, tmp_path):
    out = tmp_path / "out.jsonl"
    command("scan", bundle, folder / "dot", "--out", out).check_returncode()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 30
    image = detector.prepare((folder / "dot" / "000.png").read_bytes())
    assert rows[0]["score"] == detector.judge(image[None]).score[0]
    facts = bundle_facts(detector, Bundle({}, {}, {}))
    assert facts["spec"]["tiles"] == {"side": 32, "overlap": 0.25}
    console = Console(width=200, record=True)
    console.print(facts_table(bundle, facts))
    assert "12 of 32 px a picture, overlapping by 25%" in console.export_text()


@pytest.mark.parametrize(("overrides", "says"), [
    (["tiles.overlap=0.9"], "tiles.overlap"),
    (["tiles.side=8"], "tiles.side"),
    (["tiles.side=48"], "tiles.side 48 is larger than the picture of 150x40 px; make it smaller or image larger"),
    (["model.condition={classes: [a, b]}"], "leave out tiles or model.condition"),
    (["training.rarity={}"], "leave out tiles or training.rarity"),
    (["training.trim={}"], "leave out tiles or training.trim"),
    (["image=null", "model.network.channels=[8, 8, 8, 8, 8, 8]"], "list fewer"),
    (["tiles=null", "image={height: 64, width: 640, channels: 1}"], "512 px a side at most; set tiles.side"),
    (["image={height: 4096, width: 4096, channels: 1}"], "choose a smaller image"),
], ids=str)  # fmt: skip
def test_what_cannot_be_is_refused_when_the_settings_are_read(overrides, says):
    with pytest.raises(ConfigError) as caught:
        SPEC.with_overrides(overrides)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_looks_at_whole_pictures_says_that_it_cannot(bundle, detector, folder, tmp_path):
    engine = Engine(detector, "cpu")
    with pytest.raises(ConfigError, match="trained without tiles"):
        explore(engine, bundle, tmp_path / "look")
    with pytest.raises(ConfigError, match="trained without tiles"):
        classify(engine, folder)


@pytest.mark.parametrize(("size", "side", "expected"), [
    ((1024, 256), 128, (1024, 256)), ((250, 1000), 64, (248, 1000)), ((8000, 500), 128, (4096, 256)),
    ((6000, 4000), 128, (1256, 840)), ((50, 50), 128, (128, 128)), ((1000, 30), 128, (4096, 128)),
])  # fmt: skip
def test_a_canvas_keeps_the_pictures_ratio_and_size_within_bounds(size, side, expected):
    width, height = size
    survey = Survey({"good": 20}, 20, 20, width, height, width / height, True, {size: 20}, {"png": 20}, {"grey": 20})
    image = suggest_image_spec(survey, side)
    assert (image.width, image.height) == expected
    assert min(image.width, image.height) >= side
