"""Scores counted beside those of the calibration, and what is hot in a kept picture, on a real service."""

import io
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import running
from test_service_store import kept, until

from anomaly_vae import Detector, answers


@pytest.fixture(scope="module")
def client(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory):
    settings = f"store={tmp_path_factory.mktemp('counts') / 's.sqlite'}", "images=all", "flush_ms=1"
    with running(tiny_bundle, *settings) as server, httpx.Client(base_url=server.url, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def results(client, digits_folder):
    """Pictures of the model's own size, half of them with a bright spot, so that something is hot in them."""
    files = []
    for k, path in enumerate(sorted((digits_folder / "good").iterdir())[:24]):
        image = Image.open(path).resize((16, 16))
        if k % 2:
            image.paste(255, (1, 10, 6, 15))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files.append(("file", (path.name, buffer.getvalue())))
    found = client.post("/v1/score?heatmap=regions", files=files).json()["results"]
    until(lambda: len(client.get("/v1/verdicts").json()["verdicts"]) == len(files))
    return found


def counts(client, **query) -> answers.ScoreCounts:
    reply = client.get("/v1/models/tiny/calibration", params=query)
    return answers.ScoreCounts.model_validate_json(reply.content, strict=True, extra="forbid")


def test_scores_are_counted_beside_the_calibration(client, results, tiny_bundle):
    found, detector = counts(client), Detector.load(tiny_bundle)
    normals = detector.calibration.scores[0]
    assert found.version == detector.version
    assert found.threshold == detector.policy.threshold
    assert sum(found.calibration) == len(normals)
    assert sum(found.recent) == len(results)
    edges = np.asarray(found.edges)
    assert np.all(np.diff(edges) > 0)
    assert edges[0] == normals.min()
    assert edges[-1] > max(normals.max(), found.threshold)
    assert found.calibration == np.histogram(normals, edges)[0].tolist()
    scores = [one["score"] for one in results]
    assert found.recent[-1] == sum(score >= edges[-2] for score in scores)
    assert found.recent[0] == sum(score < edges[1] for score in scores)
    assert sum(counts(client, last=5).recent) == 5
    assert client.get("/v1/models/none/calibration").status_code == 404


def test_regions_of_a_kept_picture_are_those_of_its_reply(client, results):
    assert any(one["regions"] for one in results)
    for one in results:
        kept(client, one["id"])
        reply = client.get(f"/v1/verdicts/{one['id']}/regions")
        found = answers.VerdictRegions.model_validate_json(reply.content, strict=True, extra="forbid")
        assert (found.width, found.height) == (16, 16)
        assert [region.model_dump() for region in found.regions] == [pytest.approx(region) for region in one["regions"]]
    client.delete(f"/v1/verdicts/{results[0]['id']}/image")
    assert client.get(f"/v1/verdicts/{results[0]['id']}/regions").json()["error"]["code"] == "no_picture"
