"""Operators in C for a CPU, which go over a map once where the library's steps go over it many times.

The sources are in ``c/``. The system's compiler builds them at first use, in about two seconds and for this CPU, and
the result is kept in ``~/.cache/d-emo`` by sources, compiler and CPU. Where there is no compiler, or no room for the
file, operators keep their other forms, and `refuses` says why. What a form in C computes is as exact as the other, but
not the same to the last bit, so it never is the first of its table.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d_emo.files import digest
from d_emo.kernels.activation import Activation
from d_emo.kernels.autotune import cpu_name, tuner

SOURCES = Path(__file__).parent / "c"
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
DTYPES = (torch.float32, torch.bfloat16)


def refuses(*maps: Tensor) -> str | None:
    """Why no operator in C takes these maps, or None."""
    for x in maps:
        if x.device.type != "cpu":
            return "not on a CPU"
        if x.dtype not in DTYPES or x.dtype != maps[0].dtype:
            return "not in float32 or bfloat16"
    if torch.compiler.is_compiling():
        return "not in a compiled network"
    library = loaded()
    return library if isinstance(library, str) else None


def lanes() -> int:
    """How many numbers go into a vector of this CPU."""
    return loaded().d_emo_lanes()


@functools.cache
def loaded() -> ctypes.CDLL | str:
    """The operators, built unless they were before, or one sentence on why they are not there."""
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), *COMPILERS)))), None)
    if compiler is None:
        return "no C compiler"
    try:
        library = ctypes.CDLL(str(_built(compiler)))
        library.team = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except subprocess.CalledProcessError as error:
        return f"{compiler} fails: {(error.stderr.strip() or 'no reason given').splitlines()[0]}"
    except AttributeError:
        return "PyTorch's threads are not OpenMP's"
    except (OSError, subprocess.SubprocessError) as error:
        return f"not built: {error}"
    return library


def _built(compiler: str) -> Path:
    """The shared object, which another process may be building too."""
    made = os.stat(os.path.realpath(compiler))
    sources = sorted(SOURCES.iterdir())
    identity = [source.read_text() for source in sources] + [*FLAGS, compiler, str(made.st_size), str(made.st_mtime)]
    folder = tuner.path.parent
    target = folder / f"cpu-{digest(chr(0).join([*identity, cpu_name(), _instructions()]))[:12]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as room:
            file = Path(room) / target.name
            command = [compiler, *FLAGS, "-o", str(file), *(str(one) for one in sources if one.suffix == ".c")]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            file.replace(target)
    return target


def _instructions() -> str:
    """The CPU's instruction sets, as Linux knows them: a folder may be shared by machines, or a machine be masked."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.partition(":")[0].strip() in ("flags", "Features")), "")


def _call(function: str, pointers: dict[str, Tensor], numbers: dict[str, int]) -> None:
    """Call an operator; the structure that it takes has these fields in this order, then ``next`` and ``failed``."""
    structure = _structure(tuple(pointers), (*numbers, "next", "failed"))
    given = structure(*(None if x is None else x.data_ptr() for x in pointers.values()), *numbers.values(), 0, 0)
    library = loaded()
    if getattr(library, function)(ctypes.byref(given), library.team, torch.get_num_threads()):
        raise MemoryError(f"no memory for the rooms of {function}")


@functools.cache
def _structure(pointers: tuple[str, ...], numbers: tuple[str, ...]) -> type[ctypes.Structure]:
    fields = [(name, ctypes.c_void_p) for name in pointers] + [(name, ctypes.c_int) for name in numbers]
    return type("Given", (ctypes.Structure,), {"_fields_": fields})


def attention(
    qk: Tensor, z: Tensor, act: Activation, heads: int, window: tuple[int, int], mode: str, repeat: int,
    grad: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`d_emo.kernels.attention.forward`, or with ``grad`` the gradients of qk and z.

    Shape: qk (B, H, W, 2C), z (B, H, W, M), grad as the result -> ((B, H, W, M),), or as qk, as z.
    """
    made = (torch.empty_like(z),) if grad is None else (torch.empty_like(qk), torch.empty_like(z))
    out, grad_qk, grad_z = (*made, None, None) if grad is None else (None, *made)
    batch, height, width, dim = z.shape
    _call(
        "d_emo_attention",
        {"qk": qk, "z": z, "grad": grad, "out": out, "grad_qk": grad_qk, "grad_z": grad_z},
        {"half": z.dtype == torch.bfloat16, "act": ("none", "gelu", "silu").index(act), "heads": heads, "batch": batch,
         "height": height, "width": width, "h": window[0], "w": window[1], "near": mode != "far", "far": mode != "near",
         "repeat": repeat, "C": qk.shape[-1] // 2, "M": dim},
    )  # fmt: skip
    return made


STEPS = ("convolve", "skip", "skip_back", "convolve_back")
MAPS = ("a", "given", "grad", "c", "y", "grad_a", "kernel", "mean", "factor", "beta", "u", "v", "sums")


def local_step(step: str, size: int, **maps: Tensor) -> None:
    """One of the `STEPS` of ``c/local.c``, from some of the `MAPS` to others; ``size`` is the kernel's."""
    batch, height, width, dim = maps["a"].shape
    numbers: dict[str, Any] = {
        "half": maps["a"].dtype == torch.bfloat16, "batch": batch, "height": height, "width": width, "M": dim,
        "k": size, "step": STEPS.index(step),
    }  # fmt: skip
    _call("d_emo_local", {name: maps.get(name) for name in MAPS}, numbers)
