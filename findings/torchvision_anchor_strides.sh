#!/usr/bin/env bash
# torchvision's AnchorGenerator has no strides: it divides the padded image's side by the map's, and rounds down.
#
# Detectors of torchvision pad images to multiples of 32, and RetinaNet's two coarsest maps have strides 64 and 128. A
# side of 800 px, the default, is no multiple of those: its maps have 13 and 7 cells, and 800 // 13 = 61, 800 // 7 = 114.
# The anchors of the coarsest map stand up to 84 px from where its cells look (6 x 114 = 684 for 6 x 128 = 768), and
# change their places with the size of the batch's largest image: 896 px has strides 64 and 128 exactly. Beside that the
# corners of anchors are rounded to whole pixels: 45.3 x 22.6 px is 46 x 22. Weights and figures of mmdet, whose
# strides are given, do not carry over at these maps without a generator of one's own.
#
# Seen with torch 2.14.1, torchvision 0.29.1 on Python 3.11:
#   800 px: cells 100 50 25 13 7, strides 8 16 32 61 114; last anchor's centre at 684, the cell's at 768
#   896 px: cells 112 56 28 14 7, strides 8 16 32 64 128
#   the anchor of area 32 x 32 and sides 2 : 1 has corners [-23, -11, 23, 11]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.14.1" "torchvision==0.29.1" "numpy==2.4.6"
cat > "$folder/try.py" <<'PY'
import torch
import torchvision
from torchvision.models.detection import retinanet_resnet50_fpn

print("torch", torch.__version__, "torchvision", torchvision.__version__)
model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, min_size=800, max_size=1333).eval()


def look(side):
    """Cells and anchors' distances of each map, for one square image that is not resized."""
    model.transform.min_size, model.transform.max_size = (side,), side
    images, _ = model.transform([torch.zeros(3, side, side)])
    with torch.no_grad():
        maps = list(model.backbone(images.tensors).values())
    anchors = model.anchor_generator(images, maps)[0]
    cells, strides, start, last = [each.shape[-1] for each in maps], [], 0, None
    for count in cells:
        centres = anchors[start : start + count * count * 9].view(count, count, 9, 4)[..., [0, 2]].mean(-1)
        strides.append(int((centres[0, 1, 0] - centres[0, 0, 0]).item()))
        start, last = start + count * count * 9, centres[0, -1, 0].item()
    print(f"{side} px: cells {cells}, strides {strides}; last centre of the coarsest map {last:.0f}")
    return cells, strides, last


assert look(800) == ([100, 50, 25, 13, 7], [8, 16, 32, 61, 114], 684.0)
assert look(896) == ([112, 56, 28, 14, 7], [8, 16, 32, 64, 128], 768.0)
first = model.anchor_generator.cell_anchors[0][0].tolist()
print("the anchor of area 32 x 32 and sides 2 : 1:", first)
assert first == [-23.0, -11.0, 23.0, 11.0]
PY
"$folder/venv/bin/python" "$folder/try.py"
