"""What a scan makes beside its table: a report that opens offline, heat maps, a quarantine, a line at a service."""

import json
import os
import re
import tarfile
from pathlib import Path

import pytest
from forked import command
from PIL import Image
from serving import running

from anomaly_vae import DataError, Engine
from anomaly_vae.client import Client
from anomaly_vae.scan_files import looks, quarantine, write_heat_maps
from anomaly_vae.scan_report import scan_report
from anomaly_vae.scanning import Scan, Wanted
from anomaly_vae.sources import Folder, source_of


@pytest.fixture(scope="module")
def folder(digits_folder, tmp_path_factory):
    """80 normal pictures, 12 others, copies of one, and files that are none."""
    root = tmp_path_factory.mktemp("scan") / "in"
    (root / "sub").mkdir(parents=True)
    for kind, count in (("good", 80), ("7", 12)):
        for path in sorted((digits_folder / kind).iterdir())[:count]:
            (root / "sub" / f"{kind}-{path.name}").write_bytes(path.read_bytes())
    first = sorted((root / "sub").iterdir())[0].read_bytes()
    for i in range(3):
        (root / f"copy{i}.png").write_bytes(first)
    (root / "broken<b>.png").write_bytes(first[:60])
    (root / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"no picture")
    return root


@pytest.fixture
def engine(tiny_detector):
    return Engine(tiny_detector.with_policy(0.1), "cpu", max_batch=16)


def scanned(engine, place, out, wanted=Wanted()):  # noqa: B008
    source = source_of(str(place), engine.detector.image.max_bytes)
    with Scan(engine, source, out, wanted) as scan:
        summary = scan.run()
        page = scan_report(engine, source, summary, scan.tables(summary), str(place), "one with a <small> p-value")
        scan.finish(summary)
    return page, summary


def test_the_report_holds_what_was_found_and_asks_no_network(engine, folder, tmp_path):
    page, summary = scanned(engine, folder, tmp_path / "r.csv")
    assert f"Scan of {folder}" in page
    assert f">{summary.counts.images}<" in page
    assert f"{summary.outliers} (" in page
    assert "one with a &lt;small&gt; p-value" in page
    assert "broken&lt;b&gt;.png" in page
    assert "caf\\xe9.jpg" in page
    assert "<b>.png" not in page
    assert page.count("data:image/jpeg;base64,") == 2 * len(summary.oddest) == 2 * min(95, 100)
    assert re.search(r'<th scope="row">4</th>\s*<td class="number">[^<]*copy0\.png, [^<]*copy1\.png', page)
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page)[1])
    assert sum(row[0] for row in figures["p-values"]["data"][0]["customdata"]) == summary.counts.images
    assert sum(figures["p-values"]["data"][0]["y"]) == pytest.approx(1)
    assert "default-src &#39;none&#39;" in page
    assert not re.search(r'(?:src|href)="(?!data:)', re.sub(r"<script>.*?</script>", "", page, flags=re.S))


def test_the_report_of_a_false_discovery_rate_marks_its_own_outliers(engine, folder, tmp_path):
    page, summary = scanned(engine, folder, tmp_path / "r.csv", Wanted(fdr=0.3))
    assert page.count("outlier, score") == summary.outliers > 0
    assert "at the detector&#39;s own alpha" in page or "at the detector's own alpha" in page


def test_archives_are_looked_at_again_in_their_own_order(engine, folder, tmp_path):
    with tarfile.open(tmp_path / "in.tar.gz", "w:gz") as archive:
        archive.add(folder, "in")
    page, summary = scanned(engine, tmp_path / "in.tar.gz", tmp_path / "r.csv")
    assert page.count("data:image/jpeg;base64,") == 2 * len(summary.oddest)


def test_every_outlier_gets_a_heat_map_of_its_own_name(engine, folder, tmp_path):
    source = Folder(folder)
    paths = [str(path) for path in sorted(folder.rglob("*.png")) if "broken" not in path.name][:5]
    gone = str(folder / "gone.png")
    assert write_heat_maps(engine, source, [*paths, gone], tmp_path / "heat") == 5
    assert sorted(one.name.rsplit(".", 2)[0] for one in (tmp_path / "heat").iterdir()) == sorted(
        Path(path).name for path in paths
    )
    with Image.open(next((tmp_path / "heat").iterdir())) as picture:
        assert picture.mode == "RGB"
    assert [look.path for look in looks(engine, source, paths)] == paths
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose another --heatmaps-to"):
        write_heat_maps(engine, source, paths, tmp_path / "file")


def test_quarantine_links_or_moves_once(folder, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"x")
    for _ in range(2):
        quarantine([str(bad), str(tmp_path), str(tmp_path / "gone.png")], tmp_path / "q", "link")
    (link,) = (tmp_path / "q").iterdir()
    assert link.resolve() == bad
    assert link.suffix == ".png"
    assert quarantine([str(bad)], tmp_path / "m", "move") == 1
    assert not bad.exists()
    assert quarantine([str(bad)], tmp_path / "m", "move") == 0


def test_the_command_does_it_all_and_says_so_by_its_code(tiny_bundle, folder, tmp_path):
    out = tmp_path / "r.jsonl"
    words = ["scan", tiny_bundle, folder, "--out", out, "--alpha", "0.1"]
    done = command(*words, "--report", tmp_path / "r.html", "--heatmaps", "outliers", "--quarantine", tmp_path / "q")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    outliers = [row for row in rows if row["outlier"]]
    assert f"95 images: {len(outliers)} outliers" in done.stdout
    assert f"{len(outliers)} heat maps written to {out}.heatmaps" in done.stdout
    assert "2 files that cannot be read linked to" in done.stdout
    assert len(list(Path(f"{out}.heatmaps").iterdir())) == len(outliers) > 0
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.resolve().name for path in (tmp_path / "q").iterdir()) == [
        "broken<b>.png",
        os.fsdecode(b"caf\xe9.jpg"),
    ]
    assert command(*words, "--fail-above", "0.01").returncode == 3
    assert command(*words, "--fail-above", "0.99").returncode == 0
    assert command(*words, "--strict").returncode == 4
    for more, says in (
        (["--report", "r.txt"], "a name that ends in .html"),
        (["--fdr", "2"], "between 0 and 1"),
        (["--fdr", "0.0001"], "train with at least 99999 for calibration"),
    ):
        refused = command(*words, *more)
        assert refused.returncode == 2
        assert says in refused.stderr
        assert refused.stderr.count("\n") == 1, refused.stderr


def test_a_service_is_told_of_the_scan(tiny_bundle, folder, tmp_path):
    with running(tiny_bundle, f"store={tmp_path / 's.sqlite'}") as server:
        done = command(
            "scan", tiny_bundle, folder, "--out", tmp_path / "r.csv", "--alpha", "0.1", "--send-to", server.url,
            "--no-send-rows",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with Client(server.url) as client:
            (scan,) = client.scans()
            assert (scan.scored, scan.failed, scan.alpha, scan.model) == (95, 2, 0.1, tiny_bundle.name)
            assert f"told {server.url} of it, as scan {scan.id}" in done.stderr
            assert b"The most unusual" in client.report(scan.id)
            assert (scan.rows, list(client.verdicts())) == (0, [])
