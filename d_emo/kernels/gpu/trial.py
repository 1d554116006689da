"""The trial of an attention operator on the GPU itself, against the same in float64 and plain steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def reference(qk: Tensor, z: Tensor, heads: int, window: Sequence[int]) -> Tensor:
    """Both partitions with GELU, in the plainest way. Shape: qk (B, H, W, 2C), z (B, H, W, M) -> (B, H, W, M)."""
    (h, w), (_, height, width, _), total = window, z.shape, 0
    places = torch.arange(height * width, device=z.device).view(height, width)
    near = places.view(height // h, h, width // w, w).permute(0, 2, 1, 3).reshape(-1, h * w)
    far = places.view(h, height // h, w, width // w).permute(1, 3, 0, 2).reshape(-1, h * w)
    maps = *qk.chunk(2, dim=-1), z
    for windows in (near, far):
        qs, ks, zs = (x.flatten(1, 2)[:, windows].unflatten(-1, (heads, -1)).transpose(2, 3) for x in maps)
        weights = torch.softmax(qs @ ks.mT * qs.shape[-1] ** -0.5, -1)  # (B, windows, heads, h w, h w)
        mixed = (weights @ torch.nn.functional.gelu(zs)).transpose(2, 3).flatten(1, 2).flatten(2)
        total = total + mixed[:, windows.flatten().argsort()]
    return total.view(z.shape)


def check_one(
    operator: Any, device: torch.device, dtype: torch.dtype, window: tuple[int, int], images: int, narrow: int,
    wide: int, bound: float,
) -> None:  # fmt: skip
    """Try an operator and its gradients on maps of 2 x 2 windows and two heads, of some columns each.

    Raises:
        RuntimeError: The result, or a gradient, is not that of `reference` in float64.
    """
    generator, shape, heads = torch.Generator(device).manual_seed(0), (images, 2 * window[0], 2 * window[1]), 2
    maps = [
        torch.randn(*shape, heads * n, generator=generator, device=device, dtype=torch.float32)
        for n in (2 * narrow, wide, wide)
    ]
    *inputs, grad = (x.to(dtype) for x in maps)
    low, high = ([x.to(kind).requires_grad_() for x in inputs] for kind in (dtype, torch.float64))
    ours, exact = operator(*low, "gelu", heads, list(window), "spanning", 1), reference(*high, heads, window)
    ours = ours, *torch.autograd.grad(ours, low, grad)
    exact = exact, *torch.autograd.grad(exact, high, grad.double())
    compare(ours, exact, bound)


def compare(ours: Sequence[Tensor], exact: Sequence[Tensor], bound: float) -> None:
    """Raise RuntimeError unless the result and its gradients are as near to the exact ones as allowed.

    Shape: each of ours as its exact one.
    """
    names = "result", "gradient of queries and keys", "gradient of the value"
    for name, x, y in zip(names, ours, exact, strict=True):
        error = ((x - y).norm() / y.norm()).item()
        if not error < bound:
            raise RuntimeError(
                f"the {name} of window attention in {x.dtype} is off by {error:.2g} of its norm, {bound} is allowed"
            )
