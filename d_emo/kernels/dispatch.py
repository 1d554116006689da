"""Which form of a kernel runs: the one place that decides it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from d_emo.errors import RunError

try:
    from torch.fx._symbolic_trace import is_fx_symbolic_tracing as is_fx_tracing
except ImportError:  # before PyTorch 2.8
    from torch.fx._symbolic_trace import is_fx_tracing

is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # PyTorch 2.6 has none

HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether this build of the library has oneDNN's product and this CPU AVX-512."""

_plain = os.environ.get("D_EMO_KERNELS") == "plain"


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within this context every kernel takes its plain form, in standard operators: for counting and comparing.

    The environment variable D_EMO_KERNELS=plain does the same for a whole process.
    """
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def is_plain() -> bool:
    """Whether the plain form of small steps is wanted: inside `plain`, and in a network compiled, exported or traced.

    The compiler joins small steps itself, and other programs know standard operators only.
    """
    return torch.compiler.is_compiling() or wants_standard()


def wants_standard() -> bool:
    """Whether standard operators are wanted even of a compiled network: inside `plain`, exported or traced."""
    return _plain or is_fx_tracing() or is_exporting()


def uses_triton(*tensors: Tensor) -> bool:
    """Whether Triton's kernels run for these: on an NVIDIA GPU that `triton_works` on, in 32 bits or fewer.

    Compiled networks take them too, as operators that the compiler does not look into; exported and traced ones do not.
    """
    if wants_standard():
        return False
    if not all(t.is_cuda and t.dtype in (torch.float32, torch.bfloat16, torch.float16) for t in tensors):
        return False
    return triton_works(tensors[0].device.index)


@torch.compiler.assume_constant_result
def triton_works(index: int) -> bool:
    """`passes_trial`; the compiler, which would look into a cached function, calls this one and takes its word.

    False while a CUDA graph is recorded, unless they were tried before: nothing can be tried then.
    """
    if index not in _tried:
        if torch.cuda.is_current_stream_capturing():
            return False
        _tried[index] = passes_trial(index)
    return _tried[index]


_tried: dict[int, bool] = {}
"""By GPU, whether `passes_trial`."""


def passes_trial(index: int) -> bool:
    """Whether every kernel of `d_emo.kernels.gpu` runs on this GPU and equals its plain form.

    Raises:
        RunError: A kernel failed so that this process can no longer use the GPU.
    """
    if torch.version.cuda is None or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    try:
        from d_emo.kernels import gpu

        gpu.check(torch.device("cuda", index))
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
    except Exception as error:  # of the compiler, the driver, or a difference: all mean the plain form
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        try:
            torch.cuda.synchronize(index)
        except Exception:  # such as an illegal address, after which CUDA refuses everything
            remedy = "start again with D_EMO_KERNELS=plain in the environment, which turns them off"
            raise RunError(f"Triton's kernels broke off on this GPU ({reason}); {remedy}") from None
        warnings.warn(
            f"Triton's kernels are not used on this GPU, the library's take their place: {reason}", stacklevel=2
        )
        return False
    return True


def prefers_onednn(*tensors: Tensor | None) -> bool:
    """Whether oneDNN is the faster library for products of these: float32, on a CPU with AVX-512."""
    if wants_standard() or torch.is_autocast_enabled("cpu") or not HAS_ONEDNN:
        return False
    return all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors)


def fuses_inference(*tensors: Tensor | None) -> bool:
    """Whether steps of inference may be joined into one operator of oneDNN: as `prefers_onednn`, and no gradient."""
    return not is_plain() and not torch.is_grad_enabled() and prefers_onednn(*tensors)


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast on their device wants a product's operands; as they are where it is off."""
    device = "cuda" if tensors[0].is_cuda else "cpu"
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) if t.dtype == torch.float32 else t for t in tensors)
