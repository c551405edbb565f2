"""What people see in a terminal: progress, tables, lines. Notes go to standard error, results to standard output."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from anomaly_vae.classifying import Classified
    from anomaly_vae.detector import Detector
    from anomaly_vae.evaluation import Evaluation
    from anomaly_vae.fitting import Progress as FittingProgress
    from anomaly_vae.training import Trained

# A pipe has no width; tables that wrap at 80 columns there could not be searched.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True, highlight=False, soft_wrap=True)

PLAIN_SECONDS = 10.0
_IN_TRAINING = {True: "known", False: "unseen", None: "?"}
_WIDE = 130
"""Columns from which on the parts of the loss fit beside the bar."""


def note(line: str) -> None:
    """A line for people; machines reading standard output do not see it."""
    err.print(line, markup=False)


def say(line: str | None) -> None:
    """A line of the result, if there is one."""
    if line is not None:
        out.print(line, markup=False)


class TrainingView:
    """Epoch by epoch: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, bar: Progress | None) -> None:
        self.bar = bar
        self.tasks: dict[int, TaskID] = {}
        self.printed = 0.0

    def __call__(self, member: int, members: int, progress: "FittingProgress") -> None:
        losses = f"loss {progress.loss:.1f}"
        if self.bar is None or err.width >= _WIDE:
            parts = {"reconstruction": progress.reconstruction, progress.cost_name: progress.latent}
            losses += "".join(f"  {name} {value:.1f}" for name, value in parts.items() if not math.isnan(value))
        losses += "" if math.isnan(progress.held_out) else f"  held-out {progress.held_out:.1f}"
        who = f"model {member + 1}/{members}" if members > 1 else "training"
        if self.bar is not None:
            if member not in self.tasks:
                self.tasks[member] = self.bar.add_task(who, total=progress.epochs, losses="")
            self.bar.update(self.tasks[member], completed=progress.epoch, losses=losses)
        elif time.monotonic() - self.printed > PLAIN_SECONDS or progress.epoch == progress.epochs:
            self.printed = time.monotonic()
            rate = f"{progress.images_per_second:.0f} images/s"
            note(f"{who}  epoch {progress.epoch}/{progress.epochs}  {losses}  {rate}")


@contextmanager
def training_view() -> Iterator[TrainingView]:
    """A `TrainingView` that fits where standard error goes."""
    if not err.is_terminal:
        yield TrainingView(None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[losses]}"), console=err) as bar:
        yield TrainingView(bar)


def policy_line(detector: "Detector") -> str:
    """What a verdict means, in one sentence."""
    policy, calibration = detector.policy, detector.calibration
    text = f"alpha {policy.alpha:g} ({policy.mode}) from {calibration.n} calibration images"
    rate = f"expect {policy.expected_false_alarm_rate:.2%} false alarms"
    if calibration.crossed:
        text += f", {len(calibration.scores)}-fold"
    if calibration.groups is not None:
        groups = f"{calibration.groups} groups" if calibration.groups else "groups that nobody knows"
        text += f" in {groups}: {rate} among pictures of such groups; nothing is proven for new ones"
    elif policy.bound is not None and calibration.crossed:
        text += f": {rate} (nominal; proven to be at most {policy.bound:.1%} on average)"
    elif policy.band is not None:
        low, high = policy.band
        text += f": {rate} (90% band {low:.2%} to {high:.2%})"
    return text


def trained_lines(trained: "Trained") -> Iterator[str | None]:
    """What came of a training."""
    yield f"trained in {trained.seconds:.0f} s"
    for kind, expert in trained.detector.spec.experts.items():
        members = [one for one in trained.metrics["members"] if one["kind"] == kind]
        kept = ", ".join(f"epoch {one['epoch']} of {one['epochs']}" for one in members)
        best = f"kept {kept} (lowest held-out loss); " if expert.training.select == "best" else ""
        units = ", ".join(str(one["active_units"]) for one in members)
        yield f"{f'{kind}: ' if kind else ''}{best}active latent units: {units} of {expert.model.latent.size}"
    yield policy_line(trained.detector)
    yield power_line(trained.detector)
    yield f"bundle {trained.path} (version {trained.detector.version})"


def power_line(detector: "Detector") -> str | None:
    """What to do about a verdict that only the most extreme rank can give; None where there is room."""
    from anomaly_vae.calibration import ALPHA_LADDER

    policy, calibration = detector.policy, detector.calibration
    if calibration.rank(policy.alpha, policy.mode) > 1:
        return None
    more = next((alpha for alpha in ALPHA_LADDER if alpha > policy.alpha), min(2 * policy.alpha, 0.5))
    return (
        f"at alpha {policy.alpha:g} a picture must be more unusual than every calibration picture to be an outlier; "
        f"to find more, allow more false alarms (--alpha {more:g}) or add normal pictures"
    )


def evaluation_table(evaluation: "Evaluation") -> Table:
    """The figures of an evaluation, one a row."""
    table = Table("figure", "value", title="Evaluation on pictures the detector has not seen", title_justify="left")
    for name, value in _figures(evaluation):
        table.add_row(name, value)
    return table


def kinds_table(evaluation: "Evaluation") -> Table:
    """One row for each kind of abnormal picture; with known kinds also whether it is one of them."""
    columns = ["kind", "pictures", "flagged", "AUROC", *(["in training"] if evaluation.known_kinds else [])]
    table = Table(*columns, title="By kind", title_justify="left")
    for kind in evaluation.kinds:
        share, auroc = f"{kind.flagged} ({kind.flagged / kind.n:.0%})", _number(kind.auroc)
        seen = [_IN_TRAINING[kind.known]] if evaluation.known_kinds else []
        table.add_row(escape(kind.kind), str(kind.n), share, auroc, *seen)
    if any(kind.known is None for kind in evaluation.kinds):
        table.caption = "?: some known anomalies lie in no folder of their kind; put them into known_anomalies/KIND/"
        table.caption_justify = "left"
    return table


def _number(auroc: float | None) -> str:
    return "-" if auroc is None else f"{auroc:.3f}"


def _figures(evaluation: "Evaluation") -> Iterator[tuple[str, str]]:
    yield "normal / abnormal pictures", f"{evaluation.n_normal} / {evaluation.n_abnormal}"
    if evaluation.quality is not None:
        low, high = evaluation.quality.auroc_interval
        yield "AUROC", f"{evaluation.quality.auroc:.4f}  (95%: {low:.3f} to {high:.3f})"
        yield "average precision", f"{evaluation.quality.average_precision:.4f}"
        yield "found at 1% false alarms", f"{evaluation.quality.tpr_at_1_fpr:.1%}"
    if evaluation.pixels is not None:
        pixels = evaluation.pixels
        figures = f"AUROC {pixels.auroc:.4f}, average precision {pixels.average_precision:.4f}, PRO {pixels.pro:.4f}"
        yield "pixels", figures
    if evaluation.false_alarm_rate is not None:
        yield f"false alarms at alpha {evaluation.policy.alpha:g}", _alarms(evaluation)
    if evaluation.detection_rate is not None:
        yield "outliers found", f"{evaluation.detected} of {evaluation.n_abnormal} ({evaluation.detection_rate:.1%})"
    if evaluation.unseen is not None:
        unseen = evaluation.unseen
        found = f"{unseen.flagged} of {unseen.n} ({unseen.detection_rate:.1%}), AUROC {_number(unseen.auroc)}"
        yield "of kinds not shown in training", found
    yield "speed", f"{evaluation.images_per_second:.0f} images/s"


def _alarms(evaluation: "Evaluation") -> str:
    text = f"{evaluation.false_alarms} of {evaluation.n_normal} ({evaluation.false_alarm_rate:.1%})"
    if evaluation.false_alarm_interval is None:
        return f"{text}; nominally {evaluation.policy.expected_false_alarm_rate:.1%}"
    low, high = evaluation.false_alarm_interval
    verdict = "as promised" if evaluation.alarms_as_promised else "OUTSIDE what calibration predicts"
    return f"{text}; {low} to {high} expected: {verdict}"


def verdict_table(rows: list[dict[str, Any]]) -> Table:
    """Verdicts of single pictures."""
    boxes = any("regions" in row for row in rows)
    table = Table(
        "picture", "verdict", "p-value", "score", *(["hottest region (width x height at x, y)"] if boxes else [])
    )
    for row in rows:
        if row.get("error"):
            table.add_row(escape(row["path"]), f"unreadable: {escape(row['error'])}", "", "")
        else:
            verdict = "[bold red]outlier[/]" if row["outlier"] else "normal"
            figures = [f"{row['p_value']:.4f}", f"{row['score']:.3f}", *([_regions(row["regions"])] if boxes else [])]
            table.add_row(escape(row["path"]), verdict, *figures)
    return table


def _regions(regions: list[dict[str, Any]]) -> str:
    if not regions:
        return "none"
    first, more = regions[0], f" and {len(regions) - 1} more" if len(regions) > 1 else ""
    return f"{first['width']:.0f} x {first['height']:.0f} at {first['x']:.0f}, {first['y']:.0f}{more}"


def classes_table(classified: "Classified") -> Table:
    """Accuracies, one row for each count of labels and way to use them."""
    table = Table("labels", "encoder", "accuracy", title="Classes from few labels", title_justify="left")
    for row in classified.rows:
        spread = "" if row.sd is None else f" ± {row.sd:.1%}"
        table.add_row(str(row.labels), row.method, f"{row.mean:.1%}{spread}")
    return table
