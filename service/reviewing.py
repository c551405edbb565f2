"""What people say of verdicts, and the pictures that chance draws for them to look at.

Only what was drawn by chance may recalibrate: among the pictures that somebody chose to look at, the flagged ones above
all, normal ones are not like the normal ones of the stream.
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sqlalchemy import RowMapping, func, insert, select, update

from service import ids
from service.auditing import note
from service.database import Database
from service.schema import FEEDBACK, PICTURES, REVIEWS, VERDICTS

Floats = npt.NDArray[np.float64]
Hashes = npt.NDArray[np.uint64]

LABELS = {"false_alarm": True, "confirmed": True, "missed": False, "normal": False, "unclear": None}
"""What may be said, and whether only of outliers (True), of others (False), or of all (None)."""
NORMAL = ("false_alarm", "normal")
"""Labels that say: this picture is normal."""


class UnknownVerdict(Exception):
    """There is no such verdict, or no longer."""


class Contradiction(Exception):
    """The label does not fit the verdict."""


@dataclass(frozen=True)
class Reviewed:
    """Verdicts drawn by chance under some versions: how many, how many of them a person judged without leaving one
    out, how many of those are unclear, and of those that are normal the scores and the files' hashes, where known."""

    drawn: int
    judged: int
    unclear: int
    normal_scores: Floats
    normal_files: Hashes


class Reviews:
    """Feedback and reviews."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def say(self, number: int, label: str, text: str, by: str) -> str | None:
        """Keep what a person said of a verdict; returns what was said before, None if nothing was.

        Raises `UnknownVerdict`, and `Contradiction` for a false alarm that was none.
        """
        with self._database.writing() as connection:
            # Locked, so that nobody forgets it or says something else of it meanwhile (SQLite has one writer anyway).
            found = select(VERDICTS.c.outlier).where(VERDICTS.c.id == number).with_for_update()
            outlier = connection.scalar(found)
            if outlier is None:
                raise UnknownVerdict
            if LABELS[label] is not None and bool(outlier) is not LABELS[label]:
                fits = [name for name, of_outliers in LABELS.items() if of_outliers in (bool(outlier), None)]
                was = "an outlier" if outlier else "no outlier"
                raise Contradiction(f"the verdict was {was}, so that it can be {' or '.join(fits)}, not {label}")
            own = FEEDBACK.c.id == number
            before = connection.scalar(select(FEEDBACK.c.label).where(own))
            row = {"label": label, "note": text, "by": by, "at": time.time()}
            if before is None:
                connection.execute(insert(FEEDBACK), {"id": number, **row})
            else:
                connection.execute(update(FEEDBACK).where(own).values(**row))
            connection.execute(update(REVIEWS).where(REVIEWS.c.id == number).values(label=label))
            note(connection, by, "feedback", ids.shown(number), before, label)
        return before

    def to_review(self, model: str | None, limit: int) -> list[RowMapping]:
        """Verdicts drawn by chance that nobody judged yet, the oldest first: `id`, `model` and whether there is a
        picture, and nothing that gives the verdict away."""
        has_picture = select(PICTURES.c.id).where(PICTURES.c.id == REVIEWS.c.id).exists().label("has_picture")
        query = (
            select(REVIEWS.c.id, REVIEWS.c.model, has_picture, VERDICTS.c.filename)
            .join(VERDICTS, VERDICTS.c.id == REVIEWS.c.id)
            .where(REVIEWS.c.label.is_(None))
            .order_by(REVIEWS.c.id)
            .limit(limit)
        )
        query = query if model is None else query.where(REVIEWS.c.model == model)
        with self._database.reading() as connection:
            return list(connection.execute(query).mappings())

    def reviewed(self, model: str, versions: list[str]) -> Reviewed:
        """What reviews under these versions of a model found, up to the first that nobody judged: beyond it somebody
        may have picked. A file that was sent again counts once."""
        r = REVIEWS.c
        ours = (r.model == model, r.version.in_(versions))
        same = func.coalesce(r.content, r.id)
        with self._database.reading() as connection:
            drawn = connection.scalar(select(func.count(same.distinct())).where(*ours)) or 0
            unjudged = connection.scalar(select(func.min(r.id)).where(*ours, r.label.is_(None)))
            said = select(same, r.score, r.label, r.content).where(*ours).order_by(r.id)
            said = said if unjudged is None else said.where(r.id < unjudged)
            rows = {row[0]: tuple(row[1:]) for row in reversed(connection.execute(said).all())}
        judged = [rows[key] for key in reversed(rows)]
        normal = [(score, content) for score, label, content in judged if label in NORMAL]
        unclear = sum(label in ("unclear", "forgotten") for _, label, _ in judged)
        scores = np.array([score for score, _ in normal], np.float64)
        files = np.array([content % (1 << 64) for _, content in normal if content is not None], np.uint64)
        return Reviewed(drawn, len(judged), unclear, scores, files)
