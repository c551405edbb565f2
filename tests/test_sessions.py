"""Staying signed in: what a cookie opens, what it does not, and everything that ends it."""

import hashlib
import ssl
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from serving import running

from service import keys as keys_module
from service.keys import KeyFile, Keyring, Role, made
from service.sessions import Sessions, cookie_name
from service.store import Store

OWN = {"X-Asked-By": "page"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


@pytest.fixture(params=["kept", "held"])
def database(request, store_place):
    """In both stores, and in memory."""
    if request.param == "held":
        yield None
        return
    store = Store(store_place)
    yield store.database
    store.close()


def test_a_session_ends_with_its_time_its_key_or_by_itself(place, database, monkeypatch):
    monkeypatch.setattr(keys_module, "_RELOAD_SECONDS", 0.0)
    now = [time.time()]
    long, secret = made("long", Role.READ)
    short, other = made("short", Role.SCORE, days=1)
    KeyFile(keys=(long, short)).write(place)
    sessions = Sessions(Keyring(place), database, 48, lambda: now[0])
    assert sessions.begin(secret + "x") is None
    (cookie, session), (second, ends) = sessions.begin(secret), sessions.begin(other)
    assert session.key.name == "long"
    assert session.ends == pytest.approx(now[0] + 48 * 3600)
    assert ends.ends == pytest.approx(short.expires.timestamp())
    assert sessions.find(cookie).key == long
    for wrong in ("", "x", cookie[:-1], cookie + "x", cookie.replace(long.id, short.id), "\udcff", secret):
        assert sessions.find(wrong) is None
    now[0] += 47 * 3600
    assert sessions.find(second) is None
    assert sessions.find(cookie) is not None
    now[0] += 2 * 3600
    assert sessions.find(cookie) is None
    cookie, _ = sessions.begin(secret)
    sessions.end(cookie)
    assert sessions.find(cookie) is None
    cookie, _ = sessions.begin(secret)
    renewed, _ = made("long", Role.READ)
    KeyFile(keys=(renewed.model_copy(update={"id": long.id}),)).write(place)
    assert sessions.find(cookie) is None  # the same id with another secret is another key


def test_the_store_holds_nothing_that_signs_in(place, tmp_path):
    key, secret = made("a", Role.ADMIN)
    KeyFile(keys=(key,)).write(place)
    store = Store(str(tmp_path / "s.sqlite"))
    sessions = Sessions(Keyring(place), store.database, 1)
    cookie, _ = sessions.begin(secret)
    assert Sessions(Keyring(place), store.database, 1).find(cookie) is not None  # another process
    store.close()
    files = b"".join(path.read_bytes() for path in tmp_path.glob("s.sqlite*"))
    digest = hashlib.sha256(f"{cookie} {key.sha256}".encode()).hexdigest()
    assert digest.encode() in files
    assert cookie.partition("_")[2].encode() not in files
    assert sessions.find(digest) is None


def test_two_services_on_one_machine_have_cookies_of_their_own():
    assert cookie_name("localhost:8765") != cookie_name("localhost:8766")
    assert cookie_name("parts.example") == "anomaly-vae-session" == cookie_name("strange:port")


@pytest.fixture(scope="module")
def secrets() -> dict[str, tuple]:
    return {role.name.lower(): made(f"for-{role.name.lower()}", role) for role in Role}


@pytest.fixture(scope="module")
def server(tiny_bundle, tmp_path_factory, secrets):
    folder = tmp_path_factory.mktemp("sessions")
    KeyFile(keys=tuple(key for key, _ in secrets.values())).write(folder / "keys.yaml")
    with running(tiny_bundle, f"store={folder / 's.sqlite'}", f"keys={folder / 'keys.yaml'}") as found:
        found.keys = folder / "keys.yaml"
        yield found


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as found:
        yield found


def sign_in(client, secrets, role):
    return client.post("/v1/session", json={"key": secrets[role][1]}, headers=OWN)


def code(reply):
    return reply.status_code, reply.json()["error"]["code"]


@pytest.mark.parametrize("role", ["score", "read", "admin"])
def test_a_session_may_what_its_key_may(client, secrets, role):
    assert client.get("/v1/session").json() == {"needed": True, "key": None, "role": None, "ends": None}
    reply = sign_in(client, secrets, role)
    said = reply.json()
    assert (said["key"], said["role"]) == (f"for-{role}", role)
    left = datetime.fromisoformat(said["ends"]) - datetime.now(UTC)
    assert timedelta(hours=11.9) < left <= timedelta(hours=12)
    flags = reply.headers["set-cookie"].casefold()
    assert "httponly" in flags
    assert "samesite=strict" in flags
    assert "path=/" in flags
    assert "secure" not in flags
    rank = ["score", "read", "admin"].index(role)
    assert [client.get(path).status_code for path in ("/v1/models", "/v1/verdicts", "/v1/audit")] == [
        200 if rank >= least else 403 for least in range(3)
    ]
    assert client.delete("/v1/session", headers=OWN).json()["key"] is None
    assert code(client.get("/v1/models")) == (401, "no_key")


def test_a_change_by_cookie_must_come_from_the_page(client, secrets, server):
    kept = sign_in(client, secrets, "admin").cookies
    name = client.get("/v1/models").json()["models"][0]["name"]
    policy = f"/v1/models/{name}/policy"
    form = {"content": b'{"alpha": 0.1}', "headers": {"Content-Type": "text/plain"}}
    assert code(client.put(policy, **form)) == (403, "cross_site")
    assert code(client.post("/v1/score", content=b"x")) == (403, "cross_site")
    for site in ("cross-site", "same-site"):
        headers = {**OWN, "Sec-Fetch-Site": site}
        assert code(client.put(policy, json={"alpha": 0.1}, headers=headers)) == (403, "cross_site")
        assert code(client.post("/v1/session", json={"key": "x"}, headers=headers)) == (403, "cross_site")
    assert code(client.post("/v1/session", json={"key": secrets["admin"][1]})) == (403, "cross_site")
    assert code(client.delete("/v1/session")) == (403, "cross_site")
    assert client.get(policy).json()["policy"]["revision"] == 0
    assert client.put(policy, json={"alpha": 0.1}, headers={**OWN, "Sec-Fetch-Site": "same-origin"}).is_success
    # A key in a header is nothing that a browser sends by itself.
    bearer = {"Authorization": f"Bearer {secrets['admin'][1]}"}
    assert httpx.put(f"{server.url}{policy}", json={}, headers=bearer, cookies=kept).is_success
    assert client.get("/v1/audit").json()["changes"][0]["by"] == "for-admin"


def test_bad_keys_and_cookies_are_told(client, secrets):
    for key in ("av_00000000_x", secrets["read"][1] + "x", "ü"):
        assert code(client.post("/v1/session", json={"key": key}, headers=OWN)) == (401, "bad_key")
    assert code(client.post("/v1/session", json={}, headers=OWN)) == (400, "bad_parameter")
    sign_in(client, secrets, "read")
    (name,) = client.cookies
    client.cookies.set(name, client.cookies[name][:-1])
    client.cookies.jar.clear()
    assert code(client.get("/v1/models", headers={"Cookie": f"{name}=0123abcd_x"})) == (401, "session_over")
    assert client.get("/v1/session", headers={"Cookie": f"{name}=0123abcd_x"}).json()["role"] is None


def test_a_removed_key_ends_its_sessions(client, secrets, server):
    assert sign_in(client, secrets, "read").is_success
    before = server.keys.read_bytes()
    KeyFile(keys=tuple(key for key, _ in secrets.values() if key.role is not Role.READ)).write(server.keys)
    try:
        end = time.monotonic() + 20
        while client.get("/v1/verdicts").status_code == 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert code(client.get("/v1/verdicts")) == (401, "session_over")
    finally:
        server.keys.write_bytes(before)
    while not sign_in(client, secrets, "read").is_success:
        assert time.monotonic() < end + 10
        time.sleep(0.1)


def test_the_cookie_is_for_https_alone_where_there_is_any(server, secrets):
    """A proxy may speak it in the service's stead; the browser says so in its Origin."""
    headers = {**OWN, "Origin": "https://parts.example"}
    reply = httpx.post(f"{server.url}/v1/session", json={"key": secrets["admin"][1]}, headers=headers)
    assert "; secure" in reply.headers["set-cookie"].casefold()


def test_the_page_is_for_browsers_and_its_files_stay_for_good(client):
    text = client.get("/", headers={"Accept": "*/*"})
    assert text.headers["content-type"].startswith("text/plain")
    assert "curl" in text.text
    html = client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert html.headers["content-type"].startswith("text/html")
    assert html.headers["vary"] == text.headers["vary"] == "Accept"
    policy = html.headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "style-src 'self';" in policy
    assert "unsafe" not in policy
    assert "<script>" not in html.text
    assert "style=" not in html.text
    assert "http://" not in html.text
    (place,) = {part.rpartition("/")[0] for part in html.text.split('"') if part.startswith("static/") and "." in part}
    for name in ("page.js", "plotly.min.js", "page.css", "mark.svg"):
        packed = client.get(f"/{place}/{name}", headers={"Accept-Encoding": "gzip"})
        assert packed.headers["content-encoding"] == "gzip"
        assert "immutable" in packed.headers["cache-control"]
        assert "31536000" in packed.headers["cache-control"]
        plain = client.get(f"/{place}/{name}", headers={"Accept-Encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert plain.content == packed.content
    for wrong in (f"/{place}/none.js", f"/{place}/..", "/static/0123456789abcdef/page.js"):
        assert client.get(wrong).status_code == 404


def test_answers_that_did_not_change_are_not_sent_again(client, secrets):
    sign_in(client, secrets, "read")
    first = client.get("/v1/models")
    again = client.get("/v1/models", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/v1/models", headers={"If-None-Match": '"other"'}).json() == first.json()


def test_a_link_of_another_site_opens_the_page_and_nothing_else(tiny_bundle, tmp_path):
    """Without keys, where the origin is all that keeps other sites out."""
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    with running(tiny_bundle, "store=none") as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/", headers={**followed, "Accept": "text/html"}).is_success
        assert code(client.get("/v1/models", headers=followed)) == (403, "cross_site")
        assert code(client.get("/", headers={**followed, "Sec-Fetch-Dest": "iframe"})) == (403, "cross_site")
        assert code(client.get("/", headers={**followed, "Host": "evil.example"})) == (403, "unknown_host")
        said = client.get("/v1/session").json()
        assert (said["needed"], said["role"]) == (False, "admin")
        assert "set-cookie" not in client.post("/v1/session", json={"key": "x"}, headers=OWN).headers


def test_over_tls_the_cookie_is_secure(tiny_bundle, tmp_path, secrets):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made_by = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run([*made_by.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    KeyFile(keys=(secrets["read"][0],)).write(tmp_path / "keys.yaml")
    settings = f"tls_certificate={certificate}", f"tls_key={key}", f"keys={tmp_path / 'keys.yaml'}", "store=none"
    with running(tiny_bundle, *settings) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        with httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=certificate)) as client:
            assert "; secure" in sign_in(client, secrets, "read").headers["set-cookie"].casefold()
            assert client.get("/v1/models").is_success
