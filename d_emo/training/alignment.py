"""Alignment of a denoiser's features with those of something that sees the clean image.

Sources: REPA (Yu et al., 2025, eq. 8: the mean cosine over positions), with the projector and the norm of iREPA (Singh
et al., 2025: a 3 x 3 convolution, and targets that are standardised over positions); targets without a network from
outside: the latents themselves (VAE features; SRA 2, 2026), a classifier of one's own, the denoiser's own average under
less noise (SRA; Jiang et al., 2025).
"""

import math
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from d_emo.errors import InputError
from d_emo.io.classifier import Normalized, open_classifier
from d_emo.models.contract import DenoiserFrame
from d_emo.objective import StepNoise
from d_emo.tables import load, parse_alignment
from d_emo.weights import check_finite


class Projector(nn.Module):
    """A 3 x 3 convolution from a block's map to the target's channels. Shape: (B, H, W, C) -> (B, D, H, W)."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2))


class LatentTarget(nn.Module):
    """The clean latents, a token's patch in its channels."""

    def __init__(self, feature_shape: tuple[int, ...], latent_shape: tuple[int, ...]):
        super().__init__()
        self.patch = latent_shape[1] // feature_shape[1]
        self.channels = latent_shape[0] * self.patch**2

    def forward(self, images: Tensor | None, latents: Tensor, *_: Any) -> Tensor:
        return F.pixel_unshuffle(latents, self.patch)


class SelfTarget(nn.Module):
    """The denoiser's own moving average, which sees the same image under less noise, in a later block (SRA).

    t is less by up to a fifth of the path, at random; the block is at five sevenths of the depth (Jiang et al., 2025:
    the 20th of 28), or the next to it whose map is of the same shape.

    Attributes:
        teacher: A function of (latents, labels, step, share) -> features; the task's.
    """

    def __init__(self, feature_shape: tuple[int, ...], latent_shape: tuple[int, ...]):
        super().__init__()
        self.channels, self.teacher = feature_shape[0], None

    def forward(self, images: Tensor | None, latents: Tensor, labels: Tensor, step: StepNoise) -> Tensor:
        share = 0.2 * torch.rand(len(latents), device=latents.device)  # the loop seeds it by the step
        return self.teacher(latents, labels, step, share).float()


class ViTTarget(nn.Module):
    """The tokens of a DINOv2 of timm, whose weights lie in a file; images have one patch of 14 px for each token.

    Raises:
        InputError: The file is missing, or holds no such network.
    """

    patch = 14

    def __init__(self, feature_shape: tuple[int, ...], latent_shape: tuple[int, ...], file: str):
        super().__init__()
        if not Path(file).is_file():
            raise InputError(f"`align` dinov2:{file}: there is no such file")
        try:
            weights = load_state_dict(file, weights_only=True)
            size = {384: "small", 768: "base", 1024: "large", 1536: "giant"}[weights["cls_token"].shape[-1]]
            registers = "_reg4" if "reg_token" in weights else ""
            name = f"vit_{size}_patch14{registers}_dinov2"
            self.network = timm.create_model(name, num_classes=0, dynamic_img_size=True, checkpoint_path=file)
        except Exception as error:  # timm and PyTorch raise a dozen types
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"`align` dinov2:{file} is no DINOv2 of timm ({type(error).__name__}: {reason})") from None
        check_finite(self.network.state_dict(), file)
        cfg, self.size = self.network.pretrained_cfg, tuple(self.patch * side for side in feature_shape[1:])
        self.prepared = Normalized(nn.Identity(), cfg["mean"], cfg["std"])
        self.channels = self.network.num_features
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, latents: Tensor, *_: Any) -> Tensor:
        images = self.prepared(F.interpolate(images, self.size, mode="bicubic", antialias=True))
        return self.network.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[0].float()


class ClassifierTarget(nn.Module):
    """The map after the third stage of an EMO classifier, at a sixteenth of the image, brought to the denoiser's size.

    Raises:
        InputError: There is no such classifier.
    """

    stage = 2

    def __init__(self, feature_shape: tuple[int, ...], latent_shape: tuple[int, ...], source: str):
        super().__init__()
        if not Path(source).exists():
            raise InputError(f"`align` emov2:{source}: there is no such snapshot or file")
        opened = open_classifier(source)
        self.prepared = opened.model if isinstance(opened.model, Normalized) else None
        self.network, self.sizes = opened.emo, feature_shape[1:]
        self.requires_grad_(False)
        with torch.no_grad():
            self.channels = self._map(torch.zeros(1, 3, 64, 64)).shape[1]

    def _map(self, images: Tensor) -> Tensor:
        if self.prepared is not None:
            images = images * self.prepared.scale + self.prepared.offset
        options: dict[str, Any] = {"indices": [self.stage], "stop_early": True, "intermediates_only": True}
        return self.network.forward_intermediates(images, **options)[0]

    @torch.no_grad()
    def forward(self, images: Tensor | None, latents: Tensor, *_: Any) -> Tensor:
        return F.interpolate(self._map(images).float(), self.sizes, mode="bilinear", antialias=True)


class Alignment:
    """The auxiliary loss of a run.

    Args:
        model: Gets a `Projector` after the block; see `DenoiserFrame.project`.
        target: ``align`` of the settings.
        weight: Of the loss.
        block: Whose map is aligned, from 0; None: the one in the middle, in a U on the smallest map, where U-REPA (Tian
            et al., 2025) aligns as well.

    Attributes:
        needs_images: Whether the target looks at them.
        later_block: At five sevenths of the depth, or the next to it whose map has the shape of the aligned one.

    Raises:
        InputError: The model shows no features, or too few positions for a norm over them; there is no such block or
            target.
    """

    def __init__(self, model: DenoiserFrame, target: str, weight: float, block: int | None):
        row, what = parse_alignment(target)
        if not (count := len(model.feature_shapes)):
            raise InputError(f"`align` {target} needs a denoiser that shows its maps, and this one shows none")
        self.block = (count - 1) // 2 if block is None else block
        shape = model.feature_shape(self.block)
        self.later_block = min(
            (each for each in range(count) if model.feature_shape(each) == shape),
            key=lambda each: abs(each - (5 * count - 1) // 7),
        )
        if math.prod(shape[1:]) < 4:
            size = " x ".join(map(str, shape[1:]))
            raise InputError(f"`align` {target} needs a map of four positions or more; that of block {self.block} has "
                             f"{size}")  # fmt: skip
        self.weight, self.needs_images = weight, row.images
        self.target = load(row.open)(shape, model.latent_shape, *[what] * bool(row.takes))
        model.project(self.block, Projector(shape[0], self.target.channels))

    def loss(
        self, features: Tensor, images: Tensor | None, latents: Tensor, labels: Tensor, step: StepNoise
    ) -> Tensor:
        """What is added to the loss, before it is weighed. Shape: features (B, D, H, W) -> ()."""
        return alignment_loss(features.float(), self.target(images, latents, labels, step))


def alignment_loss(features: Tensor, target: Tensor) -> Tensor:
    """Minus the mean cosine of features and target, position by position (REPA, eq. 8).

    The target is standardised over positions first, channel by channel (the spatial norm of iREPA).

    Shape: (B, D, H, W) twice -> ().
    """
    over = (target - target.mean((2, 3), keepdim=True)) / (target.std((2, 3), keepdim=True) + 1e-6)
    return -F.cosine_similarity(features, over, dim=1).mean()
