#!/usr/bin/env bash
# An object whose annotation id is 0 is never found, and so are no objects where nothing was detected at all.
#
# COCO's format does not say where ids begin. pycocotools and faster-coco-eval keep, for each detection, the id of the
# object that it matches, and 0 for none. So a file whose annotations are numbered from 0 loses its first object:
# perfect boxes of two objects have AP 0.25, of ten 0.81, where the same file numbered from 1 has 1. pycocotools says nothing,
# faster-coco-eval warns. What converts other formats into COCO's with enumerate() makes such files.
# And of a detector that finds nothing in any image AP is 0, but pycocotools' loadRes ends in an IndexError.
#
# Seen with pycocotools 2.0.11, faster-coco-eval 1.8.0, numpy 2.4.6 on Python 3.11; AP of perfect boxes:
#   ids from 1: 1, 1, 1 of 1, 2 and 10 objects; ids from 0: 0, 0.2525, 0.8109, by both
#   no detections: IndexError (pycocotools), AP 0 (faster-coco-eval)
# What helps: number annotations from 1; where there are no detections, do not ask.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "pycocotools==2.0.11" "faster-coco-eval==1.8.0" "numpy==2.4.6"
cat > "$folder/try.py" <<'PY'
import contextlib
import io
import warnings
from importlib.metadata import version

from faster_coco_eval import COCO as FasterCOCO
from faster_coco_eval import COCOeval_faster
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def truth_of(count, first):
    boxes = [[10 * i, 10 * i, 8, 8] for i in range(count)]
    objects = [{"id": first + i, "image_id": 1, "category_id": 1, "bbox": box, "area": 64, "iscrowd": 0}
               for i, box in enumerate(boxes)]
    return {"images": [{"id": 1, "width": 100, "height": 100}], "categories": [{"id": 1, "name": "x"}],
            "annotations": objects}


def average_precision(library, truth, found):
    with contextlib.redirect_stdout(io.StringIO()):
        if library == "pycocotools":
            real = COCO()
            real.dataset = truth
            real.createIndex()
            evaluation = COCOeval(real, real.loadRes(found), "bbox")
        else:
            real = FasterCOCO(truth)
            evaluation = COCOeval_faster(real, real.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return round(float(evaluation.stats[0]), 4)


print(*(f"{name} {version(name)}" for name in ("pycocotools", "faster-coco-eval", "numpy")))
for library, warns in (("pycocotools", False), ("faster-coco-eval", True)):
    for first, expected in ((1, [1, 1, 1]), (0, [0, 0.2525, 0.8109])):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            precisions = []
            for count in (1, 2, 10):
                truth = truth_of(count, first)
                perfect = [{"image_id": 1, "category_id": 1, "bbox": each["bbox"], "score": 0.9 - 0.05 * i}
                           for i, each in enumerate(truth["annotations"])]
                precisions.append(average_precision(library, truth, perfect))
        warned = any("annotation id 0" in str(each.message) for each in said)
        print(f"{library}, ids from {first}: AP {precisions}{', with a warning' * warned}")
        assert precisions == expected and warned == (warns and first == 0)
try:
    average_precision("pycocotools", truth_of(2, 1), [])
except IndexError:
    print("pycocotools, no detections: IndexError")
else:
    raise SystemExit("pycocotools takes no detections now")
nothing = average_precision("faster-coco-eval", truth_of(2, 1), [])
print("faster-coco-eval, no detections: AP", nothing)
assert nothing == 0
PY
"$folder/venv/bin/python" "$folder/try.py"
