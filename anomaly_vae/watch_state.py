"""What a watch has done, in one SQLite file: killed at any moment, the next one goes on from there.

`files`: of every file that was scored its size and time. `outbox`: verdicts whose line or move is not finished.
`webhooks`: what is still to be posted. Every change is on disk (`synchronous=FULL`) before anybody hears of it. A lock
beside the file keeps a second watch out; whoever dies loses it.
"""

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from anomaly_vae.errors import DataError
from anomaly_vae.paths import printable

_FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS files (key BLOB PRIMARY KEY, size INTEGER, mtime INTEGER, gone REAL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS files_gone ON files (gone) WHERE gone IS NOT NULL;
CREATE TABLE IF NOT EXISTS outbox (seq INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL, size INTEGER NOT NULL,
  mtime INTEGER NOT NULL, line TEXT NOT NULL, place BLOB, said INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS webhooks (seq INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL, tries INTEGER NOT NULL,
  due REAL NOT NULL);
CREATE INDEX IF NOT EXISTS webhooks_due ON webhooks (due, seq);
"""
_PAGE = 1000

Row = dict[str, Any]


def key_of(root: Path, path: Path) -> bytes:
    """A path below `root` without that, so that keys are sorted as by `order_of`: NUL is less than what names hold."""
    return os.fsencode(path.relative_to(root)).replace(b"/", b"\0")


def path_of(root: Path, key: bytes) -> Path:
    """The path of a key."""
    return root / os.fsdecode(key.replace(b"\0", b"/"))


@dataclass(frozen=True)
class Seen:
    """One file as it was found: `size` in bytes, `mtime` in nanoseconds."""

    key: bytes
    size: int
    mtime: int


@dataclass
class Verdict:
    """What was found of a file, until its line is printed and its move done. `place`: where it moves to, if it does.

    `said`: the line was printed, and only the move is left.
    """

    file: Seen
    row: Row
    place: bytes | None
    said: bool = False
    seq: int = 0


@dataclass(frozen=True)
class Waiting:
    """A verdict to be posted; `due` in seconds since 1970."""

    seq: int
    body: Row
    tries: int
    due: float


class WatchState:
    """Use it in a `with`. Any thread may call it. Raises `DataError` where it cannot be opened, or no longer written.

    `root`: the folder that it is of; that of another is refused, unless it lies inside and so moved along with it.
    """

    def __init__(self, place: Path, root: Path) -> None:
        self.place, self._root = place, root
        self._lock = threading.RLock()
        self._held: IO[bytes] | None = None
        self._database: sqlite3.Connection | None = None
        self._inode = 0

    def __enter__(self) -> "WatchState":
        try:
            self._claim()
            with self._errors("open"):
                self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None
            if self._held is not None:
                self._held.close()
                self._held = None

    def _claim(self) -> None:
        try:
            self._held = self.place.with_name(self.place.name + ".lock").open("ab")
        except OSError as error:
            what = f"cannot write the watch's state {printable(self.place)} ({error.strerror})"
            raise DataError(f"{what}; give another place by --state") from None
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = f"another watch is using {printable(self.place)}; stop it, or give this one another --state"
            raise DataError(busy) from None

    def _open(self) -> None:
        # Calls from threads come one by one, by the lock.
        self._database = sqlite3.connect(self.place, isolation_level=None, check_same_thread=False, timeout=30)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.executescript(_SCHEMA)
        found = self.fact("format")
        if found not in (None, _FORMAT):
            what = f"{printable(self.place)} is of another version of this program (format {found})"
            raise DataError(f"{what}; update the program, or give another --state")
        own, inside = printable(self._root.absolute()), self.place.absolute().is_relative_to(self._root.absolute())
        other = self.fact("folder")
        if other not in (None, own) and not inside:
            raise DataError(f"{printable(self.place)} is the state of a watch of {other}; give another --state")
        self.put_facts({"format": _FORMAT, "folder": own})
        self._inode = self.place.stat().st_ino

    @contextmanager
    def _errors(self, verb: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            what = f"cannot {verb} the watch's state {printable(self.place)} ({error})"
            raise DataError(f"{what}; mend that, or give another --state; what is not scored yet is kept") from None

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors("write"):
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _rows(self, what: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, self._errors("read"):
            return self._connection.execute(what, values).fetchall()

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._database is not None
        return self._database

    @property
    def in_place(self) -> bool:
        """Whether the file is still where it was: with its folder it may have gone."""
        try:
            return self.place.stat().st_ino == self._inode
        except OSError:
            return False

    def fact(self, name: str) -> Any:
        """A plain value that was put there, or None."""
        found = self._rows("SELECT value FROM facts WHERE name = ?", name)
        return json.loads(found[0][0]) if found else None

    def put_facts(self, facts: Mapping[str, Any]) -> None:
        """Keep plain values."""
        with self._writing() as connection:
            _put_facts(connection, facts)

    def known(self, key: bytes) -> Seen | None:
        """The file of this key as it was when it was scored."""
        found = self._rows("SELECT key, size, mtime FROM files WHERE key = ?", key)
        return Seen(*found[0]) if found else None

    def files(self) -> Iterator[tuple[Seen, bool]]:
        """All that were scored, by ascending key, and whether each is known to be gone; changes meanwhile may show."""
        after = b""
        # Page by page: a transaction that stays open would let the log beside the file grow.
        while rows := self._rows("SELECT * FROM files WHERE key > ? ORDER BY key LIMIT ?", after, _PAGE):
            for key, size, mtime, gone in rows:
                yield Seen(key, size, mtime), gone is not None
            after = rows[-1][0]

    def count_files(self) -> int:
        """How many were scored."""
        return int(self._rows("SELECT count(*) FROM files")[0][0])

    def leave_out(self, files: Iterable[Seen]) -> None:
        """Have these count as scored."""
        with self._writing() as connection:
            _put_files(connection, files)

    def mark(self, gone: Sequence[bytes], back: Sequence[bytes], now: float, forget_before: float) -> None:
        """Note which files are gone and which are there again; forget those that were gone before that time."""
        with self._writing() as connection:
            connection.executemany("UPDATE files SET gone = ? WHERE key = ? AND gone IS NULL", [(now, k) for k in gone])
            connection.executemany("UPDATE files SET gone = NULL WHERE key = ?", [(k,) for k in back])
            connection.execute("DELETE FROM files WHERE gone < ?", (forget_before,))

    def forget_files(self) -> None:
        """Have every file score again; what is on its way stays."""
        with self._writing() as connection:
            connection.execute("DELETE FROM files")

    def keep(self, verdicts: Sequence[Verdict], facts: Mapping[str, Any]) -> None:
        """Verdicts that nobody has heard of yet, and what is to change with them."""
        with self._writing() as connection:
            _put_files(connection, (one.file for one in verdicts))
            _put_facts(connection, facts)
            for one in verdicts:
                values = (one.file.key, one.file.size, one.file.mtime, json.dumps(one.row), one.place)
                added = connection.execute(
                    "INSERT INTO outbox (key, size, mtime, line, place, said) VALUES (?, ?, ?, ?, ?, 0)", values
                )
                one.seq = added.lastrowid or 0

    def unfinished(self) -> list[Verdict]:
        """Verdicts whose line or move is not finished, in their order."""
        rows = self._rows("SELECT seq, key, size, mtime, line, place, said FROM outbox ORDER BY seq")
        return [Verdict(Seen(*row[1:4]), json.loads(row[4]), row[5], bool(row[6]), row[0]) for row in rows]

    def plan(self, verdict: Verdict) -> None:
        """Keep another place to move to."""
        with self._writing() as connection:
            values = (verdict.place, json.dumps(verdict.row), verdict.seq)
            connection.execute("UPDATE outbox SET place = ?, line = ? WHERE seq = ?", values)

    def finish(self, done: Sequence[Verdict], stuck: Sequence[Verdict], hooks: Sequence[Row], now: float) -> None:
        """Lines are printed; those that are `done` are moved too, where wanted; `hooks` are to be posted."""
        with self._writing() as connection:
            for one in done:
                connection.execute("DELETE FROM outbox WHERE seq = ?", (one.seq,))
                if one.place is not None:
                    # The name is free again: whatever comes there is another file.
                    connection.execute("DELETE FROM files WHERE key = ? AND size = ? AND mtime = ?",
                                       (one.file.key, one.file.size, one.file.mtime))  # fmt: skip
            connection.executemany("UPDATE outbox SET said = 1 WHERE seq = ?", [(one.seq,) for one in stuck])
            connection.executemany(
                "INSERT INTO webhooks (body, tries, due) VALUES (?, 0, ?)", [(json.dumps(row), now) for row in hooks]
            )

    def next_webhook(self) -> Waiting | None:
        """That which is due first."""
        found = self._rows("SELECT seq, body, tries, due FROM webhooks ORDER BY due, seq LIMIT 1")
        return Waiting(found[0][0], json.loads(found[0][1]), *found[0][2:]) if found else None

    def count_webhooks(self) -> int:
        """How many are to be posted."""
        return int(self._rows("SELECT count(*) FROM webhooks")[0][0])

    def webhook_done(self, seq: int) -> None:
        """It was taken, or given up."""
        with self._writing() as connection:
            connection.execute("DELETE FROM webhooks WHERE seq = ?", (seq,))

    def webhook_later(self, seq: int, due: float) -> None:
        """It is to be tried again then."""
        with self._writing() as connection:
            connection.execute("UPDATE webhooks SET tries = tries + 1, due = ? WHERE seq = ?", (due, seq))


def _put_facts(connection: sqlite3.Connection, facts: Mapping[str, Any]) -> None:
    rows = [(name, json.dumps(value)) for name, value in facts.items()]
    connection.executemany("INSERT INTO facts VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", rows)


def _put_files(connection: sqlite3.Connection, files: Iterable[Seen]) -> None:
    rows = ((one.key, one.size, one.mtime) for one in files)
    connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, NULL)", rows)
