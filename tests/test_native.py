"""Operators in C equal the library's steps, with all gradients, and give way where they cannot be built."""

import functools
import multiprocessing
import shutil

import pytest
import torch

from d_emo import kernels
from d_emo.kernels import attention, dispatch, local_steps, native
from d_emo.kernels.autotune import Autotuner, read_preferences
from d_emo.models.blocks import MobileOperator

pytestmark = pytest.mark.skipif(
    isinstance(native.loaded(), str) and shutil.which("cc") is None, reason="no C compiler here"
)
FORMS = {
    "window_attention": "C, a head at a time", "local_steps": "C, some channels at a time",
    "local_gradients": "C, some channels at a time",
}  # fmt: skip
ASKED = ";".join("=".join(pair) for pair in FORMS.items())


@pytest.fixture
def in_c(monkeypatch):
    """Forms in C are asked for."""
    monkeypatch.setattr(dispatch, "preferences", read_preferences(ASKED))


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def attended(inputs, seed, form, options):
    inputs = [x.clone().requires_grad_() for x in inputs]
    z, qk = inputs
    out = form(z, qk, *options)
    return out.detach(), *torch.autograd.grad(out, inputs, seed.to(out.dtype))


@pytest.mark.parametrize("mode, act, size, window, widths, repeat", [
    ("spanning", "gelu", (16, 16), (8, 8), (32, 64), 1),
    ("near", "silu", (14, 14), (7, 7), (20, 33), 1),  # nothing is a multiple of a vector
    ("far", "none", (6, 4), (3, 2), (5, 7), 2),
    ("spanning", "gelu", (2, 6), (1, 3), (2, 2), 1),
    ("near", "gelu", (3, 3), (3, 3), (24, 48), 3),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_window_attention_in_c_is_as_exact_as_in_chunks(mode, act, size, window, widths, repeat, dtype):
    torch.manual_seed(0)
    z, qk = (torch.randn(2, *size, heads * width) * 2 for heads, width in ((3, widths[1]), (6, widths[0])))
    inputs, seed, options = [z.to(dtype), qk.to(dtype)], torch.randn(z.shape), (act, 3, window, mode, repeat)
    exact = attended([x.double() for x in inputs], seed.to(dtype).double(), attention._cpu, options)
    ours = attended(inputs, seed.to(dtype), attention._native, options)
    theirs = attended(inputs, seed.to(dtype), attention._cpu, options)
    for got, other, expected in zip(ours, theirs, exact, strict=True):
        assert got.dtype == dtype and got.shape == expected.shape
        bound = 1e-6 if dtype == torch.float32 else 1.1 * error(other, expected)
        assert error(got, expected) <= bound, (error(got, expected), error(other, expected))


@pytest.mark.parametrize("shape, size", [((3, 16, 16, 64), 5), ((2, 7, 9, 16), 3), ((1, 2, 13, 80), 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_local_steps_in_c_are_as_exact_as_in_rows(shape, size, dtype):
    torch.manual_seed(0)
    a, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    kernel = (torch.randn(shape[-1], 1, size, size) / size + 0.2).to(dtype)
    gamma, beta = torch.rand(shape[-1]) + 0.5, torch.randn(shape[-1])

    def step(steps, gradients, precision=None):
        operands = [x if precision is None else x.to(precision) for x in (a, kernel, gamma, beta)]
        running = torch.zeros_like(operands[2]), torch.ones_like(operands[2]), 0.3
        y, *kept = steps(*operands, 1e-5, running)
        again, *grads = gradients(grad.to(y), *operands, *kept, 1e-5, True)
        assert torch.equal(again, y)
        return y, *kept, *grads, *running[:2]

    exact = step(local_steps._steps_in_rows, local_steps._gradients_in_rows, torch.float64)
    theirs = step(local_steps._steps_in_rows, local_steps._gradients_in_rows)
    ours = step(local_steps._steps_native, local_steps._gradients_native)
    for got, other, expected in zip(ours, theirs, exact, strict=True):
        assert got.dtype == other.dtype and got.shape == other.shape and got.is_contiguous()
        assert error(got, expected) <= (2e-6 if dtype == torch.float32 else 1.1 * error(other, expected) + 1e-6)


def step_of(op, u, autocast=False):
    u = u.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = op(u)
    out.float().square().sum().backward()
    named = {"out": out.detach(), "input": u.grad} | {name: p.grad for name, p in op.named_parameters()}
    return named | {name: buffer.clone() for name, buffer in op.named_buffers()}


def operator():
    torch.manual_seed(0)
    return MobileOperator(16, num_heads=2, window_size=4), torch.randn(2, 8, 8, 16)


@pytest.mark.parametrize("autocast", [False, True])
def test_an_operator_takes_the_forms_in_c_and_equals_its_plain_form(in_c, autocast):
    with kernels.record() as calls:
        fast = step_of(*operator(), autocast)
    assert {call.operator: call.form for call in calls if call.operator in FORMS} == FORMS
    with kernels.plain():
        slow = step_of(*operator(), autocast)
    for name, expected in slow.items():
        assert error(fast[name], expected.double()) < (0.02 if autocast else 1e-5), name


def test_threads_change_no_bit(in_c, request):
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)
    alone = step_of(*operator())
    torch.set_num_threads(3)
    assert all(torch.equal(value, alone[name]) for name, value in step_of(*operator()).items())


def in_a_fork(connection):
    torch.set_num_threads(1)
    ones = torch.ones(1, 4, 4, 8)
    connection.send(native.attention(ones, ones, "none", 1, (2, 2), "near", 1)[0].sum().item())


def test_a_forked_process_may_use_them(in_c, one_thread):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=in_a_fork, args=(sender,))
    child.start()
    assert receiver.poll(30) and receiver.recv() == 128
    child.join(10)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(value):
    qk, z = torch.randn(1, 4, 4, 16), torch.randn(1, 4, 4, 8)
    qk[0, 1, 1, 0] = value  # a query
    out = native.attention(qk, z, "gelu", 1, (2, 2), "near", 1)[0]
    assert out[0, 1, 1].isnan().all() and out.isnan().sum() == 8


def test_fixed_forms_and_compiled_networks_are_as_they_were(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "tuner", Autotuner(tmp_path))
    op, u = operator()
    with kernels.fixed(), kernels.record() as calls:
        step_of(op, u)
    assert not {call.form for call in calls} & set(FORMS.values())
    found = kernels.explain(op, u)
    forms = {call.operator: call.form for call in found["training, compiled"]}
    assert forms["window_attention"] == "CPU, in chunks"


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """Nothing has been built or timed."""
    tuner = Autotuner(tmp_path)
    for module in (dispatch, native):
        monkeypatch.setattr(module, "tuner", tuner)
    native.loaded.cache_clear()
    yield tmp_path
    native.loaded.cache_clear()


def test_they_are_built_once_and_raced(anew, monkeypatch):
    op, u = operator()
    with kernels.record() as calls:
        step_of(op, u)
    rivals = {form for call in calls if call.operator in FORMS for form in (call.form, *dict(call.refused))}
    assert set(FORMS.values()) <= rivals and all(len(call.refused) == len(dict(call.refused)) for call in calls)
    assert len(list(anew.glob("cpu-*.so"))) == 1
    native.loaded.cache_clear()
    monkeypatch.setattr(native.subprocess, "run", None)
    assert native.refuses(u) is None  # what the first process built


def fails(room):
    compiler = room / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc: no disk' >&2\nexit 1\n")
    compiler.chmod(0o755)
    return compiler, f"{compiler} fails: cc: no disk"


@pytest.mark.parametrize("compiler", [lambda room: (None, "no C compiler"), fails])
def test_without_them_a_network_trains_as_before_and_explains_it(anew, monkeypatch, compiler):
    op, u = operator()
    with kernels.plain():
        expected = step_of(op, u)
    path, why = compiler(anew)
    monkeypatch.setattr(native.shutil, "which", lambda name: path and str(path))
    op, u = operator()
    with kernels.record() as calls:
        got = step_of(op, u)
    assert {dict(call.refused)[FORMS[call.operator]] for call in calls if call.operator in FORMS} == {why}
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)
    assert why in str(kernels.explain(op, u, compiled=False)) and not list(anew.glob("cpu-*"))


def test_a_choice_from_before_a_form_was_there_is_made_again(tmp_path):
    first = Autotuner(tmp_path)
    first.choose("key", ["a", "b"], lambda form: None)
    tried = []
    Autotuner(tmp_path).choose("key", ["a", "c", "b"], tried.append)
    assert set(tried) == {"a", "b", "c"}
