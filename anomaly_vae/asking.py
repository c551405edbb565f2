"""What a client asks of the service and how an answer is read, whatever sends the one and brings the other."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Generic, Literal, TypeAlias, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ValidationError

from anomaly_vae.answers import Refusal, Scored, Scores, Summary, Unscored
from anomaly_vae.errors import ConfigError, DataError, ServiceError

Picture: TypeAlias = bytes | str | Path | tuple[str, bytes]
"""The bytes of a picture file, perhaps with a name that the service shows, or the path of one."""
Moment: TypeAlias = datetime | str
"""A time, or ISO 8601; without a zone a `datetime` is in this machine's, a text in UTC."""
Heat = Literal["none", "regions", "png", "overlay"]
Style = Literal["png", "overlay"]
Mode = Literal["average", "guaranteed"]
_PAGE = 1000
_CHUNK = 256 * 1024
_MOST_DEADLINE = 600.0
_SLOW = 600.0
"""Seconds that the service may take to load a bundle, or to take in an archive unless it is set otherwise."""
_T = TypeVar("_T")
_ANSWER = TypeVar("_ANSWER", bound=BaseModel)


@dataclass(frozen=True)
class Answer:
    """An answer as it came; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def request_id(self) -> str | None:
        return self.headers.get("x-request-id")


@dataclass(frozen=True)
class Ask(Generic[_T]):
    """One request. `kind`: what its answer is, a type of `answers` or bytes; `accepted`: the statuses that have it.

    `repeatable`: sending it twice does no harm. `deadline`: seconds that all of it may take. `patience`: seconds that
    the first byte of the answer may take, where that is longer than usual.
    """

    method: str
    path: str
    kind: type[_T]
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    content: bytes | None = None
    files: Sequence[tuple[str, tuple[str, bytes]]] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    deadline: float | None = None
    patience: float | None = None
    repeatable: bool = False
    accepted: tuple[int, ...] = (200,)

    def parts(self, left: float | None) -> dict[str, Any]:
        """As httpx takes them; `left`: seconds until the deadline."""
        headers = dict(self.headers)
        # A longer one the service would refuse; its own bounds then count.
        if left is not None and left <= _MOST_DEADLINE:
            headers["X-Deadline-Ms"] = str(max(1, round(left * 1000)))
        params = {name: _said(value) for name, value in self.query.items() if value is not None}
        found: dict[str, Any] = {"method": self.method, "url": self.path, "params": params, "headers": headers}
        if self.content is not None:
            found["content"] = self.content
        if self.files is not None:
            found["files"] = self.files
        if self.body is not None:
            found["json"] = {name: value for name, value in self.body.items() if value is not None}
        return found

    def read(self, answer: Answer) -> _T:
        """What the answer says; raises `ServiceError` for a refusal, and for what is no answer of the service."""
        if answer.status not in self.accepted:
            raise refusal(answer)
        if self.kind is bytes:
            return answer.content  # type: ignore[return-value]
        assert issubclass(self.kind, BaseModel)
        return parsed(self.kind, answer.content, answer)


def get(
    path: str, kind: type[_T], query: Mapping[str, Any] | None = None, accepted: tuple[int, ...] = (200,)
) -> Ask[_T]:
    """A request that changes nothing."""
    return Ask("GET", path, kind, query or {}, repeatable=True, accepted=accepted)


def post(path: str, kind: type[_T], **body: Any) -> Ask[_T]:
    """A request that changes something, or may."""
    return Ask("POST", path, kind, body=body)


def load(path: str, kind: type[_T], **body: Any) -> Ask[_T]:
    """A request that may have to load a bundle."""
    return Ask("POST", path, kind, body=body, patience=_SLOW)


def put(path: str, kind: type[_T], **body: Any) -> Ask[_T]:
    """A request that replaces something."""
    return Ask("PUT", path, kind, body=body)


def model_path(model: str, rest: str = "") -> str:
    """The address of a model, and of what can be done with it."""
    return f"/v1/models/{quote(model, safe='')}{rest}"


def verdict_path(verdict: str, rest: str = "") -> str:
    """The address of a verdict, and of what belongs to it."""
    return f"/v1/verdicts/{quote(verdict, safe='')}{rest}"


def page_of(left: int | None) -> int:
    """How many to ask for at once where so many are still wanted; None: all."""
    return _PAGE if left is None else min(_PAGE, left)


def to_score(pictures: Sequence[Picture], wanted: Mapping[str, Any], deadline: float | None) -> Ask[Scores]:
    """Pictures to score; raises `DataError` for a file that cannot be read."""
    if not pictures:
        raise ConfigError("there is no picture to score; give at least one")
    sent: dict[str, Any] = {"query": wanted, "deadline": _ahead(deadline), "repeatable": True}
    if len(pictures) == 1 and isinstance(pictures[0], bytes):
        headers = {"Content-Type": "application/octet-stream"}
        return Ask("POST", "/v1/score", Scores, content=pictures[0], headers=headers, **sent)
    return Ask("POST", "/v1/score", Scores, files=[("file", _file(picture)) for picture in pictures], **sent)


def only_one(scores: Scores) -> Scored:
    """The verdict where one picture was sent; one that has none was refused as a whole."""
    (result,) = scores.results
    assert isinstance(result, Scored)
    return result


class Archive:
    """An archive to score, read from its file as often as it is sent; raises `DataError` where there is none."""

    def __init__(self, path: Path, wanted: Mapping[str, Any], deadline: float | None) -> None:
        self._path = path
        with self._opened() as file:
            size = file.seek(0, 2)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        # Its first line comes when all of it has been taken in.
        self.ask = Ask(
            "POST", "/v1/score", bytes, wanted, headers=headers, deadline=_ahead(deadline), patience=deadline or _SLOW,
            repeatable=True,
        )  # fmt: skip

    def chunks(self) -> Iterator[bytes]:
        """Its bytes from the beginning."""
        with self._opened() as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    def _opened(self) -> IO[bytes]:
        try:
            return self._path.open("rb")
        except OSError as error:
            message = f"cannot read the archive {self._path} ({error.strerror}); give the path of a zip, tar or tar.gz"
            raise DataError(message) from None


def refusal(answer: Answer) -> ServiceError:
    """The error that an answer is."""
    try:
        found = Refusal.model_validate_json(answer.content)
    except ValidationError:
        message = (
            f"the answer has the status {answer.status} and is no refusal of the service; is something in between?"
        )
        return ServiceError("bad_answer", message, answer.status, answer.request_id)
    error = found.error
    later = None if error.retry_after_ms is None else error.retry_after_ms / 1000
    given = error.request_id or answer.request_id
    return ServiceError(error.code, error.message, answer.status, given, retry_after=later, results=found.results or ())


def parsed(kind: type[_ANSWER], content: bytes | str, answer: Answer) -> _ANSWER:
    """JSON as a type of `answers`; fields that a later service added are passed over."""
    try:
        return kind.model_validate_json(content)
    except ValidationError:
        message = "the answer is not what was asked for; check the address, and use score_archive for archives alone"
        raise ServiceError("bad_answer", message, answer.status, answer.request_id) from None


def line_of(text: str, answer: Answer) -> Scored | Unscored | None:
    """A line of the answer to an archive, None for the summary; raises `ServiceError` where it was not finished."""
    try:
        found = json.loads(text)
        if "summary" in found:
            parsed(Summary, text, answer)
            return None
        if "error" in found and "filename" not in found:
            raise refusal(Answer(answer.status, answer.headers, text.encode()))
    except (ValueError, TypeError):
        raise cut_off(answer) from None
    return parsed(Unscored, text, answer) if "error" in found else parsed(Scored, text, answer)


def cut_off(answer: Answer) -> ServiceError:
    """The answer to an archive ended too early."""
    message = "the answer ended before the archive's summary; what has no line yet may not have been scored"
    return ServiceError("cut_off", message, answer.status, answer.request_id)


def _ahead(deadline: float | None) -> float | None:
    if deadline is not None and not 0 < deadline < math.inf:
        raise ConfigError(f"a deadline of {deadline:g} s cannot be kept; give the seconds that it may take, or None")
    return deadline


def _file(picture: Picture) -> tuple[str, bytes]:
    if isinstance(picture, bytes):
        return "picture", picture
    if isinstance(picture, tuple):
        return picture
    path = Path(picture)
    try:
        return path.name, path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the picture {path} ({error.strerror}); give the path of a file") from None


def _said(value: Any) -> str:
    """A value as a query says it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, datetime):
        return str(value)
    # Without a zone it is this machine's time, to which the service would know no way.
    return value.astimezone().isoformat()
