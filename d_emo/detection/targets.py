"""What a detector is trained on, looked at before torchvision stumbles over it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from d_emo.errors import InputError


def check_targets(
    images: Sequence[Tensor], targets: Sequence[dict[str, Any]] | None, labels: range, *, masks: bool = False
) -> None:
    """Refuse targets that cannot be trained on.

    Args:
        images: The pictures.
        targets: Of each picture its objects, as torchvision wants them.
        labels: Those that there are.
        masks: Whether masks are needed too.

    Shape: images (3, H, W), boxes (n, 4) as left, top, right, bottom in pixels, labels (n,), masks (n, H, W).

    Raises:
        InputError: Something is missing, has another shape, or is a box without area or a label that there is not.
    """
    if targets is None:
        raise InputError("a detector in training needs targets, a dictionary with boxes and labels for every image")
    if len(targets) != len(images):
        raise InputError(f"there are {len(targets)} targets for {len(images)} image{'s' * (len(images) != 1)}")
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        for name in ("boxes", "labels", *(["masks"] if masks else [])):
            if name not in target:
                raise InputError(f"the target of image {number} has no {name}")
        boxes, given = target["boxes"], target["labels"]
        if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4:
            found = f"of {tuple(boxes.shape)}" if isinstance(boxes, Tensor) else repr(boxes)
            raise InputError(f"the boxes of image {number} must be a tensor of shape (n, 4), not {found}")
        if len(given) != len(boxes):
            raise InputError(f"image {number} has {len(given)} labels for {len(boxes)} box{'es' * (len(boxes) != 1)}")
        empty = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
        if empty.any():
            first = int(empty.int().argmax())
            raise InputError(f"box {first} of image {number} is {boxes[first].tolist()}: its right and bottom must be "
                             "beyond its left and top")  # fmt: skip
        unknown = (given < labels[0]) | (given > labels[-1])
        if unknown.any():
            raise InputError(f"image {number} has the label {int(given[unknown][0])}, and labels are from {labels[0]} "
                             f"to {labels[-1]}")  # fmt: skip
        if masks and tuple(target["masks"].shape) != (len(boxes), *image.shape[-2:]):
            raise InputError(f"the masks of image {number} must be of shape {(len(boxes), *image.shape[-2:])}, not "
                             f"{tuple(target['masks'].shape)}")  # fmt: skip
