"""Recalibration by review inside a running application: what it claims, what it remembers, and what it leaves alone."""

import shutil
import threading
from pathlib import Path

import pytest
from inside import Inside, inside
from sqlalchemy import text
from test_service_store import altered, until

from anomaly_vae import Detector, answers, content_hash
from anomaly_vae.training import train
from service import migrations
from service.store import Store


@pytest.fixture(scope="module")
def folder(tiny_bundle: Path, digits_folder: Path, tiny_spec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles: `parts`, which is at 1%, and `folds`, calibrated crosswise."""
    place = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_bundle, place / "parts")
    folds = ["training.steps=60", "calibration.few_normals=2000", "calibration.folds=2"]
    train(tiny_spec.with_overrides(folds), digits_folder, place / "folds", device="cpu")
    return place


@pytest.fixture(scope="module")
def normals(digits_folder: Path) -> list[bytes]:
    return [altered(path.read_bytes(), 2) for path in sorted((digits_folder / "good").iterdir())[:40]]


@pytest.fixture(scope="module")
def odd(digits_folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((digits_folder / "7").iterdir())[:12]]


def opened(folder: Path, place: Path, bundle: str = "parts", **settings):
    return inside(folder / bundle, place / "s.sqlite", review_share=1.0, **settings)


def review(service: Inside, pictures: list[bytes], model: str = "parts", alpha: float = 0.05) -> list[dict]:
    """Score normals under a rate that few of them support, and say that they are normal."""
    service("PUT", f"/v1/models/{model}/policy", json={"alpha": alpha})
    results = service.score(*pictures)
    for result in results:
        label = "false_alarm" if result["outlier"] else "normal"
        service("POST", "/v1/feedback", json={"verdict": result["id"], "label": label})
    return results


def recalibrate(service: Inside, status: int = 200, model: str = "parts", **body) -> dict:
    found = service("POST", f"/v1/models/{model}:recalibrate", status, json={"minimum": 20, **body})
    if status == 200:
        answers.Recalibrated.model_validate(found)
    return found


def verdicts(service: Inside, pictures: list[bytes]) -> list[tuple]:
    return [(r["p_value"], r["outlier"], r["alpha"], r["threshold"]) for r in service.score(*pictures)]


def test_no_band_is_claimed_unless_somebody_says_that_the_pictures_are_independent(folder, tmp_path, normals) -> None:
    with opened(folder, tmp_path) as service:
        assert service("GET", "/v1/models/parts")["policy"]["band"]
        review(service, normals)
        tried = recalibrate(service, preview=True)
        assert (tried["before"]["band"] is None, tried["after"]["band"]) == (False, None)
        sure = recalibrate(service, preview=True, independent=True)
        assert sure["after"]["band"] is not None
        assert {**sure["after"], "band": None} == tried["after"], "the verdicts are the same"
        recalibrate(service)
        policy = service("GET", "/v1/models/parts")["policy"]
        assert (policy["band"], policy["bound"], policy["alpha"]) == (None, None, 0.05)
        recalibrate(service, independent=True)
        assert service("GET", "/v1/models/parts")["policy"]["band"]
    with opened(folder, tmp_path) as service:
        assert service("GET", "/v1/models/parts")["policy"]["band"], "what was said holds after a restart"


def test_a_guarantee_is_not_kept_by_pictures_that_may_belong_together(folder, tmp_path, normals) -> None:
    with opened(folder, tmp_path) as service:
        review(service, normals)
        service("PUT", "/v1/models/parts/policy", json={"alpha": 0.1, "mode": "guaranteed"})
        refusal = recalibrate(service, 409)["error"]
        assert refusal["code"] == "not_independent"
        assert "independent" in refusal["message"]
        assert recalibrate(service, independent=True)["after"]["band"]


def test_a_recalibration_at_a_larger_rate_than_the_bundles_own_stands_after_a_restart(
    folder, tmp_path, normals, odd
) -> None:
    with opened(folder, tmp_path) as service:
        assert service.models.pick().own.policy.alpha < 0.05
        review(service, normals)
        done = recalibrate(service)
        before = verdicts(service, [*normals, *odd])
        assert {alpha for _, _, alpha, _ in before} == {0.05}
    with opened(folder, tmp_path) as service:
        now = service("GET", "/v1/models/parts")
        assert (now["version"], now["n"]) == (done["after"]["version"], len(normals))
        assert verdicts(service, [*normals, *odd]) == before


def test_what_recalibrated_is_not_drawn_again_and_what_came_twice_counts_once(folder, tmp_path, normals) -> None:
    with opened(folder, tmp_path) as service:
        review(service, [*normals, *normals[:10]])
        done = recalibrate(service)
        assert (done["drawn"], done["judged"], done["normal"]) == (40, 40, 40)
        served = service.models.pick()
        assert all(served.detector.has_seen(data) for data in normals)
        assert not any(served.own.has_seen(data) for data in normals)
        new = [altered(data, 5) for data in normals[:5]]
        service.score(*normals[:20], *new)
        assert len(service("GET", "/v1/review?limit=500")["verdicts"]) == len(new)
    with opened(folder, tmp_path) as service:
        assert service.models.pick().detector.has_seen(normals[0]), "after a restart as well"
        recalibrate(service, undo=True)
        assert not service.models.pick().detector.has_seen(normals[0])


def test_a_preview_asks_nothing_of_the_models_thread(folder, tmp_path, normals) -> None:
    with opened(folder, tmp_path) as service:
        review(service, normals)
        begun, gate = threading.Event(), threading.Event()

        def busy() -> None:
            begun.set()
            assert gate.wait(60)

        holding = threading.Thread(target=service.running.scorer._batcher.run, args=(busy,))
        holding.start()
        assert begun.wait(20)
        try:
            tried = recalibrate(service, preview=True)
            done = recalibrate(service)
            assert done["after"] == tried["after"]
            recalibrate(service, undo=True)
        finally:
            gate.set()
            holding.join(20)


def test_a_preview_of_a_policy_mixes_no_ranks_of_other_normals(folder, tmp_path, normals, odd) -> None:
    with opened(folder, tmp_path, "folds") as service:
        own = review(service, [*normals, *odd], "folds", 0.3)
        recalibrate(service, model="folds")
        # Ranked among the reviewed normals, not crosswise.
        other = service.score(*odd)
        recalibrate(service, model="folds", undo=True)
        assert [a["p_value"] for a in own[-len(odd) :]] != [b["p_value"] for b in other]
        for alpha in (0.1, 0.3):
            tried = service("POST", "/v1/models/folds/policy:preview", json={"alpha": alpha})
            assert tried["verdicts"] == len(own)
            assert tried["flagged_then"] == sum(result["p_value"] <= alpha for result in own)


def test_the_share_of_flagged_normals_counts_none_beside_itself(folder, tmp_path, normals) -> None:
    with opened(folder, tmp_path) as service:
        review(service, normals[:25])
        recalibrate(service)
        more = normals[25:]
        review(service, more)
        found = recalibrate(service, preview=True)["before"]
        scores = [row["score"] for row in service("GET", "/v1/verdicts?limit=100")["verdicts"]]
        of = service.models.pick().detector.calibration.scores[0].tolist()
        assert len(of) == 25
        ranks = []
        for score in scores:
            others = [one for one in of if one != score]
            ranks.append((1 + sum(one >= score - 1e-4 for one in others)) / (len(others) + 1))
        assert found["flagged_normals"] == pytest.approx(sum(rank <= 0.05 for rank in ranks) / len(scores), abs=0.05)


def test_an_older_store_is_brought_up_to_date_and_its_recalibration_stands(folder, tmp_path, normals, odd) -> None:
    with opened(folder, tmp_path) as service:
        review(service, normals)
        recalibrate(service, independent=True)
        before = verdicts(service, odd)
    store = Store(str(tmp_path / "s.sqlite"))
    with store.database.writing() as connection:
        for table, column in (("reviews", "content"), ("calibrations", "seen"), ("calibrations", "independent")):
            connection.execute(text(f"ALTER TABLE {table} DROP COLUMN {column}"))
        connection.execute(text(f"DELETE FROM schema_version WHERE number >= {_widening()}"))
    store.close()
    with opened(folder, tmp_path) as service:
        assert verdicts(service, odd) == before
        assert service("GET", "/v1/models/parts")["policy"]["band"] is None, "nobody had said so"
        assert recalibrate(service)["normal"] == len(normals)


def _widening() -> int:
    """The number of the step that widens tables."""
    return 1 + next(i for i, step in enumerate(migrations.STEPS) if "_widen" in step.__qualname__)


def test_a_forgotten_pictures_hash_is_forgotten_too(folder, tmp_path, normals) -> None:
    with opened(folder, tmp_path) as service:
        result, _ = service.score(*normals[:2])
        service("DELETE", f"/v1/verdicts/{result['id']}")
        database = service.running.store.database
        with database.reading() as connection:
            found = connection.execute(text("SELECT content, label FROM reviews ORDER BY id")).all()
        assert found[0] == (None, "forgotten")
        assert found[1][0] % (1 << 64) == content_hash(normals[1])


def test_what_was_judged_is_followed_by_other_processes_with_what_they_have_seen(folder, tmp_path, normals) -> None:
    with opened(folder, tmp_path) as one, opened(folder, tmp_path) as two:
        review(one, normals)
        version = recalibrate(one)["after"]["version"]
        until(lambda: two("GET", "/v1/models/parts")["version"] == version)
        assert two.models.pick().detector.has_seen(normals[0])
        assert Detector.load(folder / "parts").version == two.models.pick().base
