"""Makes the EMO classifiers, and `d_emo.models.hybrids`, known to timm.

``timm.create_model("emov2_5m", features_only=True)`` works then.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    register_model,
    register_notrace_module,
)

from d_emo.models.attention import WindowAttention
from d_emo.models.backbone import BACKBONES, EMO, build_backbone
from d_emo.models.blocks import ConvFirstOperator, ParallelOperator
from d_emo.models.layers import LocalConv
from d_emo.models.released import own_names

default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875,
            "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.conv.conv", "classifier": "head",
        }  # fmt: skip
        for name in BACKBONES
    }
)


def entrypoint(name: str) -> Callable[..., EMO]:
    """timm's constructor function for one of our names; ``in_chans`` is timm's word for ``in_channels``.

    What it builds reads the released checkpoints too, wherever timm loads one.
    """

    def build(
        in_chans: int = 3, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **settings: Any
    ) -> EMO:
        if isinstance(settings.get("img_size"), Sequence):
            settings["img_size"] = tuple(settings["img_size"])
        with contextlib.nullcontext() if device is None else torch.device(device):
            model = build_backbone(name, in_channels=in_chans, **settings).to(dtype=dtype)
        model.register_load_state_dict_pre_hook(translate)
        return model

    def create(pretrained: bool = False, **kwargs: Any) -> EMO:
        return build_model_with_cfg(
            build, name, pretrained, pretrained_filter_fn=own_names,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter", "flatten_sequential": True}, **kwargs,
        )  # fmt: skip

    create.__name__, create.__module__, create.__doc__ = name, __name__, f"{name}, built by d_emo."
    return create


def translate(model: EMO, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give a release's names in ``state_dict`` our names, before ``model`` loads it: timm has no filter there."""
    if not prefix:
        translated = dict(own_names(state_dict, model))
        state_dict.clear()
        state_dict.update(translated)


def register_with_timm() -> None:
    """Add every EMO name to timm's registry; names that are there already are left alone."""
    importlib.import_module("d_emo.models.hybrids")  # which registers its own, as timm's modules do
    for module in (WindowAttention, LocalConv, ConvFirstOperator, ParallelOperator):
        register_notrace_module(module)  # what looks at shapes and devices stays whole under torch.fx
    for name in BACKBONES:
        if not is_model(name):
            setattr(sys.modules[__name__], name, register_model(entrypoint(name)))


register_with_timm()
