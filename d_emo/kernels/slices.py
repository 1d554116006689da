"""Wide maps, a few images at a time."""

import torch
from torch import Tensor, nn

from d_emo.kernels.dispatch import why_standard

SLICE = 2**22
"""Elements of the widest map that are there at a time: 16 MB in float32."""


def in_slices(network: nn.Module, x: Tensor, size: int) -> Tensor:
    """``network(x)``, in inference on a CPU a few images at a time; each image's result must depend on it alone.

    A map of some 32 MB or more is given back to the system after each use, and comes again as pages to be cleared,
    which takes longer than what is computed from it. Smaller maps are used again, and stay in the cache.

    A network with forward hooks gets all images at once, so that a hook sees what its writer expects.

    Args:
        network: from maps to maps, in eval mode.
        x: a batch of maps.
        size: elements of the widest map inside ``network``, for one image.

    Shape: x (B, ...) -> (B, ...).
    """
    whole = why_standard() or torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu"
    if whole or len(x) * size <= SLICE or any(m._forward_hooks or m._forward_pre_hooks for m in network.modules()):
        return network(x)
    return torch.cat([network(images) for images in x.split(max(1, SLICE // size))])
