"""Parameters and multiply-accumulates, counted as in the papers' tables."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from d_emo import kernels
from d_emo.models.attention import WindowAttention
from d_emo.models.contract import DenoiserFrame
from d_emo.models.layers import pair


def count_parameters(model: nn.Module) -> int:
    """Parameters of a network, the fixed position embedding included and all other buffers left out.

    That is the convention of the DiT, SiT and D-EMO logs.
    """
    fixed = model.fixed_tensors if isinstance(model, DenoiserFrame) else ()
    position = sum(buffer.numel() for name, buffer in model.named_buffers() if name in fixed)
    return sum(p.numel() for p in model.parameters()) + position


def norm_cost(per_element: int) -> Callable[..., int]:
    """Cost of a norm for FlopCounterMode, which counts two operations for each multiply-accumulate."""

    def cost(input_shape: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * per_element * math.prod(input_shape)

    return cost


aten = torch.ops.aten
NORM_COSTS = {
    aten.native_layer_norm: norm_cost(5),
    aten.native_batch_norm: norm_cost(2),
    aten._native_batch_norm_legit_no_training: norm_cost(2),
    aten.cudnn_batch_norm: norm_cost(2),
}
"""fvcore's prices, which the published figures use: five per element for a layer norm, two for a batch norm in eval."""


@torch.no_grad()
def count_macs(model: nn.Module, image_or_latent_size: int | tuple[int, int] | None = None) -> int:
    """Multiply-accumulates of one forward pass of batch 1 in eval mode, attention products included.

    Works on the meta device: ``with torch.device("meta"): model = create_model(...)`` counts without any weights.

    Args:
        model: a denoiser or a classifier.
        image_or_latent_size: height and width of the input; a denoiser's own unless given, and 224
            for a classifier.

    Returns:
        MACs (the papers print them as FLOPs).
    """
    device = next(model.parameters()).device
    inputs: tuple[Tensor, ...]
    if isinstance(model, DenoiserFrame):
        channels, *sizes = model.latent_shape
        if image_or_latent_size is not None:
            sizes = pair(image_or_latent_size, "image_or_latent_size")
        ones = torch.ones(1, dtype=torch.long, device=device)
        inputs = (torch.zeros(1, channels, *sizes, device=device), ones, ones)
    else:
        height, width = pair(image_or_latent_size or 224, "image_or_latent_size")
        inputs = (torch.zeros(1, model.stem.conv.conv.in_channels, height, width, device=device),)
    training = model.training
    attentions = [module for module in model.modules() if isinstance(module, WindowAttention)]
    try:
        for attention in attentions:
            attention.merge_equal_partitions = False  # the published figures count near and far each time
        with kernels.plain(), FlopCounterMode(display=False, custom_mapping=NORM_COSTS) as counter:
            model.eval()(*inputs)
    finally:
        model.train(training)
        for attention in attentions:
            attention.merge_equal_partitions = True
    return counter.get_total_flops() // 2


def trained_parameters(model: nn.Module) -> int:
    """Number of parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
