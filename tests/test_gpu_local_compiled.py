"""The local branch's Triton kernels as a GPU has them: what the compiler makes of them, and on one."""

import contextlib
import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
from test_gpu_local import branch_inputs, compare_branch, convolution, needs_gpu, triton
from torch import nn

from d_emo import kernels
from d_emo.kernels import dispatch
from d_emo.models.blocks import AdaLNMobileBlock

POINTERS = {
    "_convolve": ("x_ptr", "plus_ptr", "out_ptr"), "_correlate": ("x_ptr", "g_ptr", "c_ptr"),
    "_skip": ("a_ptr", "c_ptr", "y_ptr"), "_skip_backward": ("grad_ptr", "a_ptr", "c_ptr", "y_ptr", "inner_ptr"),
    "_merge": (),
}  # fmt: skip
"""The kernels, and which of their pointers are to maps; the others are to float32."""

WALK = {"WIDTH": 16, "M": 1536, "K": 5, "COLUMNS": 4, "GROUPS": 4, "BLOCK_M": 64, "EACH": 2}
COMPILED = [
    ("_convolve", {**WALK, "FLIP": False, "PLUS": False, "ACT": False, "STATISTICS": True}),
    ("_convolve", {**WALK, "FLIP": True, "PLUS": True, "ACT": False, "STATISTICS": False}),
    ("_convolve", {**WALK, "FLIP": False, "PLUS": True, "ACT": True, "STATISTICS": False}),
    ("_correlate", {**WALK, "NORM": True}),
    ("_skip", {"M": 1536, "BLOCK_P": 32, "BLOCK_M": 128}),
    ("_skip_backward", {"M": 1536, "BLOCK_P": 16, "BLOCK_M": 128}),
    ("_merge", {"WIDTH": 16, "M": 1536, "BLOCK_W": 16, "BLOCK_P": 128, "BLOCK_M": 16}),
]


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """The kernels by name, to be compiled where nothing is compiled yet."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    modules = [importlib.import_module(f"d_emo.kernels.gpu.{name}") for name in ("convolution", "correlation", "skip")]
    return {name: kernel for module in modules for name, kernel in vars(module).items()}


@pytest.mark.parametrize(
    "capability, name, constants", [(90, *one) for one in COMPILED] + [(80, *one) for one in (COMPILED[0], COMPILED[3])]
)
def test_a_kernel_compiles_for_a_gpu_and_its_registers_suffice(sources, tmp_path, capability, name, constants):
    compiler = pytest.importorskip("triton.backends.compiler")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists() or not cuobjdump.with_name("ptxas").exists():
        pytest.skip("Triton came without NVIDIA's tools")
    kernel, maps = sources[name], POINTERS[name]
    types = {
        arg: "constexpr" if arg in constants else "*bf16" if arg in maps else "*fp32" if arg.endswith("_ptr") else "i32"
        for arg in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if arg.endswith("_ptr")}
    try:
        source = triton.compiler.ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    except TypeError:
        pytest.skip("Triton before 3.3 is asked in other words")
    target = compiler.GPUTarget("cuda", capability, 32)
    most = convolution.MOST_REGISTERS if constants.get("PLUS") else None
    options = {"num_warps": 4, "enable_fp_fusion": True, "maxnreg": most}
    compiled = triton.compile(source, target=target, options=options)
    (binary := tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    report = subprocess.run([cuobjdump, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", report.stdout)}
    assert used["LOCAL"] == 0 and used["STACK"] <= (64 if most else 0), used  # little or nothing spilled
    assert used["REG"] <= (most or 208), used  # 168 make three programs to a multiprocessor; older compilers take more
    assert used["SHARED"] <= 4096, used
    loads = re.findall(r"ld\.global\S*", compiled.asm["ptx"])
    assert loads and (name != "_skip" or any("v4.b32" in load for load in loads))  # 16 bytes at a time
    order = re.findall(r"(ld|st)\.global", compiled.asm["ptx"])
    if most:  # no load waits for a store: in the loop, and in each of the last two rows, all loads come first
        assert "".join(order).count("stld") == 2


@needs_gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("shape, size", [((16, 16, 16, 1536), 5), ((2, 64, 64, 512), 5), ((3, 14, 15, 330), 7),
                                         ((4, 28, 28, 96), 3)])  # fmt: skip
def test_on_the_gpu_one_step_equals_the_plain_steps(dtype, tolerance, shape, size):
    inputs = branch_inputs(shape, size, device="cuda")
    with kernels.record() as calls:
        compare_branch(inputs, dtype, tolerance)
    assert calls[0].form == "Triton, one step of training"


@needs_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_the_gpu_a_block_equals_its_plain_form(dtype, training, compiled):
    made = AdaLNMobileBlock(384, num_heads=6, window_size=8).cuda().train(training)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.05)
    x, c = torch.randn(8, 16, 16, 384, device="cuda"), torch.randn(8, 384, device="cuda")
    assert dispatch.triton_works(0)

    def step(context, call):
        with context, torch.autocast("cuda", dtype=dtype, enabled=dtype is not None), torch.set_grad_enabled(training):
            out = call(x, c)
        grads = torch.autograd.grad(out.float().square().sum(), list(made.parameters())) if training else ()
        return [out, *grads]

    got = step(contextlib.nullcontext(), torch.compile(made) if compiled else made)
    for one, other in zip(got, step(kernels.plain(), made), strict=True):
        assert (one - other).norm() <= (2e-3 if dtype is None else 5e-2) * other.norm()
