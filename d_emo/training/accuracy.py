"""Top-1 and top-5 accuracy of a classifier."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from d_emo.data import ClassImages, spread
from d_emo.training.stop import ignore_interrupts


@dataclass(frozen=True)
class Accuracy:
    """Shares of images whose class is the likeliest, and among the five likeliest, over ``images`` images."""

    top1: float
    top5: float
    images: int

    def __str__(self) -> str:
        return self.in_words("images")

    def in_words(self, unit: str) -> str:
        """The two shares, of so many ``unit``."""
        return f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%} of {self.images:,} {unit}"


def measure_accuracy(
    model: nn.Module, dataset: ClassImages, *, batch_size: int = 64, limit: int | None = None, num_workers: int = 0
) -> Accuracy:
    """Classify ``limit`` images from all over a data set in eval mode; the model's mode is left as it was.

    Args:
        model: takes images in [-1, 1].
        dataset: images and labels.
        batch_size: images per forward pass.
        limit: number of images. Default: all.
        num_workers: data loading processes.
    """
    chosen = spread(len(dataset), limit or len(dataset))
    sums = sum_over(model, dataset, chosen, batch_size=batch_size, num_workers=num_workers)
    return Accuracy(sums["accuracy"].item() / len(chosen), sums["top5"].item() / len(chosen), len(chosen))


@torch.no_grad()
def sum_over(
    model: nn.Module, dataset: ClassImages, indices: Sequence[int], *, batch_size: int = 64, num_workers: int = 0
) -> dict[str, Tensor]:
    """Sums over some images, in eval mode: "loss" (cross-entropy), "accuracy" (right answers), "top5" and "count"."""
    device, training = next(model.parameters()).device, model.training
    totals = torch.zeros(4, dtype=torch.float64)
    model.eval()
    loader = DataLoader(
        Subset(dataset, indices), batch_size=batch_size, num_workers=num_workers, worker_init_fn=ignore_interrupts
    )
    for images, labels in loader:
        logits = model(images.to(device)).float().cpu()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (B, 5)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([loss, ranked[:, 0].sum(), ranked.any(dim=1).sum(), torch.tensor(len(labels))])
    model.train(training)
    return dict(zip(("loss", "accuracy", "top5", "count"), totals.float().to(device), strict=True))
