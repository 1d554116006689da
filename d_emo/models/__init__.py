"""Every network of the papers by name: D-EMO and DiT denoisers, EMOv1 and EMOv2 classifiers."""

from d_emo.models.backbone import EMO
from d_emo.models.counting import count_macs, count_parameters
from d_emo.models.denoiser import Denoiser
from d_emo.models.registry import create_model, list_models

__all__ = ["EMO", "Denoiser", "count_macs", "count_parameters", "create_model", "list_models"]
