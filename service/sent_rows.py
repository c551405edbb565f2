"""Rows of a scan's result as they are sent: each is checked, and is a verdict to be kept or a file that failed."""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator
from sqlalchemy import Connection, RowMapping

from anomaly_vae import Spec
from service import ids
from service.errors import Problem
from service.ids import Ids
from service.metrics import Metrics
from service.records import Record
from service.scans import Scans, move_on
from service.store import Store

MOST_ROWS, MOST_BYTES = 1000, 4 << 20
_PART = "part_"
_MOST_PARTS, _LONGEST_NAME, _LONGEST_KEPT = 64, 64, 255

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Row(Spec):
    """One line of a result. Either a verdict (`score`, `p_value`, `outlier`) or an `error`; `part_...`: as it has."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Finite | None]

    path: str = Field(min_length=1, max_length=20_000)
    size: int | None = Field(None, ge=0, le=2**63 - 1)
    mtime: Finite | None = None
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    score: Finite | None = None
    p_value: float | None = Field(None, ge=0, le=1)
    outlier: bool | None = None
    error: str | None = Field(None, max_length=2000)
    version: str

    @model_validator(mode="after")
    def _either(self) -> Self:
        verdict = [self.score, self.p_value, self.outlier]
        if self.error is None and None in verdict:
            raise ValueError("it has neither an error nor all of score, p_value and outlier")
        if self.error is not None and any(one is not None for one in verdict):
            raise ValueError("it has an error and a verdict; a file has one of them")
        parts = self.__pydantic_extra__
        strange = next((name for name in parts if not name.startswith(_PART) or len(name) > _LONGEST_NAME), None)
        if strange is not None:
            raise ValueError(f"there is no column {strange[:40]!r}; parts of scores are called part_NAME")
        if len(parts) > _MOST_PARTS:
            raise ValueError(f"it has {len(parts)} parts, and no score has more than {_MOST_PARTS}")
        return self

    @property
    def parts(self) -> dict[str, float | None]:
        """Every score beside the fused one; null where it was no number."""
        return {name.removeprefix(_PART): value for name, value in self.__pydantic_extra__.items()}


@dataclass(frozen=True)
class OfScan:
    """What all rows of a scan have in common. `count`: how many it was told to have."""

    number: int
    model: str
    version: str
    source: str
    alpha: float
    expected_rate: float
    count: int

    @classmethod
    def of(cls, scan: RowMapping) -> "OfScan":
        """From a scan's row in the store."""
        names = ("model", "version", "source", "alpha", "expected_rate")
        return cls(scan["id"], count=scan["scored"] + scan["failed"], **{name: scan[name] for name in names})

    def record(self, row: Row, names: Ids) -> Record:
        """A verdict to keep. It stands at the moment when it came; its request is the scan, so that both are found by
        each other."""
        assert row.score is not None
        assert row.p_value is not None
        assert row.outlier is not None
        return Record(
            id=names.next(), request=request_of(self.number), filename=_kept(row.path), model=self.model,
            version=self.version, source=self.source, score=row.score, p_value=row.p_value, outlier=row.outlier,
            alpha=self.alpha, policy=0, expected=self.expected_rate, parts=row.parts,
        )  # fmt: skip


def request_of(number: int) -> str:
    """What the verdicts of a scan have for a request."""
    return f"scan-{ids.shown(number)}"


def rows_of(body: bytes, first: int, scan: OfScan) -> list[Row]:
    """The lines of a body; raises `Problem` that names the first bad one."""
    lines = [line for line in body.split(b"\n") if line.strip()]
    if len(lines) > MOST_ROWS:
        message = f"{len(lines):,} rows came at once, and {MOST_ROWS:,} are the most; send fewer at a time"
        raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_many_rows", message)
    if not lines:
        raise _bad("there is no row; send lines of JSON as .ndjson has them")
    if first + len(lines) > scan.count:
        raise _bad(f"the scan was told to have {scan.count:,} rows, and these go up to {first + len(lines):,}")
    return [_row(line, first + place, scan.version) for place, line in enumerate(lines)]


def _row(line: bytes, place: int, version: str) -> Row:
    try:
        row = Row.model_validate_json(line)
    except ValidationError as error:
        found: dict[str, Any] = dict(error.errors(include_url=False, include_input=False)[0])
        where = ".".join(str(part) for part in found["loc"])[:60]
        what = str(found["msg"]).removeprefix("Value error, ")[:200]
        raise _bad(f"row {place:,}: {f'{where}: ' if where else ''}{what}") from None
    if row.version != version:
        what = f"it is of version {row.version[:16]!r}, and the scan was told to be of {version}"
        raise _bad(f"row {place:,}: {what}; send the rows of that scan")
    return row


def _bad(message: str) -> Problem:
    return Problem(HTTPStatus.BAD_REQUEST, "bad_rows", message)


def _kept(path: str) -> str:
    """A path as any database takes it; of a long one its end, which tells more."""
    plain = path.replace("\0", "\ufffd")
    return plain if len(plain) <= _LONGEST_KEPT else "\u2026" + plain[1 - _LONGEST_KEPT :]


class _Overtaken(Exception):
    """The same rows came by another way meanwhile."""


class SentRows:
    """Keeps rows, each once however often it is sent: with them, in one transaction, the store counts how many of a
    scan's rows it has, and takes none but the next."""

    def __init__(self, scans: Scans, store: Store, names: Ids, metrics: Metrics) -> None:
        self._scans, self._store, self._names, self._metrics = scans, store, names, metrics

    def add(self, scan: OfScan, first: int, rows: list[Row]) -> int | None:
        """Keep those that are new; on disk when it returns how many there are, None where the scan is gone.

        Raises `Problem` where rows before these have not come.
        """
        while True:
            found = self._scans.scan(scan.number)
            if found is None:
                return None
            there = found["rows"] or 0
            if first > there:
                message = f"rows of this scan have come up to {there:,}; send those from {there} on"
                raise Problem(HTTPStatus.CONFLICT, "rows_missing", message)
            new = rows[there - first :]
            if not new:
                return int(there)
            try:
                self._keep(scan, new, there)
            except _Overtaken:
                continue
            return int(there + len(new))

    def _keep(self, scan: OfScan, rows: list[Row], there: int) -> None:
        records = [scan.record(row, self._names) for row in rows if row.error is None]

        def move(connection: Connection, _: object = None) -> None:
            if not move_on(connection, scan.number, there, there + len(rows)):
                raise _Overtaken

        # The alarms do not count them: they watch streams, and a scan says itself where its pictures are others.
        if records:
            self._store.write(records, move)
        else:
            with self._store.database.writing() as connection:
                move(connection)
        verdicts = [(record.p_value, record.outlier) for record in records]
        self._metrics.sent(scan.model, scan.version, scan.source, scan.expected_rate, verdicts)
        self._metrics.rejected("bad_image", len(rows) - len(records))
