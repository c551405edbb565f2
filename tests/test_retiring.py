"""Versions and models that are loaded, bounded, and forgotten again: memory, counters, time, and names of bundles."""

import gc
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import httpx
import pytest
from inside import Inside, inside
from serving import running
from test_service_store import until

from anomaly_vae import BundleError, Detector, answers, glance
from anomaly_vae.training import train
from service import memory
from service.shelf import MOST_LOADED


@pytest.fixture(scope="module")
def folder(tiny_bundle: Path, digits_folder: Path, tiny_spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles: `parts`, and `a` to `d` of other weights."""
    place = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_bundle, place / "parts")
    for seed, name in enumerate("abcd", 5):
        spec = tiny_spec.with_overrides(["training.steps=5", f"seed={seed}"])
        train(spec, digits_folder, place / name, device="cpu")
    return place


@pytest.fixture(scope="module")
def picture(digits_folder: Path) -> bytes:
    return sorted((digits_folder / "good").iterdir())[0].read_bytes()


@pytest.fixture
def service(folder: Path, tmp_path: Path):
    with inside(folder / "parts", tmp_path / "s.sqlite") as found:
        yield found


def load(service: Inside, bundle: str, model: str = "parts", *, activate: bool = False) -> str:
    body = {"bundle": bundle, "activate": activate}
    return service("POST", f"/v1/models/{model}:load", json=body)["version"]


def code(answer: dict) -> str:
    return answers.Refusal.model_validate(answer).error.code


def series(text: str, model: str, version: str) -> list[str]:
    return re.findall(rf'^(anomaly_\w+){{model="{model}"(?:,source="\w+")?.*version="{version}".*$', text, re.MULTILINE)


def weights_of(service: Inside, version: str) -> list[weakref.ref]:
    """References that keep nothing alive: to an engine, its detectors, and every tensor of their models."""
    names = [m["name"] for m in service("GET", "/v1/models")["models"]]
    (served,) = [one for name in {*names, "other"} for one in service.models.loaded(name) if one.version == version]
    models = [model for member in served.own.members for model in member.models()]
    tensors = [parameter for model in models for parameter in model.parameters()]
    return [weakref.ref(one) for one in (served, served.engine, served.own, *models, *tensors)]


def test_a_retired_version_leaves_memory_and_metrics(service: Inside, picture: bytes) -> None:
    first, second = service.models.pick().version, load(service, "a", activate=True)
    service.score(picture, picture)
    load(service, "parts", activate=True)
    service.score(picture)
    assert series(service.metrics(), "parts", second)
    kept = weights_of(service, second)
    found = service("POST", "/v1/models/parts:retire", json={"version": second})
    assert answers.Retired.model_validate(found) == answers.Retired(name="parts", retired=[second], loaded=[first])
    gc.collect()
    assert not [one for one in kept if one() is not None]
    text = service.metrics()
    assert not series(text, "parts", second)
    assert f'anomaly_images_scored_total{{model="parts",source="default",version="{first}"}} 1.0' in text
    assert service.running.scorer.verdicts() == 3, "what it scored was scored"
    service.score(picture)
    assert service("GET", "/v1/models/parts")["loaded"] == [first]
    change = service("GET", "/v1/audit")["changes"][0]
    assert (change["action"], change["subject"], change["by"]) == ("retire", "parts", "anyone")
    assert (set(change["before"]), change["after"]) == ({first, second}, [first])
    assert load(service, "a") == second, "it can be loaded again"


def test_a_retired_model_is_gone_after_a_restart_too_and_can_come_back(folder, tmp_path, picture) -> None:
    with inside(folder / "parts", tmp_path / "s.sqlite") as service:
        version = load(service, "a", "other", activate=True)
        service.score(picture, model="other")
        service.score(picture)
        kept = weights_of(service, version)
        assert service("POST", "/v1/models/other:retire", json={})["retired"] == [version]
        gc.collect()
        assert not [one for one in kept if one() is not None]
        assert not re.findall(r'^anomaly_.*model="other"', service.metrics(), re.MULTILINE)
        assert re.findall(r'^anomaly_images_scored_total{model="parts".* 1.0$', service.metrics(), re.MULTILINE)
        assert code(service("POST", "/v1/score?model=other", 404, data=picture)) == "unknown_model"
        assert code(service("POST", "/v1/models/other:retire", 404, json={})) == "unknown_model"
    with inside(folder / "parts", tmp_path / "s.sqlite") as service:
        assert [m["name"] for m in service("GET", "/v1/models")["models"]] == ["parts"]
        assert load(service, "b", "other", activate=True)
        assert service.score(picture, model="other")
        assert service("POST", "/v1/models/other:rollback")["version"] == version
    with inside(folder / "parts", tmp_path / "s.sqlite") as service:
        assert [m["name"] for m in service("GET", "/v1/models")["models"]] == ["other", "parts"]


def test_what_answers_cannot_be_retired(service: Inside) -> None:
    now, beside = service.models.pick().version, load(service, "a")
    wrong = [
        ({"version": now}, 409, "in_use"),
        ({}, 409, "in_use"),
        ({"version": "0123456789ab"}, 409, "not_loaded"),
        ({"version": 7}, 400, "bad_parameter"),
        ({"all": True}, 400, "bad_parameter"),
    ]
    for body, status, expected in wrong:
        assert code(service("POST", "/v1/models/parts:retire", status, json=body)) == expected
    assert code(service("POST", "/v1/models/nobody:retire", 404, json={})) == "unknown_model"
    assert set(service("GET", "/v1/models/parts")["loaded"]) == {beside, now}
    assert len(service("GET", "/v1/audit")["changes"]) == 1
    loaded_only = load(service, "b", "beside")
    assert service("POST", "/v1/models/beside:retire", json={})["retired"] == [loaded_only]


def test_no_more_versions_are_in_memory_than_are_of_use(service: Inside, picture: bytes) -> None:
    first = service.models.pick().version
    kept = [(first, weights_of(service, first))]
    for bundle in "abcd":
        version = load(service, bundle, activate=bundle == "b")
        service.score(picture)
        kept.append((version, weights_of(service, version)))
        assert len(service("GET", "/v1/models/parts")["loaded"]) <= MOST_LOADED
    gc.collect()
    loaded = service("GET", "/v1/models/parts")["loaded"]
    assert first not in loaded
    assert kept[2][0] in loaded, "what answers stays"
    for version, references in kept:
        assert (version in loaded) == any(one() is not None for one in references)
    assert not series(service.metrics(), "parts", kept[1][0]), "it never answered"


def test_every_process_on_the_store_forgets_what_one_retires(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.sqlite"
    with inside(folder / "parts", store) as one, inside(folder / "parts", store) as two:
        version = load(one, "a", "other", activate=True)
        until(lambda: len(two("GET", "/v1/models")["models"]) == 2)
        load(two, "b")
        beside = load(one, "b")
        one("POST", "/v1/models/parts:retire", json={"version": beside})
        one("POST", "/v1/models/other:retire", json={})
        until(lambda: len(two("GET", "/v1/models")["models"]) == 1)
        until(lambda: beside not in two("GET", "/v1/models/parts")["loaded"])
        assert not series(two.metrics(), "other", version)
        assert load(one, "b") == beside
        time.sleep(2.5)  # longer than it takes to hear of what was decided
        assert beside in one("GET", "/v1/models/parts")["loaded"], "an older retirement does not touch it"


class Slow:
    """Opens bundles, but those named `slow*` no sooner than it is let; on the models' thread where `computing`."""

    def __init__(self, computing: bool) -> None:
        self.computing, self.gate, self.opened = computing, threading.Event(), []

    def __call__(self, path: Path) -> Detector:
        self.opened.append(path.name)
        detector = Detector.load(path, checked=False)
        if not path.name.startswith("slow"):
            return detector
        if not self.computing:
            assert self.gate.wait(60)
            return detector
        check = detector.check_probes

        def slow(place: Path) -> None:
            assert self.gate.wait(60)
            check(place)

        detector.check_probes = slow
        return detector


@pytest.mark.parametrize("computing", [False, True], ids=["reading", "computing"])
def test_nobody_waits_for_ever_for_a_bundle(folder, tmp_path, picture, computing: bool) -> None:
    for name, source in (("parts", "parts"), ("slow-a", "a"), ("b", "b")):
        shutil.copytree(folder / source, tmp_path / "models" / name)
    slow = Slow(computing)
    with inside(tmp_path / "models" / "parts", tmp_path / "s.sqlite", slow, load_seconds=0.5) as service:
        answer = service("POST", "/v1/models/parts:load", 504, json={"bundle": "slow-a", "activate": True})
        assert code(answer) == "load_timeout"
        assert "slow-a" in answer["error"]["message"]
        busy = service("POST", "/v1/models/parts:load", 503, json={"bundle": "b"})
        assert code(busy) == "loading"
        assert "slow-a" in busy["error"]["message"]
        assert service("PUT", "/v1/models/parts/policy", json={"alpha": 0.2})["policy"]["alpha"] == 0.2
        if computing:
            late = service("POST", "/v1/score", 504, data=picture, headers={"X-Deadline-Ms": "500"})
            assert code(late) == "deadline_exceeded"
        else:
            assert service.score(picture)
        slow.gate.set()
        version = glance(folder / "a").version
        until(lambda: version in service("GET", "/v1/models/parts")["loaded"])
        assert service("GET", "/v1/models/parts")["version"] != version, "it was not activated behind anybody's back"
        service("POST", "/v1/models/parts:activate", json={"version": version})
        assert service.score(picture)
        assert service.client.post("/v1/models/parts:load", json={"bundle": "b"}).status_code in (200, 504)
        until(lambda: glance(folder / "b").version in service("GET", "/v1/models/parts")["loaded"])


def test_a_bundle_is_read_once_and_a_replaced_one_not_at_all(folder, tmp_path) -> None:
    for name, source in (("parts", "parts"), ("short-lived", "a")):
        shutil.copytree(folder / source, tmp_path / "models" / name)
    opening = Slow(computing=False)
    place, store = tmp_path / "models" / "parts", tmp_path / "s.sqlite"
    with inside(place, store, opening) as service:
        load(service, "short-lived", activate=True)
        load(service, "short-lived")
        assert opening.opened == ["short-lived"]
    shutil.rmtree(tmp_path / "models" / "short-lived")
    shutil.copytree(folder / "b", tmp_path / "models" / "short-lived")
    opening.opened.clear()
    with inside(place, store, opening) as service:
        for alpha in (0.1, 0.2, 0.3):
            service("PUT", "/v1/models/parts/policy", json={"alpha": alpha})
            service.models.refresh()
        assert opening.opened == []
        assert service("GET", "/v1/models/parts")["bundle"] == "parts"


def test_a_bundle_for_which_there_is_no_memory_is_refused_before_it_is_read(folder, tmp_path) -> None:
    for name, source in (("parts", "parts"), ("giant", "a")):
        shutil.copytree(folder / source, tmp_path / "models" / name)
    os.truncate(tmp_path / "models" / "giant" / "weights.safetensors", 1 << 42)
    opening = Slow(computing=False)
    with inside(tmp_path / "models" / "parts", tmp_path / "s.sqlite", opening) as service:
        answer = service("POST", "/v1/models/parts:load", 507, json={"bundle": "giant"})
        assert code(answer) == "no_memory"
        assert re.search(r"giant takes up to [\d,]+ MiB of memory, and [\d,]+ MiB are free; retire", str(answer))
        assert opening.opened == []


def test_what_a_bundle_takes_is_told_from_above(folder: Path, tiny_bundle: Path) -> None:
    """In a process of its own, the second time, when PyTorch itself is all there."""
    program = """
import re, sys
from pathlib import Path
from anomaly_vae import Detector, Engine
from service.memory import needed, release
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
def now():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
path, kept = Path(sys.argv[1]), []
for _ in range(2):
    release()
    Path("/proc/self/clear_refs").write_text("5")
    before = now()
    engine = Engine(Detector.load(path), "cpu", 16)
    engine.warm()
    kept.append(engine)
print(peak() - before, needed(path, 16))
"""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not tell a process its own peak")
    done = subprocess.run([sys.executable, "-c", program, str(tiny_bundle)], check=True, capture_output=True, text=True)
    took, told = map(int, done.stdout.split())
    assert took < told < 1 << 30


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert memory.of_groups(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 150000\n")
    assert memory.of_groups(tmp_path) == [450_000]
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.of_groups(tmp_path) == []
    there = memory.available("cpu")
    assert there is None or 0 < there < 1 << 50


TRICKS = ["..", ".", "../parts", "a/../parts", "/etc", "//parts", "a\0b", "parts\0", "\0", "a" * 65, "a" * 60_000,
          "p\u0430rts", "\uff50arts", "parts\u200b", "parts\n", " parts", "parts ", "", ".hidden", "-rf", "~", "$HOME",
          "C:\\parts", "parts/", "%2e%2e", "a\u202estrap", "\U0001f4a5", "escape", "deep", "circle", "itself", "file",
          "nested", "pipe"]  # fmt: skip


@pytest.fixture(scope="module")
def trapped(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """A folder of models full of traps."""
    root = tmp_path_factory.mktemp("trapped")
    place = root / "models"
    shutil.copytree(folder / "parts", place / "parts")
    shutil.copytree(folder / "a", root / "outside")
    (place / "escape").symlink_to(root / "outside")
    (place / "deep").symlink_to("../outside")
    (place / "circle").symlink_to("circle")
    (place / "itself").symlink_to(".")
    (place / "file").write_text("no folder")
    (place / ".hidden").mkdir()
    shutil.copytree(folder / "a", place / ".hidden" / "x", dirs_exist_ok=True)
    (place / "nested").mkdir()
    (place / "nested" / "bundle.yaml").symlink_to(root / "outside" / "bundle.yaml")
    (place / "pipe").mkdir()
    os.mkfifo(place / "pipe" / "bundle.yaml")
    (place / "current").symlink_to("parts")
    with inside(place / "parts", root / "s.sqlite") as found:
        yield found


@pytest.mark.parametrize("name", TRICKS, ids=[repr(name)[:20] for name in TRICKS])
def test_no_name_leads_out_of_the_folder(trapped: Inside, name: str) -> None:
    reply = trapped.client.post("/v1/models/parts:load", json={"bundle": name})
    refusal = answers.Refusal.model_validate(reply.json).error
    assert (reply.status_code, refusal.code) in {(400, "bad_parameter"), (404, "unknown_bundle")}
    assert len(refusal.message) < 600
    assert refusal.message.isprintable()
    assert len(trapped("GET", "/v1/models/parts")["loaded"]) == 1
    assert trapped("GET", "/v1/models")["bundles"] == ["current", "parts"]


@pytest.mark.parametrize("name", ["..", "a b", "%00", "%2e%2e", "x" * 65, "p%D0%B0rts", "parts%0A"])
def test_no_model_gets_such_a_name(trapped: Inside, name: str) -> None:
    reply = trapped.client.post(f"/v1/models/{name}:load", json={"bundle": "parts"})
    assert (reply.status_code, code(reply.json)) in {(400, "bad_parameter"), (404, "not_found")}
    assert [m["name"] for m in trapped("GET", "/v1/models")["models"]] == ["parts"]


def test_a_link_within_the_folder_is_a_name_like_any_other(trapped: Inside) -> None:
    assert load(trapped, "current") == glance(trapped.models._bundles._folder / "parts").version


def test_a_bundle_with_a_pipe_or_a_link_for_a_file_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "b"
    shutil.copytree(folder / "a", place)
    (place / "metrics.json").unlink()
    os.mkfifo(place / "metrics.json")
    assert Detector.load(place).version == glance(place).version, "metrics only inform"
    (place / "weights.safetensors").rename(tmp_path / "w")
    (place / "weights.safetensors").symlink_to(tmp_path / "w")
    with pytest.raises(BundleError, match="no plain file"):
        Detector.load(place)


def test_a_real_service_retires_too(folder: Path, tmp_path: Path, picture: bytes) -> None:
    with (
        running(folder / "parts", f"models={folder}", f"store={tmp_path / 's.sqlite'}") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        client.post("/v1/models/other:load", json={"bundle": "a", "activate": True}).raise_for_status()
        client.post("/v1/score?model=other", content=picture).raise_for_status()
        assert 'model="other"' in httpx.get(f"{server.health}/metrics").text
        client.post("/v1/models/other:retire", json={}).raise_for_status()
        assert 'model="other"' not in httpx.get(f"{server.health}/metrics").text
