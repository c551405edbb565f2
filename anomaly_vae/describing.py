"""The verb `info`: what a bundle is, in plain facts."""

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from anomaly_vae.bundle import Bundle
from anomaly_vae.detector import Detector


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
