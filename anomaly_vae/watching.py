"""The verb `watch`: every picture that comes into a folder is scored once, and its verdict is told, moved and posted.

A batch goes through the state twice: its verdicts are on disk before anybody hears of them, and leave the outbox when
lines are flushed, files moved and webhooks queued. Whoever is killed in between finishes that first the next time.
"""

import math
import os
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

import torch

from anomaly_vae.arrivals import Arrivals, looking_in
from anomaly_vae.delivering import OUTCOMES, Delivery, Standing, Told, outcome_of
from anomaly_vae.engine import Engine
from anomaly_vae.entries import Entry
from anomaly_vae.errors import ConfigError, DataError
from anomaly_vae.file_news import Deaf, Failed, FileNews, Found, Gone, Listed, News, Wake, present
from anomaly_vae.judgement import Judgement
from anomaly_vae.paths import printable, read_file
from anomaly_vae.scan_rows import Prepared, prepared
from anomaly_vae.watch_state import Row, Seen, Verdict, WatchState, path_of
from anomaly_vae.webhook import Webhook

STATE_NAME = ".anomaly-vae-watch.sqlite"
_MOST_WEBHOOKS, _MOST_STUCK = 100_000, 1000
"""With so many on disk nothing more is scored: files can wait where they are."""
_HALF_WRITTEN = ("empty", "truncated", "corrupt", "not_an_image", None)
"""Why a file cannot be read as long as it is being written; None: the system refused."""
_AWAY_SECONDS = 1.0


@dataclass(frozen=True)
class Wanted:
    """How to watch. `settle`, `patience`: see `Arrivals`; `every`: seconds between listings. `into`: folder that files
    are moved to, by outcome. `posted`: `outliers` or `all`. `only_new`: leave out what is there at the first start.
    `fresh`: score again what an earlier watch has scored. `base_rate`: share of outliers that the folder is known to
    bring. `alarms_anew`: begin both alarms anew."""

    settle: float = 1.0
    patience: float = 10.0
    every: float = 10.0
    into: Path | None = None
    posted: str = "outliers"
    only_new: bool = False
    fresh: bool = False
    base_rate: float = 0.0
    alarms_anew: bool = False


class Stop:
    """Call it, from a signal handler too, and the watch finishes what is in hand."""

    def __init__(self) -> None:
        self.inbox: SimpleQueue[News] = SimpleQueue()
        self.asked = False

    def __call__(self) -> None:
        self.asked = True
        self.wake()

    def wake(self) -> None:
        """Have it look again whether there is something to do."""
        self.inbox.put(Wake())


MakeWebhook = Callable[[WatchState, Callable[[Exception], None]], Webhook]


def watch(engine: Engine, root: Path, place: Path, wanted: Wanted, told: Told, stop: Stop,
          standing: Standing, webhook: MakeWebhook | None = None) -> None:  # fmt: skip
    """Watch `root`, with the state at `place`, until `stop`; a folder that goes away is waited for."""
    check(engine, root, wanted)
    while not stop.asked:
        with WatchState(place, root) as state:
            session = Watch(engine, root, state, wanted, told, stop, standing)
            try:
                if session.run(webhook):
                    return
            except DataError:
                if state.in_place:
                    raise  # else it went with its folder
        told.note(f"{printable(root)} is gone; waiting until it is there again")
        while not stop.asked and not root.is_dir():
            try:
                stop.inbox.get(timeout=_AWAY_SECONDS)
            except Empty:
                continue
        if not stop.asked:
            told.note(f"{printable(root)} is there again")
        # What came meanwhile is new.
        wanted = replace(wanted, only_new=False, fresh=False, alarms_anew=False)


def check(engine: Engine, root: Path, wanted: Wanted) -> None:
    """Refuse what cannot go well; raises `DataError` or `ConfigError`."""
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise DataError(f"{printable(root)} {what}; give the folder that pictures come into")
    for name in ("settle", "patience", "every"):
        if not 0 <= getattr(wanted, name) < math.inf:
            raise ConfigError(f"--{name} is a number of seconds, at least 0; got {getattr(wanted, name):g}")
    if not 0 <= wanted.base_rate < 1:
        raise ConfigError(f"--base-rate is a share of all pictures, such as 0.02; got {wanted.base_rate:g}")
    engine.detector.numbers_of(None)
    if wanted.into is not None:
        _check_into(root, wanted.into)


def _check_into(root: Path, into: Path) -> None:
    real = root.resolve()
    for outcome in OUTCOMES:
        place = (into / outcome).resolve()
        below = place.relative_to(real).parts if place.is_relative_to(real) else (".",)
        if real.is_relative_to(place) or not any(part.startswith(".") for part in below):
            raise ConfigError(f"--into {printable(into)} lies inside what is watched, so that moved files would come "
                              "again; give a folder elsewhere, or a hidden one such as FOLDER/.done")  # fmt: skip
    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot make the folder {printable(into)} ({error.strerror})"
        raise ConfigError(f"{what}; give another --into") from None


class Watch:
    """One go, as long as the folder is there. One thread owns it; news come in by `stop.inbox`."""

    def __init__(self, engine: Engine, root: Path, state: WatchState, wanted: Wanted, told: Told, stop: Stop,
                 standing: Standing) -> None:  # fmt: skip
        self._engine, self._root, self._state, self._wanted = engine, root, state, wanted
        self._told, self._stop, self._standing = told, stop, standing
        self._alarms = standing.alarms
        self._look = looking_in(root)
        self._arrivals = Arrivals(self._look, wanted.settle, wanted.patience)
        self._into = None if wanted.into is None else wanted.into.resolve()
        self._webhook: Webhook | None = None
        self._delivery: Delivery
        self._gone = self._held = self._caught_up = self._listed = False
        self._permits = 0
        self._unlisted: set[str] = set()
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1, "decode")

    def run(self, webhook: MakeWebhook | None) -> bool:
        """Until it is stopped; False where the folder went away."""
        inbox = self._stop.inbox
        while not inbox.empty():
            inbox.get()  # news of an earlier go
        self._begin()
        with ExitStack() as stack:
            stack.callback(self._pool.shutdown, cancel_futures=True)
            if webhook is not None:
                # Entered first, so that it ends last and posts what the others leave.
                self._webhook = webhook(self._state, lambda error: inbox.put(Failed(error)))
                stack.enter_context(self._webhook)
            self._delivery = Delivery(self._root, self._state, self._told, self._standing, self._wanted.into,
                                      self._wanted.posted, self._webhook)  # fmt: skip
            self._delivery.recover()
            news = stack.enter_context(FileNews(self._root, self._state, self._wanted.every, inbox, self._look))
            while not self._stop.asked and not self._gone:
                self._hear(self._patience())
                if not self._stop.asked and not self._gone and not self._holding():
                    self._score(self._arrivals.ready(time.monotonic(), self._engine.max_batch))
                self._count(news)
        self._count_webhooks()
        return not self._gone

    def _begin(self) -> None:
        """Take over what an earlier watch left."""
        state, wanted, version = self._state, self._wanted, self._engine.detector.version
        if wanted.fresh:
            state.forget_files()
            state.put_facts({"begun": None})
        before = state.fact("version")
        count = state.count_files()
        if before not in (None, version) and count:
            self._told.note(f"the bundle was {before} and is {version} now; the {count:,} files that were scored are "
                            "not scored again (--fresh does that)")  # fmt: skip
        if state.fact("begun") is None and wanted.only_new:
            files = present(self._root)
            state.leave_out(files)
            self._told.note(f"{len(files):,} files that are there already are left out")
        if wanted.alarms_anew:
            state.put_facts({"alarms": None})
        if not self._alarms.go_on(state.fact("alarms")):
            self._told.note("the alarms begin anew: another bundle, alpha or base rate")
        state.put_facts({"begun": True, "version": version})
        for kind in self._alarms.raised():
            self._told.note(f"still raised (--alarms-anew begins anew): {self._alarms.message(kind)}")

    def _patience(self) -> float | None:
        """Seconds until there is something to do without any news."""
        due = self._arrivals.next_due()
        return None if due is None or self._held else max(0.0, due - time.monotonic())

    def _hear(self, timeout: float | None) -> None:
        try:
            news = self._stop.inbox.get(timeout=timeout)
            while True:
                self._take(news)
                news = self._stop.inbox.get_nowait()
        except Empty:
            pass

    def _take(self, news: News) -> None:
        if isinstance(news, Found):
            self._permits += 1
            if self._state.known(news.file.key) != news.file and not self._is_ours(news.file.key):
                self._arrivals.saw(news.file, time.monotonic())
        elif isinstance(news, Listed):
            self._listed = True
            self._tell_unlisted(news.unreadable)
            self._delivery.retry()
        elif isinstance(news, Gone):
            self._gone = True
        elif isinstance(news, Deaf):
            every = self._wanted.every
            self._told.note(f"new files cannot be heard of ({news.reason}); they are found every {every:g} s")
        elif isinstance(news, Failed):
            if not self._state.in_place:
                self._gone = True  # the state went with its folder
            else:
                raise news.error

    def _is_ours(self, key: bytes) -> bool:
        """Whether it was moved there, seen through a link."""
        if self._into is None:
            return False
        folder = path_of(self._root, key).parent.resolve()
        return any(folder.is_relative_to(self._into / one) for one in OUTCOMES)

    def _tell_unlisted(self, unreadable: dict[str, str]) -> None:
        for path in sorted(unreadable.keys() - self._unlisted):
            self._told.note(f"{path} cannot be looked into: {unreadable[path]}")
        self._unlisted = set(unreadable)
        self._standing.unlisted = len(unreadable)

    def _holding(self) -> bool:
        """Whether files are to wait because others are not taken."""
        hooks = self._state.count_webhooks() >= _MOST_WEBHOOKS if self._webhook is not None else False
        held = hooks or len(self._delivery.stuck) >= _MOST_STUCK
        if held and not self._held:
            what = "verdicts wait to be posted" if hooks else "files wait to be moved"
            self._told.note(f"too many {what}; nothing more is scored until that works again")
        self._held = held
        return held

    def _count(self, news: FileNews) -> None:
        done = self._permits - len(self._arrivals)
        if done > 0:
            news.room.release(done)
            self._permits -= done
        self._standing.waiting = len(self._arrivals)
        self._count_webhooks()
        if self._listed and not self._caught_up and not len(self._arrivals):
            self._caught_up = True
            here = "" if self._into is not None else f" {self._state.count_files():,} files here are scored;"
            self._told.note(f"caught up;{here} waiting for more")

    def _count_webhooks(self) -> None:
        self._standing.webhooks_waiting = self._state.count_webhooks()

    def _score(self, ready: Sequence[tuple[Seen, bool]]) -> None:
        """Judge a batch and tell of it."""
        whole: list[tuple[Seen, Prepared]] = []
        for (file, had_its_time), one in zip(ready, self._pool.map(self._prepared, ready), strict=True):
            now = self._look(file.key)
            if now != file:
                if now is not None:
                    self._arrivals.saw(now, time.monotonic())
            elif one.error is not None and one.code in _HALF_WRITTEN and not had_its_time:
                self._arrivals.doubt(file, time.monotonic())
            else:
                whole.append((file, one))
        if whole:
            self._delivery.finish(self._kept(whole))

    def _prepared(self, ready: tuple[Seen, bool]) -> Prepared:
        file, _ = ready
        path = self._path(file)
        return prepared(self._engine, Entry(printable(path), file.size, _seconds(file.mtime), partial(read_file, path)))

    def _path(self, file: Seen) -> Path:
        return path_of(self._root, file.key)

    def _kept(self, whole: Sequence[tuple[Seen, Prepared]]) -> list[Verdict]:
        """Verdicts of a batch, on disk."""
        images = [one.image for _, one in whole if one.image is not None]
        judged = self._engine.judge(torch.stack(images)) if images else None
        rows = self._rows([one for _, one in whole], judged)
        verdicts = [Verdict(file, row, None) for (file, _), row in zip(whole, rows, strict=True)]
        self._delivery.plan(verdicts)
        raised = []
        if judged is not None:
            raised = self._alarms.count([row["path"] for row in rows if row["error"] is None], judged)
        self._state.keep(verdicts, {"alarms": self._alarms.packed()})
        for verdict in verdicts:
            self._standing.files[outcome_of(verdict.row)] += 1
        for kind in raised:
            self._told.note(self._alarms.message(kind))
        return verdicts

    def _rows(self, batch: Sequence[Prepared], judged: Judgement | None) -> list[Row]:
        verdicts = iter(() if judged is None else (judged.row(i) for i in range(len(judged))))
        rows = []
        for one in batch:
            found = next(verdicts) if one.image is not None else {}
            row = {"id": uuid.uuid4().hex, "path": one.entry.path, "size": one.entry.size, "mtime": one.entry.mtime,
                   "sha256": one.sha256, "score": found.get("score"), "p_value": found.get("p_value"),
                   "outlier": found.get("outlier"), "parts": _plain(found.get("parts")), "error": one.error,
                   "version": self._engine.detector.version}  # fmt: skip
            rows.append(row)
        return rows


def _seconds(nanoseconds: int) -> float:
    """As `stat` has it, to the last bit."""
    whole, rest = divmod(nanoseconds, 10**9)
    return whole + 1e-9 * rest


def _plain(parts: dict[str, float] | None) -> dict[str, float | None] | None:
    """JSON knows no infinity."""
    if parts is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in parts.items()}
