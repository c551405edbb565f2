"""Who may call what: every route says which role it needs, one that says nothing needs the highest."""

from collections.abc import Callable
from http import HTTPStatus
from typing import TypeVar

from flask import Flask, Response, g, request

from service.allowance import Allowance
from service.errors import Problem
from service.keys import Key, Keyring, Role

_View = TypeVar("_View", bound=Callable[..., object])


def needs(role: Role | None) -> Callable[[_View], _View]:
    """Mark a view with the role that its caller needs; None: nobody is asked."""

    def mark(view: _View) -> _View:
        view.__dict__["role"] = role
        return view

    return mark


def guard(app: Flask, keyring: Keyring | None, most_bytes: int) -> None:
    """Let each request pass only with a key for it, and as often as that may; `g.key` is that key.

    Without a keyring everybody may do all. A body of unknown length counts as `most_bytes`.
    """

    allowance = Allowance()

    @app.before_request
    def check() -> None:
        g.key = g.taken = None
        if keyring is None or request.endpoint is None:
            return
        role: Role | None = getattr(app.view_functions[request.endpoint], "role", Role.ADMIN)
        if role is not None:
            key, size = _admitted(keyring, role), _announced(most_bytes)
            allowance.take(key, size)
            g.key, g.taken = key, size

    @app.teardown_request
    def done(_: BaseException | None) -> None:
        if g.get("taken") is not None:
            allowance.give_back(g.key, g.taken)

    @app.after_request
    def say_how(response: Response) -> Response:
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response


def _admitted(keyring: Keyring, role: Role) -> Key:
    presented = _presented()
    if presented is None:
        message = "this service wants a key; send the header Authorization: Bearer KEY"
        raise Problem(HTTPStatus.UNAUTHORIZED, "no_key", message)
    key = keyring.find(presented)
    if key is None:
        message = "this key is unknown or no longer valid; ask whoever runs the service for a new one"
        raise Problem(HTTPStatus.UNAUTHORIZED, "bad_key", message)
    if key.role < role:
        has, wanted = key.role.name.lower(), role.name.lower()
        message = f"the key {key.name} has the role {has}, and this needs {wanted}; ask for another key"
        raise Problem(HTTPStatus.FORBIDDEN, "forbidden", message)
    return key


def _announced(most: int) -> int:
    """Bytes of the body, as far as its header tells."""
    if "chunked" in request.headers.get("Transfer-Encoding", "").casefold():
        return most
    return min(request.content_length or 0, most)


def _presented() -> str | None:
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    if scheme.casefold() == "bearer" and value.strip():
        return value.strip()
    return request.headers.get("X-API-Key") or None
