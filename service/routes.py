"""A route as one value: where, who may, what is asked and answered; blueprints and OpenAPI are both made from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flask import Blueprint, Response
from pydantic import BaseModel
from werkzeug.routing import BaseConverter

from anomaly_vae import Spec
from service.access import needs
from service.keys import Role


@dataclass(frozen=True)
class Route:
    """`query`, `body`: what is asked, as types. `reply`: what success answers, as a type, or media types.

    `more`: media types that it may answer instead; `takes`: those of a body that is no JSON. `codes`: of its own
    refusals, beside those that its role, query and body bring along. `busy`: what it answers with 503 in place of a
    refusal.
    """

    method: str
    rule: str
    role: Role | None
    view: Callable[..., Response]
    about: str
    reply: type[BaseModel] | tuple[str, ...]
    query: type[Spec] | None = None
    body: type[Spec] | None = None
    more: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    busy: type[BaseModel] | None = None


class PathPart(BaseConverter):
    """What a name in an address may be made of; a colon ends it, as in `/v1/models/NAME:load`."""

    regex = "[^/:]+"


def blueprint(name: str, routes: Sequence[Route]) -> Blueprint:
    """Flask's routes; every one with a handler of its own, which carries the role it needs."""
    pages = Blueprint(name, __name__)
    for route in routes:
        place = f"{route.method} {route.rule}".replace(".", "_")
        pages.add_url_rule(route.rule, place, needs(route.role)(_handler(route.view)), methods=[route.method])
    return pages


def _handler(view: Callable[..., Response]) -> Callable[..., Response]:
    def handle(**values: str) -> Response:
        return view(**values)

    return handle
