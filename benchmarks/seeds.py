"""Every preset, trained briefly on real pictures: one table a data set of what each learns and what it finds.

    python benchmarks/seeds.py --data DIR --out build/seeds/seeds.json

DIR holds `mnist/` (the idx files as published), `faces_london/` and `piped/`; what is absent is not measured. No figure
comes from MNIST's official test part or from more than the first paper of PIPED. A row that stands in the file with the
same settings is not run again; the tables are written beside it as Markdown.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from benchmark_tasks import MAKERS, Task, tasks_of
from pydantic import Field

from anomaly_vae import AnomalyVaeError, ConfigError, DetectorSpec, Engine, Spec, __version__
from anomaly_vae.data import Pictures, open_pictures
from anomaly_vae.evaluation import Evaluation, evaluate
from anomaly_vae.metrics import detection
from anomaly_vae.model import AutoEncoder
from anomaly_vae.objectives import Objective
from anomaly_vae.observations import Observation, gaussian_blur
from anomaly_vae.presets import preset_names, read_preset
from anomaly_vae.scores import LocalMaximum
from anomaly_vae.training import train

BASELINE = "(mean picture, {})"
NEEDS_CLASSES = "needs normal pictures of several classes"


class Row(Spec):
    """One preset on one data set with one seed; figures are means over the held-out normal pictures.

    `seconds`: all of `train`, CPU time of all threads. `squared_error`: per pixel and channel, at the code's mean.
    `nats`: -log p(x given z) of an image, z drawn. `cost`: of the code, in nats for a KL; `cost_name` says which.
    `parts`: AUROC of each score by itself.
    """

    data_set: str
    preset: str
    seed: int
    settings: str
    status: Literal["done", "failed", "skipped"]
    reason: str = ""
    parameters: int | None = None
    steps: int | None = None
    seconds: float | None = None
    squared_error: float | None = None
    nats: float | None = None
    cost: float | None = None
    cost_name: str = ""
    active: int | None = None
    latents: int | None = None
    auroc: float | None = None
    auroc_interval: tuple[float, float] | None = None
    parts: dict[str, float] = Field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """`steps` of the optimiser at most, and no more than fit into `seconds`, as measured beforehand."""

    steps: int
    seconds: float
    quick: bool


class Book:
    """The rows in their JSON file, written after every change; rows of other settings stay in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[Row] = []
        if path.exists():
            try:
                self.rows = [Row.parse(row, str(path)) for row in json.loads(path.read_text())["rows"]]
            except (ValueError, KeyError, TypeError, ConfigError):
                raise ConfigError(f"{path} is no file of this benchmark's rows; choose another --out") from None

    def find(self, row: Row) -> Row | None:
        """The row of this data set, preset, seed and settings."""
        return next((one for one in self.rows if _key(one) == _key(row)), None)

    def steps_of(self, row: Row) -> int | None:
        """The steps that another seed was given; a mean over seeds must be of one budget."""
        others = (one for one in self.rows if _key(one)[1:] == _key(row)[1:] and one.steps)
        return next((one.steps for one in others), None)

    def put(self, row: Row, facts: dict[str, str]) -> None:
        """Add or replace."""
        self.rows = [one for one in self.rows if _key(one) != _key(row)] + [row]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = {**facts, "rows": [one.model_dump(mode="json") for one in self.rows]}
        fresh = self._path.with_suffix(".part")
        fresh.write_text(json.dumps(content, indent=1) + "\n")
        fresh.replace(self._path)


def _key(row: Row) -> tuple[int, str, str, str]:
    return row.seed, row.data_set, row.preset, row.settings


def seconds_a_step(spec: DetectorSpec, batch: int) -> float:
    """Time of one step, measured on noise: the mean of those at the start and at the end of training.

    It is the main thread's CPU time, which other programs on a busy machine do not stretch as they do the wall clock.
    """
    assert spec.image is not None
    shape = (spec.image.channels, spec.image.height, spec.image.width)
    if spec.model.condition is not None:
        spec = spec.with_overrides([f"model.condition.classes={json.dumps(spec.data.normal)}"])
    objective = Objective(spec.objective, spec.model.build(shape, 0)).train()
    objective.model.lay_channels_last()
    optimizer = torch.optim.AdamW(objective.model.parameters(), lr=1e-5)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, *shape, generator=generator).contiguous(memory_format=torch.channels_last)
    noise = torch.randn(batch, spec.model.latent.size, generator=generator)
    label = torch.zeros(batch, dtype=torch.int64) if spec.model.condition is not None else None
    spent = 0.0
    for progress in (0.0, 0.999):
        for warming in (True, False, False):
            started = time.thread_time()
            optimizer.zero_grad()
            objective(x, noise, progress, 0, label).total.backward()
            optimizer.step()
            spent += 0.0 if warming else time.thread_time() - started
    return spent / 4


def steps_within(budget: Budget, step_seconds: float) -> int:
    """Steps that the budget allows; a tenth of what was asked for in any case, so that a slow preset learns at all."""
    return max(1, budget.steps // 10, min(budget.steps, int(budget.seconds / step_seconds)))


def measure(spec: DetectorSpec, task: Task, budget: Budget, row: Row, steps: int | None) -> Row:
    """Train and judge. Raises whatever goes wrong."""
    if steps is None:
        count = sum(line.endswith("train") for line in (task.folder / "manifest.csv").read_text().splitlines())
        made = count * (1 - spec.split.fit - spec.split.calibrate)
        steps = steps_within(budget, seconds_a_step(spec, max(2, min(spec.training.batch_size, int(made)))))
    spec = spec.with_overrides([f"training.steps={steps}"])
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        trained = train(spec, task.folder, Path(scratch) / "bundle", device="cpu")
    assert trained is not None
    seconds = time.process_time() - started
    detector = trained.detector
    judged = evaluate(Engine(detector, "cpu"), task.folder)
    assert judged.quality is not None
    model = detector.members[0].model
    figures = on_normals(detector.spec, model, judged)
    return row.model_copy(
        update={
            "status": "done",
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "steps": steps,
            "seconds": seconds,
            "cost_name": model.law.cost_name,
            "latents": model.law.size,
            "auroc": judged.quality.auroc,
            "auroc_interval": judged.quality.auroc_interval,
            "parts": judged.parts,
            **figures,
        }
    )


def on_normals(spec: DetectorSpec, model: AutoEncoder, judged: Evaluation) -> dict[str, float | int]:
    """What a `Row` says of the held-out normal pictures of an evaluation."""
    pictures, normal = judged.cases.pictures, np.flatnonzero(~judged.cases.abnormal)
    x = (pictures.images(normal).float() / 255).contiguous(memory_format=torch.channels_last)
    condition, label = spec.model.condition, None
    if condition is not None:
        label = torch.tensor([condition.classes.index(pictures.items[i].label) for i in normal])
    noise = torch.randn(len(x), model.law.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = Objective(spec.objective, model).eval()(x, noise, 1.0, 0, label)
        seen = Observation(model, x, label)
        kl = model.law.kl(seen.posterior, seen.code) if model.law.has_kl else None
        return {
            "squared_error": _finite(float(seen.squared_error.mean()), "the squared error"),
            "nats": _finite(float(loss.reconstruction), "the reconstruction in nats"),
            "cost": _finite(float(loss.latent), "the cost of the code"),
            "active": int(model.law.active(seen.code, kl).sum()),
        }


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value}")
    return value


def baselines(name: str, task: Task) -> Iterator[Row]:
    """What the mean of all pictures that a detector may be made from does, untrained, under two of the scores."""
    spec = read_preset("vae", task.overrides)
    assert spec.image is not None
    pictures = open_pictures(task.folder, spec.data, spec.image)
    test, abnormal = _column(pictures, "split") == "test", _column(pictures, "normal") == "False"
    images = pictures.images(np.arange(len(pictures))).double() / 255
    errors = ((images - images[torch.from_numpy(~test)].mean(0)) ** 2).mean(1)
    blurred = gaussian_blur(errors, LocalMaximum().window * task.side)
    scores = {"squared error": errors.mean((1, 2)).numpy(), "local maximum": blurred.amax((1, 2)).numpy()}
    for score, values in scores.items():
        quality = detection(values[test & ~abnormal], values[test & abnormal])
        yield Row(
            data_set=name, preset=BASELINE.format(score), seed=0, settings="", status="done", parameters=0, steps=0,
            seconds=0.0, squared_error=float(scores["squared error"][test & ~abnormal].mean()),
            auroc=quality.auroc, auroc_interval=quality.auroc_interval,
        )  # fmt: skip


def _column(pictures: Pictures, name: str) -> "np.ndarray[tuple[int], np.dtype[np.str_]]":
    return np.array([str(getattr(item, name)) for item in pictures.items])


def rows_of(
    name: str, tasks: tuple[Task, Task | None], presets: Sequence[str], seeds: int, budget: Budget, book: Book
) -> Iterator[Row]:
    """All rows of a data set, yielded as they come."""
    yield from baselines(name, tasks[0])
    for preset in presets:
        for seed in range(seeds):
            yield one_row(name, tasks, preset, seed, budget, book)


def one_row(name: str, tasks: tuple[Task, Task | None], preset: str, seed: int, budget: Budget, book: Book) -> Row:
    """The row as it stands in the book, or measured now. A failure is a row as well, and is tried again next time."""
    task = tasks[1] if read_preset(preset).model.condition is not None else tasks[0]
    blank = Row(data_set=name, preset=preset, seed=seed, settings="", status="skipped", reason=NEEDS_CLASSES)
    if task is None:
        return blank
    try:
        spec = read_preset(preset, [*task.overrides, f"seed={seed}"])
        same = [spec.with_overrides(["seed=0"]).model_dump_json(), task.about, __version__, repr(budget)]
        settings = hashlib.sha256("\n".join(same).encode()).hexdigest()[:16]
        blank = blank.model_copy(update={"reason": "", "settings": settings})
        standing = book.find(blank)
        if standing is not None and standing.status == "done":
            return standing
        return measure(spec, task, budget, blank, book.steps_of(blank))
    except Exception as error:  # whatever it is, the table shows it instead of ending here
        kind = "" if isinstance(error, AnomalyVaeError) else f"{type(error).__name__}: "
        return blank.model_copy(update={"status": "failed", "reason": kind + " ".join(str(error).split())})


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a preset in the given order; several seeds as mean +- sd, or what they failed of."""
    lines = [
        "| preset | parameters | steps | seconds | squared error | nats | cost of the code | active | AUROC |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for preset in dict.fromkeys(row.preset for row in rows):
        found = [row for row in rows if row.preset == preset]
        done = [row for row in found if row.status == "done"]
        bad = [row for row in found if row.status != "done"]
        if done:
            lines.append(f"| {preset} | {' | '.join(_cells(done))} |")
        if bad:
            share = f" ({len(bad)} of {len(found)} seeds)" if done else ""
            reason = bad[0].reason.replace("|", "/")
            said = f"not run: {reason}" if bad[0].status == "skipped" else f"failed: {reason}"
            lines.append(f"| {preset}{share} | {said} |" + " |" * 7)
    return "\n".join(lines)


def _cells(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    named = "none" if first.cost_name == "penalty" and not any(row.cost for row in rows) else None
    cost = _mean([row.cost for row in rows], ".1f")
    active = _mean([row.active for row in rows], ".0f" if len(rows) == 1 else ".1f")
    auroc = _mean([row.auroc for row in rows], ".3f")
    if len(rows) == 1 and first.auroc_interval is not None:
        auroc += f" ({first.auroc_interval[0]:.3f}-{first.auroc_interval[1]:.3f})"
    return [
        f"{first.parameters:,}",
        str(first.steps),
        _mean([row.seconds for row in rows], ".1f"),
        _mean([row.squared_error for row in rows], ".4f"),
        _mean([row.nats for row in rows], ".0f"),
        (named or f"{first.cost_name} {cost}") if first.cost_name else "-",
        f"{active} of {first.latents}" if first.latents else "-",
        auroc,
    ]


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):{form}}{spread}"


def page(title: str, tasks: tuple[Task, Task | None] | None, rows: Sequence[Row]) -> str:
    """A data set's heading, how it was divided, and its table."""
    if tasks is None:
        return f"### {title}\n\nnot measured here"
    about = tasks[0].about + (f". Conditional presets: {tasks[1].about}" if tasks[1] else "")
    return f"### {title}\n\n{about}.\n\n{table(rows)}"


def facts(budget: Budget, seeds: int) -> dict[str, str]:
    """Settings, machine and versions; no paths, so that the file may be shown around."""
    names = ("torch", "numpy", "scikit-learn")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    threads = torch.get_num_threads()
    most = f"at most {budget.steps} steps a row, and {budget.seconds:g} s of CPU for them"
    return {
        "settings": f"{most}; {'seed 0' if seeds == 1 else f'seeds 0 to {seeds - 1}'}",
        "machine": f"{os.cpu_count()} cores of {processor or platform.machine()}, {threads} torch threads",
        "versions": f"anomaly-vae {__version__}, Python {platform.python_version()}, {versions}",
    }


def main() -> int:
    options = parsed()
    budget = Budget(20, 1.0, True) if options.quick else Budget(options.steps, options.seconds, False)
    book, known = Book(options.out), facts(budget, options.seeds)
    pages: list[str] = []
    for name in options.data_sets:
        with tempfile.TemporaryDirectory() as scratch:
            tasks, rows = tasks_of(name, options.data, Path(scratch), budget.quick), []
            for row in rows_of(name, tasks, options.presets, options.seeds, budget, book) if tasks else ():
                rows.append(row)
                book.put(row, known)
                print(f"{name} {row.preset} seed {row.seed}: {told(row)}", flush=True)
            pages.append(page(MAKERS[name][0], tasks, rows))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".md").write_text("\n\n".join([*known.values(), *pages]) + "\n")
    print("", *pages, sep="\n\n")
    return 0


def told(row: Row) -> str:
    """A row as a line of progress."""
    if row.status != "done":
        return f"{row.status}: {row.reason}"
    return f"AUROC {row.auroc:.3f}, {row.steps} steps in {row.seconds:.1f} s"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist/, faces_london/ and piped/")
    parser.add_argument("--out", type=Path, default=Path("build/seeds/seeds.json"), help="where the rows are kept")
    # A preset of several kinds of models is as good as they are: each has its own row.
    single = [name for name in preset_names() if not read_preset(name).beside]
    parser.add_argument("--presets", nargs="+", default=single, choices=single, metavar="PRESET")
    parser.add_argument("--data-sets", nargs="+", default=list(MAKERS), choices=list(MAKERS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=400, help="of the optimiser, at most")
    parser.add_argument("--seconds", type=float, default=15, help="of CPU for these steps, at most, by a measured step")
    parser.add_argument("--seeds", type=int, default=1, help="how many; the tables then say mean ± sd")
    parser.add_argument("--quick", action="store_true", help="20 steps on few pictures: does everything run?")
    options = parser.parse_args()
    if min(options.steps, options.seconds, options.seeds) <= 0:
        parser.error("--steps, --seconds and --seeds must be above 0")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AnomalyVaeError as error:
        sys.exit(f"error: {error}")
