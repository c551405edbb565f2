"""Keys: what the file holds, who is let in with what, and that nothing is said twice."""

import io
import json
import os
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from flask import Flask, jsonify
from prometheus_client import CollectorRegistry
from serving import running

from anomaly_vae import ConfigError
from anomaly_vae.cli import main
from anomaly_vae.images import encode_png
from service import keys as keys_module
from service.access import needs
from service.allowance import Allowance
from service.edge import install
from service.errors import Problem
from service.keys import KeyFile, Keyring, Role, made
from service.metrics import Metrics
from service.settings import ServiceSettings


@pytest.fixture
def ring(tmp_path):
    """A file with one key of each role, and one that has ended; the keyring and the secrets by name."""
    found, secrets = [], {}
    for role in Role:
        key, secrets[role.name.lower()] = made(f"for-{role.name.lower()}", role, source=f"line-{int(role)}")
        found.append(key)
    old, secrets["ended"] = made("old", Role.ADMIN, days=1)
    found.append(old.model_copy(update={"expires": datetime.now(UTC) - timedelta(seconds=1)}))
    KeyFile(keys=tuple(found)).write(tmp_path / "keys.yaml")
    return Keyring(tmp_path / "keys.yaml"), secrets


@pytest.fixture
def client(ring):
    app = Flask("guarded")
    metrics = Metrics(CollectorRegistry())
    install(app, metrics, ring[0], 1000, Allowance())

    @app.get("/open")
    @needs(None)
    def open_page():
        return jsonify(ok=True)

    for role in Role:
        app.add_url_rule(f"/{role.name.lower()}", role.name, needs(role)(lambda: jsonify(ok=True)))
    app.add_url_rule("/unmarked", "unmarked", lambda: jsonify(ok=True), methods=["GET", "POST"])
    return app.test_client()


def asked(client, path, key=None, **more):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return client.get(path, headers=headers, **more)


def test_a_key_is_found_by_its_secret_alone(ring):
    keyring, secrets = ring
    assert keyring.find(secrets["score"]).name == "for-score"
    assert keyring.find(secrets["admin"]).role is Role.ADMIN
    number = secrets["score"].split("_")[1]
    other = secrets["read"].split("_", 2)[2]
    for wrong in (
        f"av_{number}_{other}", f"av_{number}_", f"av_{number}", "", "av_", "av_00000000_x", secrets["score"] + "x",
        secrets["score"][:-1], "\udcff", "ü" * 50, secrets["ended"],
    ):  # fmt: skip
        assert keyring.find(wrong) is None


def test_the_file_holds_no_secret_and_is_its_owners_alone(ring, tmp_path):
    path = tmp_path / "keys.yaml"
    text = path.read_text()
    assert all(secret.split("_", 2)[2] not in text for secret in ring[1].values())
    assert path.stat().st_mode & 0o077 == 0
    assert [key.role for key in KeyFile.of(path).keys] == [*Role, Role.ADMIN]


@pytest.mark.parametrize(("path", "least"), [("/score", 1), ("/read", 2), ("/admin", 3), ("/unmarked", 3)])
def test_each_role_may_do_what_lesser_ones_may(client, ring, path, least):
    """A route that says nothing of roles wants the highest."""
    for role in Role:
        answer = asked(client, path, ring[1][role.name.lower()])
        assert answer.status_code == (200 if role >= least else 403)
        if role < least:
            assert answer.get_json()["error"]["code"] == "forbidden"


def test_without_a_key_only_open_pages_answer(client, ring):
    assert asked(client, "/open").status_code == 200
    assert asked(client, "/nowhere").status_code == 404
    for path in ("/score", "/read", "/admin", "/unmarked"):
        answer = asked(client, path)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.get_json()["error"]["code"] == "no_key"
        assert asked(client, path, "av_1_2").get_json()["error"]["code"] == "bad_key"
        assert asked(client, path, ring[1]["ended"]).get_json()["error"]["code"] == "bad_key"
    assert client.get("/score", headers={"X-API-Key": ring[1]["score"]}).status_code == 200
    assert client.get("/score", headers={"Authorization": f"bearer  {ring[1]['score']}"}).status_code == 200
    assert client.get("/score", headers={"Authorization": f"Basic {ring[1]['score']}"}).status_code == 401


def test_a_refusal_reads_the_body_first(client):
    body = io.BytesIO(b"x" * 3_000_000)
    answer = client.post("/unmarked", input_stream=body, content_length=3_000_000)
    assert answer.status_code == 401
    assert body.tell() == 3_000_000


def test_a_key_may_ask_so_often_and_hold_so_much():
    now = [100.0]
    allowance = Allowance(lambda: now[0])
    key, _ = made("a", Role.SCORE, requests_per_second=4.0, bytes_in_hand=1000)
    free, _ = made("b", Role.SCORE)
    for _ in range(4):
        allowance.take(key, 0)
    with pytest.raises(Problem, match="4 requests a second") as refused:
        allowance.take(key, 0)
    assert (refused.value.status, refused.value.code) == (429, "rate_limited")
    assert refused.value.retry_after == pytest.approx(0.25)
    now[0] += 0.25
    allowance.take(key, 700)
    now[0] += 10
    with pytest.raises(Problem, match="in hand") as refused:
        allowance.take(key, 400)
    assert refused.value.status == 429
    with pytest.raises(Problem, match="fewer pictures") as refused:
        allowance.take(key, 1001)
    assert refused.value.status == 413
    allowance.give_back(key, 700)
    allowance.take(key, 1000)
    for _ in range(1000):
        allowance.take(free, 10**9)


def test_bounds_of_a_key_hold_over_http_and_are_given_back(client, ring, tmp_path):
    key, secret = made("slow", Role.ADMIN, requests_per_second=2.0, bytes_in_hand=500)
    KeyFile(keys=(key,)).write(tmp_path / "keys.yaml")
    ring[0]._looked = 0.0
    headers = {"Authorization": f"Bearer {secret}"}
    answers = [client.post("/unmarked", data=b"x" * 400, headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].headers["Retry-After"] == "1"
    assert answers[2].get_json()["error"]["code"] == "rate_limited"
    time.sleep(0.6)
    assert client.post("/unmarked", data=b"x" * 600, headers=headers).get_json()["error"]["code"] == "too_large"


def test_a_changed_file_is_seen(ring, tmp_path, monkeypatch):
    monkeypatch.setattr(keys_module, "_RELOAD_SECONDS", 0.0)
    keyring, secrets = ring
    path = tmp_path / "keys.yaml"
    new, secret = made("new", Role.SCORE)
    assert keyring.find(secret) is None
    KeyFile(keys=(new,)).write(path)
    assert keyring.find(secret).name == "new"
    assert keyring.find(secrets["admin"]) is None


@pytest.mark.parametrize("content", ["keys: [", "keys: [{id: 1}]", None])
def test_a_broken_file_locks_nobody_out(ring, tmp_path, monkeypatch, caplog, content):
    monkeypatch.setattr(keys_module, "_RELOAD_SECONDS", 0.0)
    keyring, secrets = ring
    path = tmp_path / "keys.yaml"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    for _ in range(3):
        assert keyring.find(secrets["score"]) is not None
    assert len(caplog.messages) == 1
    assert "the keys stay as they were" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("keys: [{id: zz}]", "id"),
        ("keys: [{id: '00000001', name: a, role: boss, sha256: x, created: 2026-01-01}]", "no role"),
        ("other: 1", "other"),
    ],
)
def test_a_broken_file_is_refused_at_the_start(tmp_path, content, words):
    (tmp_path / "keys.yaml").write_text(content)
    with pytest.raises(ConfigError, match=words) as error:
        Keyring(tmp_path / "keys.yaml")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="cannot read"):
        Keyring(tmp_path / "none.yaml")


def test_ids_are_apart():
    key, _ = made("a", Role.SCORE)
    with pytest.raises(ConfigError, match="same id"):
        KeyFile.parse({"keys": [key.model_dump(mode="json")] * 2})


def command(monkeypatch, capsys, *arguments):
    """What the entry point does with a command line: exit code, output, errors."""
    monkeypatch.setattr("sys.argv", ["anomaly-vae", "keys", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    return end.value.code or 0, said.out, said.err


def test_the_command_makes_lists_and_removes(tmp_path, monkeypatch, capsys):
    path = tmp_path / "keys.yaml"
    assert "no keys" in command(monkeypatch, capsys, path)[1]
    code, said, _ = command(
        monkeypatch, capsys, path, "--add", "line-3", "--role", "read", "--source", "line-3", "--days", "30"
    )
    assert code == 0
    secret = said.split()[-1]
    found = Keyring(path).find(secret)
    assert (found.name, found.role, found.source) == ("line-3", Role.READ, "line-3")
    assert timedelta(days=29) < found.expires - datetime.now(UTC) < timedelta(days=31)
    assert secret not in command(monkeypatch, capsys, path)[1]
    command(monkeypatch, capsys, path, "--add", "line-3")
    assert "line-3" in command(monkeypatch, capsys, path, "--remove", found.id)[1]
    assert Keyring(path).find(secret) is None
    assert len(KeyFile.of(path).keys) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--role", "boss"], "score, read, admin"),
        (["--remove", "12345678"], "no such key"),
        (["--add", "a b"], "name"),
        (["--add", "a", "--days", "-1"], "above 0"),
        (["--add", "a", "--rate", "0"], "above 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    code, _, said = command(monkeypatch, capsys, tmp_path / "keys.yaml", *arguments)
    assert code != 0
    assert words in said
    assert said.count("\n") == 1


def test_beyond_loopback_only_with_keys_or_when_told_so(tmp_path):
    with pytest.raises(ConfigError, match="anomaly-vae keys"):
        ServiceSettings.parse({"host": "0.0.0.0"})
    assert ServiceSettings.parse({"host": "0.0.0.0", "keys": str(tmp_path / "keys.yaml")}).keys is not None
    with pytest.raises(ConfigError, match="belong together"):
        ServiceSettings.parse({"tls_key": "a.pem"})


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes the certificate, is not installed")
def test_over_tls_with_keys_and_sources(tiny_bundle, ring, tmp_path):
    """A real service: who has no key gets a 401 even for a large body, who has one is counted under its source."""
    secrets = ring[1]
    picture = encode_png(np.random.default_rng(0).integers(0, 255, (1, 16, 16), np.uint8))
    certificate, private = tmp_path / "c.pem", tmp_path / "k.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", private, "-out", certificate],
        check=True, capture_output=True, env={**os.environ},
    )  # fmt: skip
    trusted = ssl.create_default_context(cafile=str(certificate))

    def answer(path, data=None, key=None):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        asking = urllib.request.Request(server.url + path, data, headers)
        try:
            with urllib.request.urlopen(asking, timeout=30, context=trusted) as got:
                return got.status, got.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    settings = (f"keys={tmp_path / 'keys.yaml'}", f"tls_certificate={certificate}", f"tls_key={private}")
    with running(tiny_bundle, *settings) as server:
        assert server.url.startswith("https://")
        with urllib.request.urlopen(server.url, timeout=30, context=trusted) as page:
            assert page.headers["X-Content-Type-Options"] == "nosniff"
            assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert page.headers["Strict-Transport-Security"]
        assert answer("/v1/score", picture)[0] == 401
        status, body = answer("/v1/score", b"\0" * 4_000_000)
        assert (status, json.loads(body)["error"]["code"]) == (401, "no_key")
        status, body = answer("/v1/score", picture, secrets["score"])
        assert status == 200, body
        assert answer("/metrics", key=secrets["score"])[0] == 403
        told = answer("/metrics", key=secrets["read"])[1].decode()
        line = next(
            line for line in told.splitlines() if line.startswith("anomaly_images_scored_total") and "line-1" in line
        )
        assert line.endswith(" 1.0")
        assert 'anomaly_rejected_total{reason="no_access"} 3.0' in told
        KeyFile(keys=()).write(tmp_path / "keys.yaml")
        time.sleep(1.2)
        assert answer("/v1/score", picture, secrets["score"])[0] == 401
