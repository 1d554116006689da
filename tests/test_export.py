import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from d_emo.config import InputError
from d_emo.export import attend_in_low_rank, export, portable_classifier, portable_denoiser
from d_emo.models import create_model
from d_emo.models.attention import WindowAttention

ROOT = Path(__file__).parents[1]


def classifier(**options):
    torch.manual_seed(0)
    model = create_model("emov2_1m", **{"num_classes": 5, "depths": [1, 1, 2, 2], "img_size": 64, **options})
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
    model(torch.randn(4, 3, 64, 64))  # batch statistics
    return model


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        ("classifier", "onnx"), ("denoiser", "pt2"), pytest.param("classifier", "pt2", marks=pytest.mark.slow),
        pytest.param("denoiser", "onnx", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_exported_networks_agree_with_pytorch_at_any_batch_size(kind, ending, tmp_path, tiny_denoiser):
    if ending == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = classifier() if kind == "classifier" else tiny_denoiser
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = portable_classifier(model, 64) if kind == "classifier" else portable_denoiser(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.module.modules())
    path = tmp_path / f"network.{ending}"
    assert export(network, path) < 1e-4 and path.stat().st_size > 10_000
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # a copy was folded
    with torch.no_grad():
        example = network.example(2)
        own = model.eval()(*example) if kind == "classifier" else model(*example).sample
        torch.testing.assert_close(network.module(*example), own, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["near", "far", "spanning"])
def test_attention_of_low_rank_is_the_same(mode):
    attention = WindowAttention(8, 24, num_heads=2, window_size=(2, 3), mode=mode)
    q, k, value = torch.randn(2, 8, 9, 8), torch.randn(2, 8, 9, 8), torch.randn(2, 8, 9, 24)
    torch.testing.assert_close(attend_in_low_rank(attention, q, k, value), attention.attend(q, k, value))


@pytest.mark.slow
def test_core_ml_converts(tmp_path):
    pytest.importorskip("coremltools")
    assert export(portable_classifier(classifier(), 64), tmp_path / "network.mlpackage") is None
    assert (tmp_path / "network.mlpackage" / "Manifest.json").exists()


def test_a_network_that_differs_is_told(tmp_path, monkeypatch):
    network = portable_classifier(classifier(), 64)
    monkeypatch.setattr("d_emo.export.write_torch", lambda network, path: lambda x: network.module(x) * 1.01)
    assert export(network, tmp_path / "network.pt2") == pytest.approx(0.01, rel=1e-2)


def test_impossible_exports_are_refused(tmp_path):
    network = portable_classifier(classifier(), 64)
    with pytest.raises(InputError, match="ends in none of .onnx, .pt2, .mlpackage"):
        export(network, tmp_path / "network.tflite")
    with pytest.raises(InputError, match="does not exist"):
        export(network, tmp_path / "none" / "network.onnx")


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("emov2_1m", "{}/a.pt2", "--image-size", "64"), 0, "differs from PyTorch by at most"),
        (("emov2_1m", "{}/a.pt2", "--image-size", "64", "--tolerance", "-1"), 1, "more than --tolerance"),
        (("emov9_1m", "{}/a.pt2"), 2, "emov1_1m"),
        (("D-EMOv2-Ti-2", "{}/a.pt2", "--image-size", "64"), 2, "--image-size is for classifiers"),
    ],
)
def test_the_script(argv, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export.py", *(part.format(tmp_path) for part in argv)])
    if code:
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "scripts" / "export.py"), run_name="__main__")
        assert stop.value.code == code
    else:
        runpy.run_path(str(ROOT / "scripts" / "export.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert words in printed.out + printed.err and "Traceback" not in printed.err
