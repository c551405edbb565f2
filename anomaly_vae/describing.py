"""The verb `info`: what a bundle is, in plain facts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from anomaly_vae.bundle import Bundle
from anomaly_vae.detector import Detector
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
        "parameters": sum(p.numel() for p in detector.members[0].model.parameters()),
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
        "data_fingerprint": bundle.description.get("data_fingerprint"),
        "metrics": {key: value for key, value in bundle.metrics.items() if key != "members"},
        "spec": detector.spec.model_dump(mode="json"),
    }


def facts_table(path: Path, facts: dict[str, Any]) -> Table:
    """The facts a person looks for."""
    image, spec = facts["image"], facts["spec"]["model"]
    kind = "colour" if image["channels"] == 3 else "grey"
    rows = {
        "version": facts["version"],
        "preset": facts["preset"],
        "pictures": f"{image['width']}x{image['height']} px, {kind}, {image['fit']}",
        "model": f"{spec['network']['kind']} network, {spec['latent']['size']} latents ({spec['latent']['kind']}), "
        f"{spec['likelihood']['kind']} likelihood, {facts['parameters']:,} parameters",
        **_unusual(DetectorSpec.parse(facts["spec"])),
        "models": f"{facts['members']}" + (" (K-fold)" if facts["members"] > 1 else ""),
        "scores": ", ".join(facts["scores"]),
        "verdict by": facts["verdict"],
        "made from": f"data {facts['data_fingerprint']}, torch {facts['torch']}",
        "on disk": f"{sum(facts['bytes'].values()) / 2**20:.1f} MiB",
    }
    table = Table("", escape(str(path)), title_justify="left")
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _unusual(spec: DetectorSpec) -> dict[str, str]:
    """What else makes the model and its training, a line each where it is not what most detectors have."""
    model, usual = spec.model, ModelSpec()
    options = _changed(model.latent, type(model.latent)())
    lines = {}
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
