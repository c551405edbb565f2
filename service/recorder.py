"""`Recorder`: verdicts go to the store off the request path, in batches, and wait in memory while it is down."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from service.database import reason_of
from service.store import Beside, Kept, Record, Store

_log = logging.getLogger(__name__)

_AT_ONCE = 1000
_RETRY_SECONDS = (0.5, 5.0)
_TIDY_SECONDS, _COMPACT_SECONDS = 60.0, 2.0
_TIDY_ROWS = 200


class Told(Protocol):
    """Who hears how writing goes."""

    def store_wrote(self, seconds: float) -> None: ...
    def store_lost(self, what: Literal["verdict", "picture"], count: int) -> None: ...
    def watch_store(self, waiting: Callable[[], float], up: Callable[[], float]) -> None: ...


@dataclass(frozen=True)
class Pending:
    """A verdict on its way. `draw` gives the PNG to keep of its picture, where one is kept, and costs CPU time."""

    record: Record
    draw: Callable[[], bytes] | None = None
    picture_bytes: int = 0


class Recorder:
    """One thread writes what `put` is given: `flush_seconds` after it came at the latest, one transaction for all.

    While the store cannot be written, at most `most_waiting` verdicts wait in memory, and pictures of them up to
    `most_picture_bytes`; what is more is lost and counted, pictures first. Writing is tried again until it works.
    `also` is done in the same transaction: see `Store.write`.
    """

    def __init__(
        self,
        store: Store,
        told: Told,
        kept: Kept = Kept(),  # noqa: B008 - it is frozen
        flush_seconds: float = 0.2,
        most_waiting: int = 10_000,
        most_picture_bytes: int = 64 << 20,
        also: Beside | None = None,
    ) -> None:
        self._store, self._told, self._kept, self._also = store, told, kept, also
        self._flush_seconds, self._most_waiting = flush_seconds, most_waiting
        self._picture_room = most_picture_bytes
        self._changed = threading.Condition()
        self._waiting: deque[Pending] = deque()
        self._in_hand = 0
        self._lost = {"verdict": 0, "picture": 0}
        self._error: str | None = None
        self._closing = False
        self._tidy_at = 0.0
        told.watch_store(lambda: len(self._waiting) + self._in_hand, lambda: float(self._is_well()))
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def put(self, pending: Pending) -> None:
        """Have a verdict kept; never waits."""
        with self._changed:
            if len(self._waiting) + self._in_hand >= self._most_waiting:
                self._lose("verdict")
                return
            if pending.draw is not None and pending.picture_bytes > self._picture_room:
                self._lose("picture")
                pending = replace(pending, draw=None)
            if pending.draw is not None:
                self._picture_room -= pending.picture_bytes
            self._waiting.append(pending)
            if len(self._waiting) == 1 or len(self._waiting) == _AT_ONCE:
                self._changed.notify_all()

    def standing(self) -> dict[str, Any]:
        """How it goes, for people and for `/ready`: `behind` while the store cannot be written."""
        with self._changed:
            waiting = len(self._waiting) + self._in_hand
            # Why not is for the log: whoever may look at /ready need not know where the store is.
            return {
                "state": "ok" if self._is_well() and self._thread.is_alive() else "behind",
                "waiting": waiting,
                "lost_verdicts": self._lost["verdict"],
                "lost_pictures": self._lost["picture"],
            }

    def _is_well(self) -> bool:
        return self._error is None and self._store.database.opened

    def flush(self, timeout: float) -> bool:
        """Wait until all that was put is kept; False if that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._in_hand, timeout)

    def close(self, timeout: float) -> bool:
        """Keep what waits, then end; False if that took longer, or the store stayed down."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while not self._ended():
            try:
                if batch := self._next():
                    self._write(batch)
                if time.monotonic() >= self._tidy_at and not self._waiting:
                    self._tidy()
            except Exception as error:  # whatever it is, what comes next must be kept
                _log.exception("the recorder failed")
                with self._changed:
                    self._lose("verdict", self._in_hand)
                    self._in_hand, self._error = 0, f"{type(error).__name__}: {error}"
                    self._changed.notify_all()

    def _ended(self) -> bool:
        with self._changed:
            return self._closing and not self._waiting

    def _next(self) -> Sequence[Pending]:
        """Sleep until something waits, then until it is due or there is much of it; nothing where none came long."""
        with self._changed:
            idle = max(0.0, self._tidy_at - time.monotonic())
            if not self._changed.wait_for(lambda: self._waiting or self._closing, idle):
                return ()
            self._changed.wait_for(lambda: len(self._waiting) >= _AT_ONCE or self._closing, self._flush_seconds)
            batch = [self._waiting.popleft() for _ in range(min(_AT_ONCE, len(self._waiting)))]
            self._in_hand = len(batch)
            return batch

    def _write(self, batch: Sequence[Pending]) -> None:
        records = [self._drawn(pending) for pending in batch]
        pause, most = _RETRY_SECONDS
        while (error := self._written(records)) is not None:
            with self._changed:
                if self._error is None:
                    _log.error("the store cannot be written, verdicts wait in memory: %s", error)
                self._error = error
                if self._closing:
                    self._lose("verdict", len(records))
                    break
                self._changed.wait_for(lambda: self._closing, pause)
            pause = min(2 * pause, most)
        with self._changed:
            if error is None and self._error is not None:
                self._error = None
                _log.warning("the store is written again")
            self._in_hand = 0
            self._picture_room += sum(pending.picture_bytes for pending in batch if pending.draw is not None)
            self._changed.notify_all()

    def _written(self, records: Sequence[Record]) -> str | None:
        """Why the store cannot be written now; None once it has been, less what it will never take."""
        started = time.monotonic()
        try:
            self._store.write(records, self._also)
        except (DataError, IntegrityError) as error:
            # Whatever a store refuses must not keep the others from it: the batch is halved until it stands alone.
            if len(records) > 1:
                middle = len(records) // 2
                return self._written(records[:middle]) or self._written(records[middle:])
            return self._refused(records[0], error)
        except (SQLAlchemyError, OSError) as error:
            return reason_of(error)
        self._told.store_wrote(time.monotonic() - started)
        return None

    def _refused(self, record: Record, error: Exception) -> str | None:
        try:
            # A commit may have been made whose answer was lost.
            there = self._store.verdict(record.id)
            if there is None or (there["request"], there["score"]) != (record.request, record.score):
                _log.error("the store refuses the verdict %016x: %s", record.id, reason_of(error))
                with self._changed:
                    self._lose("verdict")
        except SQLAlchemyError as again:
            return reason_of(again)
        return None

    def _drawn(self, pending: Pending) -> Record:
        if pending.draw is None:
            return pending.record
        try:
            return replace(pending.record, png=pending.draw())
        except Exception as error:  # the verdict matters more than its picture
            _log.warning("the picture of %016x cannot be drawn: %s", pending.record.id, error)
            with self._changed:
                self._lose("picture")
            return pending.record

    def _lose(self, what: Literal["verdict", "picture"], count: int = 1) -> None:
        self._lost[what] += count
        self._told.store_lost(what, count)

    def _tidy(self) -> None:
        """A little at a time, since verdicts wait meanwhile; more of it soon where there is more."""
        more = False
        if not self._store.database.opened:
            self._tidy_at = time.monotonic() + _TIDY_SECONDS
            return
        try:
            more = self._store.tidy(self._kept, time.time(), _TIDY_ROWS) > 0
            if not more:
                self._store.compact()
        except (SQLAlchemyError, OSError) as error:
            _log.warning("what is too old stays in the store for now: %s", reason_of(error))
        later = 0.0 if more else _COMPACT_SECONDS if self._store.uncompacted else _TIDY_SECONDS
        self._tidy_at = time.monotonic() + later
