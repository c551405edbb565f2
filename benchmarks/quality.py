"""Detection quality on real pictures, against baselines that see the same pixels, and whether verdicts keep their rate.

    python benchmarks/quality.py mnist-one-class --data DIR --classes 3,7
    python benchmarks/quality.py folder pictures/ -o 'data.normal=[clean]'
    python benchmarks/quality.py table

DIR holds `mnist/` (the idx files as published), `piped/` and `faces_london/`; what is absent is not measured. Rows go
into a JSON file as soon as they are measured, and a row that stands there with the same settings, pictures and code is
not measured again. `--split dev`, the default, looks at no official test part; `--split test` is for a release, and
every such run is listed in the file. `table` writes the rows into docs/quality.md.
"""

import argparse
import datetime as dt
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from baselines import MissingError
from quality_methods import PLAIN, Case, Method, measure, methods_of, settings_of
from quality_rows import Book, Look, Row, machine, product_code, versions
from quality_series import contaminated, few_normals, known_anomalies
from quality_tables import write_page
from quality_tasks import AbsentError, Task, Wanted, faces, folder, leave_one_out, mvtec, one_class, piped

from anomaly_vae import AnomalyVaeError, ConfigError, ImageSpec, pick_device
from anomaly_vae.presets import DEFAULT, read_preset

ROOT = Path(__file__).parent.parent
TASKS: dict[str, Callable[[Wanted], Iterator[Task]]] = {
    "mnist-one-class": lambda wanted: one_class("mnist", wanted),
    "mnist-leave-one-out": leave_one_out,
    "piped": piped,
    "faces": faces,
    "contaminated": contaminated,
    "few-normals": few_normals,
    "known-anomalies": known_anomalies,
    "folder": folder,
    "fashion-mnist": lambda wanted: one_class("fashion_mnist", wanted),
    "cifar10": lambda wanted: one_class("cifar10", wanted),
    "mvtec": mvtec,
}
OWN_ROOT = ("folder", "fashion-mnist", "cifar10", "mvtec")
WITH_CLASSES = ("mnist-one-class", "mnist-leave-one-out", "contaminated", "few-normals", "known-anomalies",
                "fashion-mnist", "cifar10", "mvtec")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Planned:
    """A row to be measured, or the one that stands for it already."""

    task: Task
    method: Method
    blank: Row
    standing: Row | None


class Run:
    """The rows of one command: what is planned, what is measured, how long it takes."""

    def __init__(self, options: argparse.Namespace, book: Book) -> None:
        self.options, self.book = options, book
        self.device = pick_device(options.device)
        self.methods = methods_of(options.methods, options.presets, _of_models(options.override))
        for method in self.methods:
            if method.preset and method.name not in PLAIN:
                read_preset(method.preset, method.overrides)  # a mistake in an override ends the command, not each row
        self.image_overrides = [text for text in options.override if text.startswith("image")]
        self.image: ImageSpec | None = read_preset(DEFAULT, self.image_overrides).image
        self.seeds = options.seeds or (3 if self.device.type == "cuda" else 1)
        self._started, self._spent = time.monotonic(), dict[str, list[float]]()

    def plan(self, tasks: Sequence[Task]) -> list[Planned]:
        """All rows, task by task. What does not depend on chance has one seed."""
        every = ((task, seed, method) for task in tasks for seed in range(self.seeds) for method in self.methods)
        return [self._planned(task, method, seed) for task, seed, method in every if method.by_chance or not seed]

    def _planned(self, task: Task, method: Method, seed: int) -> Planned:
        quick, settings = self.options.quick, ""
        try:
            same = method.spec(task, self.image_overrides, 0, quick) if method.preset else None
            settings = settings_of(task, method, self.image, same)
        except AnomalyVaeError:
            pass  # measuring says it again, and then it is recorded
        blank = Row(
            data_set=task.data_set, row=task.row, method=method.name, seed=seed, split=task.split, quick=quick,
            product=method.preset is not None, settings=settings, code=method.code, about=task.about,
            versions=versions(), machine=machine(self.device), command=self.options.told,
        )  # fmt: skip
        return Planned(task, method, blank, self.book.standing(blank) if settings else None)

    def measure_all(self, planned: Sequence[Planned], scratch: Path) -> list[Row]:
        """Measure what does not stand yet, writing each row down; the rows measured."""
        left = [one for one in planned if one.standing is None]
        print(f"rows: {len(planned)}, measured before: {len(planned) - len(left)}; {self._seeds_said()}")
        if any(one.task.split == "test" for one in left):
            today = dt.datetime.now(dt.UTC).date().isoformat()
            self.book.look(Look(date=today, version=product_code(), command=self.options.told))
        rows, case = [], None
        for i, one in enumerate(left):
            if case is None or case.task is not one.task:
                case = Case(one.task, scratch / f"task{i}", self.image)
            started = time.monotonic()
            row = self._row(case, one)
            self._spent.setdefault(one.method.name, []).append(time.monotonic() - started)
            self.book.put(row)
            rows.append(row)
            print(f"[{i + 1}/{len(left)}] {_told(row)}; {self._times(left[i + 1 :])}", flush=True)
        return rows

    def _row(self, case: Case, one: Planned) -> Row:
        """Measured, or failed: whatever goes wrong is a row as well, and is tried again next time."""
        try:
            quick, seed = self.options.quick, one.blank.seed
            spec = one.method.spec(one.task, self.image_overrides, seed, quick) if one.method.preset else None
            return one.blank.model_copy(update=measure(case, one.method, spec, seed, str(self.device)))
        except MissingError as error:
            return one.blank.model_copy(update={"status": "absent", "reason": str(error)})
        except Exception as error:  # the table shows it instead of ending here
            kind = "" if isinstance(error, AnomalyVaeError) else f"{type(error).__name__}: "
            return one.blank.model_copy(update={"status": "failed", "reason": kind + " ".join(str(error).split())})

    def _seeds_said(self) -> str:
        if self.options.seeds:
            return f"seeds: {self.seeds}"
        return f"seeds: {self.seeds}, since this is a {'GPU' if self.seeds > 1 else 'CPU'}; --seeds for more or fewer"

    def _times(self, left: Sequence[Planned]) -> str:
        """Time since the start, and what is left by the mean time of each method's rows so far."""
        every = [seconds for times in self._spent.values() for seconds in times]
        each = {name: sum(times) / len(times) for name, times in self._spent.items()}
        ahead = sum(each.get(one.method.name, sum(every) / len(every)) for one in left)
        return f"{_clock(time.monotonic() - self._started)} elapsed, about {_clock(ahead)} left"


def _of_models(overrides: Sequence[str]) -> list[str]:
    """Without settings of `data`: these say how a folder is read, and a task's manifest is read in its own way."""
    return [text for text in overrides if not text.startswith("data.")]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _told(row: Row) -> str:
    named = f"{row.data_set}, {row.row}, {row.method}, seed {row.seed}"
    if row.status == "absent":
        return f"{named}: not measured here: {row.reason}"
    if row.status == "failed":
        return f"{named}: failed: {row.reason}"
    alarms = "" if row.alpha is None else f", {row.false_alarms} of {row.n_normal} false alarms at {row.alpha:g}"
    return f"{named}: AUROC {row.auroc:.4f}{alarms}"


def main() -> int:
    options = parsed()
    options.told = shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]])
    if options.command == "table":
        if not options.out.exists():
            sys.exit(f"error: there is no {options.out}; measure something first, such as `quality.py piped`")
        write_page(Book(options.out), options.page, options.quick)
        print(f"tables written to {options.page}")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        try:
            tasks = list(TASKS[options.command](wanted(options, Path(scratch))))
        except AbsentError as error:
            print(f"{options.command}: not measured here: {error}")
            return 0
        run = Run(options, Book(options.out))
        rows = run.measure_all(run.plan(tasks), Path(scratch))
    failed = sum(row.status == "failed" for row in rows)
    print(f"rows measured: {len(rows)}, failed: {failed}; all stand in {options.out}")
    return 0


def wanted(options: argparse.Namespace, scratch: Path) -> Wanted:
    """The tasks that the command line asks for."""
    of_data = next((text for text in options.override if text.startswith("data.")), None)
    if of_data and options.command != "folder":
        raise ConfigError(f"-o {of_data}: how {options.command} is divided is fixed; settings of data are for folder")
    return Wanted(
        data=options.data,
        scratch=scratch,
        split=options.split,
        quick=options.quick,
        root=getattr(options, "root", None),
        classes=tuple(options.classes.split(",")) if getattr(options, "classes", "") else (),
        papers=getattr(options, "papers", ""),
        limit=getattr(options, "limit", None),
        group_sheets=getattr(options, "group_sheets", False),
        spec=read_preset(DEFAULT, options.override).data,
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in TASKS:
        _measuring(name, commands.add_parser(name))
    table = commands.add_parser("table", help="write the rows into a page, between its markers")
    table.add_argument("--out", type=Path, default=ROOT / "build/quality/quality.json", help="where the rows are kept")
    table.add_argument("--page", type=Path, default=ROOT / "docs/quality.md", help="Markdown; what else it says stays")
    table.add_argument("--quick", action="store_true", help="the rows of --quick runs instead of the real ones")
    options = parser.parse_args()
    if (getattr(options, "seeds", None) or 1) < 1 or (getattr(options, "limit", None) or 1) < 1:
        parser.error("--seeds and --limit must be above 0")
    return options


def _measuring(name: str, parser: argparse.ArgumentParser) -> None:
    if name == "folder":
        parser.add_argument("root", help="a folder in any layout the product reads, a manifest, or NAME:FOLDER")
    elif name in OWN_ROOT:
        parser.add_argument("root", type=Path, nargs="?", help="folder of the data set; else looked for in --data")
    if name in WITH_CLASSES:
        parser.add_argument("--classes", default="", metavar="A,B", help="these classes alone")
    if name in ("piped", "contaminated"):
        parser.add_argument("--papers", default="", metavar="A:B", help="these alone of the papers sorted by name")
        parser.add_argument("--group-sheets", action="store_true", help="crops of one sheet are one group")
    if name in ("mnist-one-class", "mnist-leave-one-out", "contaminated", "fashion-mnist", "cifar10"):
        parser.add_argument("--limit", type=int, help="training pictures, evenly thinned (leave-one-out: 6000)")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=ROOT / "build/quality/quality.json", help="where the rows are kept")
    parser.add_argument("--methods", metavar="A,B", help="default: the default preset and all baselines")
    parser.add_argument("--presets", metavar="A,B", help="presets to measure as well")
    parser.add_argument("-o", "--override", action="append", default=[], metavar="KEY=VALUE", help="for the presets")
    parser.add_argument("--seeds", type=int, help="how many; default 3 on a GPU, 1 on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="test: once a release, and recorded")
    parser.add_argument("--quick", action="store_true", help="few pictures and steps: does everything run?")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AnomalyVaeError as error:
        sys.exit(f"error: {error}")
