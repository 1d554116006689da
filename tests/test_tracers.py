"""Whoever looks into a network sees all of it: counters of operations, tracers, transforms, quantisation."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from d_emo import kernels
from d_emo.lab.benchmark import transcription
from d_emo.models import create_model


class Denoising(nn.Module):
    """A denoiser that takes and returns tensors only, as tracers want it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, latents, timestep, class_labels):
        out = self.network(latents, timestep, class_labels)
        return out if isinstance(out, torch.Tensor) else out.sample


def network(name, size=None, **options):
    """A network all of whose layers matter, and its inputs; ``size`` counts, None is as small as can be."""
    torch.manual_seed(0)
    if name[0] == "D":
        small = {} if size else {"depth": 2, "hidden_size": 48, "num_heads": 3}
        model = create_model(name, sample_size=size or 16, num_classes=5, **small)
        inputs = torch.randn(1, 4, size or 16, size or 16), torch.tensor([700]), torch.tensor([2])
    else:
        model, inputs = create_model(name, num_classes=7, **options), (torch.randn(1, 3, size or 64, size or 64),)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.05)
    return model.eval(), inputs


def by_flop_counter(model, inputs):
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def by_fvcore(model, inputs):
    analysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis(model, inputs)
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none").total()


def by_ptflops(model, inputs, backend):
    count = pytest.importorskip("ptflops").get_model_complexity_info
    named = dict(zip(("latents", "timestep", "class_labels") if len(inputs) > 1 else ("input",), inputs, strict=True))
    return count(model, tuple(inputs[0].shape[1:]), input_constructor=lambda _: named, as_strings=False,
                 print_per_layer_stat=False, verbose=False, backend=backend)[0]  # fmt: skip


def by_thop(model, inputs):
    return pytest.importorskip("thop").profile(model, inputs, verbose=False)[0]


def by_torchinfo(model, inputs):
    return pytest.importorskip("torchinfo").summary(model, input_data=inputs, verbose=0).total_mult_adds


COUNTERS = {
    "FlopCounterMode": by_flop_counter, "fvcore": by_fvcore, "thop": by_thop, "torchinfo": by_torchinfo,
    "ptflops": lambda *args: by_ptflops(*args, "pytorch"), "ptflops, aten": lambda *args: by_ptflops(*args, "aten"),
}  # fmt: skip


def in_modules(monkeypatch, model):
    """The plain transcription, its layers called as modules: three of the counters see nothing else."""
    monkeypatch.setattr(transcription, "pointwise", lambda x, layer: layer(x.movedim(1, -1)).movedim(-1, 1))
    monkeypatch.setattr(
        transcription, "local", lambda part, a: F.silu(transcription.norm(part.conv(a), part.norm))
    )
    return transcription.transcribe(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("counter", COUNTERS)
@pytest.mark.parametrize("name, size", [("emov2_1m", 224), ("D-EMOv2-Ti-2", 32)])
def test_counters_say_of_a_network_what_they_say_of_its_plain_transcription(monkeypatch, counter, name, size):
    count, (model, inputs) = COUNTERS[counter], network(name, size)
    plain = in_modules(monkeypatch, model)
    wrap = Denoising if len(inputs) > 1 else nn.Sequential
    with torch.no_grad():
        assert count(wrap(model), inputs) == pytest.approx(count(wrap(plain), inputs), rel=0.02)


NAMES = ("emov2_1m", "emov1_1m", "D-EMOv2-Ti-2", "DiT-S-2")


@pytest.fixture(params=NAMES)
def traced(request):
    model, inputs = network(request.param)
    return (Denoising(model) if len(inputs) > 1 else model).eval(), inputs


def test_jit_trace_gives_the_same_network(traced):
    model, inputs = traced
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation, and shapes that become constants
        again = torch.jit.trace(model, inputs)
    torch.testing.assert_close(again(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_torch_fx_gives_the_same_network_with_its_layers_as_modules(traced):
    model, inputs = traced
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    called = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert layers <= called


def test_torchvision_extracts_features_of_a_stage():
    from torchvision.models.feature_extraction import create_feature_extractor

    model, inputs = network("emov2_1m")
    maps = create_feature_extractor(model, {"stages.2": "third"})(*inputs)["third"]
    expected = model.forward_intermediates(*inputs, indices=[2], intermediates_only=True)[0]
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_static_quantisation_takes_every_layer(traced):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model, inputs = traced
    prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), inputs)
    expected = model(*inputs)
    prepared(*inputs)
    quantised = convert_fx(prepared)
    assert not any(type(module) in (nn.Linear, nn.Conv2d) for module in quantised.modules())
    assert (quantised(*inputs) - expected).abs().max() < 0.2 * expected.abs().max()


def linear_layers(model, kind=nn.Linear):
    return sum(isinstance(module, kind) for module in model.modules())


def test_dynamic_quantisation_takes_every_linear_layer(traced):
    from torch.ao.nn.quantized import dynamic
    from torch.ao.quantization import quantize_dynamic

    model, inputs = traced
    quantised = quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert linear_layers(quantised, dynamic.Linear) == linear_layers(model) > 10
    assert (quantised(*inputs) - model(*inputs)).abs().max() < 0.2 * model(*inputs).abs().max()


@pytest.mark.filterwarnings("ignore")
def test_pt2e_quantisation_takes_every_linear_layer():
    quantize_pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model, (x,) = network("emov2_1m", depths=[1, 1, 2, 2])
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = quantize_pt2e.prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    prepared(x)
    quantised = quantize_pt2e.convert_pt2e(prepared)
    weights = [node for node in quantised.graph.nodes if "dequantize_per_channel" in str(node.target)]
    assert len(weights) >= linear_layers(model)
    assert (quantised(x) - model(x)).abs().max() < 0.2 * model(x).abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_both_exporters_of_torch_write_onnx(dynamo, traced, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, inputs = traced
    torch.onnx.export(model, inputs, str(tmp_path / "a.onnx"), dynamo=dynamo)
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))
    names = [each.name for each in session.get_inputs()]
    out = session.run(None, {name: each.numpy() for name, each in zip(names, inputs, strict=True)})[0]
    torch.testing.assert_close(torch.from_numpy(out), model(*inputs).detach(), rtol=1e-3, atol=1e-5)


def test_transforms_of_torch_func(traced):
    model, inputs = traced
    if isinstance(getattr(model, "network", None), nn.Module):
        model.network.requires_grad_(True)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters):
        return torch.func.functional_call(model, (parameters, buffers), inputs).square().mean()

    grads = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5)


def forms(model, *inputs):
    with kernels.record() as calls:
        model(*inputs)
    return {call.form for call in calls}, {why for call in calls for _, why in call.refused}


class Logging(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


class Marked(torch.Tensor):
    pass


def test_a_dispatch_mode_and_a_subclass_of_tensors_get_the_plain_forms():
    model, inputs = network("emov2_1m")
    with torch.no_grad():
        fast, _ = forms(model, *inputs)
        with Logging():
            plain, why = forms(model, *inputs)
        marked, whose = forms(model, inputs[0].as_subclass(Marked))
    last = {"the modules", "product, softmax, product", "local convolution, sum, projection", "a new map"}
    assert plain == marked == last and "CPU, in chunks" in fast
    assert why == {"a dispatch mode is to see all operators"} and whose == {"the map is a Marked"}
