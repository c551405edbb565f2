"""The rows of `quality.py` as Markdown: per class, per method, bars, promises kept; nothing that failed is left out."""

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from quality_methods import PLAIN
from quality_rows import Book, Look, Row
from quality_tasks import CONTAMINATED, FEW, KNOWN, LEAVE_ONE_OUT, ONE_CLASS, PIPED, SHOWN

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
PLAIN_PAGE = f"# Detection quality\n\n{BEGIN}\n{END}\n"

Figure = Callable[[Row], float | None]
T = TypeVar("T")


@dataclass(frozen=True)
class Bar:
    """What the mean over all rows of a data set must reach, in percent."""

    data_set: str
    rows: int
    name: str
    figure: Figure
    least: float


def auroc(row: Row) -> float | None:
    """The image AUROC."""
    return row.auroc


def pixel_ap(row: Row) -> float | None:
    """The average precision of pixels."""
    return row.pixel_average_precision


BARS = (
    Bar(ONE_CLASS["mnist"], 10, "AUROC", auroc, 98.8),
    Bar(LEAVE_ONE_OUT, 10, "AUROC", auroc, 95.5),
    Bar(PIPED, 4, "AUROC", auroc, 99.0),
    Bar(PIPED, 4, "pixel AP", pixel_ap, 80.0),
)
LEVELS = (CONTAMINATED, FEW, SHOWN)
"""Their rows are levels of one thing: a mean over them says nothing."""


def write_page(book: Book, page: Path, quick: bool = False) -> None:
    """Put the tables between the markers of `page`, or at its end where it has none; all else in it stays."""
    text = page.read_text(encoding="utf-8") if page.exists() else PLAIN_PAGE
    if BEGIN not in text or END not in text.partition(BEGIN)[2]:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    tables = all_tables([row for row in book.rows if row.quick == quick], book.looks)
    warning = "**From a quick run: a check that everything works; the figures mean nothing.**\n\n" if quick else ""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{before}{BEGIN}\n{warning}{tables}\n{END}{after}", encoding="utf-8")


def all_tables(rows: Sequence[Row], looks: Sequence[Look]) -> str:
    """A section a data set and split, those that have no row named as such, and the looks at the test images."""
    names = dict.fromkeys((*KNOWN, *(row.data_set for row in rows)))
    pages = []
    for name in names:
        own = [row for row in rows if row.data_set == name]
        pages += [section(name, [row for row in own if row.split == part]) for part in _unique(r.split for r in own)]
        pages += [] if own else [f"## {name}\n\nnot measured here"]
    return "\n\n".join([*pages, f"## Looks at the test images\n\n{_looks(looks)}"])


def section(name: str, rows: Sequence[Row]) -> str:
    """All about one data set in one split."""
    title = name if rows[0].split == "only" else f"{name}, {rows[0].split}"
    pages = [f"## {title}", f"{'; '.join(_unique(row.about for row in rows))}.", "AUROC in %:", per_row(rows)]
    if name.startswith(LEVELS):
        more = [alarms(rows)]
    else:
        more = [pixels(rows), summary(rows), bars(name, rows), rates(rows), parts(rows)]
    return "\n\n".join([*pages, *(part for part in (*more, failures(rows)) if part), foot(rows)])


def per_row(rows: Sequence[Row], figure: Figure = auroc) -> str:
    """A line a class, a column a method; mean and standard deviation over seeds, and the mean of all classes."""
    methods = _unique(row.method for row in rows)
    names = sorted(_unique(row.row for row in rows), key=_natural)
    alone = len(names) == 1 and figure is auroc
    lines = [[name, *(_cell(_of(rows, method, name), figure, alone) for method in methods)] for name in names]
    if not rows[0].data_set.startswith(LEVELS) and len(names) > 1:
        lines.append(["**mean**", *(mean_cell(_of(rows, method), figure, len(names)) for method in methods)])
    return _table(["", *methods], lines)


def pixels(rows: Sequence[Row]) -> str:
    """The same for pixels, where there are masks."""
    known = any(row.pixel_average_precision is not None for row in rows)
    return f"Average precision of pixels in %:\n\n{per_row(rows, pixel_ap)}" if known else ""


def _cell(rows: Sequence[Row], figure: Figure, with_interval: bool = False) -> str:
    values = [value for row in rows if row.status == "done" and (value := figure(row)) is not None]
    bad = [row for row in rows if row.status != "done"]
    if not values:
        return ("failed" if bad[0].status == "failed" else "not measured here") if bad else "-"
    if with_interval and len(rows) == 1 and rows[0].auroc_interval:
        low, high = rows[0].auroc_interval
        return f"{_spread(values)} ({100 * low:.1f} to {100 * high:.1f})"
    return _spread(values) + (f" ({len(bad)} of {len(rows)} seeds failed)" if bad else "")


def mean_cell(rows: Sequence[Row], figure: Figure, wanted: int) -> str:
    """The mean over classes, ± its standard deviation over seeds; how many classes it is of where some are missing."""
    found = means(rows, figure)
    if not found:
        return "-"
    count = max(len(_done(rows, seed, figure)) for seed in _seeds(rows))
    return _spread(found) + ("" if count == wanted else f" ({count} of {wanted} rows)")


def means(rows: Sequence[Row], figure: Figure) -> list[float]:
    """The mean over the classes for each seed that has as many of them as any; one method's rows."""
    found = [_done(rows, seed, figure) for seed in _seeds(rows)]
    most = max((len(values) for values in found), default=0)
    return [statistics.fmean(values) for values in found if values and len(values) == most]


def _done(rows: Sequence[Row], seed: int, figure: Figure) -> list[float]:
    own = [row for row in rows if row.seed == seed and row.status == "done"]
    return [value for row in own if (value := figure(row)) is not None]


def summary(rows: Sequence[Row]) -> str:
    """A line a method: means over all rows and seeds, and false alarms as they were promised."""
    head = ["method", "AUROC", "AP", "TPR at 1% FPR", "pixel AUROC", "pixel AP", "PRO", "false alarms (expected)",
            "abnormal flagged", "train s", "ms an image"]  # fmt: skip
    count = len(_unique(row.row for row in rows))
    figures: list[Figure] = [
        auroc, lambda row: row.average_precision, lambda row: row.tpr_at_1_fpr,
        lambda row: row.pixel_auroc, pixel_ap, lambda row: row.pro,
    ]  # fmt: skip
    lines = []
    for method in _unique(row.method for row in rows):
        own = _of(rows, method)
        cells = [mean_cell(own, figure, count) for figure in figures]
        flagged = mean_cell(own, lambda row: row.flagged, count)
        lines.append([method, *cells, _alarms(own), flagged, _plain(own, "train_seconds"), _plain(own, "ms_an_image")])
    return "Means over all rows, in % where not said otherwise:\n\n" + _table(head, lines)


def alarms(rows: Sequence[Row]) -> str:
    """A line a level, a column a method that gives verdicts: false alarms as they were promised."""
    methods = _unique(row.method for row in rows if row.alpha is not None)
    names = sorted(_unique(row.row for row in rows), key=_natural)
    lines = [[name, *(_alarms(_of(rows, method, name)) for method in methods)] for name in names]
    return "False alarms (expected):\n\n" + _table(["", *methods], lines) if methods else ""


def _alarms(rows: Sequence[Row]) -> str:
    """False alarms of all rows, what was to be expected, and in how many rows they lie in the 90% interval."""
    own = [row for row in rows if row.false_alarms is not None]
    if not own:
        return "-"
    total = sum(row.n_normal or 0 for row in own)
    expected = sum((row.n_normal or 0) * (row.expected_rate or 0.0) for row in own)
    claimed = [(row.false_alarms or 0, row.false_alarm_interval) for row in own if row.false_alarm_interval]
    inside = sum(low <= alarms <= high for alarms, (low, high) in claimed)
    many = f"{inside} of {len(claimed)} rows in their" if len(rows) > 1 else f"{'in' if inside else 'not in'} the"
    said = f"; {many} 90% interval" if claimed else ""
    return f"{sum(row.false_alarms or 0 for row in own):,} of {total:,} ({expected:.1f}{said})"


def _plain(rows: Sequence[Row], name: str) -> str:
    values = [value for row in rows if (value := getattr(row, name)) is not None]
    return f"{statistics.fmean(values):.3g}" if values else "-"


def bars(name: str, rows: Sequence[Row]) -> str:
    """Which of the product's methods pass; one without figures for every class passes nothing."""
    lines = []
    for bar in (bar for bar in BARS if bar.data_set == name):
        for method in _unique(row.method for row in rows if row.product and row.method not in PLAIN):
            own = _of(rows, method)
            found = means(own, bar.figure)
            count = max(len(_done(own, seed, bar.figure)) for seed in _seeds(own))
            mean = 100 * statistics.fmean(found) if found else 0.0
            verdict = "**passed**" if mean >= bar.least else "not passed"
            if count < bar.rows:
                verdict = f"not passed: measured on {count} of {bar.rows}"
            lines.append([bar.name, f"{bar.least:g}", method, f"{mean:.2f}" if found else "-", verdict])
    return "Bars:\n\n" + _table(["figure", "at least", "method", "mean", "verdict"], lines) if lines else ""


def rates(rows: Sequence[Row]) -> str:
    """False-alarm rates over redrawn calibration sets."""
    lines = []
    for method in _unique(row.method for row in rows):
        every = [one for row in _of(rows, method) for one in row.achieved]
        for alpha in sorted({one.alpha for one in every}):
            same = [one for one in every if one.alpha == alpha]
            achieved = [statistics.fmean(getattr(one, part) for one in same) for part in ("mean", "low", "high")]
            spread = f"{achieved[1]:.2%} to {achieved[2]:.2%}"
            inside = sum(one.interval[0] <= one.mean <= one.interval[1] for one in same)
            counted = f"{inside} of {len(same)}"
            lines.append([method, f"{alpha:.0%}", f"{achieved[0]:.2%}", spread, counted, str(same[0].redraws)])
    head = ["method", "alpha", "achieved rate", "5% to 95% of the redraws", "rows in their 90% interval", "redraws"]
    said = (
        "False alarms over redrawn calibration sets, mean of the rows. The sets share pictures and are tested on the "
    )
    said += "same ones; the interval is that of wholly new sets and test pictures"
    return f"{said}:\n\n{_table(head, lines)}" if lines else ""


def parts(rows: Sequence[Row]) -> str:
    """AUROC of every single score of the product's methods."""
    methods = [method for method in _unique(row.method for row in rows) if any(r.parts for r in _of(rows, method))]
    names = _unique(name for row in rows for name in row.parts)
    lines = []
    for method in methods:
        own = [row for row in _of(rows, method) if row.parts]
        values = [[row.parts[name] for row in own if name in row.parts] for name in names]
        lines.append([method, *(f"{100 * statistics.fmean(v):.2f}" if v else "-" for v in values)])
    return "Single scores, mean AUROC in %:\n\n" + _table(["method", *names], lines) if lines else ""


def failures(rows: Sequence[Row]) -> str:
    """Why rows have no figures."""
    lines = [f"- {row.method}, {row.row}, seed {row.seed}: {row.reason}" for row in rows if row.status == "failed"]
    for method, reason in _unique((row.method, row.reason) for row in rows if row.status == "absent"):
        lines.append(f"- {method}: not measured here; `{reason}`")
    return "Without figures:\n\n" + "\n".join(lines) if lines else ""


def foot(rows: Sequence[Row]) -> str:
    """Seeds, machine, versions and commands, and whether the rows come from one state of the code."""
    seeds = {method: len(_seeds(_of(rows, method))) for method in _unique(row.method for row in rows)}
    counts = sorted(set(seeds.values()))
    named = {count: ", ".join(method for method in seeds if seeds[method] == count) for count in counts}
    each = (f"{count} seed{'s' if count > 1 else ''}: {named[count]}" for count in counts)
    said = "; ".join(each) if len(counts) > 1 else f"Seeds: {counts[0]}"
    lines = [f"Mean ± standard deviation over seeds where there are several. {said}."]
    lines += ["Baselines without verdicts learn from all normals, those that calibrate the others included."]
    lines += ["Machine: " + "; ".join(_unique(row.machine for row in rows)) + "."]
    lines += ["Versions: " + "; ".join(_unique(row.versions for row in rows)) + "."]
    code = _unique(row.code for row in rows if row.product)
    lines += (
        [f"Code: {', '.join(code)}{', so not all rows are of one state' if len(code) > 1 else ''}."] if code else []
    )
    commands = "\n".join(f"    {command}" for command in _unique(row.command for row in rows))
    return "  \n".join(lines) + f"\n\n{commands}"


def _looks(looks: Sequence[Look]) -> str:
    if not looks:
        return "none so far"
    return _table(["date", "version", "command"], [[one.date, one.version, f"`{one.command}`"] for one in looks])


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.2f}{spread}"


def _of(rows: Sequence[Row], method: str, name: str | None = None) -> list[Row]:
    return [row for row in rows if row.method == method and name in (None, row.row)]


def _seeds(rows: Sequence[Row]) -> list[int]:
    return _unique(row.seed for row in rows)


def _unique(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _natural(text: str) -> list[tuple[int, str]]:
    """Numbers by their size: 16 before 200."""
    return [(int(piece), "") if piece.isdigit() else (0, piece) for piece in re.split(r"(\d+)", text)]
