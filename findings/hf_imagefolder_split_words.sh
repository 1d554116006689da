#!/usr/bin/env bash
# The datasets library, reading a folder of images with one sub-folder for each class, leaves out classes and pictures
# without a word when some names hold a word such as train or test.
#
# It looks for such words, set off by "-", "_", ".", a space or a digit, in the names of folders and files to tell
# splits apart: of cat, dog, train_interior and train_station the split train has the last two, and nothing has the
# others; of cat and dog, whose first pictures are called test_1.png, there is but a split test, with those pictures.
# Neither an error nor a warning says so; asking for all splits does not bring them back. Links to folders are not
# followed either. With splits named by hand (data_files={"train": "**"}) all pictures are there.
#
# Seen with datasets 5.2.0 (pyarrow 26.0.1, Pillow 12.3.0) on Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "datasets==5.2.0" "pyarrow==26.0.1" "pillow==12.3.0"
cat > "$folder/try.py" <<'PY'
import os
import warnings
from pathlib import Path

import datasets
from PIL import Image

root = Path("data").absolute()
datasets.disable_progress_bars()
warnings.simplefilter("error", UserWarning)
print("datasets", datasets.__version__)


def pictures(name, *files):
    for file in files:
        path = root / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)


def read(name, **options):
    found = datasets.load_dataset("imagefolder", data_dir=str(root / name), cache_dir=str(root / "cache"), **options)
    return {split: (rows.features["label"].names, len(rows)) for split, rows in found.items()}


rooms = [f"{name}/{number}.png" for name in ("cat", "dog", "train_interior", "train_station") for number in range(3)]
pictures("words", *rooms)
pictures("files", "cat/test_1.png", "cat/2.png", "cat/3.png", "dog/test_1.png", "dog/2.png")
pictures("links", "cat/1.png", "bird/1.png")
os.symlink(root / "words" / "dog", root / "links" / "dog", target_is_directory=True)
seen = {name: read(name) for name in ("words", "files", "links")}
seen["words, by hand"] = read("words", data_files={"train": "**"})
for name, splits in seen.items():
    print(f"{name}: {splits}")
assert seen["words"] == {"train": (["train_interior", "train_station"], 6)}, "12 pictures of 4 classes are there"
assert seen["files"] == {"test": (["cat", "dog"], 2)}, "5 pictures are there"
assert seen["links"] == {"train": (["bird", "cat"], 2)}, "5 pictures of 3 classes are there, 3 of them by a link"
assert seen["words, by hand"]["train"][1] == 12
PY
cd "$folder" && HF_HUB_OFFLINE=1 "$folder/venv/bin/python" try.py
