"""The local branch in training: one step that equals the plain ones, gradients and running statistics included."""

import copy

import pytest
import torch
from torch import nn

from d_emo import kernels
from d_emo.kernels.depthwise import depthwise_gradients
from d_emo.lab.benchmark.timing import saved_bytes
from d_emo.models.blocks import MobileOperator
from d_emo.models.layers import synchronise_batch_norms

ONE_STEP = "CPU, one step of training"


@pytest.fixture
def forms():
    """The forms that the local branch ran in, but for those of plain steps that were asked for."""
    with kernels.record() as calls:
        yield lambda: [
            call.form for call in calls
            if call.operator == "local_branch" and ("the plain form was asked for" not in dict(call.refused).values())
        ]


def operator(dtype=torch.float32, **options):
    """An operator whose batch norm is not at its start."""
    torch.manual_seed(0)
    op = MobileOperator(8, **{"num_heads": 2, "window_size": 2, **options})
    if hasattr(op.local.norm, "bn"):
        for tensor in (*op.local.norm.bn.parameters(), op.local.norm.bn.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
    return op.to(dtype)


def training_step(op, u, autocast=False):
    """Output, gradients of the input and of every parameter, and the buffers after a step of a copy."""
    op, u = copy.deepcopy(op), u.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = op(u)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out))
    named = {"out": out.detach(), "input": u.grad}
    return named | {name: p.grad for name, p in op.named_parameters()} | dict(op.named_buffers())


def plain_step(*args, **kwargs):
    with kernels.plain():
        return training_step(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 4, 4), (3, 7, 5), (1, 7, 5), (1, 1, 2), (5, 2, 1)])
@pytest.mark.parametrize(
    "options", [{}, {"attention": False, "kernel_size": 3}, {"out_dim": 6, "attention_mode": "near"}]
)
@pytest.mark.parametrize("chunk", [2**18, 100, 1])
def test_one_step_equals_the_plain_steps(monkeypatch, forms, dtype, shape, options, chunk):
    monkeypatch.setattr("d_emo.kernels.local_steps.CHUNK", chunk)  # the whole map, a few pixels, one pixel at a time
    op = operator(dtype, **options)
    u = torch.randn(*shape, 8, dtype=dtype)
    fast, slow = training_step(op, u), plain_step(op, u)
    assert forms() == [ONE_STEP]
    for name, expected in slow.items():
        tolerance = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
        torch.testing.assert_close(fast[name], expected, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    assert {"local.norm.bn.running_mean", "local.norm.bn.running_var", "local.norm.bn.num_batches_tracked"} < set(slow)


@pytest.mark.parametrize("attention", [True, False])
def test_in_bfloat16_it_is_as_exact_as_the_plain_steps(forms, attention):
    op, u = operator(attention=attention), torch.randn(3, 7, 5, 8)
    fast, slow = training_step(op, u, autocast=True), plain_step(op, u, autocast=True)
    exact = plain_step(op.double(), u.double())
    assert forms() == [ONE_STEP]
    for name in slow:
        assert fast[name].dtype == slow[name].dtype
        assert (fast[name] - exact[name]).abs().max() <= 2 * (slow[name] - exact[name]).abs().max() + 1e-6, name


def test_several_steps_move_the_running_statistics_alike():
    ours, theirs = operator(), operator()
    ours.local.norm.bn.momentum = theirs.local.norm.bn.momentum = 0.3
    for _ in range(3):
        u = torch.randn(2, 5, 3, 8)
        ours(u)
        with kernels.plain():
            theirs(u)
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert ours.local.norm.bn.num_batches_tracked == 3


def synchronised(op):
    synchronise_batch_norms(op)


def frozen_statistics(op):
    op.local.norm.bn.eval()


def cumulative_average(op):
    op.local.norm.bn.momentum = None


def hooked(op):
    op.local.register_forward_hook(lambda module, inputs, output: 2 * output)


def replaced(op):
    proj = op.proj
    op.proj = nn.Sequential(proj, nn.Tanh())


@pytest.mark.parametrize(
    "change", [nn.Module.eval, synchronised, frozen_statistics, cumulative_average, hooked, replaced]
)
def test_what_the_step_cannot_do_goes_the_plain_way(forms, change):
    op, u = operator(), torch.randn(2, 4, 4, 8)
    change(op)
    fast, slow = training_step(op, u), plain_step(op, u)
    assert forms() and ONE_STEP not in forms()
    for name, expected in slow.items():
        torch.testing.assert_close(fast[name], expected, msg=name)


@pytest.mark.parametrize(
    "options", [{"local_norm": "layer"}, {"local_norm": "none"}, {"dilation": 2}, {"inner_skip": False}]
)
def test_other_local_branches_go_the_plain_way(forms, options):
    operator(**options)(torch.randn(2, 4, 4, 8))
    assert forms() and ONE_STEP not in forms()


def test_without_gradients_while_traced_and_in_half_precision_it_goes_the_plain_way(forms):
    op, u = operator(), torch.randn(2, 4, 4, 8)
    with torch.no_grad():
        op(u)
    with kernels.plain():
        op(u)
    with torch.autocast("cpu", dtype=torch.float16):
        op(u)
    copy.deepcopy(op).to("meta")(u.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        operator(torch.bfloat16)(u)
    copy.deepcopy(op).bfloat16()(u.bfloat16())
    torch.export.export(op, (u,))
    assert forms() and ONE_STEP not in forms()


def test_one_value_per_channel_is_refused_in_the_librarys_words():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        operator(attention=False)(torch.randn(1, 1, 1, 8))


def test_frozen_parameters_get_no_gradient_and_the_others_all_of_theirs():
    op, u = operator(), torch.randn(2, 4, 4, 8)
    expected = training_step(op, u)
    for name in ("local.conv.weight", "proj.weight"):
        frozen = copy.deepcopy(op)
        frozen.get_parameter(name).requires_grad_(False)
        got = training_step(frozen, u)
        assert got.pop(name) is None
        for other, value in got.items():
            torch.testing.assert_close(value, expected[other], msg=other)


def test_two_wide_maps_are_kept_for_the_backward_pass():
    op, u = operator(attention=False), torch.randn(16, 8, 8, 8)
    kept = saved_bytes(lambda: op(u), list(op.parameters()))
    wide, narrow = 4 * u.numel() * 4, u.numel() * 4
    assert kept <= 3 * wide + narrow + 1024  # the value before its activation, a, c, and the input


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("shape", [(6, 4, 4), (9, 2, 3), (1, 1, 1), (2, 5, 4)])
def test_the_kernels_gradient_equals_the_librarys(shape, size):
    batch, height, width = shape
    x, grad = (torch.randn(batch, height, width, 7).double().permute(0, 3, 1, 2) for _ in range(2))
    weight = torch.randn(7, 1, size, size).double().requires_grad_()
    expected = torch.autograd.grad(nn.functional.conv2d(x, weight, padding=size // 2, groups=7), weight, grad)[0]
    none, got = depthwise_gradients(x, grad, weight, (False, True))
    assert none is None
    torch.testing.assert_close(got, expected)
