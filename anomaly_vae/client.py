"""`Client`: a running service from Python, typed, without torch. `async_client` has the same for asyncio.

`Client("http://127.0.0.1:8765").score_one("new.jpg").outlier`; what cannot be done raises `ServiceError`.
"""

import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, Self, TypeVar
from urllib.parse import quote

import httpx

from anomaly_vae.answers import (
    Audit,
    Change,
    Forgotten,
    Label,
    Model,
    ModelList,
    PolicyBook,
    Preview,
    Rates,
    Ready,
    Recalibrated,
    Retired,
    ReviewPage,
    Scored,
    Scores,
    ToReview,
    Unscored,
    Verdict,
    VerdictPage,
)
from anomaly_vae.asking import (
    Answer,
    Archive,
    Ask,
    Heat,
    Mode,
    Moment,
    Picture,
    Style,
    cut_off,
    get,
    line_of,
    load,
    model_path,
    only_one,
    page_of,
    post,
    put,
    refusal,
    to_score,
    verdict_path,
)
from anomaly_vae.errors import ConfigError
from anomaly_vae.retrying import Retries, Turns
from anomaly_vae.scan_calls import ScanCalls
from anomaly_vae.watch_answers import Alarm, AlarmList

_T = TypeVar("_T")
_Http = TypeVar("_Http", httpx.Client, httpx.AsyncClient)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NOT_REACHED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class Connected(Generic[_Http]):
    """What both clients are made of: where the service is, and how it is asked.

    `key`: where the service asks for one. `timeout`: seconds without a byte after which a connection is given up.
    A refusal for now (429, 503) and a lost connection are tried again within the bounds of `retries` and of a call's
    own deadline, as long as nothing can be done twice by it. `verify`: certificates, as in httpx.
    """

    _kind: type[_Http]

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: Retries = Retries(),  # noqa: B008 - a frozen value
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no address of a service; give one like http://127.0.0.1:8765")
        self._timeout, self._retries = timeout, retries
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # Proxies of the environment are not for this machine's own services.
        far = httpx.URL(url).host not in _LOOPBACK
        self._http: _Http = self._kind(base_url=url, headers=headers, timeout=timeout, verify=verify, trust_env=far)

    def _turns(self, ask: Ask[Any]) -> Turns:
        return Turns(ask, self._retries)

    def _parts(self, turns: Turns) -> dict[str, Any]:
        ask, left = turns.ask, turns.left()
        timeout = httpx.Timeout(self._timeout)
        if ask.patience is not None:
            timeout = httpx.Timeout(self._timeout, read=max(self._timeout, ask.patience))
        elif left is not None:
            # The service answers at the deadline; the rest is for the answer's way.
            timeout = httpx.Timeout(max(left, 0) + 1)
        return {**ask.parts(left), "timeout": timeout}

    def _failed(self, turns: Turns, error: httpx.TransportError) -> float:
        reason = str(error) or type(error).__name__
        return turns.after_failure(reason, reached=not isinstance(error, _NOT_REACHED))


def answer_of(response: httpx.Response, content: bytes = b"") -> Answer:
    """An answer apart from what brought it."""
    return Answer(response.status_code, {name.lower(): value for name, value in response.headers.items()}, content)


class Client(ScanCalls, Connected[httpx.Client]):
    """A service, asked and waited for. To be closed, or used as a context manager; several threads may use it."""

    _kind = httpx.Client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def score(
        self,
        *pictures: Picture,
        model: str | None = None,
        alpha: float | None = None,
        heatmap: Heat = "none",
        parts: bool = True,
        explain: bool = False,
        reconstruction: bool = False,
        deadline: float | None = None,
    ) -> Scores:
        """Score pictures (bytes, paths, or names with bytes) in one request; a bad one has an `error` in its place.

        Raises `ServiceError` where none could be scored. `deadline`: seconds, retries and all. A picture whose answer
        was lost is sent again, and then counts twice in what the service keeps.
        """
        wanted = {"model": model, "alpha": alpha, "heatmap": heatmap, "parts": parts, "explain": explain,
                  "reconstruction": reconstruction}  # fmt: skip
        return self._do(to_score(pictures, wanted, deadline))

    def score_one(
        self,
        picture: Picture,
        *,
        model: str | None = None,
        alpha: float | None = None,
        heatmap: Heat = "none",
        parts: bool = True,
        explain: bool = False,
        reconstruction: bool = False,
        deadline: float | None = None,
    ) -> Scored:
        """Score a picture; as `score`, and a picture that cannot be scored raises `ServiceError`."""
        wanted = {"model": model, "alpha": alpha, "heatmap": heatmap, "parts": parts, "explain": explain,
                  "reconstruction": reconstruction}  # fmt: skip
        return only_one(self._do(to_score([picture], wanted, deadline)))

    def score_archive(
        self,
        archive: str | Path,
        *,
        model: str | None = None,
        alpha: float | None = None,
        heatmap: Heat = "none",
        parts: bool = True,
        explain: bool = False,
        reconstruction: bool = False,
        deadline: float | None = None,
    ) -> Iterator[Scored | Unscored]:
        """Score the pictures of a zip, tar or tar.gz, each outcome as it comes, in the archive's order.

        Raises `ServiceError` where the archive was not finished, which is after what was scored. Nothing is sent again
        once there was an outcome. Close the iterator (`contextlib.closing`) to end the work early.
        """
        wanted = {"model": model, "alpha": alpha, "heatmap": heatmap, "parts": parts, "explain": explain,
                  "reconstruction": reconstruction}  # fmt: skip
        sent = Archive(Path(archive), wanted, deadline)
        turns = self._turns(sent.ask)
        began: Answer | None = None
        while True:
            try:
                with self._http.stream(**self._parts(turns), content=sent.chunks()) as response:
                    if response.status_code == 200:
                        began = answer_of(response)
                        yield from _rows(response, began)
                        return
                    answer = answer_of(response, response.read())
            except httpx.TransportError as error:
                if began is not None:
                    raise cut_off(began) from error
                wait = self._failed(turns, error)
            else:
                again = turns.after_answer(answer)
                if again is None:
                    raise refusal(answer)
                wait = again
            time.sleep(wait)

    def models(self) -> ModelList:
        """All models, and the bundles that may be loaded."""
        return self._do(get("/v1/models", ModelList))

    def model(self, model: str) -> Model:
        """One model as it stands."""
        return self._do(get(model_path(model), Model))

    def load(self, model: str, bundle: str, *, activate: bool = False) -> Model:
        """Load a bundle of the service's folder under a name, beside what answers now or (`activate`) in its place."""
        return self._do(load(model_path(model, ":load"), Model, bundle=bundle, activate=activate))

    def activate(self, model: str, version: str) -> Model:
        """Answer by a loaded version."""
        return self._do(post(model_path(model, ":activate"), Model, version=version))

    def rollback(self, model: str) -> Model:
        """Answer by the bundle before again."""
        return self._do(load(model_path(model, ":rollback"), Model))

    def retire(self, model: str, version: str | None = None) -> Retired:
        """Forget a version that is not active, or (without one) a whole model, and free its memory."""
        return self._do(post(model_path(model, ":retire"), Retired, version=version))

    def policy(self, model: str) -> PolicyBook:
        """The policy in force, and what was decided before."""
        return self._do(get(model_path(model, "/policy"), PolicyBook))

    def set_policy(
        self, model: str, *, alpha: float | None = None, mode: Mode | None = None, threshold: float | None = None
    ) -> PolicyBook:
        """Judge by a rate of false alarms or by a threshold of the score; by neither: as the bundle itself does."""
        return self._do(put(model_path(model, "/policy"), PolicyBook, alpha=alpha, mode=mode, threshold=threshold))

    def preview(
        self,
        model: str,
        *,
        alpha: float | None = None,
        mode: Mode | None = None,
        threshold: float | None = None,
        last: int = 1000,
    ) -> Preview:
        """How many of the last verdicts a policy would flag; nothing is changed."""
        wanted = {"alpha": alpha, "mode": mode, "threshold": threshold, "last": last}
        return self._do(post(model_path(model, "/policy:preview"), Preview, **wanted))

    def rollback_policy(self, model: str) -> PolicyBook:
        """Judge by the policy before again."""
        return self._do(post(model_path(model, "/policy:rollback"), PolicyBook))

    def recalibrate(
        self, model: str, *, minimum: int = 100, preview: bool = False, undo: bool = False, independent: bool = False
    ) -> Recalibrated:
        """Rank among the normals found in review, at least `minimum` of them; `preview`: only tell what would be.

        `independent`: that no two of them belong together, so that a band may be claimed.
        """
        wanted = {"minimum": minimum, "preview": preview, "undo": undo, "independent": independent}
        return self._do(post(model_path(model, ":recalibrate"), Recalibrated, **wanted))

    def verdicts(
        self,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        model: str | None = None,
        source: str | None = None,
        outlier: bool | None = None,
        p_value_at_most: float | None = None,
        limit: int | None = None,
    ) -> Iterator[Verdict]:
        """Verdicts, the newest first: all, or `limit` of them; fetched a page at a time while you go on."""
        wanted = {"since": since, "until": until, "model": model, "source": source, "outlier": outlier,
                  "p_value_at_most": p_value_at_most}  # fmt: skip
        cursor, left = None, limit
        while left is None or left > 0:
            page = self._do(get("/v1/verdicts", VerdictPage, {**wanted, "cursor": cursor, "limit": page_of(left)}))
            yield from page.verdicts
            cursor, left = page.next, None if left is None else left - len(page.verdicts)
            if cursor is None:
                return

    def verdict(self, verdict: str) -> Verdict:
        """One verdict as it was kept, a moment after its picture was scored."""
        return self._do(get(verdict_path(verdict), Verdict))

    def image(self, verdict: str) -> bytes:
        """What the model saw of its picture, as PNG, where it was kept."""
        return self._do(get(verdict_path(verdict, "/image"), bytes))

    def heatmap(self, verdict: str, *, style: Style = "png") -> bytes:
        """The heat map of its picture, as PNG, where the picture was kept; `overlay`: the picture itself under it."""
        return self._do(get(verdict_path(verdict, "/heatmap"), bytes, {"style": style}))

    def forget(self, verdict: str, *, picture_only: bool = False) -> int:
        """Forget a verdict with its picture and feedback, or the picture alone; how many there are no longer."""
        path = verdict_path(verdict, "/image" if picture_only else "")
        return self._do(Ask("DELETE", path, Forgotten)).forgotten

    def forget_many(
        self,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        model: str | None = None,
        source: str | None = None,
        outlier: bool | None = None,
        pictures_only: bool = False,
    ) -> int:
        """Forget all verdicts that pass the filters, of which there must be one; how many there are no longer."""
        wanted = {"since": since, "until": until, "model": model, "source": source, "outlier": outlier,
                  "pictures_only": pictures_only}  # fmt: skip
        return self._do(Ask("DELETE", "/v1/verdicts", Forgotten, wanted)).forgotten

    def rates(
        self,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        minutes: int = 60,
        model: str | None = None,
        source: str | None = None,
    ) -> Rates:
        """Rates of outliers over time, of the last day unless told; in buckets of so many minutes."""
        wanted = {"since": since, "until": until, "minutes": minutes, "model": model, "source": source}
        return self._do(get("/v1/rates", Rates, wanted))

    def feedback(self, verdict: str, label: Label, note: str = "") -> Verdict:
        """Say what a picture was; saying it again replaces what was said."""
        return self._do(post("/v1/feedback", Verdict, verdict=verdict, label=label, note=note))

    def review(self, model: str | None = None, limit: int = 20) -> list[ToReview]:
        """Pictures to look at, drawn by chance."""
        return self._do(get("/v1/review", ReviewPage, {"model": model, "limit": limit})).verdicts

    def alarms(self) -> list[Alarm]:
        """Whether each source's stream still looks as calibration did: both alarms of each."""
        return self._do(get("/v1/alarms", AlarmList)).alarms

    def acknowledge(self, alarm: str) -> Alarm:
        """Begin a raised alarm anew."""
        return self._do(post(f"/v1/alarms/{quote(alarm, safe='')}:acknowledge", Alarm))

    def audit(self, limit: int | None = None) -> Iterator[Change]:
        """Who changed what, the newest first: all, or `limit` of them."""
        cursor, left = None, limit
        while left is None or left > 0:
            page = self._do(get("/v1/audit", Audit, {"cursor": cursor, "limit": page_of(left)}))
            yield from page.changes
            cursor, left = page.next, None if left is None else left - len(page.changes)
            if cursor is None:
                return

    def ready(self) -> Ready:
        """Whether pictures are taken, and how the store stands."""
        return self._do(get("/ready", Ready, accepted=(200, 503)))

    def _do(self, ask: Ask[_T]) -> _T:
        turns = self._turns(ask)
        while True:
            try:
                response = self._http.request(**self._parts(turns))
            except httpx.TransportError as error:
                wait = self._failed(turns, error)
            else:
                answer = answer_of(response, response.content)
                again = turns.after_answer(answer)
                if again is None:
                    return ask.read(answer)
                wait = again
            time.sleep(wait)


def _rows(response: httpx.Response, answer: Answer) -> Iterator[Scored | Unscored]:
    for line in response.iter_lines():
        row = line_of(line, answer)
        if row is None:
            return
        yield row
    raise cut_off(answer)
