"""Who may call what: every route says which role it needs, one that says nothing needs the highest."""

from collections.abc import Callable
from functools import lru_cache, partial
from http import HTTPStatus
from ipaddress import ip_address
from typing import TypeVar
from urllib.parse import urlsplit

from flask import Flask, Response, g, request

from service.allowance import Allowance
from service.errors import Problem
from service.keys import Key, Keyring, Role
from service.sessions import Sessions, cookie_name

_View = TypeVar("_View", bound=Callable[..., object])
_HARMLESS = ("GET", "HEAD", "OPTIONS")
PAGE_HEADER, PAGE_VALUE = "X-Asked-By", "page"
"""What the service's own page sends along with every request."""


def needs(role: Role | None) -> Callable[[_View], _View]:
    """Mark a view with the role that its caller needs; None: nobody is asked."""

    def mark(view: _View) -> _View:
        view.__dict__["role"] = role
        return view

    return mark


def guard(
    app: Flask,
    keyring: Keyring | None,
    most_bytes: int,
    allowance: Allowance,
    sessions: Sessions | None = None,
) -> None:
    """Let each request pass only with a key for it, and as often as that may; `g.key` is that key.

    Who is signed in sends a cookie instead, which stands for a key. Without a keyring everybody may do all. A body of
    unknown length counts as `most_bytes`, until `count_body` knows better. What was counted is given back once there is
    an answer, or as `count_until_closed` says.
    """

    @app.before_request
    def check() -> None:
        g.key = g.taken = None
        if keyring is None or request.endpoint is None:
            return
        role: Role | None = getattr(app.view_functions[request.endpoint], "role", Role.ADMIN)
        if role is not None:
            key, size = _admitted(keyring, role, sessions), _announced(most_bytes)
            allowance.take(key, size)
            g.key, g.taken, g.allowance = key, size, allowance

    @app.teardown_request
    def done(_: BaseException | None) -> None:
        if g.get("taken") is not None:
            allowance.give_back(g.key, g.taken)


def guard_pages(app: Flask, local: bool) -> None:
    """Keep out what a page of another site has a visitor's browser ask, which nobody's key would stop.

    `local`: only this machine's own names are answered to, so that no other name that is made to point here is.
    """

    @app.before_request
    def check_origin() -> None:
        origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
        foreign = origin is not None and urlsplit(origin).netloc != request.host
        if foreign or (site in ("cross-site", "same-site") and not _follows_a_link_home()):
            message = "a page of another site asked this; without keys only the service's own pages may"
            raise Problem(HTTPStatus.FORBIDDEN, "cross_site", message)
        if local and not is_own(request.host):
            message = f"the service is not called {request.host[:80]!r}; call it localhost, or set allow_remote or keys"
            raise Problem(HTTPStatus.FORBIDDEN, "unknown_host", message)


def _follows_a_link_home() -> bool:
    """Whether a person followed a link of another site to the page itself, which does nothing by being opened."""
    fetch = [request.headers.get(f"Sec-Fetch-{what}") for what in ("Mode", "Dest")]
    return request.method == "GET" and request.path == "/" and fetch == ["navigate", "document"]


@lru_cache(64)
def is_own(host: str) -> bool:
    """Whether a host, as a request names it with or without a port, is a name of this machine that no other has."""
    name = urlsplit(f"//{host}").hostname or ""
    if name.removesuffix(".") == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def count_body(size: int) -> None:
    """Count this request's body as `size` bytes where that is more than was announced; raises `Problem`."""
    if g.taken is not None and size > g.taken:
        g.allowance.grow(g.key, g.taken, size)
        g.taken = size


def count_until_closed(answer: Response) -> None:
    """Go on counting this request's body until `answer` has been sent to its end, or cannot be."""
    if g.taken is not None:
        answer.call_on_close(partial(g.allowance.give_back, g.key, g.taken))
        g.taken = None


def from_own_page() -> None:
    """Refuse a change that anything but the page itself had a browser ask; raises `Problem`.

    A form of another page cannot send the header, and a script of one may not. A cookie alone is no sign of who asks:
    browsers send even a strict one along from other ports of the same machine.
    """
    elsewhere = request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
    if elsewhere or request.headers.get(PAGE_HEADER) != PAGE_VALUE:
        message = f"whoever is signed in changes things from the page alone, which sends {PAGE_HEADER}: {PAGE_VALUE}"
        raise Problem(HTTPStatus.FORBIDDEN, "cross_site", message)


def _admitted(keyring: Keyring, role: Role, sessions: Sessions | None) -> Key:
    presented = presented_in(request.headers.get("Authorization", ""), request.headers.get("X-API-Key"))
    if presented is None:
        return _allowed(_signed_in(sessions), role)
    return admitted(keyring, presented, role)


def admitted(keyring: Keyring, presented: str, role: Role) -> Key:
    """The key that somebody presents, if it may do what needs this role; raises `Problem`."""
    key = keyring.find(presented)
    if key is None:
        message = "this key is unknown or no longer valid; ask whoever runs the service for a new one"
        raise Problem(HTTPStatus.UNAUTHORIZED, "bad_key", message)
    return _allowed(key, role)


def _allowed(key: Key, role: Role) -> Key:
    if key.role < role:
        has, wanted = key.role.name.lower(), role.name.lower()
        message = f"the key {key.name} has the role {has}, and this needs {wanted}; ask for another key"
        raise Problem(HTTPStatus.FORBIDDEN, "forbidden", message)
    return key


def _signed_in(sessions: Sessions | None) -> Key:
    cookie = request.cookies.get(cookie_name(request.host)) if sessions else None
    if sessions is None or cookie is None:
        message = "this service wants a key; send the header Authorization: Bearer KEY"
        raise Problem(HTTPStatus.UNAUTHORIZED, "no_key", message)
    session = sessions.find(cookie)
    if session is None:
        raise Problem(HTTPStatus.UNAUTHORIZED, "session_over", "this session is over; sign in again")
    if request.method not in _HARMLESS:
        from_own_page()
    return session.key


def _announced(most: int) -> int:
    """Bytes of the body, as far as its header tells."""
    if "chunked" in request.headers.get("Transfer-Encoding", "").casefold():
        return most
    return request.content_length or 0


def presented_in(authorization: str, api_key: str | None) -> str | None:
    """The key in the headers `Authorization` and `X-API-Key`."""
    scheme, _, value = authorization.partition(" ")
    if scheme.casefold() == "bearer" and value.strip():
        return value.strip()
    return api_key or None
