"""When a request is sent again, and after how long: the decisions alone, nothing is sent or waited for here."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from anomaly_vae.asking import Answer, Ask, refusal
from anomaly_vae.errors import ConfigError, ServiceError

_BUSY, _UNAVAILABLE = 429, 503
_FIRST_SECONDS, _LONGEST_SECONDS, _DOUBLED = 0.1, 5.0, 6


@dataclass(frozen=True)
class Retries:
    """A request is sent at most `times` times more, and none later than `seconds` after the first; 0 times: never."""

    times: int = 8
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.times < 0 or self.seconds < 0:
            raise ConfigError("retries are bounded by a number of times and seconds, both at least 0")


@dataclass
class Turns:
    """One request's attempts. `jitter` tells numbers from 0 to 1, so that many clients do not come back at once.

    Sent again is what the service refused for now (429; 503 where repeating does no harm), and what never reached it.
    Where only the answer was lost, what is not `repeatable` may have been done, and is not sent again.
    """

    ask: Ask[Any]
    retries: Retries
    jitter: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic
    made: int = 0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def left(self) -> float | None:
        """Seconds until the request's own deadline, None without one."""
        return None if self.ask.deadline is None else self.started + self.ask.deadline - self.clock()

    def after_answer(self, answer: Answer) -> float | None:
        """Seconds to wait before the next attempt; None where this answer counts."""
        busy = answer.status == _BUSY or (answer.status == _UNAVAILABLE and self.ask.repeatable)
        if not busy or answer.status in self.ask.accepted:
            return None
        return self._wait(_retry_after(answer))

    def after_failure(self, reason: str, *, reached: bool) -> float:
        """Seconds to wait after no answer came; raises `ServiceError` if that was the last attempt.

        `reached`: the service may have got the request.
        """
        wait = self._wait(None) if self.ask.repeatable or not reached else None
        if wait is not None:
            return wait
        if reached and not self.ask.repeatable:
            message = (
                f"the answer was lost ({reason}), and the change may or may not be made; look before you repeat it"
            )
            raise ServiceError("answer_lost", message)
        message = f"no answer after {self.made + 1} attempts ({reason}); check the address and that the service runs"
        raise ServiceError("unreachable", message)

    def _wait(self, told: float | None) -> float | None:
        """The service's own word, or longer from time to time; None if there is no other attempt."""
        grown = min(_FIRST_SECONDS * 2.0 ** min(self.made, _DOUBLED), _LONGEST_SECONDS)
        wait = grown * (0.5 + self.jitter() / 2) if told is None else told * (1 + self.jitter() / 4)
        end = self.started + self.retries.seconds
        if self.ask.deadline is not None:
            end = min(end, self.started + self.ask.deadline)
        if self.made >= self.retries.times or self.clock() + wait > end:
            return None
        self.made += 1
        return wait


def _retry_after(answer: Answer) -> float | None:
    """What the service said, to the millisecond where it did; a date, as proxies send, says nothing here."""
    error = refusal(answer)
    text = answer.headers.get("retry-after", "")
    if error.retry_after is not None:
        return error.retry_after
    return float(text) if text.isascii() and text.isdigit() else None
