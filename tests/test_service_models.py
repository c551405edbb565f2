"""Models, policies and calibrations that change while a real service runs: at once, whole, audited, and back again."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import running
from test_service_store import altered, form, kept, until

from anomaly_vae import Detector, answers
from anomaly_vae.training import train
from service.keys import KeyFile, Role, made


@pytest.fixture(scope="module")
def folder(tiny_bundle: Path, digits_folder: Path, tiny_spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles: `parts`, `better` of other weights, `few` which supports 10% and no less, `folds`, and a broken one."""
    place = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_bundle, place / "parts")
    brief = ["training.steps=60"]
    train(tiny_spec.with_overrides([*brief, "seed=5"]), digits_folder, place / "better", device="cpu")
    few = [*brief, "split.calibrate=0.03", "calibration.few_normals=20"]
    train(tiny_spec.with_overrides(few), digits_folder, place / "few", device="cpu")
    folds = [*brief, "calibration.few_normals=2000", "calibration.folds=2"]
    train(tiny_spec.with_overrides(folds), digits_folder, place / "folds", device="cpu")
    shutil.copytree(tiny_bundle, place / "broken")
    (place / "broken" / "weights.safetensors").write_bytes(b"no weights")
    return place


@pytest.fixture(scope="module")
def versions(folder: Path) -> dict[str, str]:
    return {name: Detector.load(folder / name).version for name in ("parts", "better", "few", "folds")}


@pytest.fixture(scope="module")
def pictures(digits_folder: Path) -> dict[str, bytes]:
    chosen = [*sorted((digits_folder / "good").iterdir())[:20], *sorted((digits_folder / "7").iterdir())[:10]]
    return {f"{path.parent.name}-{path.name}": path.read_bytes() for path in chosen}


@pytest.fixture
def serve(folder: Path, tmp_path: Path):
    """Start the service on `parts`, with a store that outlives it; a client for it."""
    with ExitStack() as stack:

        def start(*settings: str, bundle: str = "parts", store: str = "") -> httpx.Client:
            place = store or str(tmp_path / "s.sqlite")
            server = stack.enter_context(running(folder / bundle, f"models={folder}", f"store={place}", *settings))
            client = stack.enter_context(httpx.Client(base_url=server.url, timeout=60))
            client.server = server
            return client

        yield start


def version_now(client: httpx.Client, name: str = "parts") -> str:
    return answers.Model.model_validate(client.get(f"/v1/models/{name}").json()).version


def calibrations(client: httpx.Client, name: str = "parts") -> dict[str, tuple[float, float]]:
    """By version: how many normals rank verdicts, and since when (seconds since 1970), as the metrics tell."""
    families = {family.name: family.samples for family in text_string_to_metric_families(client.get("/metrics").text)}
    normals, at = (
        {sample.labels["version"]: sample.value for sample in families[metric] if sample.labels["model"] == name}
        for metric in ("anomaly_calibration_normals", "anomaly_calibration_timestamp_seconds")
    )
    return {version: (normals[version], at[version]) for version in normals}


def refused(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, answers.Refusal.model_validate(reply.json()).error.code


def test_a_bundle_is_loaded_beside_activated_and_rolled_back(serve, versions, pictures) -> None:
    client = serve()
    listed = answers.ModelList.model_validate(client.get("/v1/models").json())
    assert listed.bundles == ["better", "broken", "few", "folds", "parts"]
    loaded = answers.Model.model_validate(client.post("/v1/models/parts:load", json={"bundle": "better"}).json())
    assert loaded.version == versions["better"]
    assert version_now(client) == versions["parts"], "loading changes nothing"
    client.post("/v1/models/parts:activate", json={"version": versions["better"]}).raise_for_status()
    assert version_now(client) == versions["better"]
    body = client.post("/v1/score", content=pictures["good-0000.png"]).json()
    assert body["model"] == {"name": "parts", "version": versions["better"]}
    assert kept(client, body["results"][0]["id"]).version == versions["better"]
    client.post("/v1/models/parts:rollback").raise_for_status()
    assert version_now(client) == versions["parts"]
    client.post("/v1/models/parts:rollback").raise_for_status()
    assert version_now(client) == versions["better"], "going back is a change like any other"
    actions = [
        (c.action, c.before, c.after) for c in answers.Audit.model_validate(client.get("/v1/audit").json()).changes
    ]
    assert actions == [
        ("activate", versions["parts"], versions["better"]),
        ("activate", versions["better"], versions["parts"]),
        ("activate", versions["parts"], versions["better"]),
        ("activate", None, versions["parts"]),
    ]


def test_a_bundle_that_was_replaced_meanwhile_is_not_gone_back_to(serve, folder, versions, tmp_path) -> None:
    place = folder / "short-lived"
    shutil.copytree(folder / "better", place)
    client = serve()
    client.post("/v1/models/parts:load", json={"bundle": "short-lived", "activate": True}).raise_for_status()
    for bundle in ("folds", "few", "parts"):
        # Beyond what is kept in memory.
        client.post("/v1/models/parts:load", json={"bundle": bundle}).raise_for_status()
    client.post("/v1/models/parts:activate", json={"version": versions["parts"]}).raise_for_status()
    client.post("/v1/models/parts:load", json={"bundle": "folds"}).raise_for_status()
    client.post("/v1/models/parts:load", json={"bundle": "few"}).raise_for_status()
    shutil.rmtree(place)
    assert refused(client.post("/v1/models/parts:rollback")) == (404, "unknown_bundle")
    shutil.copytree(folder / "folds", place)
    assert refused(client.post("/v1/models/parts:rollback")) == (409, "bundle_replaced")
    shutil.rmtree(place)
    shutil.copytree(folder / "better", place)
    client.post("/v1/models/parts:rollback").raise_for_status()
    assert version_now(client) == versions["better"]
    shutil.rmtree(place)


def test_several_models_answer_in_one_process(serve, versions, pictures) -> None:
    client = serve()
    done = client.post("/v1/models/folded:load", json={"bundle": "folds", "activate": True})
    assert done.status_code == 200, done.text
    assert [m["name"] for m in client.get("/v1/models").json()["models"]] == ["folded", "parts"]
    for name, version in (("folded", versions["folds"]), ("parts", versions["parts"])):
        body = client.post(f"/v1/score?model={name}", files=form(pictures)).json()
        assert body["model"] == {"name": name, "version": version}
        row = kept(client, body["results"][-1]["id"])
        assert (row.model, row.version) == (name, version)
    assert client.post("/v1/score", content=pictures["good-0000.png"]).json()["model"]["name"] == "parts"
    assert refused(client.post("/v1/score?model=nobody", content=b"x")) == (404, "unknown_model")
    text = httpx.get(client.server.health + "/metrics").text
    for name in ("folded", "parts"):
        assert (
            f'anomaly_model_info{{model="{name}",version="{versions["folds" if name == "folded" else name]}"}} 1.0'
            in text
        )


@pytest.mark.parametrize(("path", "body", "expected"), [
    ("parts:load", {"bundle": "nowhere"}, (404, "unknown_bundle")),
    ("parts:load", {"bundle": "../parts"}, (400, "bad_parameter")),
    ("parts:load", {"bundle": ".."}, (400, "bad_parameter")),
    ("parts:load", {"bundle": "/etc"}, (400, "bad_parameter")),
    ("parts:load", {}, (400, "bad_parameter")),
    ("parts:load", {"bundle": "broken"}, (422, "bad_bundle")),
    ("-:load", {"bundle": "parts"}, (400, "bad_parameter")),
    ("parts:activate", {"version": "0123456789ab"}, (409, "not_loaded")),
    ("parts:rollback", {}, (409, "nothing_before")),
    ("other:rollback", {}, (404, "unknown_model")),
    ("parts/policy:rollback", {}, (409, "nothing_before")),
    ("parts:recalibrate", {}, (409, "too_few_reviewed")),
    ("parts:recalibrate", {"undo": True}, (409, "nothing_before")),
    ("parts:recalibrate", {"minimum": 1}, (400, "bad_parameter")),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_and_changes_nothing(refusing, path, body, expected) -> None:
    client, version = refusing
    assert refused(client.post(f"/v1/models/{path}", json=body)) == expected
    assert version_now(client) == version
    assert len(client.get("/v1/audit").json()["changes"]) == 1


@pytest.fixture(scope="module")
def refusing(folder: Path, versions, tmp_path_factory) -> Iterator[tuple[httpx.Client, str]]:
    store = tmp_path_factory.mktemp("refusing") / "s.sqlite"
    with (
        running(folder / "parts", f"models={folder}", f"store={store}") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client, versions["parts"]


def test_hot_swap_under_load_no_error_and_every_reply_names_what_scored_it(serve, folder, versions, pictures) -> None:
    client = serve("queue_size=256")
    picture = pictures["good-0000.png"]
    expected = {}
    for name in ("parts", "better"):
        detector = Detector.load(folder / name)
        expected[versions[name]] = detector.judge(detector.prepare(picture)[None]).score[0]
    replies, stop = [], threading.Event()

    def post() -> None:
        with httpx.Client(base_url=client.base_url, timeout=60) as own:
            while not stop.is_set():
                reply = own.post("/v1/score", content=picture)
                replies.append((reply.status_code, reply.json()))

    threads = [threading.Thread(target=post) for _ in range(6)]
    for thread in threads:
        thread.start()
    client.post("/v1/models/parts:load", json={"bundle": "better"}).raise_for_status()
    for version in (versions["better"], versions["parts"]) * 4:
        count = len(replies)
        client.post("/v1/models/parts:activate", json={"version": version}).raise_for_status()
        until(lambda count=count: len(replies) > count + 12)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert {status for status, _ in replies} == {200}
    seen = set()
    for _, body in replies:
        seen.add(body["model"]["version"])
        assert body["results"][0]["score"] == pytest.approx(expected[body["model"]["version"]], abs=1e-4)
    assert seen == {versions["parts"], versions["better"]}


def test_a_policy_is_tried_then_set_then_taken_back(serve, versions, pictures) -> None:
    client = serve()
    results = client.post("/v1/score", files=form(pictures)).json()["results"]
    kept(client, results[-1]["id"])
    own = client.get("/v1/models/parts/policy").json()["policy"]
    preview = client.post("/v1/models/parts/policy:preview", json={"alpha": 0.3}).json()
    answers.Preview.model_validate(preview)
    assert preview["verdicts"] == len(results)
    assert preview["flagged_now"] == sum(result["outlier"] for result in results)
    assert preview["flagged_then"] == sum(result["p_value"] <= 0.3 for result in results) > preview["flagged_now"]
    assert client.get("/v1/models/parts/policy").json()["policy"] == own, "trying changes nothing"

    book = answers.PolicyBook.model_validate(client.put("/v1/models/parts/policy", json={"alpha": 0.3}).json())
    assert (book.policy.revision, book.policy.alpha) == (1, 0.3)
    again = client.post("/v1/score", files=form(pictures)).json()["results"]
    assert [r["outlier"] for r in again] == [r["p_value"] <= 0.3 for r in again]
    assert {r["alpha"] for r in again} == {0.3}
    row = kept(client, again[-1]["id"])
    assert (row.policy_revision, row.alpha) == (1, 0.3)

    limit = float(np.mean(sorted(r["score"] for r in results)[-5:-3]))  # between two, which rounding cannot swap
    book = client.put("/v1/models/parts/policy", json={"threshold": limit}).json()
    assert (book["policy"]["mode"], book["policy"]["threshold"]) == ("threshold", limit)
    again = client.post("/v1/score", files=form(pictures)).json()["results"]
    assert [r["outlier"] for r in again] == [r["score"] > limit for r in again]
    assert sum(r["outlier"] for r in again) == 4

    assert client.post("/v1/models/parts/policy:rollback").json()["policy"]["alpha"] == 0.3
    assert client.put("/v1/models/parts/policy", json={}).json()["policy"] == {**own, "revision": 4}
    for body, code in (({"alpha": 1e-6}, "alpha_not_supported"), ({"alpha": 0.1, "threshold": 1.0}, "bad_parameter"),
                       ({"alpha": 2}, "bad_parameter"), ({"threshold": "high"}, "bad_parameter"),
                       ({"alpha": 0.01, "mode": "guaranteed"}, "alpha_not_supported")):  # fmt: skip
        assert refused(client.put("/v1/models/parts/policy", json=body)) == (400, code)
    changes = [c for c in client.get("/v1/audit").json()["changes"] if c["action"] == "policy"]
    assert [(c["before"]["alpha"], c["after"]["alpha"]) for c in changes][-1] == (own["alpha"], 0.3)
    assert len(changes) == 4


def test_a_threshold_means_nothing_where_p_values_decide(serve) -> None:
    client = serve(bundle="folds")
    assert refused(client.put("/v1/models/folds/policy", json={"threshold": 1.0})) == (400, "bad_parameter")


def test_a_threshold_is_of_one_bundles_scores(serve, versions) -> None:
    client = serve()
    client.put("/v1/models/parts/policy", json={"threshold": 1.0}).raise_for_status()
    loaded = client.post("/v1/models/parts:load", json={"bundle": "better", "activate": True})
    assert refused(loaded) == (409, "policy_not_supported")
    assert "another bundle's scores" in loaded.json()["error"]["message"]
    assert version_now(client) == versions["parts"]
    client.put("/v1/models/parts/policy", json={}).raise_for_status()
    client.post("/v1/models/parts:activate", json={"version": versions["better"]}).raise_for_status()
    # Going back to the threshold's policy, which is of the other bundle, is refused as well.
    client.put("/v1/models/parts/policy", json={"alpha": 0.2}).raise_for_status()
    assert client.post("/v1/models/parts/policy:rollback").status_code == 200


def test_a_version_that_cannot_keep_the_policy_is_not_activated(serve, versions) -> None:
    client = serve()
    client.put("/v1/models/parts/policy", json={"alpha": 0.02}).raise_for_status()
    loaded = client.post("/v1/models/parts:load", json={"bundle": "few", "activate": True})
    assert refused(loaded) == (409, "policy_not_supported")
    assert "calibration images" in loaded.json()["error"]["message"]
    assert version_now(client) == versions["parts"]


def test_what_was_decided_holds_after_a_restart_and_in_every_process_that_shares_the_store(
    folder, versions, pictures, store_place
) -> None:
    settings = (f"models={folder}", f"store={store_place}")
    with running(folder / "parts", *settings) as one, running(folder / "parts", *settings) as two:
        first, second = (httpx.Client(base_url=server.url, timeout=60) for server in (one, two))
        done = first.post("/v1/models/parts:load", json={"bundle": "better", "activate": True})
        assert done.status_code == 200, done.text
        until(lambda: version_now(second) == versions["better"])
        first.put("/v1/models/parts/policy", json={"alpha": 0.25}).raise_for_status()
        until(lambda: second.get("/v1/models/parts/policy").json()["policy"]["alpha"] == 0.25)
        names = []
        for client in (first, second):
            results = client.post("/v1/score", files=form(pictures)).json()["results"]
            assert {result["alpha"] for result in results} == {0.25}
            names += [result["id"] for result in results]
        assert len(set(names)) == 2 * len(pictures)
        for name in (names[0], names[-1]):
            assert kept(first, name) == kept(second, name)
    with running(folder / "parts", *settings) as again:
        client = httpx.Client(base_url=again.url, timeout=60)
        assert version_now(client) == versions["better"]
        assert client.get("/v1/models/parts/policy").json()["policy"]["alpha"] == 0.25
    with running(folder / "few", *settings, "model=parts") as other:
        client = httpx.Client(base_url=other.url, timeout=60)
        assert version_now(client) == versions["few"], "another bundle on the command line is a decision as well"


def test_recalibration_takes_reviewed_normals_alone_and_can_be_undone(serve, versions, digits_folder) -> None:
    client = serve("review_share=1.0", "max_images_per_request=64")
    normal = [altered(path.read_bytes(), 2) for path in sorted((digits_folder / "good").iterdir())[:360]]
    odd = [path.read_bytes() for path in sorted((digits_folder / "9").iterdir())[:40]]
    for start in range(0, 360, 60):
        batch = [*normal[start : start + 60], *odd[start // 15 : start // 15 + 4]]
        results = client.post("/v1/score", files=[("file", (f"{i}.png", data)) for i, data in enumerate(batch)]).json()
    kept(client, results["results"][-1]["id"])
    client.put("/v1/models/parts/policy", json={"alpha": 0.05}).raise_for_status()
    drawn = client.get("/v1/review?limit=500").json()["verdicts"]
    assert len(drawn) == 384
    rows = {row["id"]: row for row in client.get("/v1/verdicts?limit=1000").json()["verdicts"]}

    def label(one) -> str:
        row, is_odd = rows[one["id"]], int(one["filename"].split(".")[0]) >= 60
        return ("confirmed" if is_odd else "false_alarm") if row["outlier"] else ("missed" if is_odd else "normal")

    for one in drawn[:200]:
        client.post("/v1/feedback", json={"verdict": one["id"], "label": label(one)}).raise_for_status()
    # Picked from beyond the first that nobody judged: these do not count.
    for one in drawn[250:300]:
        client.post("/v1/feedback", json={"verdict": one["id"], "label": label(one)}).raise_for_status()
    usable = sum(label(one) in ("normal", "false_alarm") for one in drawn[:200])
    few = client.post("/v1/models/parts:recalibrate", json={"minimum": usable + 1})
    assert refused(few) == (409, "too_few_reviewed")
    assert f"{usable} of 384 pictures drawn" in few.json()["error"]["message"]

    tried = answers.Recalibrated.model_validate(
        client.post("/v1/models/parts:recalibrate", json={"preview": True}).json()
    )
    assert (tried.applied, tried.drawn, tried.judged, tried.normal) == (False, 384, 200, usable)
    assert version_now(client) == versions["parts"]
    done = answers.Recalibrated.model_validate(client.post("/v1/models/parts:recalibrate", json={}).json())
    assert (done.applied, done.after) == (True, tried.after)
    assert (done.before.version, done.after.normals) == (versions["parts"], usable)
    assert done.after.flagged_normals <= 0.05
    now = client.get("/v1/models/parts").json()
    assert (now["version"], now["base_version"], now["n"]) == (done.after.version, versions["parts"], usable)
    told = calibrations(client)
    assert told.keys() == {done.after.version}, "what ranks no more is not told of"
    assert told[done.after.version][0] == usable
    assert time.time() - 600 < told[done.after.version][1] < time.time()
    # Ranks are those among the reviewed normals.
    scores = sorted(rows[one["id"]]["score"] for one in drawn[:200] if label(one) in ("normal", "false_alarm"))
    result = client.post("/v1/score", content=odd[0]).json()["results"][0]
    above = sum(score >= result["score"] for score in scores)
    assert result["p_value"] == pytest.approx((1 + above) / (usable + 1), abs=1.5 / (usable + 1))
    assert kept(client, result["id"]).version == done.after.version
    assert client.get(f"/v1/verdicts/{result['id']}/heatmap").status_code == 200
    assert client.get(f"/v1/verdicts/{drawn[0]['id']}/heatmap").status_code == 200, "of before, by the same weights"
    undone = answers.Recalibrated.model_validate(
        client.post("/v1/models/parts:recalibrate", json={"undo": True}).json()
    )
    assert (undone.before.version, undone.after.version) == (done.after.version, versions["parts"])
    assert version_now(client) == versions["parts"]
    assert calibrations(client)[versions["parts"]][1] < told[done.after.version][1], "the bundle's own age again"
    again = client.post("/v1/models/parts:recalibrate", json={"undo": True})
    assert refused(again) == (409, "nothing_before")
    actions = [change["action"] for change in client.get("/v1/audit").json()["changes"]]
    assert actions.count("recalibrate") == 2


def test_changes_need_an_admins_key_and_are_written_down_under_its_name(serve, tmp_path, versions, pictures) -> None:
    made_keys = {
        name: made(name, role) for name, role in (("ann", Role.ADMIN), ("rob", Role.READ), ("sue", Role.SCORE))
    }
    file = tmp_path / "keys.yaml"
    KeyFile(keys=tuple(key for key, _ in made_keys.values())).write(file)
    client = serve(f"keys={file}")

    def asked(who: str, method: str, path: str, **more) -> int:
        headers = {"Authorization": f"Bearer {made_keys[who][1]}"}
        return client.request(method, path, headers=headers, **more).status_code

    assert asked("sue", "POST", "/v1/score", content=pictures["good-0000.png"]) == 200
    for path in ("/v1/verdicts", "/v1/rates", "/v1/review", "/v1/models/parts/policy"):
        assert (asked("sue", "GET", path), asked("rob", "GET", path)) == (403, 200)
    changes = [("PUT", "/v1/models/parts/policy", {"alpha": 0.2}),
               ("POST", "/v1/models/parts:load", {"bundle": "better"}),
               ("POST", "/v1/models/parts:activate", {"version": versions["better"]}),
               ("POST", "/v1/models/parts:rollback", None), ("DELETE", "/v1/verdicts?source=x", None)]  # fmt: skip
    for method, path, body in changes:
        assert asked("rob", method, path, json=body) == 403, path
        assert asked("ann", method, path, json=body) == 200, path
    assert asked("rob", "GET", "/v1/audit") == 403
    headers = {"Authorization": f"Bearer {made_keys['ann'][1]}"}
    found = client.get("/v1/audit", headers=headers).json()["changes"]
    assert {change["by"] for change in found} == {"ann", "command line"}
