"""What becomes of a verdict that is on disk: its file is moved, its line printed, its webhook queued, and it is let go.

Whoever is killed in between does all of it again the next time: a line may be printed twice, with the same id.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from anomaly_vae.moving import Clash, free_place, moved
from anomaly_vae.paths import printable
from anomaly_vae.watch_alarms import WatchAlarms
from anomaly_vae.watch_state import Row, Verdict, WatchState, path_of
from anomaly_vae.webhook import Webhook, wants

OUTCOMES = ("normal", "outlier", "unreadable")


@dataclass
class Standing:
    """How it goes, for metrics and the last line."""

    files: Counter[str]
    webhooks: Counter[str]
    alarms: WatchAlarms
    waiting: int = 0
    webhooks_waiting: int = 0
    failed_moves: int = 0
    unlisted: int = 0

    @classmethod
    def first(cls, alarms: WatchAlarms) -> "Standing":
        """Nothing yet."""
        return cls(Counter(), Counter(), alarms)


@dataclass(frozen=True)
class Told:
    """Where it is told: `say` takes lines for machines and flushes them, `note` lines for people."""

    say: Callable[[Sequence[str]], None]
    note: Callable[[str], None]


def outcome_of(row: Row) -> str:
    """One of `OUTCOMES`."""
    if row["error"] is not None:
        return "unreadable"
    return "outlier" if row["outlier"] else "normal"


class Delivery:
    """`into`: folder that files of `root` are moved to, by outcome; None leaves them. `posted`: `outliers` or `all`."""

    def __init__(self, root: Path, state: WatchState, told: Told, standing: Standing, into: Path | None,
                 posted: str, webhook: Webhook | None) -> None:  # fmt: skip
        self._root, self._state, self._told, self._standing = root, state, told, standing
        self._into, self._posted, self._webhook = None if into is None else into.absolute(), posted, webhook
        self.stuck: set[int] = set()

    def recover(self) -> None:
        """Finish what an earlier watch left."""
        left = self._state.unfinished()
        if left:
            self._told.note(
                f"finishing what an earlier watch was stopped in (verdicts: {len(left):,}); lines may repeat"
            )
            self.finish(left)
        waiting = self._state.count_webhooks()
        if waiting and self._webhook is None:
            self._told.note(f"{waiting:,} verdicts wait to be posted; give --webhook to have that done")

    def retry(self) -> None:
        """Try the moves again that could not be done."""
        if self.stuck:
            self.finish([one for one in self._state.unfinished() if one.said])

    def plan(self, verdicts: Sequence[Verdict]) -> None:
        """Choose the places that files move to."""
        if self._into is None:
            return
        taken: set[Path] = set()
        for verdict in verdicts:
            folder = self._into / outcome_of(verdict.row)
            place = free_place(path_of(folder, verdict.file.key), taken)
            taken.add(place)
            verdict.place, verdict.row["moved_to"] = os.fsencode(place), printable(place)

    def finish(self, verdicts: Sequence[Verdict]) -> None:
        """Move, tell and queue what is on disk, then let it go."""
        stuck = [one for one in verdicts if one.place is not None and not self._moved(one)]
        left = {one.seq for one in stuck}
        lines = [one.row | ({"moved_to": None} if one.seq in left else {}) for one in verdicts if not one.said]
        self._told.say([json.dumps(line) for line in lines])
        hooks = [line for line in lines if self._webhook is not None and wants(line, self._posted)]
        done = [one for one in verdicts if one.seq not in left]
        self._state.finish(done, stuck, hooks, time.time())
        was_stuck, self.stuck = self.stuck, (self.stuck | left) - {one.seq for one in done}
        if was_stuck and not self.stuck:
            self._told.note("files are moved now")
        self._standing.failed_moves = len(self.stuck)
        if self._webhook is not None and hooks:
            self._webhook.wake()

    def _moved(self, verdict: Verdict) -> bool:
        """Whether a file is moved, or gone; False where that cannot be done now."""
        file, path = verdict.file, path_of(self._root, verdict.file.key)
        assert verdict.place is not None
        try:
            while True:
                try:
                    if not moved(path, Path(os.fsdecode(verdict.place)), file.size, file.mtime):
                        self._told.note(f"{printable(path)} was not moved: it is gone, or another file by now")
                        verdict.row["moved_to"] = None
                    return True
                except Clash:
                    place = free_place(Path(os.fsdecode(verdict.place)))
                    verdict.place, verdict.row["moved_to"] = os.fsencode(place), printable(place)
                    self._state.plan(verdict)
        except OSError as error:
            if verdict.seq not in self.stuck:
                where, reason = printable(os.path.dirname(verdict.place)), error.strerror or error  # noqa: PTH120
                self._told.note(f"cannot move {printable(path)} into {where} ({reason}); it is tried again and again")
            return False
