import json
import runpy
import sys
from pathlib import Path

import pytest
import reference_block as reference
import timm
import torch

from d_emo.config import ClassifierSettings
from d_emo.errors import InputError
from d_emo.io.snapshot import save_classifier
from d_emo.models import create_model
from d_emo.models.convert import read_released_classifier, write_timm_folder

ROOT = Path(__file__).parents[1]


def release(name, folder, classes=1000):
    """A file with the names and shapes of the release and random values."""
    shapes = json.loads((ROOT / "tests" / "data" / f"{name}_released_state_dict.json").read_text())
    shapes |= {"head.weight": [classes, shapes["head.weight"][1]], "head.bias": [classes]}
    path = folder / f"{name}.pth"
    torch.save({"net": reference.random_weights(shapes, 0)}, path)
    return path


def convert(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, argv)])
    code = 0
    try:
        runpy.run_path(str(ROOT / "scripts" / "convert_weights.py"), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


@pytest.mark.parametrize("name", ["emov2_5m", "emov1_5m"])
def test_a_release_becomes_a_folder_that_timm_opens(name, tmp_path, monkeypatch, capsys):
    path = release(name, tmp_path)
    code, printed = convert(monkeypatch, capsys, path, tmp_path / "out")
    assert code == 0 and f"holds {name}" in printed.out and "1000 classes" in printed.out
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    expected = read_released_classifier(path).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
    weights = str(tmp_path / "out" / "model.safetensors")
    same = timm.create_model(name, checkpoint_path=weights)
    fewer = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": weights}, num_classes=3)
    assert torch.equal(same.head.weight, expected.head.weight) and fewer.head.out_features == 3
    assert torch.equal(fewer.stages[0][0].operator.proj.weight, expected.stages[0][0].operator.proj.weight)
    assert tuple(model.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406) and model.pretrained_cfg["crop_pct"] == 0.875


def test_settings_of_a_model_travel_along(tmp_path):
    model = create_model("emov2_1m", num_classes=4, in_channels=1, window_size=2, depths=[1, 1, 2, 1]).eval()
    write_timm_folder(model, tmp_path / "out", input_size=75, mean=(0.5,), std=(0.5,), class_names=list("abcd"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert written["input_size"] == [1, 75, 75] and written["pool_size"] == [3, 3]  # rounded up
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
    assert again.pretrained_cfg["label_names"] == list("abcd") and again.pretrained_cfg["input_size"] == (1, 75, 75)


def test_a_snapshot_becomes_a_folder_too_unless_it_is_another_variant(tmp_path, monkeypatch, capsys):
    model = create_model("emov2_1m", num_classes=2, img_size=32).eval()
    meta = {"step": 1, "weights": "ema", "image_size": 32, "data": "digits", "class_names": ["ant", "bee"]}
    save_classifier(tmp_path / "run", model, meta=meta, settings=ClassifierSettings(output_dir="run"))
    code, printed = convert(monkeypatch, capsys, tmp_path / "run", tmp_path / "out", "--model", "emov2_5m")
    assert code == 2 and "holds the weights of emov2_1m, not of emov2_5m" in printed.err
    assert not (tmp_path / "out").exists()
    assert convert(monkeypatch, capsys, tmp_path / "run", tmp_path / "out", "--model", "EMOv2_1m")[0] == 0
    opened = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    cfg = opened.pretrained_cfg
    assert tuple(cfg["mean"]) == tuple(cfg["std"]) == (0.5, 0.5, 0.5) and list(cfg["input_size"]) == [3, 32, 32]
    assert cfg["label_names"] == ["ant", "bee"] and torch.equal(opened.head.weight, model.head.weight)


def test_bad_input_is_one_sentence_and_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    path = release("emov2_5m", tmp_path, classes=7)
    assert read_released_classifier(path).num_classes == 7
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for argv, words in (
        ((path, tmp_path / "out", "--model", "emov2_2m"), f"{path} holds the weights of emov2_5m, not of emov2_2m"),
        ((path, tmp_path / "full"), "full exists and is not overwritten; name another, or give --overwrite"),
        ((path, tmp_path / "out", "--model", "DiT-S-2"), "no EMO classifier"),
        ((tmp_path / "other.pth", tmp_path / "out"), "none of the released"),
        ((tmp_path / "none.pth", tmp_path / "out"), "does not exist"),
    ):
        code, printed = convert(monkeypatch, capsys, *argv)
        assert code == 2 and words in printed.err and len(printed.err.splitlines()) == 1
    assert not (tmp_path / "out").exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="already exists"):
        write_timm_folder(create_model("emov2_1m"), tmp_path / "full")
