"""A room imports only rooms above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "d_emo"
ROOMS = [
    "config", "data", "latents", "kernels", "models", "objective", "ema", "card", "checkpoint", "hub", "training",
    "sampling", "evaluation", "curves", "explain", "export", "benchmark", "study",
]
INSIDE = {
    "config": ["base", "training", "sampling", "measuring", "exporting", "benchmarking", "study"],
    "kernels": [
        "choice", "activation", "linear", "partitions", "attention", "depthwise", "local", "modulation", "slices",
    ],
    "models": [
        "layers", "attention", "blocks", "denoiser", "stem", "backbone", "counting", "registry", "released",
        "ablations", "table", "timm_registry", "convert",
    ],
    "data": ["cores", "images", "shapes", "digits", "folder", "augmented", "tar", "hub", "sampler"],
    "latents": ["codec", "shards", "encode", "stored"],
    "training": [
        "stop", "guard", "optimizer", "watch", "sharding", "loop", "denoiser", "accuracy", "teacher", "classifier",
        "vae",
    ],
    "benchmark": ["timing", "transcription", "denoisers", "classifiers", "profile", "report"],
    "study": ["plan", "execution", "measuring", "results", "checks", "report", "plots", "cost", "study"],
    "sampling": ["schedulers", "classes", "sampler", "pictures", "pipeline", "live", "page"],
    "evaluation": [
        "statistics", "npz", "images", "features", "metrics", "reference", "parts", "result", "measurement", "judging",
    ],
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


def files_of(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.exists() else sorted((PACKAGE / room).glob("**/*.py"))


def test_every_room_is_known():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_rooms_above(room):
    below = {f"d_emo.{name}" for name in ROOMS[ROOMS.index(room) + 1 :]}
    for file in files_of(room):
        for name in imported(file):
            assert ".".join(name.split(".")[:2]) not in below, f"{file.name} imports {name}"


@pytest.mark.parametrize("folder", INSIDE)
def test_files_inside_a_room_are_in_order_too(folder):
    order = INSIDE[folder]
    assert {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"} <= set(order)
    for path in (PACKAGE / folder).glob("*.py"):
        if path.stem == "__init__":
            continue
        below = {f"d_emo.{folder}.{name}" for name in order[order.index(path.stem) + 1 :]}
        for name in imported(path):
            assert ".".join(name.split(".")[:3]) not in below, f"{path.name} imports {name}"


def test_only_the_training_loop_and_two_files_beside_it_use_accelerate():
    users = {file.name for file in PACKAGE.glob("**/*.py") if imported(file, "accelerate")}
    assert users == {"loop.py", "sharding.py", "watch.py"}


def test_only_scripts_that_share_work_ask_accelerate_for_their_rank():
    users = {file.name for file in (PACKAGE.parent / "scripts").glob("*.py") if imported(file, "accelerate")}
    assert users == {"encode_latents.py", "fid.py"}
