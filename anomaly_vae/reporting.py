"""Reports: what a training or an evaluation found, as one HTML page that opens offline and asks for nothing.

All text goes through Jinja's escaping, charts hold no text of the user's, and the page's content security policy lets
only its own two scripts run, so that a file name or a label is never more than text.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anomaly_vae import __version__
from anomaly_vae import report_charts as charts
from anomaly_vae.bundle import write_durably
from anomaly_vae.detector import Detector
from anomaly_vae.engine import Engine
from anomaly_vae.errors import DataError
from anomaly_vae.evaluation import Cases, Evaluation, Kind
from anomaly_vae.images import encode_png
from anomaly_vae.rendering import heatmap
from anomaly_vae.spec import dump_yaml
from anomaly_vae.training import Trained

MISTAKES = 12
"""So many pictures are shown of each kind of mistake."""

_SMALL = 128


@dataclass(frozen=True)
class Fact:
    """A figure for people, `text`, and for machines, `json`; `key` is its name in `Evaluation.to_dict`."""

    name: str
    key: str
    json: str
    text: str


@dataclass(frozen=True)
class Mistake:
    """A wrongly judged picture with its heat map; both are data URIs of PNGs."""

    key: str
    label: str
    score: float
    p_value: float
    picture: str
    heat: str


def check_report(path: Path) -> None:
    """Refuse a place that a report cannot be written to, before any work is done; raises `DataError`."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise DataError(f"--report {path.name}: a report is a web page; give a name that ends in .html")
    if path.is_dir() or not path.absolute().parent.is_dir():
        why = "it is a folder" if path.is_dir() else "its folder does not exist"
        raise DataError(f"cannot write {path}: {why}; choose another --report")


def write_report(path: Path, page: str) -> None:
    """Write a page, whole or not at all; raises `DataError`."""
    try:
        # A name that is no Unicode shows as its bytes.
        write_durably(path, page.encode(errors="backslashreplace"))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; choose another --report") from None


def training_report(trained: Trained, sentence: str) -> str:
    """The page on a training; `sentence` says what a verdict means."""
    detector, metrics = trained.detector, trained.metrics
    calibration, members, cost = detector.calibration, metrics["members"], metrics["latent_cost"]
    scores = np.concatenate(calibration.scores)
    drawn = _history_charts(detector, members, cost)
    drawn["scores"] = charts.score_histogram(
        scores, np.zeros(0), detector.policy.threshold, ("calibration pictures", "")
    )
    return page(
        "training.html",
        f"Training of {trained.path.name}",
        detector,
        drawn,
        sentence=sentence,
        notes=trained.notes,
        cost=cost,
        models=[
            [one["name"], f"{one['epoch']} of {one['epochs']}", f"{one['held_out_loss']:.4g}", one["active_units"]]
            for one in members
        ],
        curves=sum(not one["kind"] for one in members),
        sizes=_made_from(metrics),
        seconds=metrics["seconds"],
        crossed=calibration.crossed,
    )


def _history_charts(detector: Detector, members: list[dict[str, Any]], cost: str) -> dict[str, charts.Chart]:
    """Curves over the epochs, of the first kind of model; of what a course never computed there is none."""
    members = [one for one in members if not one["kind"]]
    histories, kept = [one["history"] for one in members], [one["epoch"] for one in members]
    in_nats = detector.spec.objective.loss.kind == "nll" and detector.spec.model.latent.has_kl
    nats, whole = "nats per picture", "nats per picture" if in_nats else "loss per picture"
    quantities = {
        "loss": ({"loss": "training loss", "held_out": "held-out loss"}, whole),
        "reconstruction": ({"reconstruction": "reconstruction"}, nats),
        "latent": ({"latent": cost}, nats if detector.spec.model.latent.has_kl else f"{cost} per picture"),
    }
    return {
        name: charts.history_chart(histories, which, kept, unit)
        for name, (which, unit) in quantities.items()
        if any(row[key] is not None for history in histories for row in history for key in which)
    }


def evaluation_report(
    engine: Engine, evaluation: Evaluation, *, name: str, source: str, sentence: str, metrics: dict[str, Any]
) -> str:
    """The page on an evaluation of the bundle `name` with the pictures `source`.

    `sentence` says what a verdict means; `metrics` are the bundle's.
    """
    detector, cases = engine.detector, evaluation.cases
    missed, alarms = _worst(engine, cases)
    quality, calibration = evaluation.quality, detector.calibration
    return page(
        "evaluation.html",
        f"Evaluation of {name}",
        detector,
        _evaluation_charts(detector, evaluation),
        source=source,
        sentence=sentence,
        facts=list(_facts(evaluation)),
        alpha=evaluation.policy.alpha,
        confusion=list(_confusion(evaluation)),
        promised=evaluation.alarms_as_promised,
        crossed=calibration.crossed,
        grouped=calibration.groups is not None,
        banded=evaluation.policy.band is not None,
        auroc=quality and quality.auroc,
        average_precision=quality and quality.average_precision,
        share_abnormal=evaluation.n_abnormal / len(cases.scores),
        kinds=_kinds(evaluation),
        parts=[[part, f"{auroc:.4f}"] for part, auroc in sorted(evaluation.parts.items(), key=lambda one: -one[1])],
        missed=missed,
        missed_count=evaluation.n_abnormal - evaluation.detected,
        alarms=alarms,
        alarm_count=evaluation.false_alarms,
        small=max(detector.image.height, detector.image.width) < _SMALL,
        sizes=[*_made_from(metrics), *_tested(evaluation)],
    )


def worst(cases: Cases, count: int = MISTAKES) -> tuple[list[int], list[int]]:
    """Positions of missed outliers, the most normal first, and of false alarms, the most anomalous first."""
    # The p-value decides; scores order those of equal p.
    order = np.lexsort((cases.scores, -cases.p_values))
    missed = [int(i) for i in order if cases.abnormal[i] and not cases.flagged[i]]
    alarms = [int(i) for i in order[::-1] if cases.flagged[i] and not cases.abnormal[i]]
    return missed[:count], alarms[:count]


def _worst(engine: Engine, cases: Cases) -> tuple[list[Mistake], list[Mistake]]:
    missed, alarms = worst(cases)
    shown = [*missed, *alarms]
    if not shown:
        return [], []
    images = cases.pictures.images(shown)
    judged = engine.judge(images, heat=True)
    assert judged.heat is not None
    pages = []
    for i, image, heat in zip(shown, images.numpy(), judged.heat, strict=True):
        item = cases.pictures.items[i]
        # The picture stands beside it, and colours show best on their own.
        painted = heatmap(heat, judged.heat_scale)
        score, p_value = float(cases.scores[i]), float(cases.p_values[i])
        pages.append(Mistake(item.key, item.label, score, p_value, _data_uri(image), _data_uri(painted)))
    return pages[: len(missed)], pages[len(missed) :]


def _data_uri(image: npt.NDArray[np.uint8]) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()


def _evaluation_charts(detector: Detector, evaluation: Evaluation) -> dict[str, charts.Chart]:
    cases, policy, calibration = evaluation.cases, evaluation.policy, detector.calibration
    normal, drawn = ~cases.abnormal, {}
    if policy.threshold is None:
        cut = calibration.rank(policy.alpha, policy.mode) / (calibration.n + 1)
        drawn["p-values"] = charts.p_value_histogram(cases.p_values[normal], cases.p_values[~normal], cut)
    else:
        drawn["scores"] = charts.score_histogram(cases.scores[normal], cases.scores[~normal], policy.threshold)
    rate, found = evaluation.false_alarm_rate, evaluation.detection_rate
    if rate is not None and found is not None:
        flagged = evaluation.detected + evaluation.false_alarms
        decision = (found, evaluation.detected / flagged) if flagged else None
        drawn["roc"] = charts.roc_curve(cases.scores, cases.abnormal, (rate, found))
        drawn["precision-recall"] = charts.precision_recall_curve(cases.scores, cases.abnormal, decision)
    if rate is not None:
        curve = charts.alarm_curve(calibration, cases.p_values[normal], policy.mode)
        drawn["alarms"] = charts.alarm_chart(curve, policy.alpha)
    return drawn


def _facts(evaluation: Evaluation) -> Iterator[Fact]:
    """The figures of `to_dict` that are single numbers or ranges; what was not measured is left out."""
    known = {key: value for key, value in evaluation.to_dict().items() if value is not None}
    for name, key, form in (
        ("AUROC", "auroc", "{:.4f}"),
        ("AUROC, 95% interval", "auroc_interval", "{:.4f}"),
        ("Average precision", "average_precision", "{:.4f}"),
        ("Found at 1% false alarms", "tpr_at_1_fpr", "{:.1%}"),
        ("Alpha", "alpha", "{:g}"),
        ("Mode", "mode", "{}"),
        ("False alarms", "false_alarms", "{}"),
        ("False-alarm rate", "false_alarm_rate", "{:.2%}"),
        ("False alarms expected (90%)", "false_alarm_interval", "{}"),
        ("Outliers found", "detection_rate", "{:.1%}"),
        ("Normal pictures", "n_normal", "{:,}"),
        ("Abnormal pictures", "n_abnormal", "{:,}"),
        ("Pictures a second", "images_per_second", "{:.0f}"),
    ):
        if key in known:
            value = known[key]
            text = " to ".join(form.format(part) for part in (value if isinstance(value, tuple) else (value,)))
            yield Fact(name, key, json.dumps(value), text)
    for key, value in (known.get("pixels") or {}).items():
        name = {"auroc": "AUROC", "average_precision": "average precision", "pro": "PRO"}[key]
        yield Fact(f"Pixels: {name}", f"pixels-{key}", json.dumps(value), f"{value:.4f}")


def _confusion(evaluation: Evaluation) -> Iterator[list[str]]:
    for name, n, flagged in (
        ("normal", evaluation.n_normal, evaluation.false_alarms),
        ("abnormal", evaluation.n_abnormal, evaluation.detected),
    ):
        if n:
            yield [name, *(f"{count:,} ({count / n:.1%})" for count in (n - flagged, flagged))]


def _kinds(evaluation: Evaluation) -> list[list[str]]:
    kinds = sorted(evaluation.kinds, key=lambda kind: kind.flagged / kind.n)
    return [
        [_marked(kind), f"{kind.n:,}", f"{kind.flagged:,}", f"{kind.flagged / kind.n:.0%}", _number(kind.auroc)]
        for kind in kinds
    ]


def _number(auroc: float | None) -> str:
    return "-" if auroc is None else f"{auroc:.4f}"


def _marked(kind: Kind) -> str:
    """A kind's name, and whether it was shown in training."""
    return f"{kind.kind} (known in training)" if kind.known else kind.kind


def _made_from(metrics: dict[str, Any]) -> list[list[str]]:
    """Split sizes as the bundle's metrics tell them: nothing vouches for those, so they may also be absent."""
    parts, names = metrics.get("pictures"), {"train": "training", "fit": "score references", "calibrate": "calibration"}
    if not isinstance(parts, dict):
        return []
    rows = []
    for key, name in names.items():
        sizes = parts.get(key)
        if isinstance(sizes, list):
            rows.append([name + (", each model" if len(sizes) > 1 else ""), ", ".join(map(str, sizes))])
    return rows


def _tested(evaluation: Evaluation) -> list[list[str]]:
    return [
        ["test, normal", f"{evaluation.n_normal:,}"],
        ["test, abnormal", f"{evaluation.n_abnormal:,}"],
        ["left out: known to the detector, or a copy", f"{evaluation.excluded:,}"],
        ["unreadable", f"{evaluation.unreadable:,}"],
    ]


def page(template: str, title: str, detector: Detector, drawn: dict[str, charts.Chart], **content: Any) -> str:
    """A page that asks nothing of any network, from one of `templates`; `drawn`: charts by the id of their place."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    loader = PackageLoader("anomaly_vae")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.policies["json.dumps_kwargs"] = {"allow_nan": False}
    own = {name: loader.get_source(pages, name)[0] for name in ("report.css", "report.js")}
    scripts = [get_plotlyjs(), own["report.js"]]
    return pages.get_template(template).render(
        title=title,
        generator=__version__,
        version=detector.version,
        spec=dump_yaml(detector.spec.model_dump(mode="json")),
        charts=drawn,
        policy=_security_policy(scripts),
        # These are the product's own text, no user's.
        css=Markup(own["report.css"]),  # noqa: S704
        plotly=Markup(scripts[0]),  # noqa: S704
        script=Markup(scripts[1]),  # noqa: S704
        **content,
    )


def _security_policy(scripts: list[str]) -> str:
    """No request at all, no script but these."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )
