"""What is new below a folder, told by two threads: one hears of files as they come, one lists everything now and then.

News from the first are quick and may be missed (network drives tell nothing of what others write there); the second
misses nothing. Neither lets more than so many files wait.
"""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from queue import SimpleQueue

from anomaly_vae.arrivals import Look, looking_in
from anomaly_vae.entries import Entry, is_picture
from anomaly_vae.paths import on_disk
from anomaly_vae.sources import Folder
from anomaly_vae.watch_state import Seen, WatchState, key_of

MOST_WAITING = 16_384
"""Files that may wait to be scored at any time; others stay where they are until the next listing."""
FORGET_SECONDS = 30 * 86_400.0
"""A file that was gone for so long is forgotten: were it to come back, it would be scored again."""
_SHARE = 10
"""Listing takes at most one part in so many of the time."""
_AT_ONCE = 1000
_LEAST_PAUSE = 0.2
_DEBOUNCE, _STEP = 400, 100


@dataclass(frozen=True)
class Found:
    """A file that is new or changed."""

    file: Seen


@dataclass(frozen=True)
class Listed:
    """All of the folder was listed; `unreadable`: what could not be, by path."""

    unreadable: dict[str, str]


@dataclass(frozen=True)
class Gone:
    """The folder is not there, or was replaced by another."""


@dataclass(frozen=True)
class Deaf:
    """Files as they come are not heard of; only listings find them."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """A thread ended by an error."""

    error: Exception


@dataclass(frozen=True)
class Wake:
    """Nothing in itself: look again."""


News = Found | Listed | Gone | Deaf | Failed | Wake


class FileNews:
    """Puts news into `inbox`. Use it in a `with`. `every`: seconds between listings; `look`: files as they are now.

    `room`: one for each file that may wait; whoever has done with a `Found` releases one.
    """

    def __init__(self, root: Path, state: WatchState, every: float, inbox: "SimpleQueue[News]",
                 look: Look) -> None:  # fmt: skip
        self._root, self._state, self._every, self._inbox, self._look = root, state, every, inbox, look
        self._real = root.resolve()
        self._identity = _identity(root)
        self.room = threading.Semaphore(MOST_WAITING)
        self._woken, self._asked, self._ending = threading.Condition(), False, threading.Event()
        self._threads = [threading.Thread(target=self._guarded, args=[one], name=one.__name__, daemon=True)
                         for one in (self._hear, self._list_often)]  # fmt: skip

    def __enter__(self) -> "FileNews":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._woken:
            self._ending.set()
            self._woken.notify()
        self.room.release(2)  # whoever waits for it ends
        for thread in self._threads:
            thread.join()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._inbox.put(Failed(error))

    def ask(self) -> None:
        """List soon."""
        with self._woken:
            self._asked = True
            self._woken.notify()

    def _hear(self) -> None:
        while not self._ending.is_set():
            try:
                self._hear_on()
            except RuntimeError:
                # A name that is no UTF-8, which ends it; only a listing can say what came.
                self.ask()
                self._ending.wait(_LEAST_PAUSE)
            except OSError as error:
                # Too many folders for the system's limit, say; a folder that is gone is told by the listing.
                self._inbox.put(Deaf(error.strerror or str(error)))
                return

    def _hear_on(self) -> None:
        from watchfiles import Change, watch

        changes = watch(self._root, watch_filter=None, debounce=_DEBOUNCE, step=_STEP, stop_event=self._ending,
                        raise_interrupt=False, ignore_permission_denied=True)  # fmt: skip
        for some in changes:
            paths = {Path(path) for change, path in some if change != Change.deleted}
            unclear = [path for path in paths if not self._heard(path)]
            if unclear or not self._root.is_dir():
                self.ask()

    def _heard(self, path: Path) -> bool:
        """Tell of one file; False where only a listing can say what came."""
        below = path.relative_to(self._root)
        if any(part.startswith(".") for part in below.parts):
            return True
        # A name that is no UTF-8 was replaced; below a link the same file may be listed under another name.
        if "\ufffd" in str(below) or path.parent.resolve() != self._real / below.parent:
            return False
        if not is_picture(str(below)):
            return not path.is_dir()  # a folder may have come with files in it
        seen = self._look(key_of(self._root, path))
        return seen is None or self._tell(seen, wait=False)

    def _tell(self, file: Seen, wait: bool) -> bool:
        if self._state.known(file.key) != file:
            if not self.room.acquire(blocking=wait):
                return False
            self._inbox.put(Found(file))
        return True

    def _list_often(self) -> None:
        while not self._ending.is_set():
            begun = time.monotonic()
            unreadable: dict[str, str] = {}
            if _identity(self._root) != self._identity or not self._state.in_place:
                self._inbox.put(Gone())
                return
            self._list(unreadable)
            if _identity(self._root) == self._identity:
                self._inbox.put(Listed(unreadable))
            took = time.monotonic() - begun
            with self._woken:
                self._woken.wait_for(lambda: self._asked or self._ending.is_set(), max(self._every, _SHARE * took))
                self._asked = False
                # What made somebody ask may not be all that is coming.
                self._woken.wait_for(self._ending.is_set, max(_LEAST_PAUSE, took))

    def _list(self, unreadable: dict[str, str]) -> None:
        gone: list[bytes] = []
        back: list[bytes] = []
        now = time.time()
        for file, known, was_gone in _merged(self._entries(unreadable), self._state.files()):
            if self._ending.is_set():
                return
            if file is None:
                assert known is not None
                gone += [] if was_gone else [known.key]
            else:
                back += [file.key] if was_gone else []
                if file != known:
                    self._tell(file, wait=True)
            if len(gone) + len(back) >= _AT_ONCE:
                self._state.mark(gone, back, now, 0)
                gone, back = [], []
        if _identity(self._root) == self._identity:
            self._state.mark(gone, back, now, now - FORGET_SECONDS)

    def _entries(self, unreadable: dict[str, str]) -> Iterator[Seen]:
        for entry in Folder(self._root):
            if entry.size is None:
                reason = _reason(entry)
                if reason is not None:
                    unreadable[entry.path] = reason
                continue
            seen = self._look(key_of(self._root, on_disk(entry.path)))
            if seen is not None:
                yield seen


def present(root: Path) -> list[Seen]:
    """All pictures below a folder, as they are now."""
    look = looking_in(root)
    found = [look(key_of(root, on_disk(entry.path))) for entry in Folder(root) if entry.size is not None]
    return [one for one in found if one is not None]


def _identity(root: Path) -> tuple[int, int] | None:
    try:
        found = root.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _reason(entry: Entry) -> str | None:
    """Why something cannot be listed; None where it went meanwhile."""
    try:
        entry.read(0)
    except OSError as error:
        return None if error.errno in (errno.ENOENT, errno.ENOTDIR) else error.strerror or str(error)
    return None


def _merged(
    files: Iterator[Seen], known: Iterator[tuple[Seen, bool]]
) -> Iterator[tuple[Seen | None, Seen | None, bool]]:
    """Files that are there and files that were scored, both by ascending key, each with its other."""
    row = next(known, None)
    for file in chain(files, [None]):
        while row is not None and (file is None or row[0].key < file.key):
            yield None, row[0], row[1]
            row = next(known, None)
        if file is None:
            return
        if row is not None and row[0].key == file.key:
            yield file, row[0], row[1]
            row = next(known, None)
        else:
            yield file, None, False
