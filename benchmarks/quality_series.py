"""Tasks in which one thing changes: how many normals there are, how many are none, how many anomalies are known."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from quality_tasks import (
    CONTAMINATED,
    FEW,
    QUICK_TRAIN,
    SHOWN,
    AbsentError,
    Entry,
    Task,
    Wanted,
    classes_of,
    crops_of,
    papers_of,
    sheet_of,
    thin,
)

SHARES = (0.0, 0.01, 0.05, 0.1)
SIZES = (16, 50, 200, 1000)
SHOWN_COUNTS = (0, 20)


def few_normals(wanted: Wanted) -> Iterator[Task]:
    """A digit from fewer and fewer pictures, those that calibrate included; the test stays the same."""
    found = classes_of("mnist", wanted)
    for label in wanted.classes or ("3",):
        train = thin(found.made[label], QUICK_TRAIN if wanted.quick else None)
        for size in SIZES:
            if size <= len(train):
                entries = (*thin(train, size), *found.test_of([label], wanted.quick))
                about = f"one digit of MNIST, made from so many pictures, calibration included; {found.about}"
                yield Task(FEW, f"digit {label}: {size} normals", found.split, about, (label,), entries)


def contaminated(wanted: Wanted) -> Iterator[Task]:
    """Abnormal pictures, none of them a test picture, among those that are said to be normal: a digit and a paper."""
    absent = []
    for make in (_contaminated_digits, _contaminated_papers):
        try:
            yield from make(wanted)
        except AbsentError as error:
            absent.append(error)
    if len(absent) == 2:
        raise absent[0]


def _contaminated_digits(wanted: Wanted) -> Iterator[Task]:
    found = classes_of("mnist", wanted)
    for label in wanted.classes or ("3",):
        train = thin(found.made[label], QUICK_TRAIN if wanted.quick else wanted.limit)
        others = [entry for name in found.made if name != label for entry in found.made[name]]
        about = "MNIST: one digit, other digits hidden among its training pictures"
        test = found.test_of([label], wanted.quick)
        yield from _mixed(wanted, f"digit {label}", about, (label,), train, others, test)


def _contaminated_papers(wanted: Wanted) -> Iterator[Task]:
    for paper in papers_of(wanted)[: None if wanted.papers else 1]:
        train, test = crops_of(paper, wanted)
        defects = [entry for entry in test if entry.label == "defect"]
        # Whole sheets: no other crop of a contaminating sheet is left in the test.
        most = _abnormal_count(SHARES[-1], len(train))
        sheets = {sheet_of(entry.path) for entry in defects[:most]}
        spare = [entry for entry in defects if sheet_of(entry.path) in sheets]
        kept = [entry for entry in test if entry.label != "defect" or sheet_of(entry.path) not in sheets]
        about = "PIPED: crops of defective sheets hidden among the clean ones; these sheets are not in the test"
        yield from _mixed(wanted, paper.name, about, ("good",), train, spare, kept)


def _abnormal_count(share: float, normals: int) -> int:
    """How many abnormal pictures make up `share` of all; one at least, unless the share is zero."""
    return max(1, round(share / (1 - share) * normals)) if share else 0


def _mixed(
    wanted: Wanted,
    row: str,
    about: str,
    normal: tuple[str, ...],
    train: Sequence[Entry],
    others: Sequence[Entry],
    test: Sequence[Entry],
) -> Iterator[Task]:
    for count in dict.fromkeys(_abnormal_count(share, len(train)) for share in SHARES):
        hidden = [replace(entry, label=normal[0], train=True, mask=None) for entry in thin(others, count)]
        whole = len(train) + len(hidden)
        name = f"{row}: {len(hidden)} of {whole:,} ({len(hidden) / whole:.0%})"
        yield Task(wanted.named(CONTAMINATED), name, wanted.split, about, normal, (*train, *hidden, *test))


def known_anomalies(wanted: Wanted) -> Iterator[Task]:
    """A digit beside few pictures of one other kind that training is shown: tested on that kind, and on all others."""
    found = classes_of("mnist", wanted)
    normal, kind = (*wanted.classes, "8", "3")[:2] if len(wanted.classes) != 1 else (wanted.classes[0], "3")
    train = thin(found.made[normal], QUICK_TRAIN if wanted.quick else wanted.limit)
    tested = found.test_of([normal], wanted.quick)
    about = f"one digit of MNIST, with pictures of one other that training is shown; {found.about}"
    for count in SHOWN_COUNTS:
        shown = [replace(entry, known=True, train=False) for entry in thin(found.made[kind], count)]
        for name, of_kind in ((f"kind {kind}", True), ("unseen kinds", False)):
            test = [entry for entry in tested if entry.label == normal or (entry.label == kind) is of_kind]
            row = f"digit {normal}, {count} of digit {kind} shown: {name}"
            yield Task(wanted.named(SHOWN), row, found.split, about, (normal,), (*train, *shown, *test))
