"""V-EMO: EMOv2 with kernels in three directions, for videos (EMOv2 paper, table XV).

Its code was not released. The parameters of its log say how large each kernel is, and the printed MACs leave one place
for the frames' stride, the stem's convolution, and one for the window, two frames.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from d_emo.errors import InputError
from d_emo.models.backbone import BACKBONES

OWN = {"spatial_dims": 3, "num_classes": 400, "img_size": 160, "drop_rate": 0.5, "drop_path_rate": 0.05}
VIDEO_BACKBONES: dict[str, dict[str, Any]] = {
    f"v-{name}": row | OWN for name, row in BACKBONES.items() if row["block"] == "i2rmb"
}
"""Every named network for Kinetics-400 and clips of 4 frames of 160 px; the paper has the 5M, the others follow it."""


def classify_clips(model: nn.Module, clips: Tensor, spatial_dims: int) -> Tensor:
    """Logits of clips: a video network's, or the mean of an image network's over the frames (TSN's consensus).

    Shape: (B, 3, T, H, W) -> (B, num_classes).

    Args:
        model: An `EMO`, or what wraps it.
        clips: As it takes them.
        spatial_dims: Of the `EMO`: 3 of a video network, 2 of an image network.
    """
    if spatial_dims == 3:
        return model(clips)
    frames = clips.transpose(1, 2)  # (B, T, 3, H, W)
    return model(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).mean(dim=1)  # (B, num_classes)


@torch.no_grad()
def inflate(
    weights: dict[str, Tensor], like: nn.Module, rule: Literal["divide", "repeat"] = "divide"
) -> dict[str, Tensor]:
    """Weights of an image classifier for the video network of the same size.

    A kernel is repeated along time. Divided by its depth, it answers a picture that stands still as before (I3D,
    section 2.2), but for the clip's two ends, where zeros are added. The paper says "temporal repetition" and not
    whether it divides.

    Args:
        weights: of an `EMO` for images, by its own names.
        like: the video network.
        rule: "divide" or "repeat".

    Returns:
        What ``like.load_state_dict`` takes. The head stays the video network's where the classes are others in number.

    Raises:
        InputError: The two networks are not of one size; or there is no such rule.
    """
    if rule not in ("divide", "repeat"):
        raise InputError(f"a kernel is inflated by 'divide' or 'repeat', got {rule!r}")
    found = {}
    for name, place in like.state_dict().items():
        if name not in weights:
            raise InputError(f"the image classifier has no {name}; it is of another size or block")
        value = weights[name]
        if value.ndim == 4 and place.ndim == 5:
            value = value[:, :, None].expand(place.shape[:3] + value.shape[2:])  # (M, C_in, k, k, k)
            value = value / place.shape[2] if rule == "divide" else value
        if value.shape != place.shape and not name.startswith("head."):
            raise InputError(
                f"{name} is {tuple(weights[name].shape)} in the image classifier, which does not inflate to "
                f"{tuple(place.shape)}: it is of another size"
            )
        found[name] = (value if value.shape == place.shape else place).clone()
    return found
