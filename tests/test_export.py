import contextlib
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from torch import nn

from d_emo.errors import InputError
from d_emo.export import OPSET, export, open_portable, portable_classifier, portable_denoiser, stir
from d_emo.models import create_model
from d_emo.models.attention import WindowAttention
from d_emo.models.convert import write_timm_folder

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


@pytest.mark.parametrize("ending", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_height_and_width_may_be_free(ending, tmp_path):
    """Of images that the window divides and not, of one window and more, at the sizes of SIZES."""
    pytest.importorskip("onnxruntime" if ending == "onnx" else "torch")
    network = portable_classifier(classifier(), (64, 96), dynamic_size=True)
    assert export(network, tmp_path / f"network.{ending}") < 1e-4


def test_an_export_of_ones_own_leaves_height_and_width_free():
    attention = WindowAttention(8, 24, num_heads=2, window_size=(2, 3)).eval()
    height, width = (torch.export.Dim(name, min=2, max=512) for name in ("height", "width"))
    free = {"u": {1: height, 2: width}}
    module = torch.export.export(attention, (torch.randn(1, 4, 6, 8),), dynamic_shapes=free).module()
    for size in ((2, 3), (2, 2), (5, 9), (64, 31)):
        u = torch.randn(1, *size, 8)
        torch.testing.assert_close(module(u), attention(u))


def test_operators_and_eight_bits_of_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    network, path = portable_classifier(classifier(), (32, 64)), tmp_path / "network.onnx"
    assert network.example(1)[0].shape == (1, 3, 32, 64)
    opset = OPSET
    with contextlib.suppress(InputError):  # of a PyTorch whose exporter writes no other
        export(network, tmp_path / "other.onnx", opset=20)
        opset = 20
        (tmp_path / "other.onnx").unlink()
    assert opset == 20 or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
    try:
        assert 1e-5 < export(network, path, opset=opset, int8=True) < 0.1
    except InputError as error:
        assert "`int8`" in str(error) and opset != 20, error
        pytest.skip(str(error))
    written = onnx.load(path)
    assert {each.domain: each.version for each in written.opset_import}[""] == opset
    linear = sum(isinstance(module, nn.Linear) for module in network.module.modules())
    assert sum(node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul") for node in written.graph.node) >= linear
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]


@pytest.mark.parametrize("size", [(8, 9), (9, 9), (8, 8), (9, 8)])  # as the window divides them or not
@pytest.mark.parametrize("mode", ["near", "far", "spanning"])
def test_exported_attention_has_tensors_of_at_most_four_axes_and_no_alias(mode, size):
    """As Core ML wants them."""
    attention = WindowAttention(8, 24, num_heads=2, window_size=(2, 3), mode=mode)
    graph = torch.export.export(attention, (torch.randn(2, *size, 8),)).run_decompositions({}).graph
    assert not [node for node in graph.nodes if node.target is torch.ops.aten.alias.default]
    shapes = [node.meta["val"].shape for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert len(shapes) > 20 and max(map(len, shapes)) == 4


@pytest.mark.slow
def test_core_ml_converts(tmp_path):
    pytest.importorskip("coremltools")
    assert export(portable_classifier(classifier(), 64), tmp_path / "network.mlpackage") is None
    assert (tmp_path / "network.mlpackage" / "Manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("emov2_1m", (224, 224)), ("emov1_1m", (96, 128))])
def test_core_ml_takes_a_program_of_the_users_own(name, size, tmp_path):
    coremltools = pytest.importorskip("coremltools")
    program = torch.export.export(timm.create_model(name).eval(), (torch.randn(1, 3, *size),))
    with pytest.raises(NotImplementedError, match="run_decompositions"):
        coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS17)
    converted = coremltools.convert(program.run_decompositions({}), minimum_deployment_target=coremltools.target.iOS17)
    converted.save(str(tmp_path / "network.mlpackage"))
    assert (tmp_path / "network.mlpackage" / "Manifest.json").exists()


@pytest.mark.parametrize(("said", "kind", "sentence"), [
    ("[MIL FileWriter]: Unknown error occurred while writing data to the file.", OSError, "the disk is full"),
    ("Unsupported fx node alias", InputError, "Core ML cannot express this network"),
])  # fmt: skip
def test_core_ml_without_room_is_not_blamed_on_the_network(tmp_path, monkeypatch, said, kind, sentence):
    tools = mock.MagicMock()
    tools.convert.side_effect = RuntimeError(said)
    monkeypatch.setitem(sys.modules, "coremltools", tools)
    with pytest.raises(kind, match=sentence):
        export(portable_classifier(classifier(), 64), tmp_path / "network.mlpackage")
    assert not list(tmp_path.iterdir())


def test_a_network_that_differs_is_told(tmp_path, monkeypatch):
    network = portable_classifier(classifier(), 64)
    monkeypatch.setattr("d_emo.export.write_torch", lambda network, path: lambda x: network.module(x) * 1.01)
    assert export(network, tmp_path / "network.pt2") == pytest.approx(0.01, rel=1e-2)
    for batch in (1, 3):  # neither is the size that the network is traced with
        wrong = {batch: 1.02}
        monkeypatch.setattr("d_emo.export.write_torch", lambda network, path, wrong=wrong: (
            lambda x: network.module(x) * wrong.get(len(x), 1)
        ))  # fmt: skip
        assert export(network, tmp_path / "network.pt2") == pytest.approx(0.02, rel=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_is_no_agreement(value, tmp_path, monkeypatch):
    network = portable_classifier(classifier(), 64)
    monkeypatch.setattr("d_emo.export.write_torch", lambda network, path: lambda x: network.module(x) * value)
    assert export(network, tmp_path / "network.pt2") == float("inf")


def test_large_networks_keep_their_weights_in_a_second_file(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("d_emo.export.ONE_FILE", 1000)
    path = tmp_path / "network.onnx"
    assert export(portable_classifier(classifier(), 64), path) < 1e-4
    assert path.stat().st_size < (tmp_path / "network.onnx.data").stat().st_size


@pytest.mark.parametrize("name", ["d-emov2-ti-2", "DIT-s/8", "EMOv2_1M"])
def test_names_are_resolved_as_everywhere(name):
    title, network = open_portable(name)
    assert title == f"{name} with random weights"
    assert network.input_names == (("images",) if name.startswith("E") else ("latents", "timesteps", "class_labels"))


@pytest.mark.parametrize("name", ["emov2_1m", "D-EMOv2-Ti-2"])
def test_every_part_of_a_network_with_random_weights_shows_in_its_output(name):
    fresh = create_model(name)
    stir(fresh)
    assert all(buffer.std() > 0 for key, buffer in fresh.named_buffers() if "running" in key)
    title, network = open_portable(name, 64 if name == "emov2_1m" else None)
    assert title == f"{name} with random weights"
    inputs = network.example(2)
    with torch.no_grad():
        before = network.module(*inputs)
        for part in ("operator.proj.weight", "expand.qk.weight", "expand.v.bias"):
            parameter = [p for n, p in network.module.named_parameters() if n.endswith(part)][-1]
            kept = parameter.clone()
            parameter.zero_()
            assert (network.module(*inputs) - before).abs().max() > 1e-4 * before.abs().max()
            parameter.copy_(kept)


def test_channels_and_kind_of_a_converted_folder(tmp_path):
    gray = create_model("emov2_1m", in_channels=1, num_classes=2)
    write_timm_folder(gray, tmp_path / "gray", input_size=64, mean=(0.5,), std=(0.5,))
    title, network = open_portable(str(tmp_path / "gray"))
    assert network.example(2)[0].shape == (2, 1, 64, 64) and network.module(*network.example(2)).shape == (2, 2)
    save_for_hf(timm.create_model("resnet10t"), tmp_path / "resnet")
    with pytest.raises(InputError, match="resnet holds a ResNet; this works with EMO"):
        open_portable(str(tmp_path / "resnet"))


def test_impossible_exports_are_refused(tmp_path):
    network = portable_classifier(classifier(), 64)
    with pytest.raises(InputError, match="ends in none of .onnx, .pt2, .mlpackage"):
        export(network, tmp_path / "network.tflite")
    with pytest.raises(InputError, match="does not exist"):
        export(network, tmp_path / "none" / "network.onnx")
    for options in ({"opset": 20}, {"int8": True}):
        with pytest.raises(InputError, match=f"`{next(iter(options))}` is for .onnx files"):
            export(network, tmp_path / "network.pt2", **options)
    with pytest.raises(InputError, match="`dynamic_size` is for .onnx and .pt2 files"):
        export(portable_classifier(classifier(), 64, dynamic_size=True), tmp_path / "network.mlpackage")


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (("emov2_1m", "{}/a.pt2", "--image-size", "64"), 0, "differs from PyTorch by at most"),
        (("emov2_1m", "{}/a.pt2", "--image-size", "64", "--tolerance", "1e-12"), 1, "more than --tolerance"),
        (("emov9_1m", "{}/a.pt2"), 2, "emov1_1m"),
        (("D-EMOv2-Ti-2", "{}/a.pt2", "--image-size", "64"), 2, "--image-size is for classifiers"),
        (("emov2_1m", "{}/a.pt2", "--image-size", "31"), 2, "--image-size must be at least 32"),
        (("emov2_1m", "{}/a.pt2", "--image-size", "32", "64"), 0, "images (3, 32, 64)"),
        (("emov2_1m", "{}/a.pt2", "--image-size", "32", "64", "96"), 2, "--image-size must be one side"),
        (("emov2_1m", "{}/a.pt2", "--int8"), 2, "--int8 is for .onnx files"),
        (("D-EMOv2-Ti-2", "{}/a.pt2", "--dynamic-size"), 2, "--dynamic-size is for classifiers"),
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
