"""A picture's way through the queue: its place, its ticket, and the outcome that somebody waits for."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self

from anomaly_vae import AnomalyVaeError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Refusal = Literal["queue_full", "deadline", "draining", "failed"]
Failure = Literal["expired", "cancelled", "unscorable", "failed"]


class Judged(Protocol):
    """The columns a judge returns for a batch; `anomaly_vae.Judgement` is one."""

    @property
    def heat(self) -> "np.ndarray[Any, Any] | None": ...
    @property
    def heat_scale(self) -> float: ...
    @property
    def latents(self) -> "np.ndarray[Any, Any] | None": ...
    def row(self, index: int, /) -> dict[str, Any]: ...


class Judge(Protocol):
    """uint8 (B, C, H, W) and whether heat maps are wanted -> columns of length B."""

    def __call__(self, images: "Tensor", heatmaps: bool, /) -> Judged: ...


class Target(NamedTuple):
    """A model that pictures are for. `probe`: a uint8 (C, H, W) picture known to be judged well, which tells a bad
    picture from a lost model when a single one fails."""

    judge: Judge
    probe: "Tensor"


Also = Callable[["Tensor", dict[str, Any]], Any]


class NotAccepted(AnomalyVaeError):
    """There is no place for this request; nothing was decoded or judged. `retry_after` is in seconds."""

    def __init__(self, reason: Refusal, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after


class NotScored(AnomalyVaeError):
    """An accepted picture that has no score: too late, withdrawn, impossible to judge, or the model is lost."""

    def __init__(self, reason: Failure, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Scored:
    """One picture's row, its heat map if asked for, what `Ticket.also` found, and where its time went (seconds).

    `latents`: those that are watched.
    """

    row: dict[str, Any]
    heat: "np.ndarray[Any, Any] | None"
    heat_scale: float
    also: Any
    queued_seconds: float
    judge_seconds: float
    latents: tuple[float, ...] = ()


class Queue(Protocol):
    """What tickets and reservations ask of the queue they belong to."""

    @property
    def clock(self) -> Callable[[], float]: ...
    def enqueue(
        self,
        image: "Tensor",
        target: Target | None,
        *,
        heatmap: bool,
        bulk: bool,
        deadline: float | None,
        also: "Also | None" = None,
        wake: "Callable[[], None] | None" = None,
    ) -> "Ticket": ...
    def give_back(self, places: int) -> None: ...
    def cancel(self, ticket: "Ticket", outcome: NotScored) -> None: ...


class Ticket:
    """A picture in the queue; `result` waits for its verdict."""

    __slots__ = (
        "_batcher",
        "_done",
        "_failure",
        "_scored",
        "also",
        "bulk",
        "deadline",
        "entered",
        "heatmap",
        "image",
        "target",
        "wake",
    )

    def __init__(
        self,
        batcher: Queue,
        image: "Tensor",
        target: Target | None,
        *,
        heatmap: bool,
        bulk: bool,
        deadline: float | None,
        entered: float,
    ) -> None:
        self._batcher = batcher
        self._done = threading.Event()
        self._scored: Scored | None = None
        self._failure: NotScored | None = None
        self.image = image
        self.target = target
        self.heatmap = heatmap
        self.bulk = bulk
        self.deadline = deadline
        self.entered = entered
        self.also: Also | None = None
        self.wake: Callable[[], None] | None = None

    def result(self) -> Scored:
        """Wait until judged or until the deadline; raises `NotScored`."""
        left = None if self.deadline is None else max(0.0, self.deadline - self._batcher.clock())
        if not self._done.wait(left):
            self._batcher.cancel(self, NotScored("expired"))
            raise NotScored("expired", "the deadline passed before the verdict")
        if self._failure is not None:
            raise self._failure
        assert self._scored is not None
        return self._scored

    @property
    def settled(self) -> bool:
        """Whether `result` need not wait."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Withdraw: its place is free at once if it still waits; if it is being judged, the verdict is dropped."""
        self._batcher.cancel(self, NotScored("cancelled"))

    def settle(self, outcome: Scored | NotScored) -> None:
        """Give the outcome to whoever waits; the first one counts."""
        if self._done.is_set():
            return
        if isinstance(outcome, NotScored):
            self._failure = outcome
        else:
            self._scored = outcome
        self._done.set()
        if self.wake is not None:
            self.wake()


class Reservation:
    """Places in the queue, held while the pictures are decoded; leaving the `with` block gives back unused ones."""

    def __init__(self, batcher: Queue, places: int, *, bulk: bool, deadline: float | None) -> None:
        self._batcher = batcher
        self._left = places
        self._bulk = bulk
        self._deadline = deadline

    def submit(
        self,
        image: "Tensor",
        target: Target | None = None,
        *,
        heatmap: bool = False,
        also: "Also | None" = None,
        wake: Callable[[], None] | None = None,
    ) -> Ticket:
        """Queue one uint8 (C, H, W) picture on one of the places; for the first model unless another is given.

        `also` is asked with the picture and its row, on a thread of the models, once it is judged. `wake` is called on
        any thread when `result` need not be waited for, and must not wait itself.
        """
        assert self._left > 0, "more pictures than places were reserved"
        ticket = self._batcher.enqueue(
            image, target, heatmap=heatmap, bulk=self._bulk, deadline=self._deadline, also=also, wake=wake
        )
        self._left -= 1
        return ticket

    def skip(self) -> None:
        """Give back one place: its picture turned out to be none."""
        self._left -= 1
        self._batcher.give_back(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left, self._left = self._left, 0
        if left > 0:
            self._batcher.give_back(left)
