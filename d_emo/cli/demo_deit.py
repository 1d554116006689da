"""How ``d-emo demo deit`` ends: accuracy of the fine-tuned DeiT-Tiny beside two floors, and a picture."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from d_emo.cli.sheets import RIGHT, WRONG, Cell, sheet
from d_emo.data.digits import Digits
from d_emo.device import best_device
from d_emo.io.classifier import open_classifier
from d_emo.io.snapshot import load_meta
from d_emo.sampling import save_png
from d_emo.text import markdown_table

RUNS = {"pretraining": "demo/deit/shapes", "fine-tuning": "demo/deit/digits"}
PICTURE = Path("demo/deit.png")
COLUMNS, SIDE = 10, 96
NOTE = "above: held-out digits, as they are read;  middle: the pixels that move the answer;  below: the hardest ones"


def conclude() -> None:
    """Print the accuracy on held-out digits and what is had for nothing, and draw digits with what was read."""
    classifier = open_classifier(RUNS["fine-tuning"])
    network, minutes = classifier.model.to(best_device()), 0.0
    for folder in RUNS.values():
        minutes += load_meta(folder, "classifier")["training_minutes"]
    images, labels = stacked(Digits(classifier.image_size, split="test"))
    train = stacked(Digits(classifier.image_size))
    with torch.no_grad():
        shares = torch.cat([network(part.to(best_device())).softmax(dim=1).cpu() for part in images.split(64)])
    rows = [
        ["DeiT-Tiny with i2RMB, Shapes-1000, then digits", shares.argmax(dim=1)],
        ["floor: the nearest mean of a class", nearest_mean(*train, images)],
        ["floor: the most frequent digit", train[1].mode().values.expand(len(labels))],
    ]
    save_png(picture(network, images, labels, shares), PICTURE, {"demo": "deit"})
    table = [[name, f"{(found == labels).float().mean():.1%}"] for name, found in rows]
    print(markdown_table([f"{len(labels)} held-out digits", "accuracy"], table))
    print(f"trained   {minutes:.1f} minutes")
    print(f"picture   {PICTURE}: digits, where the network looked, and what it got wrong")


def stacked(digits: Digits) -> tuple[Tensor, Tensor]:
    """All digits. Shape: -> (N, 3, H, W) in [-1, 1], (N,)."""
    images, labels = zip(*(digits[index] for index in range(len(digits))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def nearest_mean(images: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """The classes whose mean image is nearest. Shape: (N, 3, H, W), (N,), (M, 3, H, W) -> (M,)."""
    means = torch.stack([images[labels == label].mean(dim=0) for label in range(10)])
    return torch.cdist(wanted.flatten(1), means.flatten(1)).argmin(dim=1)


def picture(network: nn.Module, images: Tensor, labels: Tensor, shares: Tensor) -> Image.Image:
    """A digit of each class; where its pixels moved the answer; digits that were read wrongly, or least surely.

    Shape: images (N, 3, H, W) in [-1, 1], labels (N,), shares (N, 10).
    """
    likely, found = shares.max(dim=1)
    first = [int((labels == label).nonzero()[0]) for label in range(10)]
    unsure = sorted(range(len(labels)), key=lambda i: (bool(found[i] == labels[i]), float(likely[i])))[:COLUMNS]

    def cell(index: int) -> Cell:
        right = bool(found[index] == labels[index])
        words = f"{found[index]}  {likely[index]:.0%}" if right else f"{labels[index]} read as {found[index]}"
        return Cell(shown(images[index]), words, RIGHT if right else WRONG)

    heat = saliency(network, images[first], found[first])
    rows = [[cell(index) for index in first],
            [Cell(glowing(image, each)) for image, each in zip(images[first], heat, strict=True)],
            [cell(index) for index in unsure]]  # fmt: skip
    return sheet(rows, SIDE, note=NOTE)


def saliency(network: nn.Module, images: Tensor, labels: Tensor, *, rounds: int = 16) -> Tensor:
    """How strongly pixels move the logit of a class: absolute gradients, meant over noisy copies of an image.

    Source: SmoothGrad (Smilkov et al., arXiv:1706.03825).

    Shape: (B, 3, H, W), (B,) -> (B, H, W), 1 at the strongest pixel of an image.
    """
    device, total = next(network.parameters()).device, 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        noisy = images + 0.3 * torch.randn(images.shape, generator=generator)
        noisy = noisy.to(device).requires_grad_()
        network(noisy).gather(1, labels[:, None].to(device)).sum().backward()
        total = total + noisy.grad.abs().sum(dim=1, keepdim=True).cpu()
    total = F.avg_pool2d(total, 5, 1, 2)[:, 0]  # (B, H, W)
    return total / total.amax(dim=(1, 2), keepdim=True)


def shown(image: Tensor) -> np.ndarray:
    """Shape: (3, H, W) in [-1, 1] -> (H, W, 3) uint8."""
    return (image.permute(1, 2, 0) * 127.5 + 127.5).round().clamp(0, 255).byte().numpy()


def glowing(image: Tensor, heat: Tensor) -> np.ndarray:
    """An image, dimmed, with heat in orange over it. Shape: (3, H, W), (H, W) -> (H, W, 3) uint8."""
    warm = torch.tensor([255.0, 140, 0])
    mixed = 0.4 * torch.from_numpy(shown(image)).float() * (1 - heat[..., None]) + heat[..., None] * warm
    return mixed.round().clamp(0, 255).byte().numpy()
