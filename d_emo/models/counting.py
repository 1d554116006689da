"""Parameters and multiply-accumulates, counted as in the papers' tables."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from d_emo import kernels
from d_emo.models.attention import WindowAttention
from d_emo.models.layers import pair, sizes


def count_parameters(model: nn.Module) -> int:
    """Parameters of a network, the fixed position embedding included and all other buffers left out.

    That is the convention of the DiT, SiT and D-EMO logs.
    """
    fixed = getattr(model, "fixed_tensors", ())  # of denoisers
    position = sum(buffer.numel() for name, buffer in model.named_buffers() if name in fixed)
    return sum(p.numel() for p in model.parameters()) + position


def norm_cost(per_element: int) -> Callable[..., int]:
    """Cost of a norm for FlopCounterMode, which counts two operations for each multiply-accumulate."""

    def cost(input_shape: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * per_element * math.prod(input_shape)

    return cost


def resize_cost(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Cost of a bilinear resize for FlopCounterMode: four multiply-accumulates for each element of the result."""
    return 2 * 4 * math.prod(out_shape)


aten = torch.ops.aten
PRICES = {
    aten.upsample_bilinear2d: resize_cost,
    aten.native_layer_norm: norm_cost(5),
    aten.native_batch_norm: norm_cost(2),
    aten._native_batch_norm_legit_no_training: norm_cost(2),
    aten.cudnn_batch_norm: norm_cost(2),
}
"""fvcore's, which the published figures use: five per element for a layer norm, two for a batch norm in eval."""


ATTENTION_PRODUCTS = (
    aten.bmm, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention,
)  # fmt: skip
"""Operators that nothing but attention uses, and that the counter behind EMOv1's figures does not see."""


@torch.no_grad()
def count_macs(
    model: nn.Module, image_or_latent_size: int | tuple[int, ...] | None = None, *, attention_products: bool = True
) -> int:
    """Multiply-accumulates of one forward pass of batch 1 in eval mode.

    Works on the meta device: ``with torch.device("meta"): model = create_model(...)`` counts without any weights.

    Args:
        model: a denoiser, a classifier, a detector (up to its post-processing) or a segmenter.
        image_or_latent_size: height and width of the input, before them the frames of a video; a network's own unless
            given, and 224 for a classifier.
        attention_products: whether to count the products of queries with keys, and of the weights with values.

    Returns:
        MACs (the papers print them as FLOPs).
    """
    from torch.utils.flop_counter import FlopCounterMode  # and triton, which no command needs to start

    device = next(model.parameters()).device
    inputs: tuple[Tensor, ...]
    if (latent_shape := getattr(model, "latent_shape", None)) is not None:  # a denoiser's
        channels, *size = latent_shape
        if image_or_latent_size is not None:
            size = pair(image_or_latent_size, "image_or_latent_size")
        ones = torch.ones(1, dtype=torch.long, device=device)
        inputs = (torch.zeros(1, channels, *size, device=device), ones, ones)
    else:
        size = image_or_latent_size or getattr(model, "input_size", 224)
        size = sizes(size, "image_or_latent_size", getattr(model, "spatial_dims", 2))
        inputs = (torch.zeros(1, model.in_chans, *size, device=device),)
    training = model.training
    attentions = [module for module in model.modules() if isinstance(module, WindowAttention)]
    try:
        for attention in attentions:
            attention.merge_equal_partitions = False  # the published figures count near and far each time
        with kernels.plain(), FlopCounterMode(display=False, custom_mapping=PRICES) as counter:
            getattr(model.eval(), "counted_outputs", model)(*inputs)
    finally:
        model.train(training)
        for attention in attentions:
            attention.merge_equal_partitions = True
    counts = counter.get_flop_counts()["Global"]
    left_out = () if attention_products else ATTENTION_PRODUCTS
    return sum(count for operator, count in counts.items() if operator not in left_out) // 2


def trained_parameters(model: nn.Module) -> int:
    """Number of parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
