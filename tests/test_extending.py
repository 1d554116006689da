"""A block, an objective, a data set and a metric from outside of the package, from training to FID."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d_emo import create_model, list_models, tables
from d_emo.cli import run_verb
from d_emo.errors import InputError
from d_emo.io.snapshot import load_denoiser
from d_emo.sampling import Sampler, make_scheduler
from d_emo.sampling.pipeline import DEMOPipeline

ROOT = Path(__file__).parents[1]
OUTSIDE = ROOT / "examples" / "extending"
CLASSIFIER = ROOT / "tests" / "data" / "artefacts" / "classifier"
TRAIN = [
    "--model", "conv-ti/4", "--model-options", "{depth: 1, hidden_size: 32, num_heads: 2}", "--dataset", "stripes",
    "--objective", "velocity", "--image-size", "32", "--vae", "pixels", "--batch-size", "4", "--max-steps", "2",
]  # fmt: skip


@pytest.fixture
def extended(monkeypatch):
    """The examples' rows in the tables; afterwards all is as before."""
    for name in ("BLOCKS", "FAMILIES", "OBJECTIVES", "SCHEDULERS", "DATASETS", "METRICS"):
        monkeypatch.setattr(getattr(tables, name), "_rows", dict(getattr(tables, name)._rows))
    monkeypatch.syspath_prepend(OUTSIDE.parent)
    before = set(sys.modules)
    import extending

    yield extending
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "extending":
            del sys.modules[name]


def test_a_block_makes_a_family_of_models(extended):
    assert "Conv-Ti-2" in list_models() and len(list_models("conv-*")) == 20
    with torch.device("meta"):
        model = create_model("conv-ti/2", sample_size=16, num_classes=3)
    assert model.config.block == "conv" and model.config.depth == 12 and model.null_class == 3
    torch.manual_seed(0)
    model = create_model("Conv-Ti-2", sample_size=8, num_classes=3, depth=2, hidden_size=16)
    assert not any(block.adaLN_modulation[1].weight.any() for block in model.blocks)
    assert model(torch.zeros(2, 4, 8, 8), torch.tensor(1), torch.tensor([0, 3])).sample.shape == (2, 8, 8, 8)


def test_all_four_train_sample_and_measure(extended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_verb("train", [*TRAIN, "--output-dir", "run"])
    snapshot = load_denoiser("run")
    assert snapshot.objective == "velocity" and snapshot.class_names == ["lying", "standing"]
    assert snapshot.scheduler_config["prediction_type"] == "v_prediction" and snapshot.meta["model"] == "conv-ti/4"
    assert "Stripes are drawn by a formula" in (snapshot.path / "README.md").read_text()
    run_verb("sample", ["--checkpoint", "run", "--class", "standing", "--num-images", "1", "--steps", "2",
                        "--format", "png", "--output", "drawn"])  # fmt: skip
    assert len(list(Path("drawn").glob("*.png"))) == 1
    features = ["--features", f"emov2:{CLASSIFIER}"]
    run_verb("reference", ["--dataset", "stripes", "--image-size", "32", "--num-images", "16", *features,
                           "--output", "reference.npz"])  # fmt: skip
    run_verb("fid", ["--checkpoint", "run", "--reference", "reference.npz", "--num-images", "8", "--steps", "2",
                     "--metrics", "fid,mean", *features, "--output", "fid.json"])  # fmt: skip
    report = json.loads(Path("fid.json").read_text())
    assert report["mean_distance"] > 0 and report["fid"] >= report["mean_distance"] ** 2
    assert report["sampling"]["scheduler"] == "ddim-velocity"


def test_objectives_that_predict_the_same_are_told_apart_by_the_name_in_the_snapshot(extended, tmp_path, monkeypatch):
    row = dataclasses.replace(tables.OBJECTIVES["velocity"], name="other", scheduler="other", table_scheduler="other")
    tables.OBJECTIVES.register(row)
    ddim = tables.SCHEDULERS["ddim-velocity"]
    tables.SCHEDULERS.register(dataclasses.replace(ddim, name="other", objectives=("other",)))
    drew, draw = [], Sampler.images
    monkeypatch.setattr(Sampler, "images", lambda self, *args, **how: drew.append(self) or draw(self, *args, **how))
    monkeypatch.chdir(tmp_path)
    run_verb("train", [*TRAIN, "--objective", "other", "--output-dir", "run"])
    snapshot = load_denoiser("run")
    assert snapshot.objective == "other" and len(drew) == 1, "the preview"
    make_scheduler("other", snapshot.scheduler_config, "other")
    Sampler.open(snapshot, scheduler="other").replace(steps=2)
    DEMOPipeline.from_snapshot(load_denoiser("run"), scheduler="other")
    with pytest.raises(InputError, match="serves the velocity objective, .* with other; use one of other"):
        Sampler.open(load_denoiser("run"), scheduler="ddim-velocity")


def test_an_installed_package_is_found_by_the_scripts(tmp_path):
    installed = tmp_path / "site" / "extending-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: extending\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[d_emo.plugins]\nextending = extending\n")
    path = os.pathsep.join(map(str, [installed.parent, OUTSIDE.parent, ROOT]))
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "train_dit.py", *TRAIN, "--output-dir", "run"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "run" / "snapshots" / "step-2" / "snapshot.json").read_text())
    assert (meta["objective"], meta["data"], meta["step"]) == ("velocity", "stripes", 2)


def test_each_example_is_short():
    for file in OUTSIDE.glob("*.py"):
        code = [line for line in file.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(code) <= 30, f"{file.name} has {len(code)} lines"
