"""The pictures and reasons that a real service answers with: overlays, reconstructions, explanations by role."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from archiving import tarred
from PIL import Image
from serving import running
from test_service_store import kept

from anomaly_vae import Client, Detector, answers, overlay_png
from anomaly_vae.engine import Engine
from service.keys import KeyFile, Role, made


@pytest.fixture(scope="module")
def odd_one(digits_folder: Path) -> bytes:
    """A normal digit with a bright block in a corner, in colour, much larger than the detector looks at it."""
    picture = Image.open(sorted((digits_folder / "good").iterdir())[0]).resize((480, 320)).convert("RGB")
    picture.paste((255, 240, 200), (20, 200, 110, 300))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    found = {role.name.lower(): made(role.name.lower(), role) for role in Role}
    KeyFile(keys=tuple(key for key, _ in found.values())).write(file)
    return file, {name: secret for name, (_, secret) in found.items()}


@pytest.fixture(scope="module")
def url(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, secrets) -> Iterator[str]:
    store = tmp_path_factory.mktemp("store") / "s.sqlite"
    with running(tiny_bundle, f"store={store}", f"keys={secrets[0]}", "images=all", "flush_ms=1") as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str, secrets) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {secrets[1]['read']}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as found:
        yield found


def png_of(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(int)


def test_an_overlay_is_the_librarys_over_the_picture_as_it_was_sent(client, tiny_bundle, odd_one) -> None:
    detector = Detector.load(tiny_bundle)
    judged = Engine(detector, "cpu").judge(detector.prepare(odd_one)[None], heat=True)
    expected = overlay_png(judged.heat[0], judged.heat_scale, detector.image, odd_one)
    (result,) = client.post("/v1/score?heatmap=overlay", content=odd_one).json()["results"]
    answers.Scored.model_validate(result)
    shown = png_of(result["heatmap_png"])
    assert shown.shape == (320, 480, 3)
    assert np.abs(shown - png_of(base64.b64encode(expected).decode())).max() <= 2
    assert result["regions"]
    plain = np.asarray(Image.open(io.BytesIO(odd_one)).convert("RGB")).astype(int)
    assert (shown[210:290, 30:100] != plain[210:290, 30:100]).any(2).mean() > 0.5, "the block is painted over"
    assert (shown == plain).all(2).mean() > 0.3, "the rest is as it was"


def test_a_kept_picture_is_shown_in_both_styles(client, odd_one) -> None:
    (result,) = client.post("/v1/score", content=odd_one).json()["results"]
    place = f"/v1/verdicts/{kept(client, result['id']).id}/heatmap"
    default, png, overlay = (client.get(place + query) for query in ("", "?style=png", "?style=overlay"))
    assert default.content == png.content != overlay.content
    seen = [np.asarray(Image.open(io.BytesIO(reply.content)).convert("RGB")) for reply in (png, overlay)]
    assert seen[0].shape == seen[1].shape == (256, 256, 3), "both as the model saw it, enlarged"
    assert client.get(place + "?style=grey").json()["error"]["code"] == "bad_parameter"


def test_a_reconstruction_is_the_models(client, tiny_bundle, odd_one, digits_folder) -> None:
    detector = Detector.load(tiny_bundle)
    normal = sorted((digits_folder / "good").iterdir())[5].read_bytes()
    form = [("file", ("a.png", normal)), ("file", ("b.png", odd_one)), ("file", ("c.png", b"nothing"))]
    results = client.post("/v1/score?reconstruction=true&explain=true", files=form).json()["results"]
    for data, result in zip((normal, odd_one), results, strict=False):
        expected = detector.reconstruct(detector.prepare(data)[None])[0, 0].numpy().astype(int)
        shown = png_of(result["reconstruction_png"])[..., 0]
        assert shown.shape == (256, 256)
        assert np.abs(shown[::16, ::16] - expected).max() <= 1
        assert result["explanation"]["percentiles"]
        assert "heatmap_png" not in result
    assert "error" in results[2]
    lines = client.post("/v1/score?reconstruction=true", content=tarred([("a.png", normal)])).text.splitlines()
    assert json.loads(lines[0])["reconstruction_png"] == results[0]["reconstruction_png"]
    assert "reconstruction_png" not in client.post("/v1/score", content=normal).json()["results"][0]


def test_only_who_may_read_is_told_the_names_of_normals(url, secrets, odd_one) -> None:
    found = {}
    for role, key in secrets[1].items():
        with Client(url, key) as own:
            found[role] = own.score_one(odd_one, explain=True).explanation.nearest_normal
    assert found["score"].name is None
    assert found["read"].name == found["admin"].name
    assert found["read"].name.endswith(".png")
    assert len({one.id for one in found.values()}) == 1, "the same normal by the same id"
    assert found["score"].id not in found["read"].name


def test_the_client_asks_for_all_of_it(url, secrets, odd_one) -> None:
    with Client(url, secrets[1]["admin"]) as own:
        scored = own.score_one(odd_one, heatmap="overlay", reconstruction=True)
        assert png_of(scored.heatmap_png).shape == (320, 480, 3)
        assert png_of(scored.reconstruction_png).shape == (256, 256, 3)
        kept(own._http, scored.id)
        assert own.heatmap(scored.id, style="overlay") != own.heatmap(scored.id) == own.heatmap(scored.id, style="png")
