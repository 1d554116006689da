"""Window attention for GPUs, run by Triton's interpreter on the CPU and built by its compiler for cards not here."""

import inspect
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from d_emo.kernels import autotune, dispatch, plain
from d_emo.kernels.attention import attend as window_attention
from d_emo.models import create_model
from d_emo.models.attention import WindowAttention

triton = pytest.importorskip("triton")
gpu = pytest.importorskip("d_emo.kernels.gpu.attention")
spanning = pytest.importorskip("d_emo.kernels.gpu.spanning")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def interpreted(monkeypatch, triton_interpreter):
    """The kernels are chosen for CPU tensors; the list that is returned grows with every launch."""
    launches = []
    for module in (gpu, spanning):
        launch = module.launch
        monkeypatch.setattr(
            module, "launch", lambda *args, run=launch, **options: launches.append(args) or run(*args, **options)
        )
    monkeypatch.setattr(gpu, "uses_tf32", lambda: True)
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(dispatch, "triton_works", lambda index: True)
    return launches


def operands(size, widths, heads=2, batch=2, dtype=torch.float32, device="cpu"):
    """Queries with keys, and a value. Shape: (B, H, W, 2C), (B, H, W, M)."""
    generator = torch.Generator(device).manual_seed(0)
    d, e = (heads * width for width in widths)
    maps = [torch.randn(batch, *size, n, generator=generator, device=device) for n in (2 * d, e)]
    return [x.to(dtype).requires_grad_() for x in maps]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def with_gradients(inputs, dtype=None, **options):
    """The output, and the gradients of qk and z for a fixed random gradient of the output."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = window_attention(*inputs, **options)
    seed = torch.randn(out.shape, generator=generator(1)).to(out)
    return out.detach(), *torch.autograd.grad(out, inputs, seed)


def off(x, exact):
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


SIZES = [
    ((4, 8), (4, 4), (32, 80), 2),  # the studies' window of 16 tokens; widths of more than a chunk
    ((14, 7), (7, 7), (20, 70), 1),  # the classifiers'; 49 tokens, widths that no chunk divides
    ((8, 16), (8, 8), (16, 16), 1),  # the denoisers'
    ((4, 6), (2, 3), (72, 24), 1),
]


@pytest.mark.parametrize("size, window, widths, batch", SIZES)
@pytest.mark.parametrize("mode, enough", [("near", 1), ("far", 10**6), ("spanning", 1), ("spanning", 10**6)])
def test_kernels_equal_the_plain_form_with_all_gradients(
    interpreted, monkeypatch, size, window, widths, batch, mode, enough
):
    monkeypatch.setattr(gpu, "ENOUGH", enough)
    inputs = operands(size, widths, batch=batch)
    options = dict(act="gelu", heads=2, window=window, mode=mode)
    ours = with_gradients(inputs, **options)
    assert len(interpreted) == 2  # one forward, one backward
    with plain():
        torch.testing.assert_close(ours, with_gradients(inputs, **options), rtol=1e-4, atol=1e-5)


ONE_PASS = "Triton, both partitions in one pass"


@pytest.fixture
def anything_fits(monkeypatch):
    """Maps of float32, in which results are the same to many digits, are for the interpreter as good as others."""
    monkeypatch.setattr(spanning, "MOST_BYTES", 2**30)


@pytest.mark.parametrize("size, window, widths, heads", [
    ((8, 8), (4, 4), (32, 80), 2),  # the studies'; a width that no chunk divides
    ((16, 16), (8, 8), (64, 64), 1),  # the denoisers' at 256 px, whose value is wider
    ((8, 16), (8, 4), (20, 24), 1),  # windows side by side
    ((16, 8), (4, 4), (16, 16), 1),
])  # fmt: skip
@pytest.mark.parametrize("act, repeat", [("gelu", 1), ("silu", 2)])
def test_one_pass_equals_the_plain_form_with_all_gradients(
    interpreted, anything_fits, size, window, widths, heads, act, repeat
):
    inputs = operands(size, widths, heads=heads, batch=2 if size == (8, 8) else 1)
    options = dict(act=act, heads=heads, window=window, mode="spanning", repeat=repeat)
    with dispatch.record() as calls:
        ours = with_gradients(inputs, **options)
    assert [call.form for call in calls] == [ONE_PASS] and len(interpreted) == 2
    with plain():
        torch.testing.assert_close(ours, with_gradients(inputs, **options), rtol=1e-4, atol=1e-5)


def test_one_pass_says_what_it_does_not_take(interpreted, monkeypatch):
    def why(size, window, mode="spanning", **options):
        with dispatch.record() as calls:
            window_attention(*operands(size, (8, 8), batch=1, **options), heads=2, window=window, mode=mode)
        return dict(calls[0].refused).get(ONE_PASS)

    assert why((8, 8), (4, 4)) is None
    assert why((8, 8), (4, 4), "near") == why((4, 4), (4, 4)) == "one partition only"
    assert why((32, 16), (8, 8)) == "a map of more than 256 tokens"
    for size, window in (((4, 4), (2, 2)), ((14, 14), (7, 7)), ((12, 4), (4, 4)), ((8, 16), (8, 2))):
        assert "no powers of two" in why(size, window)
    assert why((16, 16), (8, 8)) == "maps of float32 that do not fit the registers"
    assert why((16, 16), (8, 8), dtype=torch.bfloat16) is None
    monkeypatch.setitem(spanning.TROUBLE, (torch.device("cpu"), True), "failed their trial")
    assert why((8, 8), (4, 4)) == "failed their trial"
    with torch.no_grad():
        assert why((8, 8), (4, 4)) is None


def test_one_pass_is_no_less_exact_than_two(interpreted):
    inputs = operands((16, 16), (64, 32), heads=1, batch=1, dtype=torch.bfloat16)
    options = dict(act="gelu", heads=1, window=(8, 8), mode="spanning")
    once = with_gradients(inputs, **options)
    low = [x.detach().requires_grad_() for x in inputs]
    twice = gpu.attend(*low, "gelu", 1, [8, 8], "spanning", 1)
    twice = twice, *torch.autograd.grad(twice, low, torch.randn(twice.shape, generator=generator(1)).bfloat16())
    with plain():
        exact = with_gradients(inputs, torch.float64, **options)
    assert all(off(x, z) <= 1.02 * off(y, z) for x, y, z in zip(once, twice, exact, strict=True))


def test_where_the_trial_of_one_pass_fails_the_others_go_on(interpreted, monkeypatch):
    monkeypatch.setattr(spanning, "TROUBLE", {})
    monkeypatch.setattr(spanning, "TRIAL", ((4, 4), 1, 16, 16))
    spanning.check(torch.device("cpu"))
    assert not spanning.TROUBLE and len(interpreted) == 3
    with monkeypatch.context() as patch:
        patch.setattr(spanning, "run_kernel", lambda *args, **sizes: SimpleNamespace(n_spills=2390))
        patch.setattr(spanning, "check_one", lambda *args, **options: None)
        spanning.check(torch.device("cpu"))
    assert "the compiler spilled 2390 registers" in spanning.trouble(torch.device("cpu"), True)
    spanning.TROUBLE.clear()
    monkeypatch.setattr(spanning, "turn", lambda x: x)
    spanning.check(torch.device("cpu"))
    assert "the result of window attention in torch.bfloat16 is off by" in spanning.trouble(torch.device("cpu"), True)
    monkeypatch.setattr(spanning, "turn", lambda x: 1 / 0)
    spanning.check(torch.device("cpu"))
    assert "division by zero" in spanning.trouble(torch.device("cpu"), False)


def test_one_pass_gives_way_where_it_is_slower(interpreted, monkeypatch, tmp_path):
    monkeypatch.setattr(spanning, "TROUBLE", {})
    monkeypatch.setattr(spanning, "TRIAL", ((4, 4), 1, 16, 16))
    monkeypatch.setattr(spanning, "tuner", autotune.Autotuner(tmp_path))
    fast, cpu = [["one pass", "a pass for each partition"]], torch.device("cpu")

    def timed(forms, trial):
        for form in forms:
            trial(form)
        return {form: 0.001 * (1 + fast[0].index(form)) for form in forms}

    monkeypatch.setattr(autotune, "timed", timed)
    spanning.compare_speed(cpu, images=1, heads=1)
    assert not spanning.TROUBLE and len(interpreted) == 6  # training: two kernels for each
    monkeypatch.setattr(spanning, "tuner", autotune.Autotuner(tmp_path / "another"))
    fast[0].reverse()
    spanning.compare_speed(cpu, images=1, heads=1)
    assert spanning.trouble(cpu, True) == spanning.trouble(cpu, False) == "2 ms here, a pass for each partition 1 ms"


def test_a_gpu_with_less_shared_memory_keeps_fewer_chunks_on_their_way(interpreted, monkeypatch):
    forward, stages = gpu.forward_kernel, []

    class Small:
        def __getitem__(self, grid):
            def run(*args, num_stages, **sizes):
                stages.append(num_stages)
                if num_stages > 1:
                    raise gpu.OutOfResources(139264, 101376, "shared memory")
                return forward[grid](*args, num_stages=num_stages, **sizes)

            return run

    inputs = operands((4, 4), (16, 16))
    options = dict(act="gelu", heads=2, window=(4, 4), mode="near")
    exact = window_attention(*inputs, **options)
    monkeypatch.setattr(gpu, "forward_kernel", Small())
    assert torch.equal(window_attention(*inputs, **options), exact) and stages == [3, 2, 1]


@pytest.mark.parametrize("act", ["gelu", "silu", "none"])
@pytest.mark.parametrize("repeat", [1, 2])
def test_every_activation_and_repetition(interpreted, act, repeat):
    inputs = operands((2, 6), (8, 20), batch=1)
    inputs[1] = 6 * inputs[1]  # far into the tails of the activations
    options = dict(act=act, heads=2, window=(2, 3), mode="far", repeat=repeat)
    ours = with_gradients(inputs, **options)
    assert len(interpreted) == 2
    with plain():
        torch.testing.assert_close(ours, with_gradients(inputs, **options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float16, 1e-3)])
def test_low_precision(interpreted, dtype, bound):
    """The interpreter cuts bfloat16 off instead of rounding it, which costs a few times the error of a GPU."""
    inputs = operands((2, 8), (16, 40), batch=1, dtype=dtype)
    options = dict(act="gelu", heads=2, window=(2, 4), mode="spanning")
    ours = with_gradients(inputs, **options)
    assert len(interpreted) == 2 and all(x.dtype == dtype for x in ours)
    with plain():
        exact = with_gradients(inputs, torch.float64, **options)
    assert max(map(off, ours, exact)) < bound


def test_operands_of_any_strides_and_expanded_gradients(interpreted):
    qk, z = (x.detach() for x in operands((2, 4), (8, 8), batch=2))
    qk, z = qk.transpose(1, 2).contiguous().transpose(1, 2), z.transpose(0, 3).contiguous().transpose(0, 3)
    inputs = [x.requires_grad_() for x in (qk, z)]
    assert not any(x.is_contiguous() for x in inputs)
    options = dict(act="silu", heads=2, window=(2, 2), mode="spanning")
    ours = torch.autograd.grad(window_attention(*inputs, **options).sum(), inputs)
    assert len(interpreted) == 2
    with plain():
        theirs = torch.autograd.grad(window_attention(*inputs, **options).sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_autocast_lowers_every_operand(interpreted):
    qk, z = operands((2, 4), (8, 8), batch=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = window_attention(qk.bfloat16(), z, act="none", heads=2, window=(2, 2), mode="near")
    assert out.dtype == torch.bfloat16 and len(interpreted) == 1
    assert torch.autograd.grad(out.float().sum(), z)[0].dtype == torch.float32


def test_what_the_kernels_do_not_take_goes_to_the_other_form(interpreted, monkeypatch):
    def launched(inputs, window=(2, 2)):
        before = len(interpreted)
        window_attention(*inputs, act="gelu", heads=2, window=window, mode="spanning")
        return len(interpreted) > before

    assert launched(operands((2, 2), (8, 8)))
    assert not launched(operands((9, 9), (8, 8), batch=1), (9, 9))  # 81 tokens
    assert gpu.refuses(*operands((2, 2), (8, 8), batch=0), (2, 2)) == "an empty batch"
    monkeypatch.setattr(gpu, "uses_tf32", lambda: False)
    assert not launched(operands((2, 2), (8, 8)))
    assert launched(operands((2, 2), (8, 8), dtype=torch.bfloat16))


@pytest.mark.parametrize("autograd", [False, True])
@pytest.mark.parametrize("window, form", [(2, "Triton"), (4, ONE_PASS)])
def test_a_compiled_attention_is_one_graph(interpreted, autograd, window, form):
    torch._dynamo.reset()
    torch.manual_seed(0)
    attention = WindowAttention(16, 32, num_heads=2, window_size=window)
    x = torch.randn(2, 2 * window, 2 * window, 16)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(autograd):
        with dispatch.record() as calls:
            ours = compiled(x)
        assert interpreted and {call.form for call in calls if call.operator == "window_attention"} == {form}
        with plain():
            theirs = attention(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if autograd:
        ours, theirs = (torch.autograd.grad(y.square().sum(), list(attention.parameters())) for y in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_denoiser_trains_the_same_with_and_without_the_kernels(interpreted):
    torch.manual_seed(0)
    model = create_model(
        "D-EMOv2-Ti-2", depth=1, hidden_size=24, num_heads=2, sample_size=8, window_size=2, num_classes=3
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, options = torch.randn(2, 4, 8, 8), {"timestep": torch.tensor([1, 7]), "class_labels": torch.tensor([0, 2])}

    def train():
        out = model(x, **options).sample
        return out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))

    ours = train()
    assert len(interpreted) == 2
    with plain():
        torch.testing.assert_close(ours, train(), rtol=1e-3, atol=1e-5)


def test_the_check_passes_and_sees_a_wrong_kernel(interpreted, monkeypatch):
    gpu.check(torch.device("cpu"))
    assert [len(launched[1]) for launched in interpreted] == [3, 5] * 4
    right = gpu.activation
    monkeypatch.setattr(gpu, "activation", lambda z, mask, ACT: right(z, mask, "silu"))
    with pytest.raises(RuntimeError, match="the result of window attention in torch.float32 is off by"):
        gpu.check(torch.device("cpu"))


def test_the_operators_pass_the_librarys_own_checks(interpreted):
    inputs = operands((2, 4), (8, 8), batch=1)
    torch.library.opcheck(gpu.attend, (*inputs, "gelu", 2, [2, 2], "spanning", 1))
    torch.library.opcheck(spanning.attend, (*operands((8, 8), (8, 8), batch=1), "gelu", 2, [4, 4], "spanning", 1))


BUILD = Path(triton.__file__).parent / "backends/nvidia/bin"


SIZES_OF_S = dict(TALL=8, WIDE=8, D=64, E=256, ACT="gelu", REPEAT=1, SCALE=0.125)
TWICE, ONCE = dict(TOKENS=64, D_CHUNK=64), dict(DOWN=2, ACROSS=2, D_CHUNK=32, E_CHUNK=32)


@pytest.mark.skipif(not shutil.which("cuobjdump", path=BUILD), reason="Triton's package has no NVIDIA tools here")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("module, kernel, sizes, warps, stages, spilled", [
    (gpu, "forward_kernel", TWICE | dict(E_CHUNK=64), 4, 3, 0),
    (gpu, "backward_kernel", TWICE | dict(E_CHUNK=32), 4, 3, 0),
    (spanning, "forward_kernel", ONCE, 4, 3, 1024),  # before the loop over the columns
    (spanning, "backward_kernel", ONCE, 8, 2, 2048),
])  # fmt: skip
def test_kernels_compile_with_few_spills_and_fit_small_cards(
    monkeypatch, tmp_path, capability, module, kernel, sizes, warps, stages, spilled
):
    """D-EMOv2-S at 256 px in bfloat16; 99 KB of shared memory is what the smallest of the cards have."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "constexprs" not in inspect.signature(ASTSource).parameters:
        pytest.skip("before Triton 3.3 sources are described otherwise")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function, sizes = getattr(module, kernel), SIZES_OF_S | sizes
    numbers = {*gpu.VARYING, "heads"}
    signature = {
        name: "constexpr" if name in sizes else "i32" if name in numbers else "*bf16" for name in function.arg_names
    }
    even = [(i,) for i, (n, kind) in enumerate(signature.items()) if kind == "*bf16"]
    source = ASTSource(function, signature, sizes, {i: [["tt.divisibility", 16]] for i in even})
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
    usage = subprocess.run(
        [BUILD / "cuobjdump", "--dump-resource-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True
    ).stdout
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    assert stack <= spilled and built.metadata.shared <= 99 * 1024
    assert ("wgmma" if capability == 90 and module is gpu else "mma.sync") in built.asm["ptx"]


@on_gpu
@pytest.mark.parametrize("batch", [2, 128], ids=["many-launches", "one-launch"])
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 1e-2), (torch.float32, 5e-3)])
def test_on_a_gpu_at_a_real_size(monkeypatch, dtype, bound, batch):
    monkeypatch.setattr(gpu, "uses_tf32", lambda: True)
    inputs = operands((16, 16), (64, 256), heads=6, batch=batch, dtype=dtype, device="cuda")
    assert dispatch.triton_refuses(*inputs) is None
    options = dict(act="gelu", heads=6, window=(8, 8), mode="spanning")
    with dispatch.record() as calls:
        ours = with_gradients(inputs, **options)
    assert [call.form for call in calls] == [ONE_PASS if dtype == torch.bfloat16 else "Triton"]
    with plain():
        exact = with_gradients(inputs, torch.float64, **options)
    for name, x, y in zip(("result", "qk", "z"), ours, exact, strict=True):
        assert off(x, y) < bound, name
