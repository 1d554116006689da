"""The local branch's kernels for GPUs: in Triton's interpreter, compiled for GPUs that are not here, and on one."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d_emo import kernels
from d_emo.kernels import attention, dispatch
from d_emo.models.blocks import AdaLNMobileBlock, MobileOperator
from d_emo.models.layers import LocalConv, fold_batch_norms, synchronise_batch_norms

triton = pytest.importorskip("triton")
convolution = pytest.importorskip("d_emo.kernels.gpu.convolution")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = (3, 5, 7)


@pytest.fixture
def interpreted(monkeypatch, triton_interpreter):
    """`d_emo.kernels.gpu.local` in Triton's interpreter, on the CPU."""
    names = ("local", "correlation", "skip")
    local, *summing = (importlib.import_module(f"d_emo.kernels.gpu.{name}") for name in names)
    # As on a GPU of three multiprocessors, so that a program has several strips and a sum several programs.
    for module in summing:
        monkeypatch.setattr(module, "multiprocessors", lambda device: 3)
        monkeypatch.setattr(module, "PROGRAMS", 1)
    return local


@pytest.fixture
def routed(interpreted, monkeypatch):
    """Let the networks take the GPU's form on the CPU."""

    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    monkeypatch.setattr(dispatch, "triton_works", lambda index: True)
    forms = [form for form in attention.WINDOW_ATTENTION if "Triton" not in form.name]  # they have tests of their own
    monkeypatch.setattr(attention, "WINDOW_ATTENTION", tuple(forms))
    return interpreted


@pytest.fixture
def ran(routed, monkeypatch):
    """The names of the GPU's operators that ran, instead of the CPU's forms."""
    names = []

    def noted(name, original):
        return lambda *args, **kwargs: (names.append(name), original(*args, **kwargs))[1]

    for name in ("local_projection", "depthwise_conv2d", "depthwise_silu"):
        monkeypatch.setattr(routed, name, noted(name, getattr(routed, name)))
    return names


def plain_conv(x, weight):
    padding = weight.shape[-1] // 2
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=padding, groups=len(weight)).permute(0, 2, 3, 1)


def plain_branch(a, kernel, gamma, beta, projection, running_mean, running_var, momentum=0.3, eps=1e-6):
    c = plain_conv(a, kernel).permute(0, 3, 1, 2)
    n = F.batch_norm(c, running_mean, running_var, gamma, beta, True, momentum, eps)
    return F.linear(a + F.silu(n.permute(0, 2, 3, 1)), projection)


def branch(a, kernel, gamma, beta, projection, running_mean, running_var):
    """`kernels.local_branch` of modules with these parameters and buffers."""
    local = LocalConv(a.shape[-1], kernel_size=kernel.shape[-1])
    proj = nn.Linear(*projection.shape[::-1], bias=False)
    local.conv._parameters["weight"], proj._parameters["weight"] = kernel, projection
    local.norm.bn._parameters.update(weight=gamma, bias=beta)
    local.norm.bn._buffers.update(running_mean=running_mean, running_var=running_var)
    local.norm.bn.momentum = 0.3
    return kernels.local_branch(local, proj, a, skip=True)


def branch_inputs(shape, size, mean=0.0, device="cpu"):
    torch.manual_seed(0)
    dim = shape[-1]
    kernel = torch.randn(dim, 1, size, size) / size
    if mean:
        kernel += 1.0  # so that the mean of the map reaches that of the convolution
    weights = [torch.randn(shape) + mean, kernel, torch.rand(dim) + 0.5, torch.randn(dim), torch.randn(6, dim)]
    return [x.to(device) for x in weights]


def all_results(function, inputs, dtype):
    """The result, all gradients, and both running statistics."""
    inputs = [x.to(dtype if i == 0 or dtype == torch.float64 else torch.float32) for i, x in enumerate(inputs)]
    inputs = [x.clone().requires_grad_() for x in inputs]
    running = [torch.full_like(inputs[2], value, requires_grad=False) for value in (0.5, 2.0)]
    out = function(*inputs, *running)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    names = ["out", "a", "kernel", "gamma", "beta", "projection", "running_mean", "running_var"]
    values = [out.detach(), *torch.autograd.grad(out, inputs, grad), *running]
    return dict(zip(names, values, strict=True))


def compare_branch(inputs, dtype, tolerance):
    """In the norm of each result, against float64."""

    def ours(*tensors):
        a, *parameters, mean, var = tensors
        return branch(a, *parameters, mean, var)

    got, expected = all_results(ours, inputs, dtype), all_results(plain_branch, inputs, torch.float64)
    for name, value in expected.items():
        assert got[name].shape == value.shape
        assert got[name].dtype == (dtype if name in ("out", "a") else torch.float32)
        error = (got[name].double() - value).norm() / value.norm().clamp(min=1e-9)
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("shape, size", [
    ((2, 5, 3, 10), 3), ((2, 5, 3, 10), 5), ((2, 5, 3, 10), 7), ((1, 2, 19, 3), 7), ((7, 1, 1, 4), 5),
    ((1, 9, 6, 66), 5),
])  # fmt: skip
def test_one_step_equals_the_plain_steps_with_all_gradients(ran, shape, size):
    compare_branch(branch_inputs(shape, size), torch.float32, 1e-4)
    assert ran == ["local_projection"]


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_in_half_precision_too(routed, dtype, tolerance):
    compare_branch(branch_inputs((2, 4, 7, 6), 5), dtype, tolerance)


def test_a_mean_far_from_zero_costs_no_precision(routed):
    x = torch.randn(3, 6, 18, 4) * 0.1 + 1000  # squares of 1e6, of which float32 keeps 0.06; the variance is 0.01
    taps = torch.zeros(9, 4)
    taps[4] = 1.0
    out, (mean, var) = routed.convolve(x, taps, statistics=True)
    assert torch.equal(out, x)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 1, 2)), rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 1, 2), correction=0), rtol=1e-3, atol=0)
    compare_branch(branch_inputs((3, 6, 5, 4), 3, mean=100.0), torch.float32, 1e-3)


def test_what_would_lie_beside_the_map_has_no_part_in_the_statistics(interpreted):
    """A value there that float16 cannot hold; a map of 5 columns has groups of columns that are all beside it."""
    x, taps = torch.zeros(1, 2, 5, 1, dtype=torch.float16), torch.zeros(5, 5, 1)
    x[..., 3:, 0] = 30000
    taps[2, :3, 0] = torch.tensor([8.0, -1.0, 1.0])
    out, (mean, var) = interpreted.convolve(x, taps.view(25, 1), statistics=True)
    assert out.isfinite().all()
    torch.testing.assert_close(mean, out.float().mean((0, 1, 2)))
    torch.testing.assert_close(var, out.float().var((0, 1, 2), correction=0))


@pytest.mark.parametrize("size", SIZES)
def test_the_convolution_equals_the_librarys_with_its_gradients(interpreted, size):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 6, 5, requires_grad=True), torch.randn(5, 1, size, size, requires_grad=True)
    grad = torch.randn(2, 4, 6, 5)
    for ours, theirs in zip(
        *((out, *torch.autograd.grad(out, (x, weight), grad)) for out in (
            interpreted.depthwise_conv2d(x, weight), plain_conv(x, weight)
        )), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    frozen = interpreted.depthwise_conv2d(x, weight.detach())
    (got,) = torch.autograd.grad(frozen, x, grad)
    torch.testing.assert_close(got, torch.autograd.grad(plain_conv(x, weight), x, grad)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_inference_in_one_pass_equals_the_steps(interpreted, dtype, bias, skip):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, 6, 5).to(dtype), torch.randn(5, 1, 5, 5), torch.randn(5) if bias else None
    expected = plain_conv(x.double(), weight.double()) + (0 if bias is None else bias.double())
    expected = F.silu(expected) + (x.double() if skip else 0)
    got = interpreted.depthwise_silu(x, weight, bias, skip=skip)
    assert got.dtype == dtype
    assert (got.double() - expected).norm() <= (1e-5 if dtype == torch.float32 else 5e-3) * expected.norm()


def test_the_trial_passes_and_names_what_is_wrong(interpreted, monkeypatch):
    monkeypatch.setattr(interpreted, "TRIALS", interpreted.TRIALS[-1:])
    interpreted.check(torch.device("cpu"))
    for factor in (1.1, float("nan")):
        wrong = torch.no_grad()(lambda *args, factor=factor: factor * interpreted._inference(*args))
        monkeypatch.setattr(interpreted, "TRIALS", [("a step", wrong, interpreted._plain_inference, 2)])
        with pytest.raises(RuntimeError, match="a step of size 3 in torch.float32 is off by"):
            interpreted.check(torch.device("cpu"))


def block(dim=6, **options):
    torch.manual_seed(0)
    made = AdaLNMobileBlock(dim, **{"num_heads": 2, "window_size": 2, "expand_ratio": 2, **options})
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    for name, buffer in made.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return made


def block_step(made, autocast=False):
    """Output, gradients of the inputs and of every parameter, and the buffers after a step of a copy."""
    made = copy.deepcopy(made)
    x, c = (torch.randn(shape, generator=torch.Generator().manual_seed(2)) for shape in ((2, 4, 6, 6), (2, 6)))
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = made(x, c)
    named = {"out": out.detach()}
    if out.requires_grad:
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
        named |= {"x": x.grad} | {name: p.grad for name, p in made.named_parameters()}
    return named | dict(made.named_buffers())


def assert_equals_plain(made, **options):
    got = block_step(made, **options)
    with kernels.plain():
        expected = block_step(made, **options)
    for name, value in expected.items():
        error = (got[name].double() - value.double()).norm()
        assert error <= 1e-4 * value.double().norm() + 1e-5, f"{name}: {error}"
    return expected


def test_a_block_in_training_takes_the_one_step(ran):
    results = assert_equals_plain(block())
    assert ran == ["local_projection"]
    assert results["operator.local.norm.bn.num_batches_tracked"] == 1
    assert "operator.local.conv.weight" in results


def test_a_block_in_training_under_autocast_takes_it_with_a_map_of_16_bits(ran, routed, monkeypatch):
    seen, convolve = [], routed.convolve
    monkeypatch.setattr(routed, "convolve", lambda x, *args, **kw: (seen.append(x.dtype), convolve(x, *args, **kw))[1])
    got = block_step(block(), autocast=True)
    with kernels.plain():
        expected, exact = block_step(block(), autocast=True), block_step(block())
    assert ran == ["local_projection"] and set(seen) == {torch.bfloat16}
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        error, theirs = ((one.double() - exact[name].double()).norm() for one in (got[name], value))
        assert error <= 3 * theirs + 1e-6, name


def test_under_autocast_a_map_of_32_bits_becomes_one_of_16(routed):
    inputs, running = branch_inputs((2, 3, 4, 5), 3), (torch.zeros(5), torch.ones(5))
    conv, operator = LocalConv(5, kernel_size=3, norm="none"), MobileOperator(5, attention=False, expand_ratio=1).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), kernels.record() as calls:
        assert branch(*inputs, *running).dtype == torch.bfloat16
        assert conv(inputs[0]).dtype == torch.bfloat16
        with torch.no_grad():
            assert conv(inputs[0]).dtype == torch.bfloat16
            assert kernels.local_branch(operator.local, nn.Identity(), inputs[0], skip=True).dtype == torch.bfloat16
    assert [call.form for call in calls if call.operator.startswith("local")] == [
        "Triton, one step of training", "Triton's convolution", "Triton, one pass",
        "Triton, one pass and the projection",
    ]  # fmt: skip


@torch.no_grad()
def test_training_mode_without_gradients_still_uses_the_batchs_statistics(ran):
    results = assert_equals_plain(block())
    assert ran == ["depthwise_conv2d"]
    assert results["operator.local.norm.bn.num_batches_tracked"] == 1


def folded(made):
    return fold_batch_norms(made.eval())


@pytest.mark.parametrize("prepare", [nn.Module.eval, folded])
@torch.no_grad()
def test_a_block_in_inference_takes_the_one_pass(ran, prepare):
    made = block()
    prepare(made)
    assert_equals_plain(made)
    assert ran == ["depthwise_silu"]


def synchronised(made):
    synchronise_batch_norms(made)


@pytest.mark.parametrize(
    "options, change", [({"local_norm": "layer"}, None), ({"local_norm": "none"}, None), ({}, synchronised),
                        ({}, nn.Module.eval), ({"inner_skip": False}, None)]
)  # fmt: skip
def test_other_norms_and_eval_mode_with_gradients_take_the_convolution_only(ran, options, change):
    made = block(**options)
    if change is not None:
        change(made)
    assert_equals_plain(made)
    assert ran == ["depthwise_conv2d"]


@pytest.mark.parametrize("options", [{"kernel_size": 1}, {"kernel_size": 9}, {"dilation": 2}])
@pytest.mark.parametrize("training", [True, False])
def test_other_convolutions_are_the_librarys(ran, options, training):
    made = block(**options).train(training)
    with torch.set_grad_enabled(training):
        assert_equals_plain(made)
    assert not ran


@torch.no_grad()
def test_a_local_convolution_alone_takes_the_one_pass_in_inference(ran):
    conv, x = LocalConv(5, kernel_size=3).eval(), torch.randn(2, 4, 6, 5)
    got = conv(x)
    with kernels.plain():
        torch.testing.assert_close(got, conv(x), rtol=1e-4, atol=1e-5)
    LocalConv(5, kernel_size=3, stride=2).eval()(x)
    assert ran == ["depthwise_silu"]


@torch.no_grad()
def test_a_hook_on_the_local_convolution_still_sees_its_output(ran):
    operator, seen = MobileOperator(6, attention=False).eval(), []
    operator.local.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    x = torch.randn(1, 4, 4, 6)
    out = operator(x)
    torch.testing.assert_close(operator.proj(seen[0] + operator.expand(x)), out)
    assert ran == ["depthwise_silu"]


@pytest.mark.parametrize(
    "training, norm, wanted", [(True, "batch", "local_projection"), (False, "batch", "depthwise_silu"),
                               (True, "none", "depthwise_conv2d")]
)  # fmt: skip
def test_the_compiler_keeps_one_graph(routed, training, norm, wanted):
    torch._dynamo.reset()
    made = block(local_norm=norm).train(training)
    x, c = torch.randn(2, 4, 4, 6), torch.randn(2, 6)
    graphs, eager, compiled = [], made, copy.deepcopy(made)

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    with torch.set_grad_enabled(training):
        ours, theirs = torch.compile(compiled, fullgraph=True, backend=backend)(x, c), eager(x, c)
    torch.testing.assert_close(ours, theirs)
    if training:
        for out in (ours, theirs):
            out.square().mean().backward()
        for (name, p), q in zip(compiled.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)
        for p, q in zip(compiled.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(p, q)
    assert len(graphs) == 1 and any(f"d_emo.{wanted}" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("needs", [True, False])
def test_the_compiler_is_told_the_true_shapes_strides_and_types(interpreted, needs):
    a, kernel, gamma, beta, projection = branch_inputs((2, 3, 4, 6), 3)
    x = a.bfloat16()
    ops = torch.ops.d_emo
    out, c, statistics = ops.local_projection(x, kernel, gamma, beta, projection, 1e-6)
    for op, args in (
        (ops.local_projection, (x, kernel, gamma, beta, projection, 1e-6)),
        (ops.local_projection_backward, (out, x, c, statistics, kernel, gamma, beta, projection, 1e-6, needs)),
        (ops.depthwise_conv2d, (x, kernel)),
        (ops.depthwise_conv2d_backward, (x, c, kernel, [needs, True])),
        (ops.depthwise_conv2d_backward, (x, c, kernel, [True, needs])),
        (ops.depthwise_silu, (x, kernel, beta, needs)),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))
