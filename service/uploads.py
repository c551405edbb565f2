"""From a request's body to the files in it: read within bounds, raw or multipart, in the order they were sent."""

from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

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


def read_body(environ: dict[str, Any], limit: int) -> bytes:
    """Read a whole request body of at most `limit` bytes; what the client declares is never trusted."""
    declared = _declared_length(environ)
    if declared is not None and declared > limit:
        # curl and others ask first for large bodies: saying no before a byte is sent is the polite answer.
        if environ.get("HTTP_EXPECT", "").lower() != "100-continue":
            _discard(environ, min(declared, limit + DISCARDED))
        raise _too_large(limit)
    if declared is None and "chunked" not in environ.get("HTTP_TRANSFER_ENCODING", "").lower():
        return b""
    chunks: list[bytes] = []
    size = 0
    for chunk in _chunks(environ, limit + 1 if declared is None else declared):
        chunks.append(chunk)
        size += len(chunk)
    if size > limit:
        _discard(environ, DISCARDED)
        raise _too_large(limit)
    if declared is not None and size < declared:
        raise Problem(HTTPStatus.BAD_REQUEST, "incomplete_body", f"{declared} bytes were announced, {size} came")
    return b"".join(chunks)


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
    if not kind or kind.startswith("image/") or kind in _RAW_KINDS:
        return [Upload(None, body)]
    raise Problem(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "unsupported_media_type",
        f"content type {kind[:80]} is not served; send image/*, application/octet-stream or multipart/form-data",
    )


_RAW_KINDS = frozenset({"application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded"})


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


def _declared_length(environ: dict[str, Any]) -> int | None:
    text = environ.get("CONTENT_LENGTH") or ""
    if not text:
        return None
    if not text.isascii() or not text.isdigit():
        raise Problem(HTTPStatus.BAD_REQUEST, "bad_content_length", "Content-Length is no number of bytes")
    return int(text)


def _chunks(environ: dict[str, Any], limit: int) -> Iterator[bytes]:
    stream = environ["wsgi.input"]
    try:
        while limit > 0 and (chunk := stream.read(min(CHUNK, limit))):
            limit -= len(chunk)
            yield chunk
    except OSError:
        raise Problem(HTTPStatus.BAD_REQUEST, "incomplete_body", "the connection broke inside the body") from None


def discard_body(environ: dict[str, Any]) -> None:
    """Read what is left of the body of a request that is refused, so that the client gets to see the answer."""
    waits = environ.get("HTTP_EXPECT", "").lower() == "100-continue"
    sends = environ.get("CONTENT_LENGTH") or "chunked" in environ.get("HTTP_TRANSFER_ENCODING", "").lower()
    if sends and not waits:
        _discard(environ, DISCARDED)


def _discard(environ: dict[str, Any], limit: int) -> None:
    for _ in _chunks(environ, limit):
        pass


def _too_large(limit: int) -> Problem:
    return Problem(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "too_large",
        f"the request is larger than {limit} bytes; send fewer or smaller images, or raise max_request_bytes",
    )
