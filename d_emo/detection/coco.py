"""Pictures with objects in COCO's format: one JSON file of annotations, and a folder of images."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d_emo.data import Reading
from d_emo.detection.masks import decode_mask, mask_problem
from d_emo.errors import InputError
from d_emo.files import read_json

_KINDS = {**dict.fromkeys(("id", "image_id", "category_id"), (int, float, str)), "file_name": (str,),
          "width": (int,), "height": (int,)}  # fmt: skip
_SECTIONS = {"images": ("id", "file_name", "width", "height"), "categories": ("id", "name"),
             "annotations": ("id", "image_id", "category_id", "bbox")}  # fmt: skip


class CocoImages:
    """A data set in COCO's format. Everything is checked when it is opened, but for what is inside of the images.

    An annotation without ``area`` has that of its box, one without ``iscrowd`` is none, as pycocotools has it. Boxes
    may leave the picture or have no area; it is training that clips them or passes over them.

    Args:
        annotations: The JSON file.
        folder: Where the images lie.
        reading: How they become RGB.
        with_masks: Whether masks are needed too; every annotation has one then.

    Attributes:
        class_names: By label from 0; COCO's category ids, in order, are numbered anew.

    Raises:
        InputError: A file that is damaged or lacks what is needed, images that are missing, annotations that cannot be
            used; names the file and the annotation's id.
    """

    def __init__(self, annotations: str | Path, folder: str | Path, *, reading: Reading, with_masks: bool = False):
        self.file, self.folder, self.reading, self.with_masks = Path(annotations), Path(folder), reading, with_masks
        content = read_json(self.file, _sections)
        self.name = self.file.stem
        categories = sorted(content["categories"], key=lambda row: row["id"])
        self.class_names = [str(row["name"]) for row in categories]
        labels = {row["id"]: label for label, row in enumerate(categories)}
        self.images = sorted(content["images"], key=lambda row: row["id"])
        for what, keys in (("image id", [row["id"] for row in self.images]), ("category id", list(labels)),
                           ("annotation id", [row["id"] for row in content["annotations"]]),
                           ("category name", self.class_names)):  # fmt: skip
            twice = [key for key, count in Counter(keys).items() if count > 1]
            if twice or (what == "category id" and len(keys) < len(categories)):
                raise InputError(f"{self.file}: the {what} {twice[0] if twice else ''} is there twice")
        if not self.images or not labels:
            raise InputError(f"{self.file} names no {'images' if labels else 'categories'}")
        by_id = {row["id"]: index for index, row in enumerate(self.images)}
        self.objects: list[list[dict[str, Any]]] = [[] for _ in self.images]
        for row in content["annotations"]:
            if (problem := _problem(row, by_id, labels, self.images, with_masks)) is not None:
                raise InputError(f"{self.file}: annotation {row['id']} {problem}")
            self.objects[by_id[row["image_id"]]].append({**row, "label": labels[row["category_id"]]})
        missing = [name for row in self.images if not (self.folder / (name := row["file_name"])).is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(f"{self.file} names the image {missing[0]}{more}, which {self.folder} does not hold")

    def __len__(self) -> int:
        return len(self.images)

    def source(self, index: int) -> Path:
        """The file of picture ``index``."""
        return self.folder / self.images[index]["file_name"]

    def origin(self, index: int) -> str:
        """The path of picture ``index``, for messages about it."""
        return str(self.source(index))

    def read(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A picture and what is in it, as the file has it.

        Shape: (3, H, W) uint8; boxes (n, 4) as left, top, right, bottom, labels, area and iscrowd (n,), and masks
            (n, H, W) uint8.

        Raises:
            InputError: The image cannot be read, or has another size than the file says.
        """
        row, objects = self.images[index], self.objects[index]
        image = self.reading.read(self.source(index), lambda: self.origin(index))
        if image.size != (row["width"], row["height"]):
            raise InputError(f"{self.origin(index)} has {image.size[0]} x {image.size[1]} px, and {self.file} says "
                             f"{row['width']} x {row['height']}")  # fmt: skip
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).reshape(-1, 4)
        target = {
            "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
            "labels": torch.tensor([each["label"] for each in objects], dtype=torch.long),
            "area": torch.tensor([each.get("area", each["bbox"][2] * each["bbox"][3]) for each in objects]),
            "iscrowd": torch.tensor([bool(each.get("iscrowd")) for each in objects], dtype=torch.bool),
        }
        if self.with_masks:
            size = (row["height"], row["width"])
            target["masks"] = torch.zeros(len(objects), *size, dtype=torch.uint8)
            for mask, each in zip(target["masks"], objects, strict=True):
                try:
                    mask.copy_(torch.from_numpy(decode_mask(each["segmentation"], *size)))
                except (RuntimeError, ValueError) as error:
                    raise InputError(f"{self.file}: annotation {each['id']} has a damaged mask ({error})") from None
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), target


def _sections(content: Any) -> dict[str, list[dict[str, Any]]]:
    """The three lists of a file in COCO's format; InputError naming what is no such list or lacks something."""
    if not isinstance(content, dict):
        raise InputError("it is no JSON object with images, categories and annotations")
    for section, keys in _SECTIONS.items():
        if not isinstance(content.get(section), list):
            raise InputError(f"it has no list {section!r}; a file of annotations in COCO's format has one")
        for number, row in enumerate(content[section]):
            numbered = section == "annotations" and isinstance(row, dict) and "id" in row
            which = f"annotation {row['id']}" if numbered else f"entry {number}"
            lacking = [key for key in keys if not isinstance(row, dict) or row.get(key) is None]
            if lacking:
                raise InputError(f"{which} of {section!r} has no {lacking[0]!r}")
            for key in set(keys) & _KINDS.keys():
                if type(row[key]) not in _KINDS[key]:
                    raise InputError(f"{which} of {section!r} has the {key} {row[key]!r}")
        if len({isinstance(row["id"], str) for row in content[section]}) > 1:
            raise InputError(f"some ids of {section!r} are numbers and some are text")
    return content


def _problem(
    row: dict[str, Any], images: dict[Any, int], labels: dict[Any, int], rows: list[dict[str, Any]], with_masks: bool
) -> str | None:
    """What is wrong with an annotation, in words."""
    if row["image_id"] not in images:
        return f"belongs to the image {row['image_id']!r}, which the file does not list"
    if row["category_id"] not in labels:
        return f"is of the category {row['category_id']!r}, which the file does not list"
    for name, numbers in (("bbox", row["bbox"]), ("area", [row.get("area", 0)])):
        numeric = isinstance(numbers, list) and all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
        if not numeric or (name == "bbox" and len(numbers) != 4):
            return f"has the {name} {row[name]!r}, which is not {'four numbers' if name == 'bbox' else 'a number'}"
    if not with_masks:
        return None
    image = rows[images[row["image_id"]]]
    return mask_problem(row.get("segmentation"), image["height"], image["width"])
