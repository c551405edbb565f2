"""`AsyncClient`: what `Client` does, for asyncio."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self, TypeVar
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
from anomaly_vae.client import Connected, answer_of
from anomaly_vae.scan_calls import AsyncScanCalls
from anomaly_vae.watch_answers import Alarm, AlarmList

_T = TypeVar("_T")


class AsyncClient(AsyncScanCalls, Connected[httpx.AsyncClient]):
    """A service, asked from one event loop by any number of tasks. To be closed, or used as a context manager."""

    _kind = httpx.AsyncClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    async def score(
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
        return await self._do(await asyncio.to_thread(to_score, pictures, wanted, deadline))

    async def score_one(
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
        return only_one(await self._do(await asyncio.to_thread(to_score, [picture], wanted, deadline)))

    async def score_archive(
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
    ) -> AsyncIterator[Scored | Unscored]:
        """Score the pictures of a zip, tar or tar.gz, each outcome as it comes, in the archive's order.

        Raises `ServiceError` where the archive was not finished, which is after what was scored. Nothing is sent again
        once there was an outcome. Close the iterator (`contextlib.aclosing`) to end the work early.
        """
        wanted = {"model": model, "alpha": alpha, "heatmap": heatmap, "parts": parts, "explain": explain,
                  "reconstruction": reconstruction}  # fmt: skip
        sent = Archive(Path(archive), wanted, deadline)
        turns = self._turns(sent.ask)
        began: Answer | None = None
        while True:
            try:
                async with self._http.stream(**self._parts(turns), content=_chunks(sent)) as response:
                    if response.status_code == 200:
                        began = answer_of(response)
                        async for row in _rows(response, began):
                            yield row
                        return
                    answer = answer_of(response, await response.aread())
            except httpx.TransportError as error:
                if began is not None:
                    raise cut_off(began) from error
                wait = self._failed(turns, error)
            else:
                again = turns.after_answer(answer)
                if again is None:
                    raise refusal(answer)
                wait = again
            await asyncio.sleep(wait)

    async def models(self) -> ModelList:
        """All models, and the bundles that may be loaded."""
        return await self._do(get("/v1/models", ModelList))

    async def model(self, model: str) -> Model:
        """One model as it stands."""
        return await self._do(get(model_path(model), Model))

    async def load(self, model: str, bundle: str, *, activate: bool = False) -> Model:
        """Load a bundle of the service's folder under a name, beside what answers now or (`activate`) in its place."""
        return await self._do(load(model_path(model, ":load"), Model, bundle=bundle, activate=activate))

    async def activate(self, model: str, version: str) -> Model:
        """Answer by a loaded version."""
        return await self._do(post(model_path(model, ":activate"), Model, version=version))

    async def rollback(self, model: str) -> Model:
        """Answer by the bundle before again."""
        return await self._do(load(model_path(model, ":rollback"), Model))

    async def retire(self, model: str, version: str | None = None) -> Retired:
        """Forget a version that is not active, or (without one) a whole model, and free its memory."""
        return await self._do(post(model_path(model, ":retire"), Retired, version=version))

    async def policy(self, model: str) -> PolicyBook:
        """The policy in force, and what was decided before."""
        return await self._do(get(model_path(model, "/policy"), PolicyBook))

    async def set_policy(
        self, model: str, *, alpha: float | None = None, mode: Mode | None = None, threshold: float | None = None
    ) -> PolicyBook:
        """Judge by a rate of false alarms or by a threshold of the score; by neither: as the bundle itself does."""
        return await self._do(
            put(model_path(model, "/policy"), PolicyBook, alpha=alpha, mode=mode, threshold=threshold)
        )

    async def preview(
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
        return await self._do(post(model_path(model, "/policy:preview"), Preview, **wanted))

    async def rollback_policy(self, model: str) -> PolicyBook:
        """Judge by the policy before again."""
        return await self._do(post(model_path(model, "/policy:rollback"), PolicyBook))

    async def recalibrate(
        self, model: str, *, minimum: int = 100, preview: bool = False, undo: bool = False, independent: bool = False
    ) -> Recalibrated:
        """Rank among the normals found in review, at least `minimum` of them; `preview`: only tell what would be.

        `independent`: that no two of them belong together, so that a band may be claimed.
        """
        wanted = {"minimum": minimum, "preview": preview, "undo": undo, "independent": independent}
        return await self._do(post(model_path(model, ":recalibrate"), Recalibrated, **wanted))

    async def verdicts(
        self,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        model: str | None = None,
        source: str | None = None,
        outlier: bool | None = None,
        p_value_at_most: float | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[Verdict]:
        """Verdicts, the newest first: all, or `limit` of them; fetched a page at a time while you go on."""
        wanted = {"since": since, "until": until, "model": model, "source": source, "outlier": outlier,
                  "p_value_at_most": p_value_at_most}  # fmt: skip
        cursor, left = None, limit
        while left is None or left > 0:
            page = await self._do(
                get("/v1/verdicts", VerdictPage, {**wanted, "cursor": cursor, "limit": page_of(left)})
            )
            for verdict in page.verdicts:
                yield verdict
            cursor, left = page.next, None if left is None else left - len(page.verdicts)
            if cursor is None:
                return

    async def verdict(self, verdict: str) -> Verdict:
        """One verdict as it was kept, a moment after its picture was scored."""
        return await self._do(get(verdict_path(verdict), Verdict))

    async def image(self, verdict: str) -> bytes:
        """What the model saw of its picture, as PNG, where it was kept."""
        return await self._do(get(verdict_path(verdict, "/image"), bytes))

    async def heatmap(self, verdict: str, *, style: Style = "png") -> bytes:
        """The heat map of its picture, as PNG, where the picture was kept; `overlay`: the picture itself under it."""
        return await self._do(get(verdict_path(verdict, "/heatmap"), bytes, {"style": style}))

    async def forget(self, verdict: str, *, picture_only: bool = False) -> int:
        """Forget a verdict with its picture and feedback, or the picture alone; how many there are no longer."""
        path = verdict_path(verdict, "/image" if picture_only else "")
        return (await self._do(Ask("DELETE", path, Forgotten))).forgotten

    async def forget_many(
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
        return (await self._do(Ask("DELETE", "/v1/verdicts", Forgotten, wanted))).forgotten

    async def rates(
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
        return await self._do(get("/v1/rates", Rates, wanted))

    async def feedback(self, verdict: str, label: Label, note: str = "") -> Verdict:
        """Say what a picture was; saying it again replaces what was said."""
        return await self._do(post("/v1/feedback", Verdict, verdict=verdict, label=label, note=note))

    async def review(self, model: str | None = None, limit: int = 20) -> list[ToReview]:
        """Pictures to look at, drawn by chance."""
        return (await self._do(get("/v1/review", ReviewPage, {"model": model, "limit": limit}))).verdicts

    async def alarms(self) -> list[Alarm]:
        """Whether each source's stream still looks as calibration did: both alarms of each."""
        return (await self._do(get("/v1/alarms", AlarmList))).alarms

    async def acknowledge(self, alarm: str) -> Alarm:
        """Begin a raised alarm anew."""
        return await self._do(post(f"/v1/alarms/{quote(alarm, safe='')}:acknowledge", Alarm))

    async def audit(self, limit: int | None = None) -> AsyncIterator[Change]:
        """Who changed what, the newest first: all, or `limit` of them."""
        cursor, left = None, limit
        while left is None or left > 0:
            page = await self._do(get("/v1/audit", Audit, {"cursor": cursor, "limit": page_of(left)}))
            for change in page.changes:
                yield change
            cursor, left = page.next, None if left is None else left - len(page.changes)
            if cursor is None:
                return

    async def ready(self) -> Ready:
        """Whether pictures are taken, and how the store stands."""
        return await self._do(get("/ready", Ready, accepted=(200, 503)))

    async def _do(self, ask: Ask[_T]) -> _T:
        turns = self._turns(ask)
        while True:
            try:
                response = await self._http.request(**self._parts(turns))
            except httpx.TransportError as error:
                wait = self._failed(turns, error)
            else:
                answer = answer_of(response, response.content)
                again = turns.after_answer(answer)
                if again is None:
                    return ask.read(answer)
                wait = again
            await asyncio.sleep(wait)


async def _rows(response: httpx.Response, answer: Answer) -> AsyncIterator[Scored | Unscored]:
    async for line in response.aiter_lines():
        row = line_of(line, answer)
        if row is None:
            return
        yield row
    raise cut_off(answer)


async def _chunks(archive: Archive) -> AsyncIterator[bytes]:
    chunks = archive.chunks()
    while chunk := await asyncio.to_thread(next, chunks, b""):
        yield chunk
