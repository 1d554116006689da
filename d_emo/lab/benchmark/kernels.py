"""Times of the GPU's kernels at the size of D-EMOv2-S at 256 px, beside the bytes that they have to move."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from d_emo.config import KernelsSettings
from d_emo.errors import InputError
from d_emo.text import markdown_table

SIDE, WINDOW, NARROW, WIDE, HEADS, KERNEL = 16, 8, 384, 1536, 6, 5
"""Tokens of a side of the map and of a window, channels of queries and of the value, heads, side of the convolution."""


class Row(NamedTuple):
    """A kernel.

    Attributes:
        name: what it does.
        run: does it once.
        maps: wide maps, of `WIDE` channels, that have to be read and written; queries with keys are half of one.
        h100: microseconds on an H100 at batch 256, measured before, or expected; see docs/speed.md.
    """

    name: str
    run: Callable[[], object]
    maps: float
    h100: str


def rows(batch: int, device: torch.device) -> list[Row]:
    """The kernels on random maps in bfloat16; a copy of a map is the first."""
    from d_emo.kernels.gpu import attention, local, spanning
    from d_emo.kernels.gpu.convolution import convolve, taps_of
    from d_emo.kernels.gpu.correlation import correlate
    from d_emo.kernels.gpu.skip import skip, skip_backward

    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    z, a, grad = (random(batch, SIDE, SIDE, WIDE).bfloat16() for _ in range(3))
    qk, out, inner = random(batch, SIDE, SIDE, 2 * NARROW).bfloat16(), torch.empty_like(z), torch.empty_like(z)
    weight, norm = 0.2 * random(WIDE, 1, KERNEL, KERNEL), random(3, WIDE)
    taps, options, ops = taps_of(weight), ("gelu", HEADS, [WINDOW, WINDOW], "spanning", 1), torch.ops.d_emo
    return [
        Row("copy of a wide map", lambda: out.copy_(z), 2, "139 measured"),
        Row("attention, one pass", lambda: spanning.attend(qk, z, *options), 2.5, "173 to 255 expected"),
        Row("its gradients", lambda: ops.spanning_attention_backward(grad, qk, z, *options), 4, "277 to 527 expected"),
        Row("attention, two passes", lambda: attention.attend(qk, z, *options), 2.5, "436 measured"),
        Row("its gradients", lambda: ops.window_attention_backward(grad, qk, z, *options), 4, "969 measured"),
        Row("convolution with statistics", lambda: convolve(a, taps, statistics=True), 2, "246 measured"),
        Row("convolution", lambda: convolve(a, taps), 2, "193 measured"),
        Row("gradient of its input, plus a map", lambda: convolve(a, taps, flip=True, plus=out, out=out), 3,
            "207 to 363 expected"),
        Row("gradient of its weight", lambda: correlate(a, inner, KERNEL, c=z, norm=norm), 4, "366 measured"),
        Row("skip", lambda: skip(a, z, norm), 3, "204 measured"),
        Row("its gradients", lambda: skip_backward(grad, a, z, norm), 5, "379 measured"),
        Row("inference: convolution, SiLU, skip", lambda: local.depthwise_silu(a, weight, norm[0], skip=True), 2,
            "180 to 318 expected"),
    ]  # fmt: skip


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of a run on the GPU, its cache emptied before each."""
    from triton.testing import do_bench

    return do_bench(run, warmup=30, rep=120, return_mode="median")


def kernels_table(settings: KernelsSettings) -> str:
    """A markdown table: each kernel's time, its bytes at the speed of a copy, and what is known of an H100.

    Raises:
        InputError: There is no NVIDIA GPU that Triton's kernels run on.
    """
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise InputError("benchmark kernels times Triton's kernels, and PyTorch finds no NVIDIA GPU here")
    device = torch.device("cuda")
    head = f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}, bfloat16, batch {settings.batch_size}"
    return f"{head}\n\n{measured(settings.batch_size, device)}"


def measured(batch: int, device: torch.device) -> str:
    """The table of `kernels_table`; the time of a kernel that fails is what it says."""
    lines, map_time = [], None
    for row in rows(batch, device):
        try:
            time = 1e3 * milliseconds(row.run)
        except Exception as error:  # of Triton's compiler or the driver: the others are still of use
            lines.append([row.name, str(error).strip().splitlines()[0][:80], "", row.h100])
            continue
        map_time = map_time or time / row.maps
        lines.append([row.name, f"{time:.0f}", f"{map_time * row.maps:.0f}", row.h100])
    return markdown_table(["kernel", "us", "bytes, us", "H100 at batch 256, us"], lines)
