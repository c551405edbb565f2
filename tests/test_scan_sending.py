"""A scan's rows at a service: each counts once, whoever is killed, restarted or asked twice in between."""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from forked import begun, command
from serving import Server, running, started

from anomaly_vae import Detector
from anomaly_vae.client import Client
from anomaly_vae.errors import ServiceError
from anomaly_vae.scan_calls import FinishedScan
from service.keys import KeyFile, Role, made

SCRIPT = """
from anomaly_vae import cli, scan_sending
from anomaly_vae.retrying import Retries
scan_sending._ROWS = 5
scan_sending._PATIENCE = Retries(times=1000, seconds={seconds})
cli.main()
"""


@pytest.fixture(scope="module")
def folder(digits_folder, tmp_path_factory):
    """300 pictures, 40 of them odd, and 7 files that are none."""
    root = tmp_path_factory.mktemp("scan") / "in"
    root.mkdir()
    for kind, count in (("good", 260), ("7", 40)):
        for path in sorted((digits_folder / kind).iterdir())[:count]:
            (root / f"{kind}-{path.name}").write_bytes(path.read_bytes())
    for i in range(7):
        (root / f"bad{i}.png").write_bytes(b"no picture")
    return root


@pytest.fixture
def script(tmp_path):
    """The command with batches of 5 rows that gives a service up after so many seconds."""

    def script(seconds: float) -> Path:
        (tmp_path / "run.py").write_text(SCRIPT.format(seconds=seconds))
        return tmp_path / "run.py"

    return script


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    place = tmp_path_factory.mktemp("keys") / "keys.yaml"
    roles = {"line": (Role.SCORE, None), "own": (Role.SCORE, "line-3"), "boss": (Role.ADMIN, None)}
    found = {name: made(name, role, source=source) for name, (role, source) in roles.items()}
    KeyFile(keys=tuple(key for key, _ in found.values())).write(place)
    return place, {name: secret for name, (_, secret) in found.items()}


@pytest.fixture(scope="module")
def server(tiny_bundle, tmp_path_factory, keys):
    store = tmp_path_factory.mktemp("store") / "s.sqlite"
    with running(tiny_bundle, f"store={store}", f"keys={keys[0]}") as found:
        yield found


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def assert_there_once(client: Client, out: Path, source: str) -> None:
    """Every verdict of the result is kept once, in the lists and in the rates."""
    verdicts = list(client.verdicts(source=source))
    (scan,) = [one for one in client.scans() if one.source == source]
    rows = [row for row in rows_of(out) if row["error"] is None]
    found = [(one.filename, one.score, one.p_value, one.outlier, one.version) for one in reversed(verdicts)]
    assert found == [(row["path"], row["score"], row["p_value"], row["outlier"], row["version"]) for row in rows]
    assert {one.request_id for one in verdicts} == {f"scan-{scan.id}"}
    assert verdicts[0].parts == {name[5:]: rows[-1][name] for name in rows[-1] if name.startswith("part_")}
    buckets = client.rates(source=source).buckets
    assert sum(one.scored for one in buckets) == len(rows) == scan.scored
    assert sum(one.outliers for one in buckets) == sum(row["outlier"] for row in rows) == scan.outliers
    assert scan.rows == len(rows_of(out)) == scan.scored + scan.failed
    assert scan.has_report


def samples(server: Server, name: str, **labels: str) -> list[float]:
    lines = httpx.get(f"{server.health}/metrics").text.splitlines()
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return [float(line.rsplit(" ", 1)[1]) for line in lines
            if line.startswith(f"{name}{{") and all(one in line for one in wanted)]  # fmt: skip


@contextmanager
def with_key(secret: str):
    os.environ["ANOMALY_VAE_KEY"] = secret
    try:
        yield
    finally:
        del os.environ["ANOMALY_VAE_KEY"]


def test_all_rows_come_once_and_are_seen_in_lists_rates_and_metrics(server, keys, tiny_bundle, folder, tmp_path):
    out = tmp_path / "out.ndjson"
    with with_key(keys[1]["line"]):
        done = command("scan", tiny_bundle, folder, "--out", out, "--alpha", "0.1", "--send-to", server.url,
                       "--send-as", "monday")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "with 307 rows of the source monday" in done.stderr
    assert not (tmp_path / ".out.ndjson.scan").exists()
    with Client(server.url, keys[1]["boss"]) as client:
        assert_there_once(client, out, "monday")
        (scan,) = [one for one in client.scans() if one.source == "monday"]
        assert (scan.by, scan.failed) == ("line", 7)
        # What came at one moment is not a stream: it raises no alarm, and begins none.
        assert not [alarm for alarm in client.alarms() if alarm.source == "monday"]
        assert {one.alpha for one in client.verdicts(source="monday", limit=5)} == {0.1}
    of = {"model": "tiny", "source": "monday"}
    assert samples(server, "anomaly_images_scored_total", **of) == [300]
    assert samples(server, "anomaly_outliers_total", **of) == [scan.outliers]
    assert samples(server, "anomaly_expected_outlier_ratio", **of) == [scan.expected_rate]
    assert samples(server, "anomaly_rejected_total", reason="bad_image") == [7]


def test_a_command_that_is_killed_while_it_sends_and_repeated_sends_what_is_missing(
    server, keys, tiny_bundle, folder, tmp_path, script
):
    out, words = tmp_path / "out.ndjson", ["--alpha", "0.1", "--send-to", server.url, "--send-as", "killed"]
    words = ["scan", tiny_bundle, folder, "--out", out, *words]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    kills, seen = 0, []
    with with_key(keys[1]["line"]), Client(server.url, keys[1]["boss"]) as client:
        while kills < 3 and rows_at(client, "killed") < 307:
            process = begun(words, nowhere, nowhere, script=script(60))
            wanted = (seen[-1] if seen else 0) + 20
            while process.poll() is None and rows_at(client, "killed") < wanted:
                time.sleep(0.002)
            process.kill()
            process.wait(60)
            kills += 1
            seen.append(rows_at(client, "killed"))
            assert out.exists()
        assert len(set(seen) | {0, 307}) >= 4, seen  # it was killed in between
        written = out.read_bytes()
        os.close(nowhere)
        if (tmp_path / ".out.ndjson.scan").exists():
            done = command(*words, script=script(60))
            assert done.returncode == 0, done.stderr
            assert "this scan was finished before" in done.stderr
        assert out.read_bytes() == written
        assert_there_once(client, out, "killed")


def rows_at(client: Client, source: str) -> int:
    return sum(one.rows for one in client.scans() if one.source == source)


def test_a_service_that_is_restarted_in_the_middle_has_all_rows_once(tiny_bundle, folder, tmp_path, script):
    out, store = tmp_path / "out.ndjson", f"store={tmp_path / 's.sqlite'}"
    first = started(tiny_bundle, "-o", store)
    assert first.ready.wait(120)
    port = first.url.rsplit(":", 1)[1]
    (tmp_path / "log").touch()
    with (tmp_path / "log").open("w+") as log:
        process = begun(["scan", tiny_bundle, folder, "--out", out, "--alpha", "0.1", "--send-to", first.url], log, log,
                        script=script(120))  # fmt: skip
        with Client(first.url) as client:
            while process.poll() is None and rows_at(client, "scan") == 0:
                time.sleep(0.002)
            os.killpg(first.process.pid, signal.SIGKILL)
            first.process.wait(60)
        second = started(tiny_bundle, "-o", store, "--port", port)
        try:
            assert process.wait(120) == 0, (tmp_path / "log").read_text()
            with Client(second.url) as client:
                assert_there_once(client, out, "scan")
        finally:
            second.stop()


def test_a_service_that_stays_away_costs_nothing_but_a_repetition(tiny_bundle, folder, tmp_path, script):
    out, store = tmp_path / "out.ndjson", f"store={tmp_path / 's.sqlite'}"
    with running(tiny_bundle, store) as server:
        url = server.url
    words = ["scan", tiny_bundle, folder, "--out", out, "--alpha", "0.1", "--fail-above", "0.05", "--send-to", url]
    refused = command(*words, script=script(0.5))
    assert refused.returncode == 1
    first, last = refused.stderr.splitlines()
    assert first.startswith(f"{url} does not take the scan now (no answer after 1 attempts")
    assert f"error: the result is written, but {url} was not told of it (0 of 307 rows sent): no answer after" in last
    assert last.endswith("mend that and repeat the command, which sends what is missing")
    assert len(rows_of(out)) == 307
    other = command(*words, "--alpha", "0.2", script=script(0.5))
    assert other.returncode == 2
    assert "repeat it as it was to send the rest, or give --fresh to begin anew" in other.stderr
    other = command(*words, "--fdr", "0.5", script=script(0.5))
    assert other.returncode == 2
    assert "repeat it as it was to send the rest" in other.stderr
    with running(tiny_bundle, store, f"port={url.rsplit(':', 1)[1]}"), Client(url) as client:
        done = command(*words)
        assert done.returncode == 3, "the exit code is that of the scan"
        assert "this scan was finished before" in done.stderr
        assert_there_once(client, out, "scan")
        assert command(*words).returncode == 3
        assert [one.rows for one in client.scans()] == [307, 307], "what was sent whole is a scan anew when repeated"


def test_a_key_that_may_not_send_is_told_before_the_scan(server, keys, tiny_bundle, folder, tmp_path):
    words = ["scan", tiny_bundle, folder, "--out", tmp_path / "out.csv", "--send-to", server.url]
    with with_key("av_0123abcd_wrong"):
        refused = command(*words)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1, refused.stderr
    assert f"--send-to {server.url}: this key is unknown or no longer valid" in refused.stderr
    with with_key(keys[1]["own"]):
        refused = command(*words, "--send-as", "elsewhere")
        assert refused.returncode == 1
        assert "the key own is for pictures of the source line-3; name no other" in refused.stderr
        assert (tmp_path / "out.csv").exists()
        done = command(*words, "--fresh")
        assert "with 307 rows of the source line-3" in done.stderr
    assert command(*words[:-2], "--send-as", "x").returncode == 2
    assert command(*words, "--send-as", "a b").returncode == 2


TOLD = {"name": "n", "model": "tiny", "started": "2026-01-31T06:00:00Z", "finished": "2026-01-31T07:00:00Z",
        "expected_rate": 0.01, "alpha": 0.01}  # fmt: skip


def told(version: str, token: str, scored: int, failed: int = 0, **more) -> FinishedScan:
    return FinishedScan(**{**TOLD, "version": version, "token": token, "scored": scored, "failed": failed, **more},
                        outliers=0)  # fmt: skip


def line(i: int, version: str, **more) -> bytes:
    row = {"path": f"in/{i}.png", "size": 9, "mtime": 1.5, "sha256": "0" * 64, "score": i / 7, "p_value": 0.5,
           "outlier": False, "part_kl": 1.25, "error": None, "version": version}  # fmt: skip
    return json.dumps({**row, **more}).encode() + b"\n"


BAD = {"score": None, "p_value": None, "outlier": None, "error": "it is broken", "sha256": None}


@pytest.fixture
def version(tiny_bundle):
    return Detector.load(tiny_bundle).version


def test_a_batch_that_is_sent_again_or_overlaps_or_comes_from_many_counts_once(server, keys, version):
    with Client(server.url, keys[1]["boss"]) as client:
        wanted = told(version, "a" * 32, 90, 10, source="again")
        scan = client.add_scan(wanted)
        assert client.add_scan(wanted).id == scan.id, "the token finds it again"
        lines = [line(i, version, **(BAD if i % 10 == 0 else {})) for i in range(100)]
        for first, last, rows in ((0, 30, 30), (0, 30, 30), (10, 50, 50), (40, 45, 50)):
            taken = client.add_rows(scan.id, first, b"".join(lines[first:last]))
            assert (taken.rows, taken.served) == (rows, True)
        with pytest.raises(ServiceError, match="rows of this scan have come up to 50; send those from 50 on") as caught:
            client.add_rows(scan.id, 51, lines[51])
        assert caught.value.code == "rows_missing"
        gate = threading.Barrier(6)

        def send() -> None:
            gate.wait()
            for first in range(50, 100, 10):
                client.add_rows(scan.id, first, b"".join(lines[first : first + 10]))

        threads = [threading.Thread(target=send) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client.scan(scan.id).rows == 100
        names = [one.filename for one in client.verdicts(source="again")]
        assert names[::-1] == [f"in/{i}.png" for i in range(100) if i % 10]


def test_a_version_that_is_not_served_is_kept_and_shown_under_its_own_name(server, keys, version):
    with Client(server.url, keys[1]["boss"]) as client:
        scan = client.add_scan(told("0123456789ab", "b" * 32, 2, model="elsewhere", source="far"))
        taken = client.add_rows(scan.id, 0, line(0, "0123456789ab") + line(1, "0123456789ab"))
        assert (taken.rows, taken.served) == (2, False)
        found = list(client.verdicts(source="far"))
        assert {(one.model, one.version) for one in found} == {("elsewhere", "0123456789ab")}
        assert client.rates(source="far", model="elsewhere").buckets[0].scored == 2
        assert samples(server, "anomaly_images_scored_total", source="far") == []
        # The same version under the name of its folder is the model that the service knows.
        assert client.add_scan(told(version, "c" * 32, 1, model="my-folder", source="far")).model == "tiny"


def test_sources_beyond_some_count_as_one_in_metrics(server, keys, version):
    with Client(server.url, keys[1]["boss"]) as client:
        for i in range(55):
            scan = client.add_scan(told(version, f"{i:032x}", 1, source=f"many-{i}"))
            client.add_rows(scan.id, 0, line(0, version))
        assert len(list(client.verdicts(source="many-54"))) == 1
    lines = httpx.get(f"{server.health}/metrics").text
    assert lines.count("anomaly_images_scored_total{") < 60
    assert 'source="many-54"' not in lines


@pytest.mark.parametrize(("body", "code", "says"), [
    (lambda v: b"", "empty", "there are no rows"),
    (lambda v: b"\n \n", "bad_rows", "there is no row"),
    (lambda v: b"{", "bad_rows", "row 0: Invalid JSON"),
    (lambda v: b"[]", "bad_rows", "row 0: "),
    (lambda v: line(0, v) + line(1, v, score="1"), "bad_rows", "row 1: score: Input should be a valid number"),
    (lambda v: line(0, v, score=float("nan")), "bad_rows", "row 0: score: Input should be a finite number"),
    (lambda v: line(0, v).replace(b"1.25", b"1e999"), "bad_rows", "row 0: part_kl: Input should be a finite number"),
    (lambda v: line(0, v, p_value=1.5), "bad_rows", "row 0: p_value"),
    (lambda v: line(0, v, outlier=1), "bad_rows", "row 0: outlier"),
    (lambda v: line(0, v, outlier=None), "bad_rows", "neither an error nor all of score, p_value and outlier"),
    (lambda v: line(0, v, error="x"), "bad_rows", "an error and a verdict"),
    (lambda v: line(0, v, path=""), "bad_rows", "row 0: path"),
    (lambda v: line(0, v, path="x" * 20_001), "bad_rows", "row 0: path"),
    (lambda v: line(0, v).replace(b"in/0", b"\\ud800"), "bad_rows", "row 0: "),
    (lambda v: line(0, v, colour=1.0), "bad_rows", "no column 'colour'"),
    (lambda v: line(0, v, **{f"part_{i}": 1.0 for i in range(70)}), "bad_rows", "it has 71 parts"),
    (lambda v: line(0, "0123456789ab"), "bad_rows", "it is of version '0123456789ab'"),
    (lambda v: b"".join(line(i, v) for i in range(6)), "bad_rows", "told to have 5 rows, and these go up to 6"),
    (lambda v: line(0, v) * 1001, "too_many_rows", "1,001 rows came at once, and 1,000 are the most"),
    (lambda v: line(0, v, path="x" * (5 << 20)), "too_large", "larger than 4194304 bytes"),
])  # fmt: skip
def test_what_is_no_row_is_refused_in_a_line_and_nothing_of_it_is_kept(server, keys, version, body, code, says):
    with Client(server.url, keys[1]["boss"]) as client:
        scan = client.add_scan(told(version, "d" * 32, 5, source="wrong"))
        with pytest.raises(ServiceError) as caught:
            client.add_rows(scan.id, 0, body(version))
        assert caught.value.code == code
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert client.scan(scan.id).rows == 0
        assert not list(client.verdicts(source="wrong"))


def test_rows_are_for_whoever_told_of_the_scan(server, keys, version):
    with Client(server.url, keys[1]["line"]) as line_key, Client(server.url, keys[1]["own"]) as other:
        scan = line_key.add_scan(told(version, "e" * 32, 5))
        assert scan.source == "scan"
        for refused in (lambda: other.add_rows(scan.id, 0, line(0, version)),
                        lambda: other.add_scan(told(version, "e" * 32, 5))):  # fmt: skip
            with pytest.raises(ServiceError, match="told of by line; use that key") as caught:
                refused()
            assert caught.value.code == "not_yours"
        with pytest.raises(ServiceError, match="there is no scan"):
            line_key.add_rows("0" * 16, 0, line(0, version))
        headers = {"Authorization": f"Bearer {keys[1]['line']}", "Content-Type": "text/csv"}
        rows = f"{server.url}/v1/scans/{scan.id}/rows?first=0"
        wrong = httpx.post(rows, content=line(0, version), headers=headers)
        assert wrong.json()["error"]["code"] == "unsupported_media_type"
