"""Layer norm with adaLN's shift and scale in one step equals the two steps, gradients included."""

import copy

import pytest
import torch
from torch import nn

from d_emo import kernels
from d_emo.lab.benchmark.timing import saved_bytes


@pytest.fixture
def forms():
    """The forms that ran."""
    with kernels.record() as calls:
        yield lambda: [call.form for call in calls]


def inputs(shape, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(*shape, 6, dtype=dtype)] + [torch.randn(shape[0], 6, dtype=dtype) for _ in range(2)]


def layer_norm(affine=True, dtype=torch.float32):
    norm = nn.LayerNorm(6, eps=1e-6, elementwise_affine=affine, dtype=dtype)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norm


def gradients(function, norm, tensors):
    """The output, and the gradients of the inputs and of the norm's parameters."""
    norm, tensors = copy.deepcopy(norm), [x.clone().requires_grad_() for x in tensors]
    out = function(norm, *tensors)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return out.detach(), *torch.autograd.grad(out, [*tensors, *norm.parameters()], seed)


def two_steps(norm, x, shift, scale):
    return norm(x) * (1 + scale[:, None, None]) + shift[:, None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1), (1, 7, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_one_step_equals_the_two(forms, dtype, shape, affine):
    norm, tensors = layer_norm(affine, dtype), inputs(shape, dtype)
    got, expected = (gradients(f, norm, tensors) for f in (kernels.modulated_norm, two_steps))
    assert forms() == ["one step"]
    torch.testing.assert_close(got, expected)


def test_shift_and_scale_may_come_in_the_precision_of_autocast(forms):
    norm, tensors = layer_norm(), inputs((3, 4, 5))
    tensors[1:] = [x.bfloat16() for x in tensors[1:]]
    got, slow = (gradients(f, norm, tensors) for f in (kernels.modulated_norm, two_steps))
    exact = gradients(two_steps, norm.double(), [x.double() for x in tensors])
    assert forms() == ["one step"]
    for a, b, c in zip(got, slow, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - c).abs().max() <= (b - c).abs().max() + 1e-6


def test_what_the_step_cannot_do_goes_the_plain_way(forms):
    norm, tensors = layer_norm(), inputs((2, 3, 3))
    expected = two_steps(norm, *tensors)
    with torch.no_grad():
        torch.testing.assert_close(kernels.modulated_norm(norm, *tensors), expected)
    with kernels.plain():
        torch.testing.assert_close(kernels.modulated_norm(norm, *tensors), expected)
    low = [x.bfloat16() for x in tensors]
    assert kernels.modulated_norm(copy.deepcopy(norm).bfloat16(), *low).dtype == torch.bfloat16
    assert kernels.modulated_norm(nn.Identity(), *tensors).equal(two_steps(nn.Identity(), *tensors))
    nowhere = [x.to("meta") for x in tensors]
    assert kernels.modulated_norm(copy.deepcopy(norm).to("meta"), *nowhere).shape == expected.shape
    norm.register_forward_hook(lambda module, arguments, output: 2 * output)
    torch.testing.assert_close(kernels.modulated_norm(norm, *tensors), two_steps(norm, *tensors))
    assert set(forms()) == {"norm, then modulation"}


def test_of_the_maps_only_the_input_is_kept_for_the_backward_pass():
    norm, tensors = layer_norm(), [x.requires_grad_() for x in inputs((2, 32, 32))]
    there = [*tensors, *norm.parameters()]
    one, two = (saved_bytes(lambda f=f: f(norm, *tensors), there) for f in (kernels.modulated_norm, two_steps))
    map_, statistics = tensors[0].numel() * 4, 2 * tensors[0].numel() // 6 * 4
    assert two >= map_ + statistics and one <= statistics + 1024
