"""The published interface is the real one: every answer of a running service is as its document says."""

import ast
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from archiving import tarred
from serving import Server, running

from anomaly_vae import answers, watch_answers
from anomaly_vae.images import BAD_IMAGE_CODES
from service.asked import ScanWanted
from service.codes import CODES

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("service")
    for name in ("tiny", "other"):
        shutil.copytree(tiny_bundle, folder / "models" / name)
    settings = f"store={folder / 's.sqlite'}", f"models={folder / 'models'}", "review_share=1", "flush_ms=1"
    with running(folder / "models" / "tiny", *settings) as found:
        yield found


@pytest.fixture(scope="module")
def document(server: Server) -> dict:
    return httpx.get(f"{server.url}/openapi.json").json()


class Checked:
    """A client that holds every answer against the document, and remembers which operations succeeded."""

    def __init__(self, server: Server, document: dict) -> None:
        self._client = httpx.Client(base_url=server.url, timeout=60)
        self._document, self.succeeded, self.refused = document, set(), set()

    def __call__(self, method: str, path: str, status: int, **more):
        reply = self._client.request(method, path, **more)
        assert reply.status_code == status, reply.text
        operation = self._operation(method, path.partition("?")[0])
        said = operation["responses"][str(status)]
        kind = reply.headers["content-type"].partition(";")[0]
        assert kind in said["content"], kind
        for header in said["headers"]:
            assert reply.headers[header]
        reference = said["content"][kind]["schema"].get("$ref")
        if reference:
            name = reference.rpartition("/")[2]
            type_ = getattr(answers, name, None) or getattr(watch_answers, name)
            type_.model_validate_json(reply.content, strict=True, extra="forbid")
        if status >= 400:
            code = reply.json()["error"]["code"]
            assert f"`{code}`" in said["description"]
            assert CODES[code].status == status
            self.refused.add(code)
        else:
            self.succeeded.add(operation["operationId"])
        return reply

    def _operation(self, method: str, path: str) -> dict:
        for template, methods in self._document["paths"].items():
            if re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/:]+", re.escape(template)), path):
                return methods[method.lower()]
        raise AssertionError(f"{path} is not in the document")


def test_every_answer_is_as_the_document_says(server, document, digits_folder):
    ask = Checked(server, document)
    pictures = [path.read_bytes() for path in sorted((digits_folder / "8").iterdir())[:12]]
    files = [("file", (f"{i}.png", data)) for i, data in enumerate([*pictures, b"text"])]
    ask("POST", "/v1/score?heatmap=overlay&reconstruction=true&explain=true", 200, files=files)
    results = ask("POST", "/v1/score?heatmap=png", 200, files=files).json()["results"]
    assert any(result.get("regions") for result in results)
    odd = next(result["id"] for result in results if result.get("outlier"))
    lines = ask("POST", "/v1/score", 200, content=tarred([("a.png", pictures[0]), ("b.txt", b"x")])).text.splitlines()
    for line, type_ in zip(lines, (answers.Scored, answers.Unscored, answers.Summary), strict=True):
        type_.model_validate_json(line, strict=True, extra="forbid")
    until_kept(server, odd)

    for path in ("/", "/docs", "/openapi.json", "/live", "/ready", "/v2/health/live", "/v2/health/ready", "/metrics"):
        ask("GET", path, 200)
    for path in ("/v1/models", "/v1/models/tiny", "/v1/models/tiny/policy", "/v1/audit", "/v1/review", "/v1/verdicts",
                 "/v1/alarms"):  # fmt: skip
        ask("GET", path, 200)
    for query in ("format=csv", "format=ndjson", "since=2020-01-01", "until=1e9", "since=0001-01-01T00:00:00%2B14:00"):
        ask("GET", f"/v1/verdicts?{query}", 400 if "1e9" in query else 200)
    ask("GET", "/v1/rates?since=0001-01-01T00:00:00Z&until=9999-12-31T23:59:59-12:00", 400)
    ask("GET", "/v1/rates?since=2026-01-01&until=2026-02-01T00:00:00-12:00", 200)
    one = f"/v1/verdicts/{odd}"
    for path in (one, f"{one}/image", f"{one}/heatmap", f"{one}/regions", "/v1/models/tiny/calibration"):
        ask("GET", path, 200)
    own = {"headers": {"X-Asked-By": "page"}}
    page = httpx.get(server.url, headers={"Accept": "text/html"}).text
    ask("GET", "/" + re.search(r"static/[0-9a-f]+/page.js", page)[0], 200)
    ask("GET", "/v1/session", 200)
    ask("POST", "/v1/session", 200, json={"key": "any"}, **own)
    ask("DELETE", "/v1/session", 200, **own)
    ask("DELETE", "/v1/session", 403)
    ask("POST", "/v1/feedback", 200, json={"verdict": odd, "label": "confirmed"})
    ask("GET", one, 200)
    ask("POST", "/v1/feedback", 409, json={"verdict": odd, "label": "missed"})

    loaded = ask("POST", "/v1/models/second:load", 200, json={"bundle": "other", "activate": True}).json()
    ask("POST", "/v1/models/second:activate", 200, json={"version": loaded["version"]})
    ask("POST", "/v1/models/second:retire", 200, json={})
    ask("POST", "/v1/models/tiny:rollback", 409)
    ask("PUT", "/v1/models/tiny/policy", 200, json={"alpha": 0.1})
    ask("POST", "/v1/models/tiny/policy:preview", 200, json={"threshold": 1.0, "last": 20.0})
    ask("POST", "/v1/models/tiny/policy:rollback", 200)
    told = ScanWanted.model_config["json_schema_extra"]["examples"][0]
    scan = ask("POST", "/v1/scans", 200, json=told).json()["id"]
    page = {"content": b"<p>a report", "headers": {"Content-Type": "text/html"}}
    row = {"path": "a.png", "score": 1.0, "p_value": 0.5, "outlier": False, "version": told["version"]}
    rows = {"content": json.dumps(row), "headers": {"Content-Type": "application/x-ndjson"}}
    ask("POST", f"/v1/scans/{scan}/rows?first=0", 200, **rows)
    ask("POST", f"/v1/scans/{scan}/rows?first=9", 409, **rows)
    ask("POST", f"/v1/scans/{scan}/rows?first=0", 400, content="{}", headers=rows["headers"])
    ask("GET", f"/v1/scans/{scan}/report", 404)
    ask("PUT", f"/v1/scans/{scan}/report", 200, **page)
    for path in ("/v1/scans", f"/v1/scans/{scan}", f"/v1/scans/{scan}/report"):
        ask("GET", path, 200)
    ask("DELETE", f"/v1/scans/{scan}", 200)
    ask("DELETE", f"/v1/scans/{scan}", 404)
    refuse(ask, one)
    ask("DELETE", f"{one}/image", 200)
    ask("GET", f"{one}/image", 404)
    ask("DELETE", one, 200)
    ask("DELETE", "/v1/verdicts?outlier=true", 200)
    operations = {one["operationId"] for methods in document["paths"].values() for one in methods.values()}
    # It takes another bundle, hundreds of reviews or an alarm; `answers` are held against those in tests of their own.
    assert operations - ask.succeeded == {"rollback", "recalibrate", "acknowledge"}


def refuse(ask: Checked, one: str) -> None:
    """Requests that are refused, each in its own way."""
    ask("POST", "/v1/score", 400)
    ask("POST", "/v1/score", 422, content=b"text")
    ask("POST", "/v1/score", 422, files=[("a", ("a", b"text")), ("b", ("b", b"\x89PNG\r\n\x1a\n"))])
    ask("POST", "/v1/score", 415, json={})
    ask("POST", "/v1/score?model=nobody", 404, content=b"x")
    ask("POST", "/v1/score?alpha=1e-7", 400, content=b"x")
    ask("POST", "/v1/score", 400, content=b"x", headers={"X-Deadline-Ms": "0"})
    ask("GET", "/v1/audit?cursor=1" + "0" * 30, 400)
    ask("GET", "/v1/models/nobody", 404)
    ask("POST", "/v1/models/a:load", 404, json={"bundle": "nobody"})
    ask("POST", "/v1/models/a:activate", 409, json={"version": "1"})
    ask("POST", "/v1/models/tiny:recalibrate", 409, json={"minimum": 1000})
    ask("POST", "/v1/models/tiny:retire", 409, json={})
    ask("POST", "/v1/models/tiny:retire", 400, json={"version": ""})
    for wrong in ({"alpha": "0.1"}, {"alpha": 5e-324}, {"alpha": 0.1, "threshold": 1}, {"beta": 1}):
        ask("PUT", "/v1/models/tiny/policy", 400, json=wrong)
    ask("PUT", "/v1/models/tiny/policy", 200, json={"alpha": 1 - 1e-15})
    for wrong in ("x\0y", "x" * 1001):
        ask("POST", "/v1/feedback", 400, json={"verdict": one[-16:], "label": "unclear", "note": wrong})
    ask("POST", "/v1/alarms/0123456789abcdef:acknowledge", 404)
    ask("GET", "/v1/verdicts?outlier=1", 400)
    ask("GET", "/v1/verdicts?limit=0", 400)
    ask("GET", "/v1/verdicts/0000000000000000/heatmap", 404)
    ask("DELETE", "/v1/verdicts", 400)


def until_kept(server: Server, name: str) -> None:
    end = time.monotonic() + 30
    while httpx.get(f"{server.url}/v1/verdicts/{name}").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_method_that_is_not_served_is_told_with_those_that_are(server):
    for path, allowed in (("/v1/models/tiny:rollback", "POST"), ("/v1/score", "POST"), ("/v1/models/tiny", "GET")):
        reply = httpx.delete(server.url + path)
        assert reply.status_code == 405
        assert set(reply.headers["allow"].split(", ")) - {"HEAD", "OPTIONS"} == {allowed}


def test_every_code_that_a_refusal_can_carry_is_listed_with_its_status():
    said = dict.fromkeys(BAD_IMAGE_CODES)
    for path in sorted((ROOT / "service").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in {"Problem", "_too_much"}:
                continue
            texts = [part.value for part in node.args[:2] if isinstance(part, ast.Constant)]
            status = [part.attr for part in node.args[:2] if isinstance(part, ast.Attribute)]
            if texts and node.func.id == "Problem":
                assert CODES[texts[0]].status.name == status[0], f"{path.name}: {texts[0]}"
            said |= dict.fromkeys(texts[:1])
    assert set(said) | {"not_found", "method_not_allowed"} == set(CODES)


class Page(HTMLParser):
    """What a page refers to, and its style."""

    def __init__(self) -> None:
        super().__init__()
        self.ids, self.links, self.sources, self.style, self._tag = set(), set(), set(), "", ""

    def handle_starttag(self, tag, attrs):
        found, self._tag = dict(attrs), tag
        self.ids.add(found.get("id"))
        self.links.add(found.get("href"))
        self.sources.add(found.get("src"))
        assert "style" not in found

    def handle_endtag(self, tag):
        self._tag = ""

    def handle_data(self, data):
        if self._tag == "style":
            self.style += data


def test_the_page_shows_all_of_it_and_fetches_nothing(server, document):
    reply = httpx.get(f"{server.url}/docs")
    page = Page()
    page.feed(reply.text)
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in reply.headers["content-security-policy"]
    assert "http" not in page.style
    assert page.sources == {None}
    assert {link for link in page.links if link and not link.startswith("#")} == {"openapi.json"}
    assert {link[1:] for link in page.links if link and link.startswith("#")} <= page.ids
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["operationId"] in page.ids
            assert path in reply.text
    assert all(f"<code>{code}</code>" in reply.text for code in CODES)
    assert set(document["components"]["schemas"]) <= page.ids
    assert "default-src 'none'" in httpx.get(server.url).headers["content-security-policy"]


def test_random_requests_find_no_answer_that_is_not_documented(server, digits_folder, tmp_path):
    program = shutil.which("schemathesis", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("schemathesis is not installed; pip install schemathesis, or put it on the PATH")
    picture = sorted((digits_folder / "8").iterdir())[0].read_bytes()
    replies = [httpx.post(f"{server.url}/v1/score", content=picture).json() for _ in range(3)]
    told = ScanWanted.model_config["json_schema_extra"]["examples"][0]
    scan = httpx.post(f"{server.url}/v1/scans", json=told).json()["id"]
    environment = {**os.environ, "MODEL": "tiny", "VERDICT": replies[0]["results"][0]["id"], "SCAN": scan}
    environment |= {"PYTHONPATH": str(ROOT / "tests"), "SCHEMATHESIS_HOOKS": "schemathesis_lines"}
    command = [program, "--config-file", str(ROOT / "tests" / "schemathesis.toml"), "run",
               f"{server.url}/openapi.json", "--checks", "all", "--suppress-health-check", "all", "--no-color",
               "--max-examples", "10", "--seed", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-8000:]
    assert httpx.get(f"{server.url}/ready").status_code == 200
    assert "Traceback" not in server.output
    assert json.loads(httpx.get(f"{server.url}/openapi.json").text)
