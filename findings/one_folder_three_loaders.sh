#!/usr/bin/env bash
# One folder of images, one sub-folder for each class, read by three loaders that people train with: they disagree
# about the number of a class and about which way up a picture is.
#
# Classes whose names are numbers: torchvision.datasets.ImageFolder and the datasets library sort them as text (0, 1,
# 10, 11, 2, ...), timm sorts them as numbers (0, 1, 2, ..., 10, 11). So a classifier trained with one and measured with
# another is right about classes 0 and 1 only, and a label drawn as "class 10" is another picture.
# EXIF orientation: datasets turns a JPEG upright when it decodes it, torchvision and timm leave it lying on its side.
# Hidden folders: torchvision and timm take .ipynb_checkpoints for a class (and so shift all others), datasets does not.
# Links: torchvision and timm follow links to folders until the system stops them: two pictures beside a link to the
# folder that they are in train as 82. datasets follows no link to a folder and reads two.
#
# Seen with torchvision 0.29.1 (torch 2.14.1), timm 1.0.31, datasets 5.2.0, Pillow 12.3.0 on Python 3.11: as said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.14.1" "torchvision==0.29.1" "timm==1.0.31" "datasets==5.2.0" "pillow==12.3.0"
cat > "$folder/try.py" <<'PY'
import sys
from pathlib import Path

import datasets
import PIL
import timm
import torchvision
from PIL import Image
from timm.data import create_dataset

folder = Path(sys.argv[1])
print("torchvision", torchvision.__version__, "timm", timm.__version__, "datasets", datasets.__version__,
      "Pillow", PIL.__version__)


def picture(path, orientation=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (64, 32), "blue")
    image.paste("red", (0, 0, 32, 32))  # left half
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, quality=95)


def loaders(root):
    """Names in the order of their numbers, and the size of the first picture, by loader."""
    seen = torchvision.datasets.ImageFolder(root)
    yield "torchvision", seen.classes, seen[0][0].size
    seen = create_dataset("", str(root))
    yield "timm", sorted(seen.reader.class_to_idx, key=seen.reader.class_to_idx.get), seen[0][0].size
    seen = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(folder / "cache"))
    yield "datasets", seen.features["label"].names, seen[0]["image"].size


numbers = folder / "numbers"
for number in range(12):
    picture(numbers / str(number) / "a.jpg", orientation=6)
found = {name: (classes, size) for name, classes, size in loaders(numbers)}
for name, (classes, size) in found.items():
    print(f"{name:12} size of a turned 64 x 32 picture {size}  classes {' '.join(classes)}")
as_text, as_numbers = sorted(map(str, range(12))), [str(number) for number in range(12)]
assert found["torchvision"][0] == as_text and found["datasets"][0] == as_text
assert found["timm"][0] == as_numbers
assert found["torchvision"][1] == found["timm"][1] == (64, 32)
assert found["datasets"][1] == (32, 64)

hidden = folder / "hidden"
for name in ("cat", "dog", ".ipynb_checkpoints"):
    picture(hidden / name / "a.jpg")
found = {name: classes for name, classes, _ in loaders(hidden)}
print("beside .ipynb_checkpoints:", found)
assert found["torchvision"] == found["timm"] == [".ipynb_checkpoints", "cat", "dog"], found
assert found["datasets"] == ["cat", "dog"], found

linked = folder / "linked"
for name in ("cat", "dog"):
    picture(linked / name / "a.jpg")
(linked / "cat" / "again").symlink_to(linked, target_is_directory=True)
found = {
    "torchvision": len(torchvision.datasets.ImageFolder(linked)), "timm": len(create_dataset("", str(linked))),
    "datasets": len(datasets.load_dataset("imagefolder", data_dir=str(linked), split="train",
                                          cache_dir=str(folder / "cache"))),
}
print("two pictures and a link upwards:", found)
assert found == {"torchvision": 82, "timm": 82, "datasets": 2}, found
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
