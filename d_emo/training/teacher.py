"""Distillation: a trained classifier whose soft logits a smaller one learns."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d_emo import checkpoint
from d_emo.config import InputError
from d_emo.models import create_model  # noqa: F401  makes our names known to timm


class Normalized(nn.Module):
    """A classifier that takes images in [-1, 1], whatever normalisation and fixed size it was trained with.

    Shape: (B, 3, H, W) -> (B, num_classes).
    """

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], size: int | None = None):
        super().__init__()
        self.model, self.size = model, size
        self.register_buffer("scale", 0.5 / torch.tensor(std)[:, None, None])
        self.register_buffer("offset", (0.5 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None and images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        return self.model(images * self.scale + self.offset)


def normalized(model: nn.Module) -> Normalized:
    """A timm model behind its own ``pretrained_cfg``."""
    cfg = model.pretrained_cfg
    return Normalized(model, cfg["mean"], cfg["std"], cfg["input_size"][-1] if cfg.get("fixed_input_size") else None)


def load_teacher(name: str, weights: str | None, num_classes: int) -> nn.Module:
    """A classifier of images in [-1, 1], in eval mode and without gradients.

    Args:
        name: a snapshot or run folder of ours, a folder in timm's layout, or the name of a timm model.
        weights: a file for a timm model; its pretrained weights are fetched otherwise.
        num_classes: classes that it must know.

    Raises:
        InputError: if there is no such teacher, its weights cannot be had, or it knows other classes.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        teacher: nn.Module = checkpoint.load_classifier(folder).model
        known = teacher.num_classes
    else:
        teacher = _timm_model(f"local-dir:{folder}" if folder.is_dir() else name, weights, num_classes)
        known = teacher.model.num_classes
    if known != num_classes:
        raise InputError(f"the teacher {name} knows {known} classes, but the data have {num_classes}; choose another")
    return teacher.eval().requires_grad_(False)


def _timm_model(name: str, weights: str | None, num_classes: int) -> Normalized:
    try:
        if weights is not None:
            return normalized(timm.create_model(name, num_classes=num_classes, checkpoint_path=weights))
        return normalized(timm.create_model(name, pretrained=True))
    except Exception as error:  # an unknown name, no network, no such weights: timm raises a dozen types
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"cannot load the teacher {name}{'' if weights is None else f' with {weights}'} "
            f"({type(error).__name__}: {reason}); give a timm name, or a local one with --teacher-weights"
        ) from error


def distillation_loss(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher's softened classes, times tau^2 (Hinton et al.).

    Shape: (B, num_classes) twice -> scalar.
    """
    log_student, log_teacher = (F.log_softmax(logits.float() / tau, dim=1) for logits in (student, teacher))
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * tau**2
