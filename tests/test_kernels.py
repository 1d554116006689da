"""Every fast form equals the plain one, with all gradients."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from d_emo import kernels
from d_emo.errors import RunError
from d_emo.kernels import dispatch, in_slices, plain
from d_emo.kernels.attention import attend as window_attention
from d_emo.kernels.dispatch import HAS_ONEDNN
from d_emo.lab.benchmark.timing import saved_bytes
from d_emo.models.layers import LocalConv

needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this CPU has no AVX-512")


def linear(x, weight, bias=None, act=None):
    """`kernels.linear` of a layer with these parameters."""
    layer = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
    if not torch.compiler.is_compiling():
        layer._parameters.update(weight=weight, bias=bias)
    return kernels.linear(layer, x, act)


def gradients(function, inputs):
    """The output of a function, and the gradients of its inputs for a fixed random gradient of the output."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return out.detach(), torch.autograd.grad(out, inputs, seed)


@pytest.mark.parametrize("shape", [(5, 12), (1, 12), (2, 3, 5, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_equals_the_library_with_its_gradients(shape, bias, dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(7, 12)] + ([torch.randn(7)] if bias else [])
    inputs = [x.to(dtype) for x in inputs]
    for got, expected in zip(*(gradients(f, inputs) for f in (linear, F.linear)), strict=True):
        torch.testing.assert_close(got, expected)


def test_linear_takes_inputs_that_are_not_contiguous_and_gradients_that_are_expanded():
    x = torch.randn(4, 6, 8).transpose(0, 1).requires_grad_()
    weight = torch.randn(8, 5).t().requires_grad_()
    ours, theirs = (torch.autograd.grad(f(x, weight).sum(), (x, weight)) for f in (linear, F.linear))
    torch.testing.assert_close(ours, theirs)


@needs_onednn
def test_linear_uses_onednn_for_float32_only_and_never_where_the_plain_form_is_wanted():
    def operators(function, *inputs):
        with torch.profiler.profile() as profile:
            function(*inputs)
        return {event.name for event in profile.events()}

    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert "mkldnn::_linear_pointwise" in operators(linear, x, weight)
    assert "mkldnn::_linear_pointwise" not in operators(linear, x.double(), weight.double())
    with plain():
        assert "mkldnn::_linear_pointwise" not in operators(linear, x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16

    class Layer(torch.nn.Linear):
        def forward(self, x):
            return kernels.linear(self.inner, x)

    outer = Layer(4, 5)
    outer.inner = torch.nn.Linear(4, 5)
    graph = torch.export.export(outer, (x,)).graph
    assert not any(name in str(node.target) for node in graph.nodes for name in ("mkldnn", "d_emo"))


@pytest.fixture
def card(monkeypatch):
    """As if there were a GPU, on which nothing has been tried; yields how to set what a trial does."""
    gpu = pytest.importorskip("d_emo.kernels.gpu")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, answer in (
        ("get_device_capability", (9, 0)), ("synchronize", None), ("set_device", None),
        ("is_current_stream_capturing", False),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(dispatch, "_tried", {})
    return lambda trial: monkeypatch.setattr(gpu, "CHECKS", (trial,))


@pytest.mark.parametrize("capability, problem, works", [
    ((9, 0), None, True), ((9, 0), RuntimeError("ptxas: no such card\nmore"), False), ((7, 5), None, False)
])  # fmt: skip
def test_a_gpu_takes_tritons_kernels_only_if_all_pass_a_trial(monkeypatch, card, recwarn, capability, problem, works):
    tried = []

    def trial(device):
        tried.append((str(device), torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        if problem:
            raise problem

    card(trial)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    with torch.inference_mode():
        assert dispatch.triton_works(1) is works
    assert dispatch.triton_works(1) is works
    assert tried == ([] if capability < (8, 0) else [("cuda:1", True, False)])
    assert [str(w.message).partition(": ")[2] for w in recwarn] == (["ptxas: no such card"] if problem else [])


def test_a_trial_that_breaks_the_gpu_ends_with_the_remedy(monkeypatch, card):
    def broken(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    card(broken)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RunError, match="illegal memory access was encountered.; start again with D_EMO_KERNELS=plain"):
        dispatch.triton_works(0)


def test_a_trial_without_memory_decides_nothing(card):
    def crowded(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    card(crowded)
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.triton_works(0)
    card(lambda device: None)
    assert dispatch.triton_works(0)


def test_nothing_is_tried_while_a_cuda_graph_is_recorded(monkeypatch, card):
    card(lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not dispatch.triton_works(0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert dispatch.triton_works(0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch.triton_works(0)


def differentiated(tried):
    """A trial that takes a gradient of numbers, and needs them to be real ones."""

    def trial(device):
        x = torch.randn(3, requires_grad=True)
        tried.append(torch.autograd.grad(x.square().sum(), x)[0].sum().item())

    return trial


def test_the_trial_may_happen_while_a_network_is_compiled(card):
    card(differentiated(tried := []))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1 if dispatch.triton_works(0) else x, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1, 1] and len(tried) == 1


def test_the_trial_may_happen_in_a_checkpointed_block(card, recwarn):
    card(differentiated(tried := []))
    x = torch.randn(4, requires_grad=True)
    checkpoint(lambda x: (x * (2 if dispatch.triton_works(0) else 3)).exp(), x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, 2 * (2 * x).exp().detach())
    assert len(tried) == 1 and not recwarn.list


def test_what_the_trial_saves_is_not_counted_as_a_networks(card):
    card(differentiated([]))
    x = torch.randn(5, requires_grad=True)
    assert saved_bytes(lambda: dispatch.triton_works(0) and x.exp().sum()) == 5 * 4


@pytest.mark.parametrize("surroundings", [
    FakeTensorMode, lambda: torch.device("meta"), lambda: torch.autocast("cpu", dtype=torch.bfloat16)
])  # fmt: skip
def test_the_trial_takes_no_notice_of_what_is_around_it(card, surroundings):
    card(differentiated(tried := []))
    with surroundings():
        assert dispatch.triton_works(0)
    assert len(tried) == 1


def test_an_environment_variable_turns_all_kernels_off():
    code = "from d_emo.kernels import dispatch; print(dispatch.why_standard())"
    for value, plain_form in (("plain", "the plain form was asked for"), ("", "None")):
        environment = {**os.environ, "D_EMO_KERNELS": value}
        told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert told.stdout.strip() == plain_form


def attention_inputs(size, dtype, batch=2, heads=2):
    torch.manual_seed(0)
    return [torch.randn(batch, *size, heads * width).to(dtype) for width in (6, 5)]


@pytest.mark.parametrize("mode", ["near", "far", "spanning"])
@pytest.mark.parametrize("act", ["gelu", "silu", "none"])
@pytest.mark.parametrize("size, window, batch", [((4, 6), (2, 3), 3), ((3, 3), (3, 3), 1), ((4, 2), (1, 2), 2)])
@pytest.mark.parametrize("chunk", [2**20, 100, 7])
def test_window_attention_equals_its_plain_form_with_all_gradients(monkeypatch, mode, act, size, window, batch, chunk):
    monkeypatch.setattr("d_emo.kernels.attention.FROZEN_CHUNK", max(3, chunk // 2))
    monkeypatch.setattr("d_emo.kernels.attention.CHUNK", chunk)  # the whole batch, an image, some heads at a time
    inputs = attention_inputs(size, torch.float64, batch)

    def attend(qk, z):
        return window_attention(qk, z, act=act, heads=2, window=window, mode=mode, repeat=2)

    fast, frozen = gradients(attend, inputs), attend(*inputs)
    with plain():
        slow = gradients(attend, inputs)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(frozen, slow[0])


@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_window_attention_in_low_precision_is_as_exact_as_the_plain_form(dtype, autocast):
    def attend(qk, z):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return window_attention(qk, z, act="gelu", heads=2, window=(4, 4), mode="spanning")

    inputs = attention_inputs((8, 8), dtype)
    exact = gradients(attend, [x.double() for x in inputs]) if not autocast else None
    with plain():
        slow = gradients(attend, inputs)
    fast = gradients(attend, inputs)
    exact = exact or gradients(attend, [x.double() for x in inputs])
    for a, b, c in zip((fast[0], *fast[1]), (slow[0], *slow[1]), (exact[0], *exact[1]), strict=True):
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 1e-6


@pytest.mark.parametrize("act", ["none", "gelu", "silu", "tanh"])
def test_linear_applies_the_activation_with_and_without_gradients(act):
    x, weight, bias = torch.randn(9, 12), torch.randn(7, 12), torch.randn(7)
    act = {"none": None, "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU(), "tanh": torch.nn.GELU("tanh")}[act]
    expected = F.linear(x, weight, bias) if act is None else act(F.linear(x, weight, bias))
    torch.testing.assert_close(linear(x, weight, bias, act), expected)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias, act), expected)


@needs_onednn
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2}])
@pytest.mark.parametrize("folded", [False, True])
def test_local_convolution_in_inference_is_the_same_in_one_step(norm, options, folded):
    torch.manual_seed(0)
    conv = LocalConv(6, kernel_size=5, norm=norm, **options)
    conv(torch.randn(4, 9, 7, 6))  # running statistics that are not 0 and 1
    conv.eval()
    if folded:
        conv.fold_norm()
    x = torch.randn(1, 9, 7, 6)
    with torch.no_grad():
        with kernels.record() as calls:
            fast = conv(x)
        assert [call.form for call in calls] == ["the modules" if norm == "layer" else "oneDNN, one pass"]
        with plain():
            slow = conv(x)
    assert fast.shape == slow.shape and fast.is_contiguous()
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(conv(x), slow)


class Doubling(torch.nn.Module):
    """Notes how many images it sees."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = torch.nn.Identity(), []

    def forward(self, x):
        self.seen.append(len(x))
        return self.inner(2 * x)


def test_slices_hold_as_many_images_as_fit_and_only_in_inference(monkeypatch):
    monkeypatch.setattr("d_emo.kernels.slices.SLICE", 20)
    x = torch.randn(7, 2, 3)
    for size, seen in ((8, [2, 2, 2, 1]), (20, [1] * 7), (21, [1] * 7), (2, [7])):
        network = Doubling()
        with torch.no_grad():
            assert torch.equal(in_slices(network, x, size), 2 * x)
            assert network.seen == seen
            with plain():
                in_slices(network, x, size)
        in_slices(network, x, size)
        assert network.seen == [*seen, 7, 7]
    hooked, shapes = Doubling(), []
    hooked.inner.register_forward_hook(lambda module, inputs, out: shapes.append(len(out)))
    with torch.no_grad():
        in_slices(hooked, x, 8)
    assert shapes == [7]
