"""From a request's body to the files in it: read within bounds, raw or multipart, in the order they were sent."""

import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import IO, Any

from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

from service.errors import Problem

CHUNK = 256 * 1024
# A body beyond the limit is still read, up to this much more: refused unread, clients see a broken pipe, not the 413.
DISCARDED = 64 * 1024 * 1024
MAX_FIELDS = 64


@dataclass(frozen=True, slots=True)
class Upload:
    """One file as sent. `name` is what the client called it; it is shown back and never used as a path."""

    name: str | None
    data: bytes


def read_body(environ: dict[str, Any], limit: int, message: str | None = None) -> bytes:
    """Read a whole request body of at most `limit` bytes; what the client declares is never trusted.

    `message`: what one that sends more is told.
    """
    message = message or (
        f"the request is larger than {limit} bytes; send fewer or smaller images, or raise max_request_bytes"
    )
    return b"".join(_bounded(environ, limit, message))


@contextmanager
def spooled_body(environ: dict[str, Any], limit: int, received: Callable[[int], None]) -> Iterator[IO[bytes]]:
    """A whole archive of at most `limit` bytes in a file that has no name, so that nothing can leave it behind.

    `received` is told how many bytes have come; what it raises ends the reading.
    """
    message = f"the archive is larger than {limit} bytes; split it, or raise max_archive_bytes"
    with tempfile.TemporaryFile() as file:
        for chunk in _bounded(environ, limit, message):
            _write(file, chunk)
            received(file.tell())
        file.seek(0)
        yield file


def peek(environ: dict[str, Any], size: int, limit: int) -> bytes:
    """The first `size` bytes of a body, which is then read as if nobody had looked; refuses one announced to be larger
    than `limit`, which is too much whatever it is."""
    message = (
        f"the request is larger than {limit} bytes, too much even for an archive; split it, or raise max_archive_bytes"
    )
    if _announced(environ, limit, message) is None and not _is_chunked(environ):
        return b""
    head = b"".join(_chunks(environ, size))
    environ["wsgi.input"] = _Rejoined(head, environ["wsgi.input"])
    return head


class _Rejoined:
    """A body whose head has been read already."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self._head, self._rest = io.BytesIO(head), rest

    def read(self, size: int) -> bytes:
        found: bytes = self._head.read(size) or self._rest.read(size)
        return found


def _write(file: IO[bytes], chunk: bytes) -> None:
    try:
        file.write(chunk)
        file.flush()
    except OSError as error:
        message = f"the service has no room for the archive now ({error.strerror}); try again later, or split it"
        raise Problem(HTTPStatus.INSUFFICIENT_STORAGE, "no_room", message, retry_after=30.0) from None


def _bounded(environ: dict[str, Any], limit: int, message: str) -> Iterator[bytes]:
    """A body in chunks; raises `Problem`, with `message` if there are more than `limit` bytes."""
    declared = _announced(environ, limit, message)
    if declared is None and not _is_chunked(environ):
        return
    size = 0
    for chunk in _chunks(environ, limit + 1 if declared is None else declared):
        size += len(chunk)
        if size > limit:
            _discard(environ, DISCARDED)
            raise _too_large(message)
        yield chunk
    if declared is not None and size < declared:
        raise Problem(HTTPStatus.BAD_REQUEST, "incomplete_body", f"{declared} bytes were announced, {size} came")


def uploads(body: bytes, content_type: str | None, max_files: int) -> list[Upload]:
    """The files of a body: all file parts of a multipart form, else the body itself as one file."""
    kind, options = parse_options_header(content_type)
    kind = kind.lower()
    if kind == "multipart/form-data":
        found = list(_multipart(body, options.get("boundary", ""), max_files))
        if not found:
            raise Problem(HTTPStatus.BAD_REQUEST, "no_files", "the form holds no file; send one with -F file=@part.png")
        return found
    # curl --data-binary calls any file a urlencoded form; the bytes themselves tell what they are.
    if not kind or kind.startswith("image/") or kind in RAW_KINDS:
        return [Upload(None, body)]
    raise Problem(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "unsupported_media_type",
        f"content type {kind[:80]} is not served; send image/*, application/octet-stream or multipart/form-data",
    )


RAW_KINDS = frozenset({"application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded"})


def _multipart(body: bytes, boundary: str, max_files: int) -> Iterator[Upload]:
    if not boundary:
        raise Problem(HTTPStatus.BAD_REQUEST, "bad_multipart", "the multipart content type names no boundary")
    decoder = MultipartDecoder(boundary.encode("latin-1", "replace"), max_parts=max_files + MAX_FIELDS)
    decoder.receive_data(body)
    decoder.receive_data(None)
    files, part, data = 0, None, bytearray()
    try:
        while not isinstance(event := decoder.next_event(), Epilogue | NeedData):
            if isinstance(event, File | Field):
                part, data = event, bytearray()
            elif isinstance(event, Data):
                data += event.data
                if not event.more_data and isinstance(part, File):
                    files += 1
                    _check_count(files, max_files)
                    yield Upload(_shown_name(part), bytes(data))
    except ValueError:
        raise Problem(
            HTTPStatus.BAD_REQUEST, "bad_multipart", "the multipart body is cut off or malformed; send it again whole"
        ) from None


def _check_count(files: int, max_files: int) -> None:
    if files > max_files:
        raise Problem(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            "too_many_images",
            f"more than {max_files} images in one request; send fewer at a time",
        )


def _shown_name(part: File) -> str:
    return (part.filename or part.name or "")[:255]


def _announced(environ: dict[str, Any], limit: int, message: str) -> int | None:
    """The length the client declares, if it does; raises `Problem` for one beyond `limit`."""
    text = environ.get("CONTENT_LENGTH") or ""
    if not text:
        return None
    if not text.isascii() or not text.isdigit():
        raise Problem(HTTPStatus.BAD_REQUEST, "bad_content_length", "Content-Length is no number of bytes")
    if int(text) > limit:
        # curl and others ask first for large bodies: saying no before a byte is sent is the polite answer.
        if environ.get("HTTP_EXPECT", "").lower() != "100-continue":
            _discard(environ, min(int(text), limit + DISCARDED))
        raise _too_large(message)
    return int(text)


def _is_chunked(environ: dict[str, Any]) -> bool:
    return "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "").lower()


def _chunks(environ: dict[str, Any], limit: int) -> Iterator[bytes]:
    stream = environ["wsgi.input"]
    try:
        while limit > 0 and (chunk := stream.read(min(CHUNK, limit))):
            limit -= len(chunk)
            yield chunk
    except TimeoutError:
        raise slow_body() from None
    except OSError:
        raise broken_body() from None


def slow_body() -> Problem:
    """For a body that does not come as fast as it must."""
    message = "the body came too slowly; send it faster, or raise body_seconds"
    return Problem(HTTPStatus.REQUEST_TIMEOUT, "slow_body", message)


def broken_body() -> Problem:
    """For one that broke off."""
    return Problem(HTTPStatus.BAD_REQUEST, "incomplete_body", "the connection broke inside the body")


def discard_body(environ: dict[str, Any]) -> None:
    """Read what is left of the body of a request that is refused, so that the client gets to see the answer."""
    waits = environ.get("HTTP_EXPECT", "").lower() == "100-continue"
    if not waits and (environ.get("CONTENT_LENGTH") or _is_chunked(environ)):
        _discard(environ, DISCARDED)


def _discard(environ: dict[str, Any], limit: int) -> None:
    for _ in _chunks(environ, limit):
        pass


def _too_large(message: str) -> Problem:
    return Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", message)
