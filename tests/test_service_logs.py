"""What a service logs: lines that machines read, with the request's id, and nothing of pictures or keys."""

import json
import logging
from pathlib import Path

import httpx
from serving import running

from service.keys import KeyFile, Role, made
from service.logs import JsonLines, TextLines, told


def test_every_request_is_a_line_of_json_when_asked_for(tiny_bundle: Path, digits_folder: Path, tmp_path: Path) -> None:
    picture = next((digits_folder / "good").iterdir()).read_bytes()
    key, secret = made("line-3", Role.SCORE)
    KeyFile(keys=(key,)).write(tmp_path / "keys.yaml")
    with running(tiny_bundle, "log_requests=true", f"keys={tmp_path / 'keys.yaml'}") as server:
        for headers in ({"Authorization": f"Bearer {secret}"}, {}):
            headers["X-Request-Id"] = f"tray-{len(headers)}"
            httpx.post(server.url + "/v1/score", content=picture, headers=headers, timeout=60)
    lines = [json.loads(line) for line in server.output.splitlines() if line.startswith("{")]
    fine, refused = [line for line in lines if line["logger"] == "service.requests"]
    assert {name: fine[name] for name in ("level", "message", "request_id", "method", "route", "status", "key")} == {
        "level": "info", "message": "answered", "request_id": "tray-1", "method": "POST", "route": "/v1/score",
        "status": 200, "key": "line-3",
    }  # fmt: skip
    assert fine["bytes"] == len(picture)
    assert fine["milliseconds"] > 0
    assert fine["time"].endswith("Z")
    assert (refused["request_id"], refused["status"], refused["key"]) == ("tray-0", 401, None)
    assert secret not in server.output


def test_without_asking_only_what_went_wrong_is_logged(tiny_bundle: Path, digits_folder: Path) -> None:
    picture = next((digits_folder / "good").iterdir()).read_bytes()
    with running(tiny_bundle) as server:
        httpx.post(server.url + "/v1/score", content=picture, timeout=60)
    assert not [line for line in server.output.splitlines() if line.startswith("{")]


def test_a_line_tells_its_fields_and_the_exception() -> None:
    try:
        raise ValueError("no such shape")
    except ValueError as error:
        record = logging.LogRecord("service.x", logging.ERROR, "f", 1, "it failed: %s", ("badly",), None)
        record.exc_info = (ValueError, error, error.__traceback__)
    record.__dict__ |= told(request_id="a\nb")
    line = json.loads(JsonLines().format(record))
    assert (line["message"], line["request_id"]) == ("it failed: badly", "a\nb")
    assert "no such shape" in line["exception"]
    assert "\n" not in JsonLines().format(record)
    assert TextLines().format(record).startswith("ERROR it failed: badly request_id=")
