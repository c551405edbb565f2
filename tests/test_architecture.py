"""The house stands as `CONTRIBUTING.md` says: imports point down, the service sees only the library's front door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LIBRARY = [
    {"seeds", "answers"},
    {"watch_answers"},
    {"errors", "trickling"},
    {"asking"},
    {"scan_calls", "paths", "external_sort", "ray_cluster"},
    {"tables"},
    {"retrying"},
    {"client"},
    {"async_client"},
    {"spec", "image_sniffing", "torchvision_compat", "von_mises_fisher", "adversaries"},
    {"posteriors", "oriented_gradients"},
    {"latent_laws"},
    {"networks", "corruptions", "augmentation", "likelihoods", "latents", "marking", "viewing", "pretrained"},
    {"backbones", "image_headers", "calibration", "fusion", "metrics", "bundle"},
    {"images", "model", "checkpoints", "drift", "onnx_operators", "scan_ledger", "moving", "watch_state"},
    {"entries", "arrivals", "webhook"},
    {"source_archives", "object_store", "scan_manifest"},
    {"sources", "ray_pipeline"},
    {"file_news"},
    {"onnx_pictures", "perceptual", "exposure", "differentiable", "tiling", "masking"},
    {"objectives", "observations", "regions", "lowering"},
    {"score_base", "whitening"},
    {"whitened_score"},
    {
        "error_scores",
        "structure_scores",
        "likelihood_scores",
        "debiased_scores",
        "latent_scores",
        "difference_scores",
        "gradient_scores",
        "inpainting_scores",
        "surprise_scores",
        "learned_scores",
        "shape_scores",
        "texture_scores",
    },
    {"layouts", "rendering", "scores", "report_charts", "grids"},
    {"datasets", "manifest", "splitting", "similarity", "overlaying"},
    {"listing"},
    {"surveying"},
    {"data"},
    {"expert_spec"},
    {"recipe", "expert"},
    {"member", "presets", "dividing", "labelling", "known"},
    {"normals", "packing"},
    {"judgement"},
    {"detector", "checkpointing"},
    {"compiled", "exportable"},
    {"precision", "onnx_graph"},
    {"engine"},
    {"gpu_decoding"},
    {"scan_rows", "watch_alarms"},
    {"scan_ray"},
    {"scan_summary", "scan_files", "delivering", "scan_outbox"},
    {"watching", "watch_metrics", "scan_sending"},
    {"fabric", "fitting"},
    {"latent_space", "explore_page"},
    {"looking"},
    {"explore_sections"},
    {"training", "estimator", "evaluation", "scanning", "checking", "describing", "exploring", "classifying"},
    {"exporting"},
    {"scoring", "reporting"},
    {"scan_report"},
    {"console"},
    {"cli_common"},
    {"cli_looking", "scan_view", "cli_sending"},
    {"cli_scanning", "cli_watching"},
    {"cli"},
    {"__main__"},
]
SERVICE = [
    {"errors", "settings", "ids", "first_schema", "records", "tickets", "logs", "codes", "memory"},
    {"schema", "database"},
    {"migrations"},
    {"kinds", "counting"},
    {"batching", "shares", "bridge", "metrics", "uploads", "keys", "archives", "store", "looking", "auditing"}
    | {"refusals", "loading"},
    {"alarms"},
    {
        "recorder",
        "upkeep",
        "scans",
        "exporting",
        "decisions",
        "alarm_gauges",
        "reviewing",
        "allowance",
        "keys_command",
        "store_command",
        "bodies",
        "sessions",
    },
    {"access", "policies", "asked", "sent_rows"},
    {"served", "routes", "edge"},
    {"shelf"},
    {"models"},
    {"openapi"},
    {"options", "keeping", "watching"},
    {"drawing"},
    {"scoring", "models_api", "verdicts_api", "calibration_api", "alarms_api", "scans_api"},
    {"health", "streaming"},
    {"api", "pages"},
    {"quick"},
    {"front"},
    {"app"},
    {"process"},
    {"demo"},
]
RANKS = {name: rank for rank, names in enumerate(LIBRARY) for name in names}
SERVICE_RANKS = {name: rank for rank, names in enumerate(SERVICE) for name in names}


def imports(path: Path) -> set[str]:
    """Every module a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "anomaly_vae"}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "anomaly_vae").glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_down(path):
    if path.stem == "__init__":
        return
    for module in imports(path):
        assert module.split(".")[0] != "service", f"{path.name} imports the service"
        if module.startswith("anomaly_vae.") and module != "anomaly_vae.__version__":
            assert RANKS[module.split(".")[1]] < RANKS[path.stem], f"{path.name} imports {module} upwards"


@pytest.mark.parametrize("path", sorted((ROOT / "service").glob("*.py")), ids=lambda path: path.stem)
def test_the_service_uses_the_front_door(path):
    import anomaly_vae

    for module in imports(path):
        if module.startswith("service."):
            assert SERVICE_RANKS[module.split(".")[1]] < SERVICE_RANKS[path.stem], (
                f"{path.name} imports {module} upwards"
            )
        if module.startswith("anomaly_vae."):
            assert module.split(".", 1)[1] in anomaly_vae.__all__, f"{path.name} reaches into {module}"


@pytest.mark.parametrize("path", sorted([*(ROOT / "anomaly_vae").glob("*.py"), *(ROOT / "service").glob("*.py")]),
                         ids=lambda path: path.stem)  # fmt: skip
def test_files_hold_one_idea(path):
    assert len(path.read_text().splitlines()) <= 400


def test_import_and_help_stay_light():
    code = (
        "import sys, anomaly_vae, anomaly_vae.cli; "
        "heavy = {'torch', 'numpy', 'scipy', 'sklearn', 'flask', 'pyarrow'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"imported: {done.stderr}"


def test_the_front_door_opens():
    import anomaly_vae

    for name in anomaly_vae.__all__:
        assert getattr(anomaly_vae, name) is not None
    with pytest.raises(AttributeError):
        anomaly_vae.nothing_here  # noqa: B018


def test_nothing_is_unpickled():
    forbidden = ("import pickle", "torch.load(", "torch.save(", "fabric.save(", "allow_pickle=True", "joblib.load")
    for path in [*(ROOT / "anomaly_vae").glob("*.py"), *(ROOT / "service").glob("*.py")]:
        assert not any(word in path.read_text().replace("safetensors.torch.", "") for word in forbidden), path
