"""Reports load nothing, run nothing of a user's, and say what was measured."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, write_digits
from forked import command
from PIL import Image

from anomaly_vae import Detector, Engine, report_charts
from anomaly_vae.bundle import read_bundle
from anomaly_vae.calibration import Calibration
from anomaly_vae.errors import DataError
from anomaly_vae.evaluation import Cases, evaluate
from anomaly_vae.reporting import MISTAKES, check_report, evaluation_report, training_report, worst, write_report
from anomaly_vae.training import train

HOSTILE = "<script>alert(1)</script>.png"
QUOTED = "\"'><img src=x onerror=alert(2)>{{ 7*7 }}.png"


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and the text inside them."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self.open, self.html = [], {}, [], html
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def charts(self):
        return json.loads(self.texts["script"][0])

    @property
    def security(self):
        return next(one["content"] for one in self.all("meta") if "http-equiv" in one)


def report_on(engine, folder, metrics=None):
    evaluation = evaluate(engine, folder)
    page = evaluation_report(
        engine, evaluation, name="a bundle", source=str(folder), sentence="what is promised", metrics=metrics or {}
    )
    return Page(page), evaluation


@pytest.fixture(scope="module")
def tiny(tiny_bundle, digits_folder):
    engine = Engine(Detector.load(tiny_bundle), "cpu")
    return report_on(engine, digits_folder, read_bundle(tiny_bundle).metrics)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """K-fold: a training on few normals, its page, and the page of its evaluation."""
    folder = write_digits(tmp_path_factory.mktemp("few"), count=200)
    spec = TINY.with_overrides(["training.steps=40"])
    trained = train(spec, folder, tmp_path_factory.mktemp("bundles") / "few", device="cpu")
    assert trained.detector.calibration.crossed
    return Page(training_report(trained, "what is promised")), *report_on(Engine(trained.detector, "cpu"), folder)


@pytest.fixture(scope="module")
def hostile(tiny_bundle, digits_folder, tmp_path_factory):
    """Pictures that pass as normal, called abnormal, under names that would like to be markup."""
    engine = Engine(Detector.load(tiny_bundle), "cpu")
    evaluation = evaluate(engine, digits_folder)
    cases = evaluation.cases
    most_normal = [i for i in np.argsort(cases.scores) if not cases.abnormal[i]][:2]
    folder = write_digits(tmp_path_factory.mktemp("hostile"), count=120)
    for i, key in zip(most_normal, (HOSTILE, QUOTED), strict=True):
        pixels = np.asarray(Image.open(cases.pictures.items[i].path)).copy()
        pixels[0, 0] ^= 1
        place = folder / ("<b>kind" if key == QUOTED else "") / key
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
    return report_on(engine, folder)[0]


def pages(tiny, few, hostile):
    return {"split": tiny[0], "k-fold": few[1], "training": few[0], "hostile": hostile}


@pytest.mark.parametrize("which", ["split", "k-fold", "training", "hostile"])
def test_a_page_loads_nothing_and_runs_its_own_scripts_alone(which, tiny, few, hostile):
    page = pages(tiny, few, hostile)[which]
    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"link", "iframe", "object", "embed", "base", "form", "svg", "a"}
    )
    for _, attributes in page.elements:
        assert not any(name.startswith("on") or name in ("href", "action", "srcset", "style") for name in attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    (style,) = page.texts["style"]
    assert not re.search(r"url\(|@import|https?:", style)
    data, plotly, own = page.texts["script"]
    assert json.loads(data)
    assert "Plotly" in plotly
    assert "http" not in own
    assert "sendDataToCloud" not in own
    assert page.html.count(plotly[:2000]) == 1
    assert "default-src 'none'" in page.security
    assert "unsafe-eval" not in page.security
    scripts = re.search(r"script-src ([^;]*);", page.security)[1].split()
    wanted = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (plotly, own)]
    assert scripts == wanted


def test_names_that_would_be_markup_are_text(hostile):
    assert len(hostile.all("script")) == 3
    alts = [image["alt"] for image in hostile.all("img")]
    for key in (HOSTILE, f"<b>kind/{QUOTED}"):
        assert f"Picture {key}" in alts
        assert key in hostile.texts["strong"]
        assert key not in hostile.html
    assert "<b>kind" in hostile.texts["th"]
    assert "script>alert" not in hostile.texts["script"][0]


def test_every_worst_mistake_is_shown_with_its_heat_map(tiny):
    page, evaluation = tiny
    cases = evaluation.cases
    keys = np.array([item.key for item in cases.pictures.items])
    missed, alarms = cases.abnormal & ~cases.flagged, ~cases.abnormal & cases.flagged
    assert (missed.sum(), alarms.sum()) == (evaluation.n_abnormal - evaluation.detected, evaluation.false_alarms)
    hardest = keys[missed][np.argsort(cases.scores[missed])][:MISTAKES]
    loudest = keys[alarms][np.argsort(-cases.scores[alarms])][:MISTAKES]
    assert page.texts["strong"] == [*hardest, *loudest]
    images = page.all("img")
    assert [one["alt"] for one in images] == [
        text for key in (*hardest, *loudest) for text in (f"Picture {key}", f"Heat map of {key}")
    ]
    assert len({one["src"] for one in images}) == len(images)
    content = base64.b64decode(images[0]["src"].partition(",")[2])
    assert content.startswith(b"\x89PNG")


def test_the_worst_mistakes_come_first():
    rng = np.random.default_rng(0)
    p, scores, abnormal = rng.integers(1, 9, 60) / 10, rng.normal(size=60), rng.random(60) < 0.5
    missed, alarms = worst(Cases(None, abnormal, scores, p, p <= 0.4), 1000)
    assert set(missed) == set(np.nonzero(abnormal & (p > 0.4))[0])
    assert set(alarms) == set(np.nonzero(~abnormal & (p <= 0.4))[0])
    assert [(-p[i], scores[i]) for i in missed] == sorted((-p[i], scores[i]) for i in missed)
    assert [(p[i], -scores[i]) for i in alarms] == sorted((p[i], -scores[i]) for i in alarms)


@pytest.mark.parametrize("which", ["split", "k-fold"])
def test_the_figures_are_those_for_machines(which, tiny, few):
    page, evaluation = tiny if which == "split" else few[1:]
    told = {one["id"].removeprefix("fact-"): json.loads(one["value"]) for one in page.all("data")}
    machine = json.loads(json.dumps(evaluation.to_dict()))
    assert told == {key: machine[key] for key in told}
    assert {"auroc", "average_precision", "alpha", "false_alarms", "detection_rate", "n_normal"} <= told.keys()
    assert ("false_alarm_interval" in told) == (which == "split")
    assert f"{machine['auroc']:.4f}" in page.texts["data"]
    cells = page.texts["td"]
    passed = evaluation.n_normal - evaluation.false_alarms
    assert f"{passed:,} ({passed / evaluation.n_normal:.1%})" in cells
    assert f"{evaluation.detected:,} ({evaluation.detection_rate:.1%})" in cells
    for kind in machine["kinds"]:
        assert kind["kind"] in page.texts["th"]
        assert f"{kind['auroc']:.4f}" in cells
    for part, auroc in machine["parts"].items():
        assert part in page.texts["th"]
        assert f"{auroc:.4f}" in cells


def lines(chart):
    return {shape["name"]: shape["x0"] for shape in chart["layout"]["shapes"]}


def test_a_threshold_is_drawn_where_there_is_one_and_nowhere_else(tiny, few):
    page, evaluation = tiny
    assert lines(page.charts["scores"]) == {"threshold": evaluation.policy.threshold}
    training, crossed, _ = few
    assert "scores" not in crossed.charts
    assert "p-values" in crossed.charts
    assert not any("threshold" in lines(chart) for one in (training, crossed) for chart in one.charts.values())


def test_a_training_page_has_every_members_curves(few):
    page, members = few[0], TINY.calibration.folds
    assert {name: len(page.charts[name]["data"]) for name in ("loss", "reconstruction", "latent")} == {
        "loss": 2 * members,
        "reconstruction": members,
        "latent": members,
    }
    assert all(len(trace["x"]) == len(trace["y"]) > 1 for trace in page.charts["latent"]["data"])


@pytest.mark.parametrize(
    ("kind", "course", "cost", "shown"),
    [
        ("contractive", "joint", "Jacobian", True),
        ("adversarial", "joint", "critic", True),
        ("sparse", "greedy", "penalty", False),
    ],
)
def test_a_training_page_calls_the_cost_of_the_code_by_its_name(kind, course, cost, shown, tmp_path):
    spec = TINY.with_overrides(
        ["model.network={kind: mlp, hidden: [24]}", "training.steps=20", "training.select=last",
         "calibration.few_normals=0", "scores=[{kind: squared_error}]", "verdict=squared_error",
         f"model.latent={{kind: {kind}, size: 4}}", f"objective.course={{kind: {course}, share: 0.99}}"]
    )  # fmt: skip
    trained = train(spec, write_digits(tmp_path / "digits", count=160), tmp_path / "bundle", device="cpu")
    page = Page(training_report(trained, "what is promised"))
    assert trained.metrics["latent_cost"] == cost
    assert ("latent" in page.charts) == shown
    assert "KL" not in "".join(page.texts["figcaption"])
    assert any(f"{cost}: what the code costs" in text for text in page.texts["figcaption"]) == shown
    if shown:
        assert page.charts["latent"]["layout"]["yaxis"]["title"]["text"] == f"{cost} per picture"
        assert page.charts["loss"]["layout"]["yaxis"]["title"]["text"] == "loss per picture"


def test_bars_add_up_and_lie_on_one_side_of_the_threshold():
    rng = np.random.default_rng(1)
    normal, abnormal = rng.normal(size=500), 3 + 2 * rng.standard_t(2, 300)
    threshold = float(np.sort(normal)[-25])
    for trace, values in zip(
        report_charts.score_histogram(normal, abnormal, threshold)["data"], (normal, abnormal), strict=True
    ):
        x, y = np.array(trace["x"]), np.array(trace["y"])
        assert y.sum() == pytest.approx(1)
        assert y[x > threshold].sum() == pytest.approx((values > threshold).mean())
    same = report_charts.score_histogram(np.ones(5), np.zeros(0), None)
    assert sum(same["data"][0]["y"]) == pytest.approx(1)


@pytest.mark.parametrize("mode", ["average", "guaranteed"])
def test_the_alarm_curve_is_what_verdicts_achieve_and_its_band_holds(mode):
    rng = np.random.default_rng(2)
    achieved, inside = [], []
    for _ in range(150):
        calibration = Calibration.of([rng.normal(size=79)])
        p = calibration.p_values(rng.normal(size=60))
        curve = report_charts.alarm_curve(calibration, p, mode)
        for i in (0, len(curve.alpha) // 2, -1):
            assert curve.achieved[i] == calibration.outliers(p, float(curve.alpha[i]), mode).mean()
        achieved.append(curve.achieved)
        inside.append((curve.low <= curve.achieved) & (curve.achieved <= curve.high))
    # Neighbouring alphas rise and fall together; four standard errors leave room for the luck of one seed.
    error = np.std(achieved, 0) / np.sqrt(len(achieved))
    assert (np.abs(np.mean(achieved, 0) - curve.expected) < 4 * error + 1e-3).all()
    assert np.mean(inside, 0).min() > 0.85
    assert (curve.expected <= curve.alpha + 1e-12).all()


def test_no_band_is_claimed_where_none_holds(few):
    p = np.linspace(0.01, 1, 50)
    for calibration in (
        Calibration.of([np.arange(30.0), np.arange(30.0)]),
        Calibration.of([np.arange(60.0)], groups=7),
    ):
        assert report_charts.alarm_curve(calibration, p, "average").low is None
    assert [trace["name"] for trace in few[1].charts["alarms"]["data"]] == ["predicted", "achieved"]


def test_normal_pictures_alone_make_a_page_without_curves(tiny_bundle, tmp_path):
    write_digits(tmp_path)
    for kind in "456789":
        shutil.rmtree(tmp_path / kind)
    page, evaluation = report_on(Engine(Detector.load(tiny_bundle), "cpu"), tmp_path)
    assert evaluation.n_abnormal == 0
    assert set(page.charts) == {"scores", "alarms"}
    assert "need both normal and abnormal" in page.html


def test_the_commands_write_pages(tiny_bundle, digits_folder, tmp_path):
    few = write_digits(tmp_path / "few", count=120)
    spec = tmp_path / "tiny.yaml"
    spec.write_text(json.dumps(TINY.with_overrides(["training.steps=20"]).model_dump(mode="json")))
    done = command("train", spec, "--data", few, "--out", tmp_path / "bundle", "--report", "--json")
    assert done.returncode == 0, done.stderr
    assert Detector.load(tmp_path / "bundle").version == json.loads(done.stdout)["version"]
    assert "Training of bundle" in (tmp_path / "bundle" / "report.html").read_text()

    done = command("evaluate", tiny_bundle, "--data", digits_folder, "--report", tmp_path / "page.html", "--json")
    assert done.returncode == 0, done.stderr
    told = {one["id"]: one["value"] for one in Page((tmp_path / "page.html").read_text()).all("data")}
    assert json.loads(told["fact-auroc"]) == json.loads(done.stdout)["auroc"]

    done = command("evaluate", tiny_bundle, "--data", digits_folder, "--report", tmp_path / "page.csv")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "ends in .html" in done.stderr


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "folder.html").mkdir()
    for place in ("folder.html", "none/page.html"):
        with pytest.raises(DataError, match="choose another --report"):
            check_report(tmp_path / place)
        with pytest.raises(DataError, match="choose another --report"):
            write_report(tmp_path / place, "")


def test_a_name_that_is_no_unicode_does_not_lose_the_page(tmp_path):
    write_report(tmp_path / "page.html", "name \udcff of a file")
    assert (tmp_path / "page.html").read_text() == "name \\udcff of a file"


def test_a_browser_draws_the_charts_and_complains_of_nothing(hostile, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    path = Path(tmp_path / "page.html")
    path.write_text(hostile.html)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [browser, *flags, "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ":CONSOLE:" not in done.stderr
    assert "CONSOLE(" not in done.stderr
    drawn = Page(done.stdout)
    plots = [one for one in drawn.all("svg") if one.get("class") == "main-svg"]
    assert len(plots) >= len(hostile.charts)
    buttons = {one["data-title"] for one in drawn.all("button")}
    assert buttons == {"Download plot as a PNG", "Zoom", "Pan", "Reset axes"}, "none that shares a chart"
    assert len(drawn.all("script")) == 3
