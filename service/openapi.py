"""`GET /openapi.json` and `GET /docs`: the interface as a document, made from the same routes that are served.

Both ask for no key: they tell nothing that is not in the source. Where keys are asked for, each route says which role.
"""

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from flask import Response, render_template
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from anomaly_vae import __version__
from anomaly_vae.answers import Refusal, Summary
from service.codes import CODES, FOR_BODIES, FOR_KEYS, FOR_QUERIES
from service.routes import Route

_REF = "#/components/schemas/"
_STYLE = (Path(__file__).parent / "templates" / "docs.css").read_text(encoding="utf-8")
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'sha256-{_DIGEST}'; frame-ancestors 'none'; base-uri 'none'"
_ABOUT = (
    "Is this picture like the normal ones? Pictures in, calibrated verdicts out.\n\n"
    "Every answer carries `X-Request-Id`. Every refusal is JSON (`Refusal`) with a stable `code`; answers 429 and 503 "
    "say in `Retry-After` when to try again. Later versions may add fields to answers: pass over those that you do "
    "not know."
)
_DEADLINE = "Milliseconds that the answer may take; the settings deadline_ms or archive_deadline_ms unless given"
_REQUEST_ID = "An id of your own for logs: up to 64 letters, digits, dots, dashes and underscores, or it is replaced"
_LINES = {
    "application/x-ndjson": "One JSON value a line. Of an archive: `Scored` or `Unscored` for each picture, then "
    "`Summary`, or a `Refusal` where it could not be finished. Of verdicts: a `Verdict` a line.",
    "text/csv": "A line a verdict, after one of column names.",
}
_PATHS = {
    "model": ("A model's name", {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"}),
    "scan": ("The id that it was given", {"type": "string", "pattern": "^[0-7][0-9a-f]{15}$"}),
    "verdict": ("The id that its answer gave", {"type": "string", "pattern": "^[0-7][0-9a-f]{15}$"}),
    "alarm": ("Its id in GET /v1/alarms", {"type": "string", "pattern": "^[0-9a-f]{16}$"}),
    "digest": ("Of all files of the page together", {"type": "string", "pattern": "^[0-9a-f]{16}$"}),
    "file": ("A file's name", {"type": "string"}),
}


class Described:
    """Two routes that describe `groups` of routes, and themselves; `secured`: whether keys are asked for."""

    def __init__(self, groups: Mapping[str, Sequence[Route]], *, secured: bool) -> None:
        self._groups = {**groups, "This interface": self.routes()}
        self._document = document(self._groups, secured)
        self._json = json.dumps(self._document, indent=1) + "\n"

    def routes(self) -> list[Route]:
        """Both of them."""
        return [
            Route("GET", "/openapi.json", None, self.openapi, "This interface for programs", ("application/json",)),
            Route("GET", "/docs", None, self.docs, "This interface for people", ("text/html",)),
        ]

    def openapi(self) -> Response:
        return Response(self._json, mimetype="application/json")

    def docs(self) -> Response:
        page = render_template(
            "docs.html", document=self._document, groups=_shown(self._document), codes=CODES, style=_STYLE,
            schemas=self._document["components"]["schemas"], type_of=type_of,
        )  # fmt: skip
        answer = Response(page, mimetype="text/html")
        answer.headers["Content-Security-Policy"] = _POLICY
        return answer


def document(groups: Mapping[str, Sequence[Route]], secured: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document of all routes."""
    routes = [(group, route) for group, routes in groups.items() for route in routes]
    paths: dict[str, dict[str, Any]] = {}
    for group, route in routes:
        path = re.sub(r"<(\w+)>", r"{\1}", route.rule)
        paths.setdefault(path, {})[route.method.lower()] = _operation(group, route, secured)
    components: dict[str, Any] = {
        "schemas": _schemas([route for _, route in routes]),
        "headers": {
            "X-Request-Id": {"description": "The request's id in the service's log", "schema": {"type": "string"}},
            "Retry-After": {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}},
        },
    }
    if secured:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "anomaly-vae", "version": __version__, "description": _ABOUT},
        "tags": [{"name": group} for group in groups],
        "paths": paths,
        "components": components,
    }


def _operation(group: str, route: Route, secured: bool) -> dict[str, Any]:
    guarded = secured and route.role is not None
    found: dict[str, Any] = {
        "tags": [group],
        "summary": route.about,
        "operationId": _name(route),
        "parameters": [*_parameters(route)],
        "responses": _responses(route, guarded),
    }
    about = [" ".join((route.query.__doc__ or "").split())] if route.query else []
    if route.role is not None:
        about.append(f"Where keys are asked for, one with the role `{route.role.name.lower()}` or above.")
    found["description"] = "\n\n".join(about)
    if guarded:
        found["security"] = [{"bearer": []}, {"header": []}]
    if route.body is not None:
        content = {"application/json": {"schema": {"$ref": _REF + route.body.__name__}}}
        found["requestBody"] = {"content": content, "required": _is_needed(route)}
    if route.takes:
        found["requestBody"] = {"content": {kind: _sent(kind) for kind in route.takes}, "required": True}
    return found


def _name(route: Route) -> str:
    """The view's name; that of an address with a version of its own beside the short one says so."""
    return route.view.__name__ + ("_v2" if route.rule.startswith("/v2/") else "")


def _is_needed(route: Route) -> bool:
    assert route.body is not None
    return any(field.is_required() for field in route.body.model_fields.values())


def _parameters(route: Route) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"<(\w+)>", route.rule):
        about, schema = _PATHS[name]
        yield {"name": name, "in": "path", "required": True, "description": about, "schema": schema}
    if route.query is not None:
        for name, value in route.query.model_json_schema()["properties"].items():
            found = {key: part for key, part in _without_null(value).items() if key != "title"}
            about = found.pop("description", "")
            yield {"name": name, "in": "query", "description": about, "schema": found}
    if "bad_deadline" in route.codes:
        most = {"type": "integer", "minimum": 1, "maximum": 600_000}
        yield {"name": "X-Deadline-Ms", "in": "header", "description": _DEADLINE, "schema": most}
    yield {"name": "X-Request-Id", "in": "header", "description": _REQUEST_ID, "schema": {"type": "string"}}


def _responses(route: Route, guarded: bool) -> dict[str, Any]:
    headers = {"X-Request-Id": {"$ref": "#/components/headers/X-Request-Id"}}
    kinds = route.reply if isinstance(route.reply, tuple) else ()
    content: dict[str, Any] = {kind: {"schema": _raw(kind)} for kind in (*kinds, *route.more)}
    if not isinstance(route.reply, tuple):
        content = {"application/json": {"schema": {"$ref": _REF + route.reply.__name__}}, **content}
    found: dict[str, Any] = {"200": {"description": route.about, "headers": headers, "content": content}}
    by_status: dict[HTTPStatus, list[str]] = {}
    for code in _codes(route, guarded):
        by_status.setdefault(CODES[code].status, []).append(code)
    for status, codes in sorted(by_status.items()):
        again = status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
        retry = {"Retry-After": {"$ref": "#/components/headers/Retry-After"}} if again else {}
        found[str(status.value)] = {
            "description": ", ".join(f"`{code}`" for code in codes),
            "headers": headers | retry,
            "content": {"application/json": {"schema": {"$ref": _REF + "Refusal"}}},
        }
    if route.busy is not None:
        content = {"application/json": {"schema": {"$ref": _REF + route.busy.__name__}}}
        found["503"] = {"description": "Not now", "headers": headers, "content": content}
    return found


def _codes(route: Route, guarded: bool) -> list[str]:
    """Every code it may refuse with, each once."""
    keys = (*FOR_KEYS, "too_large") if guarded else ()
    body, query = FOR_BODIES if route.body else (), FOR_QUERIES if route.query else ()
    return list(dict.fromkeys((*query, *body, *keys, *route.codes, "internal")))


def _sent(kind: str) -> dict[str, Any]:
    if kind == "multipart/form-data":
        about = "Pictures; the field may have any name, and they are answered in the order sent"
        files = {"type": "array", "items": _raw("application/octet-stream"), "minItems": 1, "description": about}
        return {"schema": {"type": "object", "properties": {"file": files}, "required": ["file"]}}
    if kind in _LINES:
        about = "Lines of a result of `scan`, as .ndjson has them: an object each, with a verdict or an error"
        return {"schema": {"type": "string", "minLength": 1, "description": about}}
    return {"schema": {**_raw(kind), **({"minLength": 1} if kind.startswith("text/") else {})}}


def _raw(kind: str) -> dict[str, Any]:
    if kind in _LINES:
        return {"type": "string", "description": _LINES[kind]}
    if kind == "application/json":
        return {"type": "object"}
    return {"type": "string"} if kind.startswith("text/") else {"type": "string", "format": "binary"}


def _schemas(routes: Iterable[Route]) -> dict[str, Any]:
    kinds: dict[type[Any], JsonSchemaMode] = {Refusal: "serialization", Summary: "serialization"}
    for route in routes:
        for answered in (route.reply, route.busy):
            if isinstance(answered, type):
                kinds[answered] = "serialization"
        if route.body is not None:
            kinds[route.body] = "validation"
    _, found = models_json_schema(list(kinds.items()), ref_template=_REF + "{model}")
    asked = {kind.__name__ for kind, mode in kinds.items() if mode == "validation"}
    schemas: dict[str, Any] = found["$defs"]
    for name, schema in schemas.items():
        for field, value in schema.get("properties", {}).items():
            value.pop("title", None)
            # A field of an answer that may be left out is left out rather than null.
            if name not in asked and field not in schema.get("required", ()):
                schema["properties"][field] = _without_null(value)
    return schemas


def _without_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in schema.items() if not (name == "default" and value is None)}
    choices = [one for one in found.get("anyOf", ()) if one != {"type": "null"}]
    if len(choices) == 1:
        del found["anyOf"]
        found = {**choices[0], **found}
    elif choices:
        found["anyOf"] = choices
    return found


# --- for people -----------------------------------------------------------------------------------------------------


def type_of(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).removeprefix(_REF)
    if "anyOf" in schema:
        return " or ".join(type_of(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " | ".join(json.dumps(one) for one in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("format") or schema.get("type", "any"))
    if kind == "array":
        return f"list of {type_of(schema['items'])}" if "items" in schema else "list"
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"names to {type_of(schema['additionalProperties'])}"
    return kind + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    said = [f"{sign} {schema[name]:,}" for name, sign in signs.items() if name in schema]
    if "maxLength" in schema:
        said.append(f"up to {schema['maxLength']} characters")
    if "pattern" in schema:
        said.append(f"as {schema['pattern']}")
    return f" ({', '.join(said)})" if said else ""


def _shown(document: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The operations of each group, each with an example of curl."""
    groups: dict[str, list[dict[str, Any]]] = {tag["name"]: [] for tag in document["tags"]}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            shown = {**operation, "path": path, "method": method.upper()}
            groups[operation["tags"][0]].append({**shown, "curl": _curl(shown, document["components"]["schemas"])})
    return groups


def _curl(operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    words = ["curl"] if operation["method"] == "GET" else ["curl", "-X", operation["method"]]
    if "security" in operation:
        words += ["-H", '"Authorization: Bearer $KEY"']
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        body = schemas[content["application/json"]["schema"]["$ref"].removeprefix(_REF)]
        example = json.dumps(body.get("examples", [{}])[0])
        words += ["-H", "'Content-Type: application/json'", "-d", shlex.quote(example)]
    elif "application/x-ndjson" in content:
        words += ["-H", "'Content-Type: application/x-ndjson'", "--data-binary", "@rows.ndjson"]
    elif "text/html" in content:
        words += ["-H", "'Content-Type: text/html'", "--data-binary", "@report.html"]
    elif content:
        words = ["curl", *words[3:], "--data-binary", "@picture.jpg"]
    address = "http://127.0.0.1:8765" + operation["path"]
    for name, example in (("model", "NAME"), ("verdict", "ID"), ("alarm", "ID"), ("scan", "ID")):
        address = address.replace(f"{{{name}}}", example)
    return " ".join([*words, address])
