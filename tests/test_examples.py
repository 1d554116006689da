"""The examples are whole programs that run as a newcomer would run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: object, folder: Path) -> str:
    """What an example prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, ROOT / "examples" / f"{name}.py", *arguments]
    ended = subprocess.run([*map(str, program)], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_short_and_says_how_to_run_it(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 60
    assert f"    python examples/{file.name} " in text


def test_there_are_six():
    assert [file.stem for file in EXAMPLES] == ["finetune", "int8", "measure", "objective", "sample", "train"]


def test_train_then_sample(photos, tmp_path):
    tiny = "--image-size=32", "--steps=2", "--batch-size=2"
    shown = run("train", photos / "train", "snapshot", *tiny, folder=tmp_path)
    assert "step 2  loss " in shown
    run("sample", "drawn", "bee", 0, "--snapshot=snapshot", "--each=1", "--steps=2", folder=tmp_path)
    assert sorted(file.name for file in (tmp_path / "drawn").iterdir()) == ["000-bee.png", "001-ant.png"]


def test_measure(photos, tmp_path):
    from d_emo.config import ClassifierSettings
    from d_emo.io.snapshot import save_classifier
    from d_emo.models import create_model

    settings = ClassifierSettings(model="emov2_1m", data_dir=str(photos))
    meta = {"step": 1, "weights": "ema", "class_names": ["ant", "bee"], "image_size": 32}
    save_classifier(tmp_path / "classifier", create_model("emov2_1m", num_classes=2), meta=meta, settings=settings)
    shown = run("measure", photos / "train", "classifier", "--images", photos / "val", folder=tmp_path)
    assert shown.startswith("FID-6 ")
    drawn = ["--snapshot", ROOT / "d_emo/pretrained/demo-shapes", "--count=4", "--steps=2"]
    assert run("measure", photos / "train", "classifier", *drawn, folder=tmp_path).startswith("FID-4 ")


def test_finetune(photos, tmp_path):
    shown = run("finetune", photos / "train", "--image-size=32", "--epochs=1", "--batch-size=3", folder=tmp_path)
    assert "epoch 1  loss " in shown


def test_objective(tmp_path):
    shown = run("objective", "l1.png", "--steps=2", folder=tmp_path)
    assert "drew the ten digits with FlowMatchEulerDiscreteScheduler" in shown and (tmp_path / "l1.png").exists()
