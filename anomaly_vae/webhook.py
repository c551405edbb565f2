"""Posts what waits in a queue on disk to one URL, signed, at least once each, until it is taken or refused for good."""

import hashlib
import hmac
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

import httpx

from anomaly_vae.errors import ConfigError
from anomaly_vae.watch_state import Waiting

SECRET_VARIABLE = "ANOMALY_VAE_WEBHOOK_SECRET"  # noqa: S105 - its name, no secret
_FIRST_SECONDS, _LONGEST_SECONDS, _LONGEST_TOLD = 0.5, 60.0, 3600.0
_LAST_SECONDS = 5.0
_TIMEOUT = 10.0
_AGAIN = (408, 429)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Queue(Protocol):
    """Where they wait; `due` in seconds since 1970."""

    def next_webhook(self) -> Waiting | None: ...
    def webhook_done(self, seq: int) -> None: ...
    def webhook_later(self, seq: int, due: float) -> None: ...


def signature(secret: str, body: bytes) -> str:
    """`X-Signature` of a body: HMAC-SHA256 with the secret, in hexadecimal digits."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def checked_url(url: str) -> httpx.URL:
    """A URL that can be posted to; raises `ConfigError`."""
    try:
        found = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        found = httpx.URL("")
    if found.scheme not in ("http", "https") or not found.host:
        raise ConfigError(f"--webhook {url!r} is no address; give one such as https://host/path")
    return found


def checked_secret(environment: Mapping[str, str]) -> str:
    """The secret to sign with; raises `ConfigError`."""
    secret = environment.get(SECRET_VARIABLE, "")
    if not secret:
        raise ConfigError("--webhook signs what it posts: put a secret that the receiver knows, such as what "
                          f"`openssl rand -hex 32` makes, into the environment variable {SECRET_VARIABLE}")  # fmt: skip
    return secret


def told_wait(headers: httpx.Headers, now: float) -> float | None:
    """Seconds that `Retry-After` asks for, as a number or a date; None where it says nothing that can be read."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text) if text.isascii() and text.isdigit() else parsedate_to_datetime(text).timestamp() - now
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), _LONGEST_TOLD)


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(_FIRST_SECONDS * 2.0 ** min(failures - 1, 20), _LONGEST_SECONDS)


class Webhook:
    """A thread that posts. Use it in a `with`; at the end it posts on for some seconds if the receiver takes it.

    Each body gets a `timestamp` (seconds since 1970) when it is sent, and is signed with it; `X-Id` is the verdict's id
    at every try. Called in the thread: `failed` once, if the queue itself fails; `less` when the queue got shorter.
    `counts`: what became of posts, `sent`, `retried`, `given_up`.
    """

    def __init__(
        self,
        url: httpx.URL,
        secret: str,
        queue: Queue,
        note: Callable[[str], None],
        failed: Callable[[Exception], None],
        less: Callable[[], None],
        counts: Counter[str],
    ) -> None:
        self._url, self._secret, self._queue, self._counts = url, secret, queue, counts
        self._note, self._failed, self._less = note, failed, less
        self._failures = 0
        self._not_before = 0.0
        self._woken, self._more = threading.Condition(), False
        self._until: float | None = None
        # Proxies of the environment are not for this machine's own services.
        self._client = httpx.Client(timeout=_TIMEOUT, trust_env=self._url.host not in _LOOPBACK)
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)

    def __enter__(self) -> "Webhook":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._woken:
            self._until = time.time() + _LAST_SECONDS
            self._woken.notify()
        self._thread.join()
        self._client.close()

    def wake(self) -> None:
        """There may be more to post."""
        with self._woken:
            self._more = True
            self._woken.notify()

    def _run(self) -> None:
        try:
            while (waiting := self._next()) is not None:
                self._post(waiting)
        except Exception as error:
            self._failed(error)

    def _next(self) -> Waiting | None:
        """What is to be posted now, waited for; None at the end."""
        while True:
            with self._woken:
                until, self._more = self._until, False
            waiting, now = self._queue.next_webhook(), time.time()
            due = None if waiting is None else max(waiting.due, self._not_before)
            if due is not None and due <= now and (until is None or (now < until and not self._failures)):
                return waiting
            if until is not None:
                return None
            with self._woken:
                if not self._more and self._until is None:
                    self._woken.wait(None if due is None else due - now)

    def _post(self, waiting: Waiting) -> None:
        body = json.dumps(waiting.body | {"timestamp": time.time()}).encode()
        headers = {"content-type": "application/json", "x-id": str(waiting.body["id"]),
                   "x-signature": signature(self._secret, body)}  # fmt: skip
        try:
            answer = self._client.post(self._url, content=body, headers=headers)
        except httpx.HTTPError as error:
            self._later(waiting, f"{type(error).__name__}: {error}", None)
            return
        if answer.is_success:
            self._done(waiting, "sent")
            if self._failures:
                self._note(f"the webhook at {self._url.host} takes verdicts again")
            self._failures, self._not_before = 0, 0.0
        elif answer.status_code >= 500 or answer.status_code in _AGAIN:
            self._later(waiting, f"it answers {answer.status_code}", told_wait(answer.headers, time.time()))
        else:
            self._done(waiting, "given_up")
            path, words = waiting.body.get("path"), " ".join(answer.text.split())[:200]
            self._note(f"the webhook refused {path} for good: {self._url.host} answers {answer.status_code} {words}")

    def _done(self, waiting: Waiting, outcome: str) -> None:
        self._queue.webhook_done(waiting.seq)
        self._counts[outcome] += 1
        self._less()

    def _later(self, waiting: Waiting, reason: str, told: float | None) -> None:
        self._counts["retried"] += 1
        self._failures += 1
        if self._failures == 1:
            self._note(f"the webhook at {self._url.host} fails ({reason}); verdicts wait and are posted again")
        now = time.time()
        # The receiver rests, and this one for longer, so that one that always fails does not hold up the others.
        self._not_before = now + (backoff(self._failures) if told is None else told)
        self._queue.webhook_later(waiting.seq, now + max(backoff(waiting.tries + 1), told or 0.0))


def wants(row: dict[str, Any], which: str) -> bool:
    """Whether a verdict is posted; `which`: outliers or all."""
    return which == "all" or row["outlier"] is True
