"""Reading a request's JSON body or query as one of the types in `asked`, and answering JSON."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, TypeVar

from flask import Response, g, request

from anomaly_vae import ConfigError, Spec
from service.errors import Problem
from service.uploads import read_body

_S = TypeVar("_S", bound=Spec)
MOST_BYTES = 64 * 1024


def body_of(kind: type[_S]) -> _S:
    """The request's JSON; raises `Problem`."""
    data = read_body(request.environ, MOST_BYTES)
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        raise Problem(HTTPStatus.BAD_REQUEST, "bad_json", "the body is no JSON; send one object") from None
    if not isinstance(found, dict):
        raise Problem(HTTPStatus.BAD_REQUEST, "bad_json", "the body must be one JSON object, such as {}")
    return _parsed(kind, found, "the body")


def query_of(kind: type[_S]) -> _S:
    """The request's query; raises `Problem` for a parameter that there is not, or that is given twice."""
    return parsed_query(kind, request.args.items(multi=True))


def parsed_query(kind: type[_S], pairs: Iterable[tuple[str, str]]) -> _S:
    """As `query_of`, of the names and values in a query."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name not in kind.model_fields:
            known = ", ".join(kind.model_fields)
            message = f"there is no parameter {name[:40]!r}; there are {known}"
            raise Problem(HTTPStatus.BAD_REQUEST, "unknown_parameter", message)
        if name in found:
            raise Problem(HTTPStatus.BAD_REQUEST, "bad_parameter", f"{name} is given twice; give it once")
        found[name] = value
    return _parsed(kind, found, "the query")


def answer(body: Any, status: HTTPStatus = HTTPStatus.OK) -> Response:
    """Plain values as JSON; a number that is none is a fault."""
    return Response(json.dumps(body, allow_nan=False) + "\n", status, mimetype="application/json")


def moment(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def who() -> str:
    """Whom changes are written down to: the key's name, or `anyone` where nobody is asked for a key."""
    return g.key.name if g.get("key") else "anyone"


def _parsed(kind: type[_S], found: dict[str, Any], source: str) -> _S:
    try:
        return kind.parse(found, source)
    except ConfigError as error:
        raise Problem(HTTPStatus.BAD_REQUEST, "bad_parameter", str(error)[:500]) from None
