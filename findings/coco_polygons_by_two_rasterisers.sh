#!/usr/bin/env bash
# One COCO polygon covers 100 pixels for pycocotools and 121 for OpenCV, so masks shrink from one to the other.
#
# COCO's format does not say whether a corner is the middle of a pixel or its edge. pycocotools takes it for the edge,
# OpenCV's fillPoly and findContours for the middle of a pixel that is covered. What writes masks by findContours, as
# supervision's as_coco does, loses the last row and the last column in COCO's tools. It cannot be seen at home:
# supervision reads its own file by fillPoly and gets every mask back to the pixel. But objects that were found without
# an error are scored against smaller ones: AP 0.2 for squares of 4 px, 0.6 of 8 px, 0.8 of 16 px, 0.9 of 32 px. Each
# further pass through both takes another row and column. The other way COCO's own polygons are a pixel too wide and too
# high by from_coco. "area" in the file is that of the mask, not of the polygon.
#
# Seen with supervision 0.31.2, OpenCV 5.0.0.93 (headless), pycocotools 2.0.11, NumPy 2.4.6 on Python 3.11:
#   corners (5, 5) to (15, 15): pycocotools 100 px, fillPoly 121, supervision's from_coco 121
#   a square of 10 x 10 px by findContours and pycocotools, again and again: 100, 81, 64, 49 px
#   AP of exact masks against as_coco's file: squares of 4 8 16 32 px 0.2 0.6 0.8 0.9; discs 0.0 0.5 0.8 0.9
# What helps: write run lengths (pycocotools.mask.encode), which have no such freedom.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "supervision==0.31.2" "opencv-python-headless==5.0.0.93" "pycocotools==2.0.11" "numpy==2.4.6"
cat > "$folder/try.py" <<'PY'
import contextlib
import io
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

warnings.simplefilter("ignore")
import cv2
import numpy as np
import supervision as sv
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

folder, SIDE = Path(sys.argv[1]), 160
print(*(f"{name} {version(name)}" for name in ("supervision", "opencv-python-headless", "pycocotools", "numpy")))


def by_pycocotools(corners):
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([np.ravel(corners).tolist()], SIDE, SIDE)))


def written_by_supervision(masks):
    """Masks of one image as supervision writes them, and as it reads them again."""
    boxes = sv.mask_to_xyxy(masks, coordinate_convention="exclusive").astype(float)
    cv2.imwrite(str(folder / "image.png"), np.zeros((SIDE, SIDE, 3), np.uint8))
    objects = sv.Detections(xyxy=boxes, mask=masks, class_id=np.zeros(len(masks), dtype=int))
    name = str(folder / "image.png")
    dataset = sv.DetectionDataset(classes=["x"], images=[name], annotations={name: objects})
    with contextlib.redirect_stderr(io.StringIO()):
        dataset.as_coco(annotations_path=str(folder / "written.json"))
    return json.loads((folder / "written.json").read_text()), read_by_supervision("written.json")


def read_by_supervision(file):
    dataset = sv.DetectionDataset.from_coco(str(folder), str(folder / file), force_masks=True)
    (objects,) = dataset.annotations.values()
    return objects.mask


def average_precision(truth, masks):
    """AP of the masks, each found once and nothing else."""
    found = [{"image_id": each["image_id"], "category_id": each["category_id"], "score": 0.9,
              "segmentation": coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))}
             for each, mask in zip(truth["annotations"], masks, strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):
        real = COCO()
        real.dataset = truth
        real.createIndex()
        evaluation = COCOeval(real, real.loadRes(found), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return round(float(evaluation.stats[0]), 2)


corners = np.array([[5, 5], [15, 5], [15, 15], [5, 15]])
filled = cv2.fillPoly(np.zeros((SIDE, SIDE), np.uint8), [corners], 1)
square = np.zeros((SIDE, SIDE), bool)
square[5:15, 5:15] = True
truth, _ = written_by_supervision(square[None])
truth["annotations"][0]["segmentation"] = [corners.ravel().tolist()]
(folder / "edges.json").write_text(json.dumps(truth))
counts = int(by_pycocotools(corners).sum()), int(filled.sum()), int(read_by_supervision("edges.json").sum())
print("corners (5, 5) to (15, 15): pycocotools, fillPoly, from_coco:", *counts)
assert np.array_equal(by_pycocotools(corners), square) and counts == (100, 121, 121)

again, pixels = square.astype(np.uint8), [100]
for _ in range(3):
    (contour,), _ = cv2.findContours(np.ascontiguousarray(again), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    again = by_pycocotools(contour)
    pixels.append(int(again.sum()))
print("findContours and pycocotools, again and again:", *pixels)
assert pixels == [100, 81, 64, 49]

rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
for kind, expected in (("squares", [0.2, 0.6, 0.8, 0.9]), ("discs", [0.0, 0.5, 0.8, 0.9])):
    precisions = []
    for side in (4, 8, 16, 32):
        down, right = (abs(axis - 40 * np.arange(1, 4)[:, None, None]) for axis in (rows, columns))  # three objects
        masks = np.maximum(down, right) < side / 2 if kind == "squares" else np.hypot(down, right) <= side / 2
        truth, back = written_by_supervision(masks)
        assert np.array_equal(back, masks) and [each["area"] for each in truth["annotations"]] == [masks[0].sum()] * 3
        precisions.append(average_precision(truth, masks))
        for each, mask in zip(truth["annotations"], masks, strict=True):
            each["segmentation"] = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert average_precision(truth, masks) == 1
    print(f"AP of exact masks against as_coco's {kind} of 4, 8, 16, 32 px:", *precisions, "(run lengths: 1)")
    assert precisions == expected
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
