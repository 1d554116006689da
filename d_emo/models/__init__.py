"""Every network of the papers by name: D-EMO and DiT denoisers, EMOv1 and EMOv2 classifiers."""

from typing import Any

from d_emo.models.backbone import EMO
from d_emo.models.counting import count_macs, count_parameters
from d_emo.models.registry import create_model, list_models

__all__ = ["EMO", "Denoiser", "count_macs", "count_parameters", "create_model", "list_models"]


def __getattr__(name: str) -> Any:
    if name != "Denoiser":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from d_emo.models.denoiser import Denoiser  # diffusers, which classifiers can do without

    return Denoiser
