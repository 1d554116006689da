"""The task of training a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from d_emo import checkpoint
from d_emo.config import ClassifierSettings, InputError
from d_emo.data import ClassImages, open_dataset, open_held_out, spread
from d_emo.models import create_model
from d_emo.models.backbone import BACKBONES
from d_emo.models.registry import resolve_name


class Augmentation(NamedTuple):
    """Random changes to the images of a step."""

    flip: torch.Tensor  # (B,) bool
    shift: torch.Tensor  # (B, 2), as shares of half the image side

    def __getitem__(self, rows: slice) -> Augmentation:  # type: ignore[override]
        return Augmentation(*(field[rows] for field in self._asdict().values()))


class ClassifierTask:
    """Cross-entropy with label smoothing on randomly shifted (and, where the data allow, mirrored) images.

    Args:
        settings: Resolved settings.

    Raises:
        InputError: Settings that cannot work together; a data set or model that cannot be opened.
    """

    lr_scales: dict[str, float] = {}
    smaller = "Choose fewer --max-steps, a smaller --image-size or a GPU."

    def __init__(self, settings: ClassifierSettings):
        if resolve_name(settings.model) not in BACKBONES:
            raise InputError(f"{settings.model} is a denoiser; train it with scripts/train_dit.py")
        self.settings = settings
        self.dataset = _open(settings, "train")
        self.held_out = open_held_out(settings, self.dataset.class_names) if settings.validate_every else None
        torch.manual_seed(settings.seed)
        options = {"num_classes": len(self.dataset.class_names), **(settings.model_options or {})}
        self.model = create_model(settings.model, **options)

    def introduction(self) -> list[str]:
        settings = self.settings
        return [
            f"{settings.model} on {settings.data_dir or settings.dataset}: {len(self.dataset):,} images, "
            f"{len(self.dataset.class_names)} classes, {settings.image_size} px; run folder {settings.output_dir}"
        ]

    def prepare(self, device: torch.device, folder: Path) -> None:
        """Nothing to prepare: images are read as they are needed."""

    def draw(self, generator: torch.Generator, batch_size: int) -> Augmentation:
        device = generator.device
        return Augmentation(
            flip=(torch.rand(batch_size, generator=generator, device=device) < 0.5) & self.dataset.flip,
            shift=(torch.rand(batch_size, 2, generator=generator, device=device) * 4 - 2) * self.settings.shift,
        )

    def loss(self, model: nn.Module, batch: list[torch.Tensor], draws: Augmentation) -> dict[str, torch.Tensor]:
        images, labels = batch
        logits = model(augment(images, draws)).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == labels).float().mean()}

    def validate(self, model: nn.Module, *, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        """Sums of loss and right answers over this process's share of the held-out images, and their number."""
        device, batch_size = next(model.parameters()).device, 64
        share = spread(len(self.held_out), self.settings.validate_images)[rank::world_size]
        totals = torch.zeros(3, device=device)
        for start in range(0, len(share), batch_size):
            items = [self.held_out[index] for index in share[start : start + batch_size]]
            labels = torch.tensor([label for _, label in items], device=device)
            logits = model(torch.stack([image for image, _ in items]).to(device)).float()
            right = (logits.argmax(dim=1) == labels).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            totals += torch.stack([loss, right.sum(), torch.ones_like(right).sum()])
        return dict(zip(("loss", "accuracy", "count"), totals, strict=True))

    def save_snapshot(self, folder: Path, model: nn.Module, *, step: int, minutes: float) -> None:
        settings = self.settings
        meta: dict[str, Any] = {
            "step": step, "weights": "ema", "image_size": settings.image_size, "data": self.dataset.name,
            "class_names": self.dataset.class_names, "training_minutes": round(minutes, 1),
        }
        held_out = ""
        if settings.data_dir is None:
            meta["held_out_accuracy"] = round(accuracy(model, _open(settings, "test")), 4)
            held_out = f"* Accuracy on held-out images: {meta['held_out_accuracy']:.2%}.\n"
        card = f"""# {settings.model} on {settings.data_dir or settings.dataset}, {settings.image_size} px

* Training: {step:,} steps of batch {settings.batch_size}, {minutes:.1f} minutes.
* Weights: moving average (EMA, decay {settings.ema_decay}) of parameters and BatchNorm statistics.
{held_out}"""
        checkpoint.save_classifier(folder, model, meta=meta, settings=settings, card=card)


def augment(images: torch.Tensor, draws: Augmentation) -> torch.Tensor:
    """Mirror and translate, repeating the border. Shape: (B, 3, H, W) -> same."""
    images = torch.where(draws.flip[:, None, None, None], images.flip(-1), images)
    if not draws.shift.any():
        return images
    matrix = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    matrix[:, :, 2] = draws.shift
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def accuracy(model: nn.Module, dataset: ClassImages, batch_size: int = 64, limit: int = 2000) -> float:
    """Top-1 accuracy over the first ``limit`` images; the model is in eval mode."""
    device, right, count = next(model.parameters()).device, 0, min(limit, len(dataset))
    for start in range(0, count, batch_size):
        items = [dataset[index] for index in range(start, min(start + batch_size, count))]
        labels = torch.tensor([label for _, label in items])
        logits = model(torch.stack([image for image, _ in items]).to(device))
        right += int((logits.argmax(dim=1).cpu() == labels).sum())
    return right / count


def _open(settings: ClassifierSettings, split: str) -> ClassImages:
    return open_dataset(
        dataset=settings.dataset, data_dir=settings.data_dir, image_size=settings.image_size, split=split,
        num_images=settings.num_images if split == "train" else None, skip_corrupt=settings.skip_corrupt,
    )
