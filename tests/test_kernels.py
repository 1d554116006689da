"""Every fast form equals the plain one, with all gradients."""

import pytest
import torch
import torch.nn.functional as F

from d_emo.kernels import linear, plain
from d_emo.kernels.choice import onednn_available

needs_onednn = pytest.mark.skipif(not onednn_available(), reason="this CPU has no AVX-512")


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

    class Layer(torch.nn.Module):
        def forward(self, x, weight):
            return linear(x, weight)

    graph = torch.export.export(Layer(), (x, weight)).graph
    assert not any("mkldnn" in str(node.target) for node in graph.nodes)
