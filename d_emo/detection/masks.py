"""Masks of objects in COCO's three forms: polygons, run lengths, and run lengths packed into a string."""

import math
from types import ModuleType
from typing import Any

import numpy as np

from d_emo.errors import imported

FURTHEST = 10**6
"""Of the coordinates of polygons, in pixels."""


def rle() -> ModuleType:
    """faster-coco-eval's functions on masks; InputError where it is not installed or is broken."""
    return imported("faster_coco_eval.core.mask", "masks and mAP need faster-coco-eval", "d-emo[detection]")


def mask_problem(segmentation: Any, height: int, width: int) -> str | None:
    """What is wrong with a mask for an image of this size, in words; a packed one is only read by `decode_mask`."""
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width]:
            return f"has a mask of the size {size}, and its image is {[height, width]} (height, width)"
        if isinstance(counts, str):
            return None
        if not isinstance(counts, list) or not all(type(each) is int and each >= 0 for each in counts):
            return "has a mask whose counts are no whole numbers"
        if sum(counts) != height * width:
            return f"has a mask of {sum(counts)} pixels, and its image has {height * width}"
        return None
    if not isinstance(segmentation, list) or not segmentation:
        return "has no mask (segmentation)"
    for polygon in segmentation:
        if not isinstance(polygon, list) or not all(type(each) in (int, float) for each in polygon):
            return "has a polygon that is no list of numbers"
        if beyond := [each for each in polygon if not math.isfinite(each) or abs(each) > FURTHEST]:  # fills the memory
            return f"has a polygon with the coordinate {beyond[0]:g}, which is in no picture"
        if len(polygon) % 2 or len(polygon) < 6:  # pycocotools takes four numbers for a box
            return f"has a polygon of {len(polygon)} numbers; three points or more are six or more, and even"
    return None


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A mask as pycocotools paints it. Shape: (height, width) uint8."""
    mask = rle()
    packed = mask.frPyObjects(segmentation, height, width) if not _is_packed(segmentation) else segmentation
    return mask.decode(mask.merge(packed) if isinstance(packed, list) else packed)


def _is_packed(segmentation: Any) -> bool:
    return isinstance(segmentation, dict) and isinstance(segmentation["counts"], str)
