"""The verb `info`: what a bundle is, in plain facts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from anomaly_vae.bundle import Bundle
from anomaly_vae.detector import Detector
from anomaly_vae.expert_spec import ExpertSpec
from anomaly_vae.images import inside
from anomaly_vae.model import ModelSpec
from anomaly_vae.objectives import AdversarySpec, LossSpec, ObjectiveSpec
from anomaly_vae.recipe import DetectorSpec
from anomaly_vae.spec import Spec


def bundle_facts(detector: Detector, bundle: Bundle) -> dict[str, Any]:
    """Facts for machines; the whole spec is among them."""
    policy = detector.policy
    return {
        "version": detector.version,
        "preset": detector.spec.preset,
        "image": detector.image.model_dump(mode="json"),
        "members": len(detector.members),
        "parameters": sum(p.numel() for model in detector.members[0].models() for p in model.parameters()),
        "scores": list(detector.spec.parts),
        "verdict": detector.spec.verdict,
        "alpha": policy.alpha,
        "mode": policy.mode,
        "threshold": policy.threshold,
        "expected_false_alarm_rate": policy.expected_false_alarm_rate,
        "false_alarm_band": policy.band,
        "calibration_images": detector.calibration.n,
        "calibration_groups": detector.calibration.groups,
        "bytes": {name: len(data) for name, data in bundle.files.items()},
        "torch": bundle.description.get("torch"),
        "known_kinds": list(detector.known_kinds),
        "data_fingerprint": bundle.description.get("data_fingerprint"),
        "metrics": {key: value for key, value in bundle.metrics.items() if key != "members"},
        "spec": detector.spec.model_dump(mode="json"),
    }


def facts_table(path: Path, facts: dict[str, Any]) -> Table:
    """The facts a person looks for."""
    image, spec = facts["image"], DetectorSpec.parse(facts["spec"])
    kind = "colour" if image["channels"] == 3 else "grey"
    rows = {
        "version": facts["version"],
        "preset": facts["preset"],
        "pictures": f"{image['width']}x{image['height']} px, {kind}, {image['fit']}",
        **_looked_at(spec),
        **_models(spec),
        **_shown(facts),
        "divisions": f"{facts['members']}" + (" (K-fold), each with all models" if facts["members"] > 1 else ""),
        "parameters": f"{facts['parameters']:,} a division",
        "scores": ", ".join(facts["scores"]),
        "verdict by": facts["verdict"],
        "made from": f"data {facts['data_fingerprint']}, torch {facts['torch']}",
        "on disk": f"{sum(facts['bytes'].values()) / 2**20:.1f} MiB",
    }
    table = Table("", escape(str(path)), title_justify="left")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _looked_at(spec: DetectorSpec) -> dict[str, str]:
    """In what pieces a picture is judged, and how much of it, a line each where it is not all at once."""
    lines = {}
    if spec.tiling is not None and spec.tiles is not None:
        overlap = f"overlapping by {spec.tiles.overlap:.0%}"
        lines["tiles"] = f"{spec.tiling.count} of {spec.tiling.side} px a picture, {overlap}"
    counts = inside(spec.image) if spec.image else None
    if counts is not None:
        lines["region"] = f"{float(counts.float().mean()):.1%} of the picture counts"
    return lines


def _shown(facts: dict[str, Any]) -> dict[str, str]:
    """What anomalies it was shown in training, if any."""
    kinds = facts["known_kinds"]
    return {"known anomalies": f"{', '.join(kinds)} (outlier exposure)"} if kinds else {}


def _models(spec: DetectorSpec) -> dict[str, str]:
    """Every kind of model, and what is unusual about it, a line each."""
    lines = {}
    for name, expert in spec.experts.items():
        model, of = expert.model, f"{name} " if name else ""
        many = f", {expert.ensemble} of them" if expert.ensemble > 1 else ""
        lines[f"{of}model"] = (
            f"{model.network.kind} network{' with skips' if model.network.sees_input else ''}, {model.latent.size} "
            f"latents ({model.latent.kind}), {model.likelihood.kind} likelihood{many}"
        )
        lines |= {f"{of}{what}": line for what, line in _unusual(expert).items()}
    return lines


def _unusual(spec: ExpertSpec) -> dict[str, str]:
    """What else makes the model and its training, a line each where it is not what most detectors have."""
    model, usual = spec.model, ModelSpec()
    options = _changed(model.latent, type(model.latent)())
    lines = {}
    if model.marker is not None:
        lines["marker"] = "marks damage; trained on synthetic defects"
    if model.views is not None:
        lines["views"] = "tells turned and mirrored pictures apart"
    if model.backbone is not None:
        lines["sees features of"] = " ".join([model.backbone.kind, getattr(model.backbone, "name", "network")])
    if model.latent.kind != usual.latent.kind or options:
        lines["law of z"] = ", ".join([model.latent.kind, *options])
    if model.condition is not None:
        names = model.condition.classes
        lines["classes"] = f"{len(names)} ({', '.join(names)}), {model.condition.scoring}"
    terms = [*_objective(spec.objective), *(["critic of pictures"] if model.critic else [])]
    if terms:
        lines["objective"] = "; ".join(terms)
    return lines


def _objective(objective: ObjectiveSpec) -> Iterator[str]:
    loss = _changed(objective.loss, LossSpec())
    if loss:
        yield ", ".join([f"loss {objective.loss.kind}", *(text for text in loss if not text.startswith("kind "))])
    if objective.corruption:
        yield f"corruption by {', '.join(one.kind for one in objective.corruption)}"
    if objective.perceptual is not None:
        network = objective.perceptual.network
        yield f"perceptual loss by {getattr(network, 'name', network.kind)}, weight {objective.perceptual.weight:g}"
    if objective.adversary is not None:
        yield ", ".join(["adversary", *_changed(objective.adversary, AdversarySpec())])
    if objective.course.kind != "joint":
        yield f"course {objective.course.kind}, share {objective.course.share:g}"
    if objective.encoder_steps:
        yield f"{objective.encoder_steps} encoder steps more"


def _changed(spec: Spec, usual: Spec) -> list[str]:
    """Settings that are not the usual ones, the number of latents apart."""
    now, then = spec.model_dump(mode="json"), usual.model_dump(mode="json")
    return [f"{name} {value}" for name, value in now.items() if value != then[name] and name != "size"]
