#!/usr/bin/env bash
# nibabel: labels that are read from a NIfTI file and saved again with their own header are other numbers.
#
# get_fdata() gives float64, and Nifti1Image(labels, image.affine, image.header) keeps the file's integer type. To store
# floats as integers nibabel stretches them over the whole range of the type and writes a slope and an offset in
# float32, even where every value is a whole number that the type holds. Read again, the labels are a little less or
# more (0.9999999998 for 1, 2.99998 for 3, 1.992 for 2). What a training script does next goes wrong without a word:
# labels == 1 finds nothing, and astype(int) cuts down to the class below. A segmentation network trained on masks that
# somebody cropped or cleaned in this way loses classes or takes one for another; which ones depends on the type and on
# the largest label.
#
# Seen with nibabel 5.4.2, NumPy 2.4.6 on Python 3.11; share of voxels that equal the labels, and after astype(int):
#   int16, 4 classes: 0.25, 0.25 (0 1 2 3 become 0 0 1 2)       int16, 5 classes: 0.20, 0.61
#   uint8, 3 classes: 0.34, 0.67 (0 1 2 become 0 0 2)           uint8, 5 classes: 0.20, 0.59
#   float32, or integers given to Nifti1Image: all equal
# What helps: np.asarray(image.dataobj), which is integers, instead of get_fdata(); np.rint when reading others' masks.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "nibabel==5.4.2" "numpy==2.4.6"
cat > "$folder/try.py" <<'PY'
import sys
from pathlib import Path

import nibabel
import numpy as np

folder = Path(sys.argv[1])
print("nibabel", nibabel.__version__, "NumPy", np.__version__)


def saved_again(labels, read):
    """Labels as they are after one file was read and written anew, with nothing changed in between."""
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), folder / "first.nii.gz")
    image = nibabel.load(folder / "first.nii.gz")
    assert np.array_equal(image.get_fdata(), labels)  # the first file is right
    nibabel.save(nibabel.Nifti1Image(read(image), image.affine, image.header), folder / "second.nii.gz")
    again = nibabel.load(folder / "second.nii.gz")
    assert again.get_data_dtype() == labels.dtype
    return again.get_fdata()


def as_floats(image):
    return image.get_fdata()


def as_stored(image):
    return np.asarray(image.dataobj)


for kind, classes, equal, cut in (
    ("int16", 4, 0.25, [0, 0, 1, 2]), ("int16", 5, 0.203, [0, 1, 2, 2, 3]),
    ("uint8", 3, 0.344, [0, 0, 2]), ("uint8", 5, 0.203, [0, 1, 1, 2, 4]),
    ("float32", 4, 1, [0, 1, 2, 3]),
):
    labels = (np.arange(64) % classes).reshape(4, 4, 4).astype(kind)
    found = saved_again(labels, as_floats)
    values, share = np.unique(found), round(float((found == labels).mean()), 3)
    print(f"{kind}, {classes} classes: {values.tolist()}, equal {share}; "
          f"astype(int) {values.astype(int).tolist()}, equal {(found.astype(int) == labels).mean():.3f}")
    assert share == equal and len(values) == classes
    assert values.astype(int).tolist() == cut
    assert np.array_equal(np.rint(found), labels)
    assert np.array_equal(saved_again(labels, as_stored), labels)
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
