"""Long work that a request asks for, such as loading a bundle: it is done, but nobody waits for ever."""

import logging
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, TypeVar

from anomaly_vae import AnomalyVaeError
from service.errors import Problem

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class _Job:
    def __init__(self, what: str, work: Callable[[], Any], late: Callable[[Any], None]) -> None:
        self.what, self.work, self.late = what, work, late
        self.done = threading.Event()
        self.given_up = False
        self.result: Any = None
        self.error: BaseException | None = None


class Loading:
    """One job at a time, each on a thread of its own, for which nobody waits longer than `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._changed = threading.Condition()
        self._job: _Job | None = None

    def run(self, what: str, work: Callable[[], _T], late: Callable[[_T], None]) -> _T:
        """What `work` gives; raises what it raises, or `Problem` where it takes too long: `late` then gets it.

        `what` names it for people. A second job waits for the first, but not for one that was given up.
        """
        until = time.monotonic() + self._seconds
        job = self._begun(_Job(what, work, late), until)
        if not job.done.wait(max(0.0, until - time.monotonic())):
            with self._changed:
                job.given_up = not job.done.is_set()
            if job.given_up:
                message = f"{what} takes longer than {self._seconds:g} s (load_seconds) and goes on; ask again later"
                raise Problem(HTTPStatus.GATEWAY_TIMEOUT, "load_timeout", message)
        if job.error is not None:
            raise job.error
        found: _T = job.result
        return found

    def _begun(self, job: _Job, until: float) -> _Job:
        def possible() -> bool:
            return self._job is None or self._job.given_up

        with self._changed:
            self._changed.wait_for(possible, until - time.monotonic())
            if self._job is not None:
                message = f"{self._job.what} is not done yet, and bundles are loaded one at a time; try again later"
                raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "loading", message, retry_after=10.0)
            self._job = job
        threading.Thread(target=self._do, args=(job,), name="loader", daemon=True).start()
        return job

    def _do(self, job: _Job) -> None:
        try:
            job.result = job.work()
        except BaseException as error:  # it is for whoever waits
            job.error = error
        with self._changed:
            self._job = None
            job.done.set()
            self._changed.notify_all()
        if not job.given_up:
            return
        if job.error is None:
            _log.warning("%s is done, though nobody waited for it any more", job.what)
            job.late(job.result)
        else:
            known = isinstance(job.error, AnomalyVaeError)
            _log.error("%s failed: %s", job.what, job.error, exc_info=None if known else job.error)
