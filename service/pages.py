"""The product's own page at `/`, its scripts and styles, and signing in.

The page itself holds nothing but its frame and asks nobody for a key: all that it shows comes from the same routes as
everything else, with the role of whoever is signed in.
"""

import gzip
import hashlib
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from http import HTTPStatus
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import get_args

from flask import Response, render_template, request

from anomaly_vae import __version__
from anomaly_vae.answers import Session as SessionShown
from service.access import from_own_page
from service.asked import ScoreWanted, SignInWanted
from service.bodies import answer, body_of, moment
from service.errors import Problem
from service.keys import Key, Role
from service.routes import Route
from service.sessions import Session, Sessions, cookie_name

_FOLDER = Path(__file__).parent / "static"
_PLOTLY = "plotly.min.js"
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_YEAR = 31_536_000
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_GUARDED_STYLE = re.compile(r'getElementById\("([0-9a-f]{64})"\)\)\{var \w+=document\.createElement\("style"\)')
"""Styles that plotly brings along for maps and puts into the page unless an element has their id already."""


class WebPages:
    """The page, its files and the session. `sessions`: None where nobody is asked for a key. `usage` answers those who
    want no HTML; `rules`: addresses that are served, so that the page shows no more than there is."""

    def __init__(self, sessions: Sessions | None, usage: Callable[[], Response], rules: Iterable[str]) -> None:
        self._sessions, self._usage, self._files = sessions, usage, StaticFiles()
        rules = set(rules)
        self._features = {
            "verdicts": "/v1/verdicts" in rules,
            "alarms": "/v1/alarms" in rules,
            "scans": "/v1/scans" in rules,
            "reconstruction": "reconstruction" in ScoreWanted.model_fields,
            "overlay": "overlay" in get_args(ScoreWanted.model_fields["heatmap"].annotation),
        }

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route("GET", "/", None, self.home, "The page, or in plain text what there is", ("text/html", "text/plain")),
            Route("GET", "/static/<digest>/<file>", None, self.static, "What the page is made of",
                  tuple(_TYPES.values()), codes=("not_found",)),
            Route("GET", "/v1/session", None, self.session, "Who is signed in on the page", SessionShown),
            Route("POST", "/v1/session", None, self.sign_in, "Sign in on the page", SessionShown, body=SignInWanted,
                  codes=("bad_key", "cross_site", "store_down")),
            Route("DELETE", "/v1/session", None, self.sign_out, "Sign out", SessionShown,
                  codes=("cross_site", "store_down")),
        ]  # fmt: skip

    def home(self) -> Response:
        wanted = request.accept_mimetypes
        if wanted.quality("text/html") <= wanted.quality("text/plain"):
            response = self._usage()
        else:
            page = render_template(
                "page.html",
                version=__version__,
                static=f"static/{self._files.digest}",
                plotly_styles=self._files.plotly_styles,
                features=self._features,
            )
            response = Response(page, mimetype="text/html")
            response.headers["Content-Security-Policy"] = _POLICY
        response.headers["Vary"] = "Accept"
        return response

    def static(self, digest: str, file: str) -> Response:
        data = self._files.packed(file) if digest == self._files.digest else None
        if data is None:
            raise Problem(HTTPStatus.NOT_FOUND, "not_found", "there is no such file; load the page anew")
        packed = request.accept_encodings.quality("gzip") > 0
        response = Response(data if packed else gzip.decompress(data), mimetype=_TYPES[Path(file).suffix])
        if packed:
            response.headers["Content-Encoding"] = "gzip"
        response.headers["Vary"] = "Accept-Encoding"
        response.headers["Cache-Control"] = f"public, max-age={_YEAR}, immutable"
        return response

    def session(self) -> Response:
        cookie = request.cookies.get(cookie_name(request.host))
        return self._shown(self._sessions.find(cookie) if self._sessions and cookie else None)

    def sign_in(self) -> Response:
        from_own_page()
        asked = body_of(SignInWanted)
        if self._sessions is None:
            return self._shown(None)
        begun = self._sessions.begin(asked.key.strip())
        if begun is None:
            message = "this key is unknown or no longer valid; ask whoever runs the service for a new one"
            raise Problem(HTTPStatus.UNAUTHORIZED, "bad_key", message)
        cookie, session = begun
        response = self._shown(session)
        response.set_cookie(
            cookie_name(request.host), cookie, expires=session.ends, httponly=True, samesite="Strict", secure=_by_tls()
        )
        return response

    def sign_out(self) -> Response:
        from_own_page()
        name = cookie_name(request.host)
        cookie = request.cookies.get(name)
        if self._sessions is not None and cookie is not None:
            self._sessions.end(cookie)
        response = self._shown(None)
        response.delete_cookie(name, httponly=True, samesite="Strict", secure=_by_tls())
        return response

    def _shown(self, session: Session | None) -> Response:
        key: Key | None = session.key if session else None
        role = Role.ADMIN if self._sessions is None else key.role if key else None
        return answer(
            {
                "needed": self._sessions is not None,
                "key": key.name if key else None,
                "role": role.name.lower() if role else None,
                "ends": moment(session.ends) if session else None,
            }
        )


class StaticFiles:
    """Scripts and styles under one digest, so that a browser may keep them for good, and modules find each other."""

    def __init__(self) -> None:
        self._contents = {path.name: path.read_bytes() for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}
        told = hashlib.sha256(version("plotly").encode())
        for name, content in self._contents.items():
            told.update(f"\n{name} {len(content)}\n".encode() + content)
        self.digest = told.hexdigest()[:16]
        self._packed: dict[str, bytes] = {}

    @cached_property
    def plotly_styles(self) -> list[str]:
        """Ids of what keeps plotly from adding inline styles, which the page's policy forbids."""
        return _GUARDED_STYLE.findall(_plotly().decode("utf-8"))

    def packed(self, name: str) -> bytes | None:
        """A file, packed by gzip; None where there is none of this name."""
        if name not in self._contents and name != _PLOTLY:
            return None
        if name not in self._packed:
            content = _plotly() if name == _PLOTLY else self._contents[name]
            self._packed[name] = gzip.compress(content, 6, mtime=0)
        return self._packed[name]


def _plotly() -> bytes:
    return (files("plotly") / "package_data" / _PLOTLY).read_bytes()


def _by_tls() -> bool:
    """Whether the browser speaks HTTPS, with this service or with a proxy before it, as it says itself."""
    return request.is_secure or request.headers.get("Origin", "").startswith("https://")
