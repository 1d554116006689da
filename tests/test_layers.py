"""A layer imports only layers above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "d_emo"
LAYERS = [
    "errors", "text", "files", "claims", "tables", "config", "threads", "device", "weights", "kernels", "data",
    "latents", "models", "detection", "segmentation", "objective", "frechet", "ema", "io", "training", "sampling",
    "evaluation", "doctor", "explain", "portable", "export", "app", "lab", "cli",
]
INSIDE = {
    "config": [
        "paths", "ranges", "base", "exact", "objective", "of_latents", "finetuning", "training", "distilling",
        "encoding", "dense", "detecting", "segmenting", "video", "inspecting", "sampling", "measuring", "exporting",
        "benchmarking", "demos", "study",
    ],
    "kernels": [
        "autotune", "dispatch", "activation", "native", "linear", "partitions", "attention", "depthwise", "local_steps",
        "local", "modulation", "slices", "explaining",
    ],
    "models": [
        "layers", "embeddings", "attention", "blocks", "contract", "token_denoiser", "denoiser",
        "hierarchical", "stem", "backbone", "video", "counting",
        "registry", "timm_models", "released", "hybrids", "timm_registry", "convert",
    ],
    "segmentation": [
        "heads", "networks", "unet", "images", "fundus", "losses", "sliding", "augment", "measures", "pictures",
        "contents",
    ],
    "data": [
        "reading", "images", "listing", "names", "shapes", "digits", "scenes", "nuclei", "fundus", "moving", "stored",
        "folder", "augmented", "videos", "video_lists", "video_folder", "tar", "hub", "sampler",
        "describing",
    ],
    "detection": ["targets", "features", "ssdlite", "retinanet", "maskrcnn", "masks", "augment", "anchors", "coco",
                  "average_precision", "drawing", "contents"],
    "latents": ["codec", "autoencoders", "shards", "encode", "dataset"],
    "io": ["schema", "training_state", "card", "snapshot", "classifier", "segmenter", "video", "hub"],
    "training": [
        "stop", "feed", "guard", "optimizer", "muon", "progress", "parallel", "finetuning", "task", "rehearsal",
        "same_data", "same_settings", "loop", "alignment", "words", "judging", "denoiser", "accuracy", "teacher",
        "classifier", "latent_classifier", "detector", "segmenter", "video", "autoencoders", "perceptual", "vae",
    ],
    "sampling": [
        "schedulers", "classes", "guidance", "denoising", "sampler", "files", "grids", "request", "pipeline",
    ],
    "evaluation": [
        "statistics", "npz", "images", "features", "metrics", "reference", "feature_shards", "result", "measurement",
        "classifier_metrics", "drawn",
    ],
    "app": ["studio", "page"],
    "lab": ["reporting", "models_table", "loss_curves", "benchmark", "study"],
    "lab/benchmark": ["timing", "transcription", "forms", "kernels", "cases", "step", "profile", "report", "dense"],
    "lab/study": ["plan", "execution", "measuring", "results", "checks", "report", "plots", "cost", "study"],
}


def imported(file: Path, package: str = "d_emo") -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: write imports from the package's root"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == package}


def files_of(layer: str) -> list[Path]:
    single = PACKAGE / f"{layer}.py"
    return [single] if single.exists() else sorted((PACKAGE / layer).glob("**/*.py"))


def test_every_layer_is_known():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__", "__main__"} == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_only_layers_above(layer):
    below = {f"d_emo.{name}" for name in LAYERS[LAYERS.index(layer) + 1 :]}
    for file in files_of(layer):
        for name in imported(file):
            assert ".".join(name.split(".")[:2]) not in below, f"{file.name} imports {name}"


@pytest.mark.parametrize("folder", INSIDE)
def test_files_inside_a_layer_are_in_order_too(folder):
    order = INSIDE[folder]
    assert {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"} <= set(order)
    package = folder.replace("/", ".")
    for path in (PACKAGE / folder).glob("*.py"):
        if path.stem == "__init__":
            continue
        below = {f"d_emo.{package}.{name}" for name in order[order.index(path.stem) + 1 :]}
        for name in imported(path):
            wrong = [other for other in below if name == other or name.startswith(f"{other}.")]
            assert not wrong, f"{path.name} imports {name}"


def test_only_the_training_loop_and_two_files_beside_it_use_accelerate_and_the_verbs_that_share_work():
    users = {file.name for file in PACKAGE.glob("**/*.py") if imported(file, "accelerate")}
    assert users == {"loop.py", "parallel.py", "progress.py", "encode.py"}
